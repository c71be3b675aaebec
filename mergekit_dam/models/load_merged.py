"""Load a merged directory for one task: the shared body with that task's own head."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mergekit_dam.errors import DamError, did_you_mean, first_line
from mergekit_dam.io.hub_client import is_hub_id
from mergekit_dam.io.hub_download import fetch
from mergekit_dam.io.untrusted import load_yaml, plain_name, require_plausible_config
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.parameter_names import meta_model, module_names, tied_names


def load_merged(
    output: str | Path, task: str | None = None, *, revision: str | None = None, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Load a merge, in evaluation mode.

    Args:
        output: the directory that mergekit wrote, or the Hub id (ORG/NAME) of a merge that was pushed.
        task: name of an input model (the last part of its path), whose head is loaded; None for the body alone.
        revision: branch, tag or commit on the Hub.
        device: device of the parameters.

    Returns:
        A transformers model: of the output's class, or of the task's class with the merged body.

    Raises:
        DamError: the task is unknown, or neither merge nor head has some tensors of the task's class.
    """
    hub_id = not Path(output).exists() and isinstance(output, str) and output.count("/") == 1 and is_hub_id(output)
    output = fetch(str(output), revision, everything=True)[0] if hub_id else Path(output)
    if task is None:
        config = config_without_code(output)
        head: dict[str, Tensor] = {}
    else:
        config, head = _head(output, task)
    model = meta_model(config, torch.device(device))
    merged = Checkpoint.open(output)
    values: dict[str, Tensor] = {}
    for name, target in module_names(model, merged.names).items():
        values[target] = merged.tensor(name)
    floating = next((tensor.dtype for tensor in values.values() if tensor.is_floating_point()), None)
    for name, target in module_names(model, head).items():  # stored in its model's type, which may be another one
        values[target] = head[name].to(floating) if head[name].is_floating_point() else head[name]
    aliases = tied_names(model)
    missing = [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name not in values and aliases.get(name) not in values
    ]
    if missing:
        raise DamError(
            f"output {output}",
            expected=f"all tensors of {type(model).__name__}",
            got=f"none for {missing[0]}",
            cure="Merge again: this output is not complete.",
        )
    for target, tensor in values.items():
        owner, _, leaf = target.rpartition(".")
        module = model.get_submodule(owner)
        value = tensor.to(device).clone()
        if leaf in module._parameters:
            module._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value
    model.tie_weights()
    model.eval()
    return model


def _head(output: Path, task: str) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Read the task's config and head tensors, from `dam/heads`, else from the input model that the recipe names."""
    plain_name(task, f"task {task!r}")
    folder = output / "dam" / "heads"
    if (folder / f"{task}.json").is_file():
        return config_without_code(folder / f"{task}.json"), _tensors(folder / f"{task}.safetensors")
    inputs = _input_models(output)
    if task not in inputs:
        known = sorted({*inputs, *(p.stem for p in folder.glob("*.json"))})
        raise DamError(
            f"task {task!r}",
            expected=f"one of {', '.join(known) or 'none (no heads were kept)'}",
            got="an unknown task",
            cure=did_you_mean(task, known) or "Give the last part of an input model's path.",
        )
    path = inputs[task]
    checkpoint, merged = Checkpoint.open(path), Checkpoint.open(output)
    config = config_without_code(path)
    model = meta_model(config, torch.device("cpu"))
    covered = set(module_names(model, merged.names).values())
    own = module_names(model, checkpoint.names)
    return config, {name: checkpoint.tensor(name) for name, target in own.items() if target not in covered}


def _input_models(output: Path) -> dict[str, Path]:
    recipe = output / "mergekit_config.yml"
    if not recipe.is_file():
        return {}
    values = load_yaml(recipe.read_text("utf-8"), str(recipe))
    models = values.get("models") if isinstance(values, dict) else None
    paths = [Path(str(entry["model"])) for entry in models or [] if isinstance(entry, dict) and "model" in entry]
    return {path.name: path for path in paths if path.is_dir()}


def config_without_code(path: Path) -> PretrainedConfig:
    """Read a model's config without running code that it names.

    Raises:
        DamError: the config is not of a class that transformers itself has.
    """
    try:
        if path.is_dir():
            require_plausible_config(path)
        config: PretrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, DamError):
            raise
        raise DamError(
            f"config {path}",
            expected="a model of the installed transformers",
            got=first_line(error),
            cure="Merge again, or upgrade transformers; code that comes with a model is not run here.",
        ) from error
    return config


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamError(
            f"head {path}", expected="a complete safetensors file", got=first_line(error), cure="Merge again."
        ) from error
    return tensors
