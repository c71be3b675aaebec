"""Benchmarks of lm-evaluation-harness (lm_eval, the extra `lm-eval`) on a merged causal LM.

What it finds is kept like our own measurements (see `measurements`), in the shape

    {task: {"metrics": {metric: [value, standard error or null]}, "samples": number or null, "by": "lm_eval VERSION"}}

The harness brings its own data; whether the merge was calibrated on them, nobody can tell from here.
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

_CAUSAL = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Harness:
    """Tasks that lm_eval knows: found out before anything is learned, since learning takes long.

    Attributes:
        tasks: names, patterns, or YAML files with tasks of one's own.
        manager: lm_eval's index of tasks.
        version: of lm_eval.
    """

    tasks: tuple[str, ...]
    manager: Any
    version: str

    @classmethod
    def of(cls, text: str) -> Harness:
        """From names that are separated by commas.

        Raises:
            DamError: lm_eval is missing, or it knows no such task.
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
        # its own index has thousands of files, and takes long to read
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
            seed: of the choice of examples that a prompt shows.

        Returns:
            See above; groups of tasks have no number of samples.

        Raises:
            DamError: no causal LM, data that cannot be had, or a fault of the harness.
        """
        kind = str((load_json(model / "config.json").get("architectures") or ["unknown"])[0])
        if not kind.endswith(_CAUSAL):
            raise DamError(
                f"model {model}",
                expected="a causal LM, for lm_eval",
                got=kind,
                cure="Measure other models with `mergekit-dam eval --data FILE`.",
            )
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        try:
            found = lm_eval.simple_evaluate(
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
                cure="Check that the task's data can be had (HF_HUB_OFFLINE, HF_TOKEN), or take other tasks.",
            ) from error
        assert found is not None, "None is what all processes but the first of a distributed run get"
        return self._kept(found)

    def _kept(self, found: Any) -> dict[str, Any]:
        samples = found.get("n-samples", {})
        kept = {}
        for task, values in found["results"].items():
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
                kept[str(task)] = {"metrics": metrics, "samples": count, "by": f"lm_eval {self.version}"}
        return kept


def told(found: dict[str, Any]) -> list[str]:
    """A line for every metric."""
    return [
        f"{task}: {metric} {value:.4f}" + ("" if error is None else f" +- {error:.4f}")
        for task, one in found.items()
        for metric, (value, error) in one["metrics"].items()
    ]


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _is_number(value: Any) -> bool:
    """lm_eval says N/A where a standard error makes no sense."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
