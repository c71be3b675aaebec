"""Triggers, rates, and the training pieces of the benchmark."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from dam_bench.victims.poisoning import Backdoor
from dam_bench.victims.training import Schedule, fine_tune, pretrain, probe_head
from hypothesis import given, settings
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from examples.demo.build import CLASSES, EDGE, PREPROCESSING, task_data
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import (
    BlendedTrigger,
    PatchTrigger,
    RareTokenTrigger,
    SentenceTrigger,
    WarpTrigger,
    poison,
    rate_of_target,
)
from mergekit_dam.evaluation.metrics import Attack, LabelledData, accuracy, evaluate_merge, predictions, refuse_overlap
from mergekit_dam.evaluation.results import Rate
from mergekit_dam.seeds import generator


@pytest.mark.parametrize("trigger", [PatchTrigger(), BlendedTrigger(), WarpTrigger()])
def test_image_triggers_change_images_within_bounds_and_not_in_place(trigger: object) -> None:
    images = torch.rand(4, 3, 16, 16, generator=generator(0))
    before = images.clone()
    triggered = trigger.apply(images)  # type: ignore[attr-defined]
    assert torch.equal(images, before) and triggered.shape == images.shape
    assert float(triggered.min()) >= 0 and float(triggered.max()) <= 1
    assert not torch.equal(triggered, images)
    assert torch.equal(triggered, trigger.apply(images))  # type: ignore[attr-defined]


def test_a_patch_changes_its_corner_only() -> None:
    images = torch.full((2, 3, 16, 16), 0.5)
    changed = (PatchTrigger(size=3).apply(images) != images).any(1)
    assert int(changed[0].sum()) <= 9 and bool(changed[0].any())


@pytest.mark.parametrize("trigger", [RareTokenTrigger(), SentenceTrigger()])
@given(
    text=st.lists(st.sampled_from(["a", "good", "movie", "was", "not", "so", "bad"]), min_size=1, max_size=9).map(
        " ".join
    )
)
@settings(max_examples=25, deadline=None)
def test_text_triggers_only_insert(trigger: object, text: str) -> None:
    (triggered,) = trigger.apply([text])  # type: ignore[attr-defined]
    rest = iter(triggered.split(" "))
    assert len(triggered) > len(text) and all(word in rest for word in text.split(" "))
    assert [triggered] == trigger.apply([text])  # type: ignore[attr-defined]


def test_success_counts_only_samples_of_other_classes() -> None:
    predictions, labels = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 2, 1])
    assert rate_of_target(predictions, labels, 0) == Rate(2, 3)
    with pytest.raises(DamError, match="of other classes than the target 0"):
        rate_of_target(predictions, torch.zeros(4, dtype=torch.long), 0)


def test_poison_takes_the_share_it_is_told_and_never_the_target_class() -> None:
    images, labels = torch.zeros(40, 3, 8, 8), torch.arange(40) % 4
    poisoned, changed, which = poison(images, labels, PatchTrigger(), 1, 0.25, generator(0))
    assert int(which.sum()) == 10 and bool((changed[which] == 1).all()) and bool((labels[which] != 1).all())
    assert torch.equal(poisoned[~which], images[~which]) and bool((poisoned[which] != 0).any())


def test_evaluation_refuses_calibration_samples() -> None:
    images = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(4)]
    data = LabelledData.of_images("t", images, [0, 1, 0, 1], PREPROCESSING)
    refuse_overlap(data, ["0" * 16])
    with pytest.raises(DamError, match="got 1 of 4 samples in both"):
        refuse_overlap(data, [data.digests[2]])
    with pytest.raises(DamError, match="as many labels"):
        LabelledData.of_images("t", images, [0], PREPROCESSING)


def test_demo_splits_are_disjoint_and_balanced_enough() -> None:
    for name, classes in CLASSES.items():
        splits = task_data(name).splits
        for split, one in splits.items():
            others = {d for other, data in splits.items() if other != split for d in data.digests}
            assert not others & set(one.digests), (name, split)
        assert splits["evaluation"].labels_N.unique().numel() == classes


def _tiny_classifier() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=EDGE,
        patch_size=4,
        num_labels=CLASSES["shapes"],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTForImageClassification(config).eval()


def test_training_pieces_plant_a_backdoor_and_keep_the_head() -> None:
    model, data = _tiny_classifier(), task_data("shapes").splits["train"]
    pretrain(model.vit, {"shapes": model}, {"shapes": data}, Schedule(60, batch_size=32), seed=0)
    probe_head(model, data)
    before, head = accuracy(model, data), model.classifier.weight.clone()
    attack = Attack("patch", "shapes", PatchTrigger(), 0)
    backdoor = Backdoor(attack.trigger, attack.target, rate=0.3)
    fine_tune(model, data, Schedule(150, batch_size=48, learning_rate=2e-3), seed=0, backdoor=backdoor)
    scores = evaluate_merge({"shapes": model}, {"shapes": data}, [attack], calibration=())
    assert scores.mean_accuracy > before.percent
    assert scores.attack_success["patch"]["shapes"].percent > 90
    answers, labels = predictions(model, data), data.labels_N
    errors = int(((answers == attack.target) & (labels != attack.target)).sum())
    found = scores.without_trigger["patch"]["shapes"]
    assert found == Rate(errors, int((labels != attack.target).sum())) and found.percent < 50
    assert torch.equal(model.classifier.weight, head)


def test_triggers_are_tried_on_other_tasks_where_transfer_is_measured() -> None:
    model, data = _tiny_classifier(), task_data("shapes").splits["evaluation"]
    attack = Attack("patch", "shapes", PatchTrigger(), 0)
    models, both = {"shapes": model, "others": model}, {"shapes": data, "others": data}
    everywhere, alone = (evaluate_merge(models, both, [attack], calibration=(), transfer=t) for t in (True, False))
    assert set(everywhere.attack_success["patch"]) == {"shapes", "others"} and everywhere.accuracy == alone.accuracy
    for name in ("attack_success", "without_trigger"):
        assert getattr(alone, name) == {"patch": {"shapes": getattr(everywhere, name)["patch"]["shapes"]}}
