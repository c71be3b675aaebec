"""Check that mergekit knows every tensor before a merge, and that the merge wrote every tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from mergekit.architecture import WeightInfo
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from mergekit_dam.errors import DamError
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.models.parameter_names import load_names, meta_model, tied_names

_SHOWN = 3  # names listed in an error


def check_coverage(weights: Iterable[WeightInfo], base_names: Iterable[str], *, ignored: frozenset[str]) -> None:
    """Refuse a merge that would omit tensors of the base, as mergekit does without a message.

    Args:
        weights: tensors in mergekit's definition of the architecture.
        base_names: the base checkpoint's tensor names.
        ignored: names that may be omitted, such as the head of a base used without it.

    Raises:
        DamError: tensors of the base are missing from the definition.
    """
    known = {s for w in weights for s in (w.name, *(w.aliases or ()), *(w.tied_names or ()))}
    names = list(base_names)
    missing = [name for name in names if name not in known and name not in ignored]
    if missing:
        raise DamError(
            "architecture",
            expected=f"a definition of all {len(names)} tensors of the base",
            got=f"{len(missing)} unknown to mergekit: {_list(missing)}",
            cure="This family is not supported; see the README for the supported families.",
        )


def verify_output(
    output: Path, base: Path, *, dtype: torch.dtype | None = None, base_config: PretrainedConfig | None = None
) -> None:
    """Compare names, shapes and types of a merged directory, from headers alone, with its config.json and its base.

    The sizes are those of the output's config, since a recipe may change vocabulary and depth. Tensors that the base's
    own files lack may be missing in the output.

    Args:
        output: directory that mergekit wrote.
        base: theta_0's directory.
        dtype: the type that `dtype` or `out_dtype` asks for; None: any floating type.
        base_config: the base's config where it differs from the file (override_architecture).

    Raises:
        DamError: tensors are missing, unknown, or of another shape or type.
    """
    wanted, written = Checkpoint.open(base), Checkpoint.open(output)
    cpu, config = torch.device("cpu"), base_config or AutoConfig.from_pretrained(base, trust_remote_code=False)
    model = meta_model(config, cpu)
    expected, taken = _by_parameter(model, wanted), model.state_dict()
    own = AutoConfig.from_pretrained(output, trust_remote_code=False) if (output / "config.json").is_file() else config
    own.architectures = config.architectures
    merged = model if own.to_dict() == config.to_dict() else meta_model(own, cpu)
    got, tied = _by_parameter(merged, written), tied_names(merged)
    parameters = {name: tensor for name, tensor in merged.state_dict().items() if name not in tied}
    # a tensor that this class does not load, like an old position_ids buffer, may be kept or dropped
    missing = sorted(expected.get(n, n) for n in parameters if n not in got and (n in expected or n not in taken))
    extra = [name for key, name in got.items() if key not in parameters and key not in expected]
    if missing or extra:
        raise DamError(
            f"output {output}",
            expected=f"the {len(parameters)} tensors of its config.json",
            got=f"{len(missing)} missing ({_list(missing)}), {len(extra)} unknown ({_list(extra)})",
            cure="Do not use this output; report the architecture.",
        )
    for key, name in got.items():
        source, shape, kind = expected.get(key), written.shape(name), written.dtype(name)
        of_config = key in parameters and (key not in taken or parameters[key].shape != taken[key].shape)
        size = tuple(parameters[key].shape) if of_config or source is None else wanted.shape(source)
        like = parameters[key].dtype if source is None else wanted.dtype(source)
        floating = like.is_floating_point
        if shape != size or floating != kind.is_floating_point or (dtype and floating and kind != dtype):
            raise DamError(
                f"tensor {name} of {output}",
                expected=f"{size} {dtype or like}",
                got=f"{shape} {kind}",
                cure="Do not use this output; report the architecture.",
            )


def _by_parameter(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Map parameter names to the checkpoint's names; tied parameters count as one parameter.

    Tensors that the class does not load are keyed by their name without the class prefix.
    """
    tied, taken, prefix = tied_names(model), model.state_dict(), f"{model.base_model_prefix}."
    return {
        tied.get(target, target if target in taken else target.removeprefix(prefix)): name
        for name, target in load_names(model, checkpoint.names).items()
    }


def _list(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"
