"""The pure parts: merge equation, masks, losses, perturbation. The defects of the public code, each as a test."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from mergekit_dam.errors import DamError
from mergekit_dam.learn import masks
from mergekit_dam.learn.losses import consistency, disagreement, distillation, entropy
from mergekit_dam.learn.masks import ConcreteMask, LogitSteps, mask_product
from mergekit_dam.learn.paper_search import UniversalPerturbation
from mergekit_dam.merging import rule
from mergekit_dam.merging.mask_bytes import to_bytes, to_probabilities
from mergekit_dam.merging.mask_keys import mask_shape
from mergekit_dam.merging.mask_product import MaskProduct
from mergekit_dam.seeds import generator, stable_seed
from mergekit_dam.tasks.bounds import Bounds

CPU = torch.device("cpu")


def _tensors(seed: int, models: int = 3) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    source = generator(seed)
    draw = lambda *shape: torch.randn(*shape, generator=source)  # noqa: E731
    return draw(5, 4), [draw(5, 4) for _ in range(models)], draw(models), torch.rand(5, 4, generator=source)


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_merge_is_the_papers_equation(seed: int) -> None:
    base, models, coefficients, mask = _tensors(seed)
    expected = base + mask * sum(c * (m - base) for c, m in zip(coefficients, models, strict=True))
    torch.testing.assert_close(rule.merge(base, list(models), coefficients, mask), expected)


@given(st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_gradients_of_the_chain_rule_are_autograds(seed: int) -> None:
    base, models, coefficients, mask = _tensors(seed)
    weight = torch.randn(5, 4, generator=generator(seed, "loss"))
    coefficients.requires_grad_(True)
    mask.requires_grad_(True)
    theta = base + mask * sum(c * (m - base) for c, m in zip(coefficients, models, strict=True))
    (theta * weight).sum().backward()
    found = torch.zeros_like(mask)
    rule.gradients(weight, base, list(models), coefficients.detach(), None, mask_out=found)
    torch.testing.assert_close(found, mask.grad)
    found = torch.zeros_like(coefficients)
    rule.gradients(weight, base, list(models), None, mask.detach(), coefficient_out=found)
    torch.testing.assert_close(found, coefficients.grad)


@given(st.integers(0, 1000), st.sampled_from([(5, 4), (5, 1), (1, 1)]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_masks_of_each_models_own_follow_the_equation_and_autograd(
    seed: int, shape: tuple[int, ...], shares: bool
) -> None:
    base, models, coefficients, _ = _tensors(seed)
    source = generator(seed, "own")
    shared, *own = (torch.randn(shape, generator=source).requires_grad_(True) for _ in range(1 + len(models)))
    mask = MaskProduct((shared.detach(),) if shares else (), logits=True, own=tuple(one.detach() for one in own))
    coefficients.requires_grad_(True)
    terms = [c * one.sigmoid() * (m - base) for c, one, m in zip(coefficients, own, models, strict=True)]
    theta = base + (shared.sigmoid() if shares else 1.0) * torch.stack(terms).sum(0)
    torch.testing.assert_close(rule.merge(base, list(models), coefficients.detach(), mask), theta.detach())
    weight = torch.randn(5, 4, generator=source)
    (theta * weight).sum().backward()
    to_mask, to_coefficients = torch.zeros(mask.gradient_shape), torch.zeros(len(models))
    rule.gradients(
        weight, base, list(models), coefficients.detach(), mask, mask_out=to_mask, coefficient_out=to_coefficients
    )
    torch.testing.assert_close(to_coefficients, coefficients.grad)
    found = mask.logit_gradients(to_mask, range(len(mask.parts)))
    for ours, logits in zip(found, [shared, *own] if shares else own, strict=True):
        torch.testing.assert_close(ours, logits.grad)


def test_a_model_without_the_tensor_adds_nothing() -> None:
    base, models, coefficients, mask = _tensors(0)
    without = rule.merge(base, [models[0], None, models[2]], coefficients, mask)
    same = rule.merge(base, [models[0], base, models[2]], coefficients, mask)
    assert torch.equal(without, same)
    assert torch.equal(rule.merge(base, [base] * 3, coefficients, mask), base)


@pytest.mark.parametrize("rescale", [True, False])
def test_mask_logit_gradient_is_autograds(rescale: bool) -> None:
    mask = ConcreteMask({"w": (4, 3)}, name="m", temperature=0.5, rescale=rescale, initial_logit=0.2, device=CPU)
    sample = mask.sample("w", seed=0, step=0)
    noise = torch.logit(sample) * 0.5 - mask.logits["w"]
    logits = mask.logits["w"].clone().requires_grad_(True)
    drawn = torch.sigmoid((logits + noise) / 0.5)
    weight = torch.randn(4, 3, generator=generator(1))
    ((drawn / drawn.mean() if rescale else drawn) * weight).sum().backward()
    assert logits.grad is not None
    (found,) = mask_product([mask], "w", [sample]).logit_gradients(weight.clone(), [0])
    torch.testing.assert_close(found, logits.grad)


@given(st.integers(0, 50), st.sampled_from(["element", "row"]))
@settings(max_examples=20, deadline=None)
def test_masks_broadcast_and_rescaling_keeps_the_mean(seed: int, granularity: str) -> None:
    shape = mask_shape((6, 5), granularity)  # type: ignore[arg-type]
    mask = ConcreteMask({"w": shape}, name="m", temperature=0.5, rescale=True, initial_logit=0.0, device=CPU)
    sample = mask.sample("w", seed=seed, step=1)
    assert torch.broadcast_shapes(sample.shape, (6, 5)) == (6, 5)
    assert bool(((sample > 0) & (sample < 1)).all())
    torch.testing.assert_close(mask_product([mask], "w", [sample]).full().mean(), torch.tensor(1.0))
    assert torch.equal(sample, mask.sample("w", seed=seed, step=1))
    assert not torch.equal(sample, mask.sample("w", seed=seed, step=2))


@given(seed=st.integers(0, 1000), count=st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_saved_masks_multiply_as_their_probabilities_do(seed: int, count: int) -> None:
    values = [torch.rand(7, 3, generator=generator(seed, i)) for i in range(count)]
    for one in values:
        one[0] = 1.0
    kept = [to_bytes(one) for one in values]
    found = MaskProduct(tuple(kept)).full()
    torch.testing.assert_close(found, torch.stack([to_probabilities(one) for one in kept]).prod(0))
    assert bool((found[0] == 1.0).all()), "what is kept is kept whole"


def test_density_is_the_kept_fraction() -> None:
    mask = ConcreteMask({"w": (100,)}, name="m", temperature=0.5, rescale=True, initial_logit=0.0, device=CPU)
    mask.logits["w"][:25] = 20.0
    mask.logits["w"][25:] = -20.0
    assert mask.density() == pytest.approx(0.25)
    assert mask.expectation("w")[:25].min() > 0.99


@pytest.mark.parametrize("together", [True, False])
def test_steps_of_logits_wait_for_each_other_or_not(together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "together_numel", lambda device, total: total if together else 1)  # accelerator, or CPU
    mask = ConcreteMask({"a": (4,), "b": (4,)}, name="m", temperature=1.0, rescale=False, initial_logit=0.0, device=CPU)
    steps = LogitSteps({"m": mask}, {"m": torch.optim.SGD(mask.logits.values(), lr=1.0)})
    steps.add([("m", "a")], [torch.ones(4)])
    assert (mask.logits["a"].grad is not None) == together
    assert mask.logits["a"].tolist() == [0.0 if together else -1.0] * 4
    steps.add([("m", "b")], [torch.ones(4)])
    steps.finish(0)
    assert all(logits.grad is None and logits.tolist() == [-1.0] * 4 for logits in mask.logits.values())


def test_the_two_masks_are_two() -> None:
    make = lambda name: ConcreteMask(  # noqa: E731
        {"w": (50,)}, name=name, temperature=0.5, rescale=False, initial_logit=0.0, device=CPU
    )
    first, second = (
        make("task_shared").sample("w", seed=0, step=0),
        make("backdoor_detection").sample("w", seed=0, step=0),
    )
    assert not torch.equal(first, second)
    assert torch.equal(MaskProduct((first, second)).full(), first * second)


def test_consistency_does_not_reward_a_confident_answer_with_the_target() -> None:
    clean = torch.tensor([[8.0, 0.0, 0.0], [0.0, 8.0, 0.0]])
    hijacked = torch.tensor([[0.0, 0.0, 12.0], [0.0, 0.0, 12.0]])
    assert entropy(hijacked) < entropy(clean)  # what the public code minimises is content with the backdoor
    assert consistency(hijacked, clean) > 5 > 1e-6 > consistency(clean, clean).abs()
    assert disagreement(hijacked, clean) > disagreement(clean, clean)
    torch.testing.assert_close(
        distillation(hijacked, clean), F.kl_div(hijacked.log_softmax(-1), clean.softmax(-1), reduction="batchmean")
    )


def test_perturbation_stays_within_pixels_and_refuses_normalised_ones() -> None:
    bounds = Bounds.of(0.0, 1.0)
    perturb = UniversalPerturbation((3, 4, 4), bounds, eps=0.25, inserts=False, generator=generator(0))
    pixels = torch.rand(2, 3, 4, 4, generator=generator(1))
    with torch.no_grad():
        perturb.delta.add_(5.0)
    perturb.project()
    perturbed, _ = perturb(pixels, None)
    assert float(perturbed.min()) >= 0 and float(perturbed.max()) <= 1
    assert float((perturbed - pixels).abs().max()) <= 0.25 + 1e-6
    with pytest.raises(DamError, match="before mean and std"):
        perturb((pixels - 0.5) / 0.2, None)


def test_inserted_tokens_come_after_the_first_and_extend_the_mask() -> None:
    bounds = Bounds.of(torch.full((6,), -1.0), torch.full((6,), 1.0))
    perturb = UniversalPerturbation((2, 6), bounds, eps=0.5, inserts=True, generator=generator(0))
    x, mask = torch.randn(3, 5, 6), torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    out, longer = perturb(x, mask)
    assert out.shape == (3, 7, 6) and longer is not None
    assert torch.equal(out[:, 0], x[:, 0]) and torch.equal(out[:, 3:], x[:, 1:])
    assert torch.equal(longer.sum(1), mask.sum(1) + 2)


def test_seeds_do_not_depend_on_the_process() -> None:
    assert stable_seed(0, "a", 1) == 1497209822362405998
