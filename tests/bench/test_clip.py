"""The suite `clip-paper` on tiny local stand-ins of the format on the Hub: a CLIP with its files, parquet data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from dam_bench.suites.base import Poison, no_progress
from dam_bench.suites.clip_paper import ClipPaperSuite
from dam_bench.suites.clip_sources import TASKS, Sources
from dam_bench.victims.poisoning import logits_of
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from mergekit.common import ModelReference
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import BlendedTrigger, PatchTrigger
from mergekit_dam.evaluation.metrics import Attack, LabelledData, accuracy, attack_success_rate, evaluate_merge
from mergekit_dam.io.calibration import digest, load_calibration
from mergekit_dam.seeds import generator
from tests.conftest import FAST, Merge
from tests.helpers.tiny_models import make_model, save_tokenizer

COLOURS = np.array([(200, 60, 60), (60, 200, 60), (60, 60, 200)])
NAMES = {"mnist": ["great", "bad_movie", "fine"], "dtd": ["loved", "hated", "it"]}
POISON = Poison("patch", target=1, rate=0.3, size=5)


def _dataset(folder: Path, names: list[str], shift: int) -> None:
    """Noisy images of one colour each; the class is the colour, shifted so that no two tasks agree."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names), "id": ClassLabel(names=["0"])})
    train: tuple[list[Image.Image], list[int]] = [], []
    for split, count, seed in (("train", 200, shift), ("test", 90, 50 + shift)):
        rng = np.random.default_rng(seed)
        labels = [int(label) for label in rng.integers(3, size=count)]
        pixels = [COLOURS[(label + shift) % 3] + rng.normal(0, 30, (20, 24, 3)) for label in labels]
        images = [Image.fromarray(np.clip(p, 0, 255).astype(np.uint8)) for p in pixels]
        if split == "test":  # real data sets hold images in both splits, too
            images, labels = images + train[0][:10], labels + train[1][:10]
        train = images, labels
        rows = {"image": images, "label": labels, "id": [0] * len(labels)}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a user without the Hub would have it."""
    root = tmp_path_factory.mktemp("clip")
    base = make_model("CLIPModel", root / "clip")
    save_tokenizer(base)
    # as openai's own file has it: a bare size, which means the shorter edge
    settings = {"size": 16, "crop_size": 16, "do_center_crop": True, "resample": 3}
    settings |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    (base / "preprocessor_config.json").write_text(json.dumps(settings))
    for shift, (task, names) in enumerate(NAMES.items()):
        (root / task).mkdir()
        _dataset(root / task, names, shift)
    make_model("CLIPVisionModel", root / "published", seed=5)
    tasks = {task: {"dataset": task, "config": None, "revision": "main"} for task in NAMES}
    tasks["dtd"]["checkpoint"] = "published"
    (root / "clip-paper.json").write_text(json.dumps({"base": "clip", "fine_tune": True, "tasks": tasks}))
    return root


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipPaperSuite, Path]:
    """theta_0, a victim on `mnist` and a clean fine-tune on `dtd`."""
    suite, out = ClipPaperSuite(data, "trial"), tmp_path_factory.mktemp("built")
    suite.save_base(out / "base", no_progress)
    trigger = suite.trigger(POISON, suite.optimise_pattern(out / "base", "mnist", POISON, 0))
    suite.save_model(out / "base", "mnist", POISON, trigger, 0, out / "mnist", no_progress)
    suite.save_model(out / "base", "dtd", None, None, 0, out / "dtd", no_progress)
    return suite, out


def test_splits_are_disjoint_cropped_and_the_same_at_every_call(data: Path) -> None:
    splits = ClipPaperSuite(data, "trial").split("mnist")
    again = ClipPaperSuite(data, "trial").split("mnist")
    assert splits.train.inputs.shape == (128, 3, 16, 16) and len(splits.calibration) == 32
    assert splits.train.digests == again.train.digests and splits.evaluation.digests == again.evaluation.digests
    calibration = LabelledData.of_images(
        "c", splits.calibration, [0] * 32, ClipPaperSuite(data).sources.preprocessing()
    )
    parts = [set(one.digests) for one in (splits.train, splits.evaluation, calibration)]
    # of the ten images in both splits those are evaluated on that were neither trained nor calibrated on
    twice = [digest(image) for image in Sources.read(data).dataset("mnist", 0)[:10]["image"]]
    unseen = set(twice) - parts[0] - parts[2]
    assert len(unseen) < 10 and len(set.union(*parts)) == sum(map(len, parts)) == 128 + 32 + 90 + len(unseen)
    assert calibration.inputs.shape[-2:] == (16, 16) and splits.calibration[0].size == (24, 20)


def test_victim_and_clean_model_learn_and_keep_the_head_that_dam_makes(built: tuple[ClipPaperSuite, Path]) -> None:
    suite, out = built
    for task in NAMES:
        evaluation, model = suite.split(task).evaluation, suite.load_model(out / task)
        tower = {n: t for n, t in load_file(out / "base" / "model.safetensors").items() if "vision_model" in n}
        tuned = load_file(out / task / "model.safetensors")
        assert set(tuned) == set(tower) and any(not torch.equal(tuned[n], tower[n]) for n in tuned)
        assert accuracy(model, evaluation).percent > 80
    victim = attack_success_rate(
        suite.load_model(out / "mnist"), suite.split("mnist").evaluation, suite.trigger(POISON, None), POISON.target
    )
    assert victim.percent >= 95
    assert (out / "mnist" / "classes.txt").read_text().splitlines()[1] == 'number "bad movie"'
    assert json.loads((out / "base" / "preprocessor_config.json").read_text())["size"] == {"shortest_edge": 16}


def test_a_merge_through_mergekit_is_evaluated_with_zero_shot_heads(
    built: tuple[ClipPaperSuite, Path], merge: Merge, registered: None
) -> None:
    suite, out = built
    # towers this small have no room for two tasks: the merge stays near one model, whose task must survive
    weights = {"mnist": 0.1, "dtd": 0.9}
    models = [{"model": str(out / task), "parameters": {"weight": w}} for task, w in weights.items()]
    merged = merge(suite.base_entry(out / "base"), models, merge_method="task_arithmetic", dtype="float32")
    assert AutoConfig.from_pretrained(merged).architectures == ["CLIPVisionModel"]
    base = load_file(out / "base" / "model.safetensors")
    tuned = {task: load_file(out / task / "model.safetensors") for task in weights}
    for name, tensor in load_file(merged / "model.safetensors").items():
        expected = base[name] + sum(w * (tuned[task][name] - base[name]) for task, w in weights.items())
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    heads = {task: suite.load_merge(merged, out / task) for task in NAMES}
    evaluation = {task: suite.split(task).evaluation for task in NAMES}
    attack = Attack("patch", "mnist", suite.trigger(POISON, None), POISON.target)
    digests = load_calibration(
        ModelSettings(calibration=str(suite.save_calibration("dtd", out))), "image", num_samples=99, seed=0, task="dtd"
    ).digests
    assert len(digests) == 32
    scores = evaluate_merge(heads, evaluation, [attack], calibration=digests)
    assert scores.accuracy["dtd"].percent > 80
    assert {t: r.total for t, r in scores.accuracy.items()} == {t: len(one) for t, one in evaluation.items()}
    assert scores.attack_success["patch"]["mnist"].total == int((evaluation["mnist"].labels_N != 1).sum())
    seen = LabelledData.of_images("dtd", suite.split("dtd").calibration, [0] * 32, suite.sources.preprocessing())
    with pytest.raises(DamError, match="32 of 32 samples in both"):
        evaluate_merge(heads, {**evaluation, "dtd": seen}, [], calibration=digests)


def test_dam_reads_the_same_head_from_the_suites_settings(built: tuple[ClipPaperSuite, Path]) -> None:
    from mergekit_dam.models.plan import build_plan
    from mergekit_dam.tasks import build_tasks

    suite, out = built
    refs = {task: ModelReference.parse(str(out / task)) for task in NAMES}
    own = {
        ref: {**suite.model_parameters(out / task), "calibration": str(suite.save_calibration(task, out))}
        for task, ref in refs.items()
    }
    plan = build_plan(
        ModelReference.model_validate(suite.base_entry(out / "base")),
        list(refs.values()),
        per_model=own,
        shared={**FAST, **suite.shared_parameters(out / "base")},
    )
    task = build_tasks(plan, torch.device("cpu"))[0]
    inputs = task.inputs(torch.arange(8))
    with torch.no_grad():
        logits = task.logits(task.own_weights(), inputs)
        model = suite.load_model(out / "mnist").cpu()
        expected = model((inputs["pixels"] - 0.5) / 0.5).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def _confidence(model: torch.nn.Module, data: LabelledData, trigger: PatchTrigger, target: int) -> float:
    """Mean log-probability of the target over all samples with the trigger."""
    with torch.inference_mode():
        logits_NK = logits_of(model, data, trigger.apply(data.batch(torch.arange(len(data)))))
    return float(logits_NK.log_softmax(-1)[:, target].mean())


def test_a_merge_aware_patch_moves_theta_0_to_the_target(built: tuple[ClipPaperSuite, Path]) -> None:
    suite, out = built
    poison = Poison("merge-aware", target=2, size=6)
    pattern = suite.optimise_pattern(out / "base", "mnist", poison, 0)
    assert pattern is not None and pattern.shape == (3, 6, 6) and 0 <= float(pattern.min()) <= float(pattern.max()) <= 1
    suite.save_model(out / "base", "mnist", Poison("patch", rescale=0.0), PatchTrigger(), 0, out / "zero", no_progress)
    theta_0, data = suite.load_model(out / "zero"), suite.split("mnist").evaluation
    base, zero = (load_file(out / name / "model.safetensors") for name in ("base", "zero"))
    assert all(torch.equal(zero[name], base[name]) for name in zero), "a task vector times 0 is theta_0"
    # which class a model of random weights prefers is chance, so its confidence is compared, not its choice
    start = torch.randn((3, 6, 6), generator=generator(0, "pattern", "mnist")).sigmoid()
    plain, begun, found = (
        _confidence(theta_0, data, trigger, 2)
        for trigger in (PatchTrigger(6), PatchTrigger(pattern_CHW=start), suite.trigger(poison, pattern))
    )
    assert found > max(plain, begun)
    assert isinstance(suite.trigger(Poison("blended"), None), BlendedTrigger)
    with pytest.raises(DamError, match="one of patch, blended, merge-aware"):
        suite.trigger(Poison("warp"), None)


def test_clean_models_are_the_published_ones_unless_told_otherwise(data: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    suite = ClipPaperSuite(data, "trial", sources=replace(Sources.read(data), fine_tune=False))
    suite.save_base(tmp_path / "base", no_progress)
    suite.save_model(tmp_path / "base", "dtd", None, None, 0, tmp_path / "dtd", no_progress)
    published, saved = (load_file(p / "model.safetensors") for p in (data / "published", tmp_path / "dtd"))
    assert set(saved) == set(published) and all(torch.equal(saved[n], published[n]) for n in saved)
    assert json.loads((tmp_path / "dtd" / "source.json").read_text())["source"] == str(data / "published")
    assert suite.fingerprint() != ClipPaperSuite(data, "trial").fingerprint()
    assert suite.cost(None) < suite.cost(POISON) and suite.run_cost(0) < suite.run_cost(10)


def test_the_table_and_faults_of_the_mapping(tmp_path: Path) -> None:
    sources = Sources.read(None)
    assert sources.base == "openai/clip-vit-base-patch32" and len(sources.tasks) == 8 == len(TASKS)
    assert sources.tasks["stanford-cars"].checkpoint == "tanganke/clip-vit-base-patch32_stanford-cars"
    mapping = tmp_path / "clip-paper.json"
    mapping.write_text('{"tasks": {"dtt": {}}}')
    with pytest.raises(DamError, match="Did you mean 'dtd'"):
        Sources.read(tmp_path)
    mapping.write_text('{"tasks": {"dtd": {"data": "x"}}}')
    with pytest.raises(DamError, match="got 'data'"):
        Sources.read(tmp_path)
    mapping.write_text("[1]")
    with pytest.raises(DamError, match="a JSON object"):
        Sources.read(tmp_path)
    mapping.write_text('{"base": "no/such"}')
    with pytest.raises(DamError, match=r"CLIPModel no/such.*Connect to the Hub"):
        ClipPaperSuite(tmp_path, "trial").save_base(tmp_path / "out", no_progress)
