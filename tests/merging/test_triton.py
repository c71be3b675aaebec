"""The kernels for accelerators give what the merge rule gives.

Without an accelerator Triton's interpreter runs them (conftest.py asks for it).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_dam.merging import rule, triton_groups, triton_merge
from mergekit_dam.merging.mask_bytes import to_bytes
from mergekit_dam.merging.mask_keys import Granularity, mask_shape
from mergekit_dam.merging.mask_product import MaskProduct, has_own
from mergekit_dam.merging.triton_groups import ElementGroup, Group, Member, RowGroup, grouped
from tests.helpers.searching import learned
from tests.helpers.tiny_models import make_model

pytest.importorskip("triton", reason="PyTorch for CPUs comes without it, and no wheel is for this system")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def some(shape: tuple[int, ...], dtype: torch.dtype, missing: tuple[int, ...]) -> tuple[Tensor, list[Tensor | None]]:
    """theta_0 and four models of it, some of which lack the tensor."""
    base = torch.randn(shape, device=DEVICE)
    models = [None if t in missing else (base + 0.1 * torch.randn_like(base)).to(dtype) for t in range(4)]
    return base.to(dtype), models


def masks(shape: tuple[int, ...], kind: str, tasks: int = 4) -> Tensor | MaskProduct | None:
    logits = tuple(2 * torch.randn(shape, device=DEVICE) for _ in range(2))
    own = tuple(2 * torch.randn(shape, device=DEVICE) for _ in range(tasks))
    if kind == "own saved":
        return MaskProduct((to_bytes(logits[0].sigmoid()),), own=tuple(to_bytes(one.sigmoid()) for one in own))
    if kind in ("own", "own alone"):
        return MaskProduct(logits[:1] if kind == "own" else (), True, own=own)
    if kind == "samples":
        return MaskProduct(tuple(one.sigmoid() for one in logits[:1]), temperature=0.5)
    if kind == "saved":
        return MaskProduct(tuple(to_bytes(one.sigmoid()) for one in logits))
    return {"logits": MaskProduct(logits, True), "tensor": logits[0].sigmoid(), "none": None}[kind]


CASES = pytest.mark.parametrize(
    ("shape", "dtype", "missing"),
    [((3,), torch.float32, ()), ((37, 65), torch.bfloat16, (1,)), ((2, 16, 32), torch.float32, (0, 3))],
    ids=["small", "two blocks and a half", "whole blocks"],
)


def on_cpu(found: object) -> Any:
    """The same there, where the merge rule does not call the kernels."""
    if isinstance(found, MaskProduct):
        return replace(found, factors=on_cpu(found.factors), own=on_cpu(found.own))
    if isinstance(found, list | tuple):
        return type(found)(map(on_cpu, found))
    return found.cpu() if isinstance(found, Tensor) else found


@CASES
@pytest.mark.parametrize("kind", ["logits", "samples", "saved", "tensor", "none", "own", "own alone", "own saved"])
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_merging(
    shape: tuple[int, ...], dtype: torch.dtype, missing: tuple[int, ...], kind: str, out_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base, models = some(shape, dtype, missing)
    mask, coefficients = masks(shape, kind), torch.rand(4, 3)[:, 1]
    out = torch.full(shape, torch.nan, dtype=out_dtype, device=DEVICE)
    triton_merge.merge(base, models, coefficients, mask, out)
    wanted = torch.empty(shape, dtype=out_dtype)
    rule.merge(*on_cpu((base, models)), coefficients, on_cpu(mask), wanted)
    torch.testing.assert_close(out.cpu(), wanted)


@CASES
@pytest.mark.parametrize("kind", ["logits", "samples", "own", "own alone"])
def test_gradients_of_logits_and_coefficients(
    shape: tuple[int, ...], dtype: torch.dtype, missing: tuple[int, ...], kind: str
) -> None:
    torch.manual_seed(1)
    base, models = some(shape, dtype, missing)
    mask, coefficients, gradient = masks(shape, kind), torch.rand(4), torch.randn_like(base)
    assert isinstance(mask, MaskProduct)
    outs = [torch.full(shape, torch.nan, device=DEVICE) for _ in mask.parts]
    ours, wanted = torch.ones(4, 2, device=DEVICE)[:, 0], torch.ones(4)
    triton_merge.gradients(gradient, base, models, coefficients, mask, coefficient_out=ours, logits_out=outs)
    found = rule.logit_gradients(
        *on_cpu((gradient, base, models)), coefficients, on_cpu(mask), range(len(outs)), coefficient_out=wanted
    )
    torch.testing.assert_close(ours.cpu(), wanted)
    for out, expected in zip(outs, found, strict=True):
        torch.testing.assert_close(out.cpu(), expected)


@CASES
@pytest.mark.parametrize("kind", ["logits", "saved", "tensor", "own", "own alone", "own saved"])
def test_gradients_of_the_mask_add_up(
    shape: tuple[int, ...], dtype: torch.dtype, missing: tuple[int, ...], kind: str
) -> None:
    torch.manual_seed(2)
    base, models = some(shape, dtype, missing)
    mask = masks(shape, kind)
    arguments = (torch.randn(shape, device=DEVICE), base, models, torch.rand(4), mask)
    sums = (4, *shape) if has_own(mask) else shape
    ours, wanted = ((torch.ones(sums, device=d), torch.ones(4, device=d)) for d in (DEVICE, torch.device("cpu")))
    for _ in range(2):
        triton_merge.gradients(*arguments, mask_out=ours[0], coefficient_out=ours[1])
        rule.gradients(*on_cpu(arguments), mask_out=wanted[0], coefficient_out=wanted[1])
    torch.testing.assert_close(on_cpu(ours), wanted)


def test_which_tensors_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not triton_merge.serves(torch.zeros(3), None) and not triton_merge.runs_on(torch.device("cpu"))
    assert triton_merge.runs_on(torch.device("cuda"))
    monkeypatch.setattr(triton_merge, "runs_on", lambda device: True)
    base = torch.zeros(3, 4)
    logits, rows = (torch.zeros(3, 4),), (torch.zeros(3, 1),)
    assert triton_merge.serves(base, None) and triton_merge.serves(base, MaskProduct(logits, True))
    assert not triton_merge.serves(torch.zeros(0, 4), None) and not triton_merge.serves(base, MaskProduct(rows, True))
    assert not triton_merge.serves(base, MaskProduct(logits, True, means=(torch.ones(()),)))


def members(tasks: int, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Member]:
    found = []
    for i, shape in enumerate(shapes):
        base, models = some(shape, dtype, tuple(t for t in range(4) if (t + i) % 4 == 0))
        found.append(Member(f"tensor {i}", f"mask {i}", i, base, models[:tasks]))
    return found


SHAPES = (16,), (48, 32), (7, 16), (3, 1040), (5, 3), (3, 4, 16)


def test_what_is_grouped() -> None:
    groups = grouped(members(3, torch.float32, *SHAPES), 1500)
    found = [(type(group), "".join(m.name[-1] for m in group.members)) for group in groups]
    matrices = [(ElementGroup, "1"), (ElementGroup, "23"), (ElementGroup, "5")]
    # 15 elements do not fit, nor do rows of 3
    assert found == [(ElementGroup, "0"), *matrices, *((RowGroup, names) for _, names in matrices)]


@pytest.mark.parametrize("columns", [1, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize(("kind", "parts"), [("logits", 2), ("own", 4), ("own alone", 3)])
def test_groups_do_what_single_tensors_do(
    kind: str, parts: int, granularity: Granularity, dtype: torch.dtype, columns: int
) -> None:
    torch.manual_seed(3)
    every = members(3, dtype, *SHAPES)
    masks_by_name = {m.mask: masks(mask_shape(m.base.shape, granularity), kind, 3) for m in every}
    coefficients = torch.rand(3, columns, device=DEVICE)
    ours, wanted = torch.zeros_like(coefficients), torch.zeros(3, columns)
    # a row adds up a thousand elements in another order
    tolerance = {} if granularity == "element" else {"rtol": 1e-4, "atol": 1e-4}
    serving = [group for group in grouped(every, 1500) if group.serves(masks_by_name)]
    assert "".join(sorted(m.name[-1] for group in serving for m in group.members)) == "01235", "each once"
    for group in serving:
        assert group.num_parts(masks_by_name) == parts
        merged = group.merged(masks_by_name, coefficients, dtype)
        upstreams = [
            None if m.name.endswith("2") else torch.randn(m.base.shape, device=DEVICE).to(dtype) for m in group.members
        ]
        found = dict(group.logit_gradients(upstreams, masks_by_name, coefficients, ours))
        for member, upstream in zip(group.members, upstreams, strict=True):
            column = member.column if columns > 1 else 0
            own = on_cpu((member.base, member.models, coefficients[:, column], masks_by_name[member.mask]))
            theta = rule.merge(*own, torch.empty(member.base.shape, dtype=dtype))
            torch.testing.assert_close(merged[member.name].cpu(), theta)
            if upstream is None:
                assert member.mask not in found, "no task used it"
                continue
            expected = expected_gradients(upstream.cpu(), *own, coefficient_out=wanted[:, column])
            torch.testing.assert_close(on_cpu(found[member.mask]), expected, **tolerance)
    torch.testing.assert_close(ours.cpu(), wanted, rtol=1e-4, atol=1e-4)


def expected_gradients(
    upstream: Tensor,
    base: Tensor,
    models: list[Tensor | None],
    lambdas: Tensor,
    mask: MaskProduct,
    *,
    coefficient_out: Tensor,
) -> list[Tensor]:
    """dL/dlogit of all parts by the merge rule."""
    found = torch.zeros(mask.gradient_shape)
    rule.gradients(upstream, base, models, lambdas, mask, mask_out=found, coefficient_out=coefficient_out)
    return mask.logit_gradients(found, range(len(mask.parts)))


def test_masks_that_groups_do_not_serve() -> None:
    (group, _) = grouped(members(2, torch.float32, (16, 4), (32, 16)), 1 << 20)
    good = {"mask 0": masks((16, 4), "logits"), "mask 1": masks((32, 16), "logits")}
    assert group.serves(good)
    of_others = ("tensor", "saved", "samples")
    for bad in (*(masks((32, 16), kind) for kind in of_others), masks((32, 1), "logits"), None):
        assert not group.serves(good | {"mask 1": bad})


def test_an_accelerator_without_triton_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    triton_merge.warn_without_kernels(torch.device("cuda"))
    monkeypatch.setattr(triton_merge, "triton_kernels", None)
    triton_merge.warn_without_kernels(torch.device("cpu"))
    assert not caplog.text and not triton_merge.runs_on(torch.device("cuda"))
    triton_merge.warn_without_kernels(torch.device("cuda"))
    assert "mergekit-dam[kernels]" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py does this with compiled kernels")
@pytest.mark.parametrize("granularity", ["element", "row"])
def test_a_search_with_kernels_gives_the_same_masks(
    granularity: Granularity, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 2, "granularity": granularity, "scan_steps": 2, "detection": "model"}
    layers = {"num_hidden_layers": 1}  # the interpreter takes a millisecond per program
    base = make_model("ViTModel", tmp_path / "base", **layers)
    for name in "ab":
        make_model("ViTForImageClassification", tmp_path / name, seed=ord(name), body=base, **layers)
    plain = learned(tmp_path, images, **settings)
    served = set()
    monkeypatch.setattr(triton_merge, "runs_on", lambda device: True)
    monkeypatch.setattr(triton_groups, "ALIGNED", 4)  # as mapped files are; the interpreter does not mind
    serves = Group.serves

    def noted(group: Group, masks_by_name: dict[str, MaskProduct]) -> bool:
        found = serves(group, masks_by_name)
        served.update(group.mask_names if found else ())
        return found

    monkeypatch.setattr(Group, "serves", noted)
    kernels = learned(tmp_path, images, **settings)
    assert len(served) == len(plain[0]) // 3, "logits of M1 and of two M2 per tensor, none left to single operations"
    assert kernels[2] == pytest.approx(plain[2], rel=1e-4)
    torch.testing.assert_close(kernels[1], plain[1], rtol=1e-3, atol=1e-5)
    for name, logits in plain[0].items():
        assert float((kernels[0][name] - logits).abs().gt(1e-2).float().mean()) < 0.02, name
