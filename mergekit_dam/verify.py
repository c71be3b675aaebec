"""Is everything there? Before the merge: does mergekit know every tensor; after it: was every one written."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from mergekit.architecture import WeightInfo
from transformers import AutoConfig, PretrainedConfig

from mergekit_dam.checkpoint import Checkpoint
from mergekit_dam.errors import DamError
from mergekit_dam.module_names import meta_model, module_names, tied_names

_SHOWN = 3  # names listed in an error


def check_coverage(weights: Iterable[WeightInfo], base_names: Iterable[str], *, ignored: frozenset[str]) -> None:
    """Refuse a merge that would leave tensors of the base out, which mergekit does in silence.

    Args:
        weights: what mergekit's definition of the architecture lists.
        base_names: the base checkpoint's tensor names.
        ignored: names that may be left out, such as the head of a base taken without it.

    Raises:
        DamError: naming the first of the missing tensors.
    """
    known = {s for w in weights for s in (w.name, *(w.aliases or ()), *(w.tied_names or ()))}
    names = list(base_names)
    missing = [name for name in names if name not in known and name not in ignored]
    if missing:
        raise DamError(
            "architecture", expected=f"a definition of all {len(names)} tensors of the base",
            got=f"{len(missing)} unknown to mergekit: {_list(missing)}",
            cure="This family is not supported; see the README for those that are.",
        )  # fmt: skip


def verify_output(
    output: Path, base: Path, *, dtype: torch.dtype | None = None, base_config: PretrainedConfig | None = None
) -> None:
    """Compare a merged directory with its base by names, shapes and types, from the headers alone.

    Args:
        output: what mergekit wrote.
        base: theta_0's directory.
        dtype: the type asked for by `dtype` or `out_dtype`; None: any floating type will do.
        base_config: the base's config where it is not the one on disk (override_architecture).

    Raises:
        DamError: tensors missing, added, or of another shape or type.
    """
    config = base_config or AutoConfig.from_pretrained(base)
    wanted, written = Checkpoint.open(base), Checkpoint.open(output)
    model = meta_model(config, torch.device("cpu"))
    aliases = tied_names(model)

    def by_parameter(checkpoint: Checkpoint) -> dict[str, str]:
        names = module_names(model, checkpoint.names)
        return {aliases.get(target, target): name for name, target in names.items()}

    expected, got = by_parameter(wanted), by_parameter(written)
    missing = [name for target, name in expected.items() if target not in got]
    extra = sorted(set(written.names) - set(got.values()) - set(module_names(model, written.names)))
    if missing or extra:
        raise DamError(
            f"output {output}", expected=f"the {len(expected)} tensors of the base",
            got=f"{len(missing)} missing ({_list(missing)}), {len(extra)} unknown ({_list(extra)})",
            cure="Do not use this output; report the architecture.",
        )  # fmt: skip
    for target, name in expected.items():
        shape, kind = written.shape(got[target]), written.dtype(got[target])
        floating = wanted.dtype(name).is_floating_point
        if shape != wanted.shape(name) or floating != kind.is_floating_point or (dtype and floating and kind != dtype):
            raise DamError(
                f"tensor {got[target]} of {output}", expected=f"{wanted.shape(name)} {dtype or wanted.dtype(name)}",
                got=f"{shape} {kind}", cure="Do not use this output; report the architecture.",
            )  # fmt: skip


def _list(names: list[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "none"
