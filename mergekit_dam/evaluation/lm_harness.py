"""Run benchmarks of lm-evaluation-harness (lm_eval, the extra `lm-eval`) on a merged causal LM.

Its results are stored beside our own measurements (see `results`), in the shape

    {task: {"metrics": {metric: [value, standard error or null]}, "samples": number or null, "by": "lm_eval VERSION"}}

The harness brings its own data; this module cannot know whether the merge was calibrated on them.
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergekit_dam.errors import DamError, did_you_mean, first_line
from mergekit_dam.io.hub_client import hub_cause, hub_error
from mergekit_dam.io.untrusted import load_json
from mergekit_dam.models.families import CAUSAL_CLASSES


@dataclass(frozen=True)
class Harness:
    """Tasks for lm_eval, checked before anything is learned, since learning takes long.

    Attributes:
        tasks: names, patterns, or YAML files of the user's own tasks.
        manager: lm_eval's index of tasks.
        version: of lm_eval.
    """

    tasks: tuple[str, ...]
    manager: Any
    version: str

    @classmethod
    def of(cls, text: str) -> Harness:
        """Parse task names that are separated by commas.

        Raises:
            DamError: lm_eval is missing, or does not know a task.
        """
        try:
            import lm_eval
            from lm_eval.models import huggingface  # noqa: F401 (it needs packages that lm_eval alone does not bring)
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise DamError(
                "lm-evaluation-harness",
                expected="the package lm_eval",
                got=str(error),
                cure="Install it: pip install 'mergekit-dam[lm-eval]'.",
            ) from error
        tasks = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
        # the default index has thousands of files, and takes long to read
        manager = TaskManager(include_defaults=not all(_is_file(name) for name in tasks))
        known = set(manager.all_tasks)
        for name in tasks:
            if not (_is_file(name) or name in known or fnmatch.filter(known, name)):
                raise DamError(
                    f"lm_eval task {name!r}",
                    expected="a task, a group or a pattern that it knows, or a YAML file",
                    got="an unknown name",
                    cure=did_you_mean(name, known) or "`lm_eval ls tasks` lists them.",
                )
        if not tasks:
            raise DamError("lm_eval tasks", expected="names", got=repr(text), cure="E.g. --lm-eval arc_easy,piqa.")
        return cls(tasks, manager, str(lm_eval.__version__))

    def measure(self, model: Path, *, device: torch.device, limit: int | None = None, seed: int = 0) -> dict[str, Any]:
        """Run the tasks on a model directory.

        Args:
            model: of a causal LM; code in it is never run.
            device: where it computes.
            limit: samples of each task; None for all.
            seed: of the draw of few-shot examples.

        Returns:
            Results in the shape above; groups of tasks have no number of samples.

        Raises:
            DamError: the model is no causal LM, data are not available, or the harness fails.
        """
        kind = str((load_json(model / "config.json").get("architectures") or ["unknown"])[0])
        if not kind.endswith(CAUSAL_CLASSES):
            raise DamError(
                f"model {model}",
                expected="a causal LM, for lm_eval",
                got=kind,
                cure="Measure other models with `mergekit-dam eval --data FILE`.",
            )
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            results = lm_eval.simple_evaluate(
                HFLM(pretrained=str(model), device=str(device), trust_remote_code=False),
                tasks=list(self.tasks),
                limit=limit,
                task_manager=self.manager,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ValueError, RuntimeError, LookupError, ImportError) as error:
            subject = f"lm_eval on {model}"
            if (cause := hub_cause(error)) is not None:
                raise hub_error(cause, subject) from error
            raise DamError(
                subject,
                expected="a run without error",
                got=f"{type(error).__name__}: {first_line(error)}",
                cure="Check that the task's data are available (HF_HUB_OFFLINE, HF_TOKEN), or choose other tasks.",
            ) from error
        assert results is not None, "lm_eval returns None only to processes after the first of a distributed run"
        return self._measurements(results)

    def _measurements(self, results: Any) -> dict[str, Any]:
        samples = results.get("n-samples", {})
        measurements = {}
        for task, values in results["results"].items():
            metrics = {}
            for key, value in values.items():
                name, _, filtered = key.partition(",")
                if not filtered or name.endswith("_stderr") or not _is_number(value):
                    continue
                error = values.get(f"{name}_stderr,{filtered}")
                title = name if filtered == "none" else f"{name} ({filtered})"
                metrics[title] = [float(value), float(error) if _is_number(error) else None]
            if metrics:
                count = samples.get(task, {}).get("effective")
                measurements[str(task)] = {"metrics": metrics, "samples": count, "by": f"lm_eval {self.version}"}
        return measurements


def format_results(results: dict[str, Any]) -> list[str]:
    """Format results of `Harness.measure`, one line per metric."""
    return [
        f"{task}: {metric} {value:.4f}" + ("" if error is None else f" +- {error:.4f}")
        for task, result in results.items()
        for metric, (value, error) in result["metrics"].items()
    ]


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _is_number(value: Any) -> bool:
    """Whether lm_eval gives a number; it writes N/A where a standard error makes no sense."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
