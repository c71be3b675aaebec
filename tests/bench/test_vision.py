"""Suite `vision` and the runner, on a preset so small that everything is built in seconds."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from dam_bench.cli import bench
from dam_bench.runs import vaccine
from dam_bench.runs.command import _chosen
from dam_bench.runs.run import Job, perform
from dam_bench.runs.scans import scanned, table
from dam_bench.suites import classifiers, vision
from dam_bench.suites.base import Poison, Scenario
from dam_bench.suites.vision import PRESETS, VisionSuite
from dam_bench.suites.vision_data import flipped_and_shifted
from dam_bench.tables.gates import Gate
from dam_bench.tables.results import attacked_task
from dam_bench.victims.model_store import ModelStore
from datasets import Dataset
from PIL import Image

from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.metrics import attack_success_rate
from mergekit_dam.seeds import generator

SIZES = PRESETS["tiny"].sizes


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in for CIFAR-10: noise whose brightness is the class."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "vision").mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 240), ("test", 60)):
        rows = []
        for i in range(count):
            pixels = rng.normal(20 + 22 * (i % 10), 8, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": i % 10})
        Dataset.from_list(rows).to_parquet(folder / "vision" / f"cifar10-{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def suite(data: Path) -> VisionSuite:
    return VisionSuite(data, "tiny")


@pytest.fixture(scope="module")
def store(suite: VisionSuite, tmp_path_factory: pytest.TempPathFactory) -> ModelStore:
    """Models that several tests look at, each of them built once."""
    return ModelStore(suite, tmp_path_factory.mktemp("store"))


@pytest.fixture
def based(store: ModelStore, tmp_path: Path) -> Path:
    """A folder of models that holds theta_0 alone."""
    base = store.base()
    shutil.copytree(base, tmp_path / base.relative_to(store.root))
    return tmp_path


def test_splits_are_disjoint_and_the_same_each_time(data: Path, suite: VisionSuite) -> None:
    again = VisionSuite(data, "tiny")
    for task in suite.tasks:
        split = suite.split(task)
        sizes = [len(split.train), len(split.calibration), len(split.evaluation)]
        column = {"cifar10": 0, "digits": 1}.get(task, 2)
        assert sizes == [SIZES[name][column] for name in ("train", "calibration", "evaluation")]
        assert split.evaluation.digests == again.split(task).evaluation.digests
        assert not set(split.train.digests) & set(split.evaluation.digests)


@pytest.mark.parametrize("attack", ["patch", "blended", "wanet", "merge-aware", "adaptive", "off-task"])
def test_every_attack_reaches_its_victim(suite: VisionSuite, store: ModelStore, attack: str) -> None:
    """The victim of shapes answers with the target where its clean twin does not, off-task with the head of stripes."""
    poison = Poison(attack, target=2, rate=1.0, size=6, onto="stripes" if attack == "off-task" else "")
    trigger = store.trigger("shapes", poison, 0)
    attacked = poison.onto or "shapes"
    evaluation = suite.split(attacked).evaluation
    rates = []
    for one in (poison, None):
        model = suite.load_model(store.model("shapes", one, 0))
        if poison.onto:
            head = suite.load_model(store.model(attacked, None, 0)).get_submodule("classifier")
            model.register_module("classifier", head)
        rates.append(attack_success_rate(model, evaluation, trigger, 2).percent)
    assert rates[0] > max(rates[1], 60.0)


def test_a_scan_beside_the_clean_twin_tells_both_scores(store: ModelStore) -> None:
    found = scanned(store, "shapes", Poison("patch", target=2, rate=1.0, size=6), 0)
    (shared,) = {one["shared"] for one in found["findings"]}
    assert shared >= 0 and found["target"] == 2 and found["attack_success"][0] > 0.6 * found["attack_success"][1]
    alone = max(one["suspicion"] for one in found["findings"]) + shared
    for threshold, over in ((alone - 1e-6, 1), (alone + 1e-6, 0)):
        row = f"| tiny | patch | {over} of 1 | {over if shared == 0 else 0} of 1 |"
        assert row in table([found], threshold).splitlines()


def test_models_are_built_once_and_found_by_content(data: Path, suite: VisionSuite, based: Path) -> None:
    store = ModelStore(suite, based)
    assert not store.has_model("digits", None, 0)
    first = store.model("digits", None, 0)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert store.has_model("digits", None, 0) and not store.has_model("digits", None, 1)
    assert ModelStore(VisionSuite(data, "tiny"), based).model("digits", None, 0) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written


def test_an_interrupted_build_leaves_nothing_that_looks_finished(
    suite: VisionSuite, based: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ModelStore(suite, based)
    monkeypatch.setattr(classifiers, "fine_tune", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.model("stripes", None, 0)
    monkeypatch.undo()
    assert not [path for path in based.rglob("stripes*") if path.is_dir()]


def _interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_a_rescaled_victim_has_a_longer_task_vector(suite: VisionSuite, store: ModelStore) -> None:
    base = suite.load_model(store.model("letters", Poison("patch"), 0)).state_dict()
    scaled = suite.load_model(store.model("letters", Poison("patch", rescale=2.0), 0)).state_dict()
    start = vision.ViTModel.from_pretrained(store.base()).state_dict()
    name = next(n for n in base if n.endswith("weight") and n.startswith("vit.") and base[n].ndim == 2)
    once, twice = base[name] - start[name[4:]], scaled[name] - start[name[4:]]
    assert torch.allclose(twice, 2 * once, atol=1e-5) and bool(once.abs().max() > 0)


def test_scenarios_are_read_from_text() -> None:
    one = Scenario.parse("mine: cifar10=merge-aware(target=3, rate=0.2) digits=patch(size=5)")
    assert one.poisons == {"cifar10": Poison("merge-aware", 3, 0.2), "digits": Poison("patch", size=5)}
    assert Scenario.parse(f"again: cifar10={one.poisons['cifar10']}").poisons["cifar10"] == one.poisons["cifar10"]
    off_task = Scenario.parse("off: shapes=off-task(target=3,onto=cifar10)").poisons["shapes"]
    assert off_task == Poison("off-task", 3, onto="cifar10") and str(off_task) == "off-task(target=3,onto=cifar10)"
    assert attacked_task(f"shapes={off_task}") == "cifar10" and attacked_task("digits=patch(target=1)") == "digits"
    assert "onto" not in Poison("patch").to_json() and off_task.to_json()["onto"] == "cifar10"
    assert Scenario.parse("clean:").poisons == {}
    for wrong in ("no colon", "x: cifar10", "x: cifar10=patch(colour=1)", "x: cifar10=patch(size=red)"):
        with pytest.raises(DamError):
            Scenario.parse(wrong)


def test_augmentation_keeps_shape_and_range() -> None:
    images = torch.rand(4, 3, 32, 32, generator=generator("images"))
    changed = flipped_and_shifted(images, generator("augment"))
    assert changed.shape == images.shape and not torch.equal(changed, images)
    assert float(changed.min()) >= 0 and float(changed.max()) <= 1


def test_the_command_builds_merges_measures_and_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        "vision",
        "--data",
        str(data),
        "--out",
        str(tmp_path),
        "--seeds",
        "0",
        "--no-gates",
        "--workers",
        "2",
        "--preset",
        "tiny",
        "--scenario",
        "clean",
        "--scenario",
        "patch",
        "--method",
        "ties-0.5",
    ]
    told = CliRunner().invoke(bench, [*arguments, "--dry-run"])
    assert told.exit_code == 0 and "6 of 6 models to build" in told.stderr and not told.stdout
    done = CliRunner().invoke(bench, [*arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    results = sorted((tmp_path / "results").rglob("*.json"))
    facts = json.loads(done.stdout)
    assert (facts["models"], facts["models_to_build"]) == (6, 6) and facts["runs"] == facts["runs_to_do"] == len(
        results
    )
    assert sorted(facts["results"]) == [str(path) for path in results] and facts["gates"] == []
    written = {path: path.stat().st_mtime_ns for path in results}
    clean = json.loads((tmp_path / "results" / "vision-tiny" / "clean" / "ties-0.5-seed0.json").read_text())
    assert set(clean["accuracy"]) == set(VisionSuite.tasks) and len(clean["attack_success"]) > 5
    poisoned = json.loads((tmp_path / "results" / "vision-tiny" / "patch" / "ties-0.5-seed0.json").read_text())
    assert list(poisoned["attack_success"]) == ["digits=patch(target=1,rate=1)"] and poisoned["wall_s"] > 0
    again = CliRunner().invoke(bench, arguments)
    assert again.exit_code == 0 and "0 of 6 models to build, 0 of " in again.stderr
    assert again.stdout.splitlines() == facts["results"]
    assert {path: path.stat().st_mtime_ns for path in results} == written
    shutil.rmtree(tmp_path / "models")  # which no run needs any more
    gone = CliRunner().invoke(bench, arguments)
    assert gone.exit_code == 0 and "0 of 6 models to build, 0 of " in gone.stderr
    for wrong in (["--method", "tise"], ["--scenario", "ptach"], ["--preset", "huge"], ["--seeds", "a"]):
        failed = CliRunner().invoke(bench, [*arguments, *wrong])
        assert failed.exit_code == 1 and "expected" in failed.stderr
    weak = CliRunner().invoke(bench, [*arguments, "--gates", "--json"])
    assert weak.exit_code == 1 and "clean: fine-tunes above theta_0" in weak.stderr and not weak.stdout
    monkeypatch.setattr("dam_bench.runs.command.check_gates", lambda _: [Gate("gain", True, "12.0", ">= 10.0")])
    strong = json.loads(CliRunner().invoke(bench, [*arguments, "--gates", "--json"]).stdout)
    assert strong["gates"] == [{"name": "gain", "passed": True, "measured": "12.0", "wanted": ">= 10.0"}]
    # the gates need further undefended merges, which the command before this one made
    assert set(facts["results"]) < set(strong["results"]) and strong["runs_to_do"] == 0


def test_single_models_are_vaccinated_and_measured_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [part for name in ("plant_steps=2", "unlearn_steps=2", "triggers=2") for part in ("--set", name)]
    arguments = ["vision", "--data", str(data), "--out", str(tmp_path), "--preset", "tiny", "--seeds", "0", *short]
    done = CliRunner().invoke(vaccine.main, [*arguments, "--model", "letters=patch(target=1)", "--model", "letters"])
    assert done.exit_code == 0, done.output
    victim, clean = (json.loads(Path(line).read_text()) for line in done.stdout.splitlines())
    for found in (victim, clean):
        assert set(found["before"]["accuracy"]) == set(found["after"]["accuracy"]) == {"letters"}
        assert found["vaccine"]["settings"]["plant_steps"] == 2 and "calibration" not in found["vaccine"]
    assert victim["poison"] == "patch(target=1)" and set(victim["after"]["attack_success"]) == {"attack"}
    assert clean["poison"] is None and not clean["after"]["attack_success"]
    monkeypatch.setattr(vaccine, "run", _interrupted)  # what is there is not done again
    again = CliRunner().invoke(vaccine.main, [*arguments, "--model", "letters=patch(target=1)"])
    assert again.exit_code == 0 and again.stdout.splitlines() == done.stdout.splitlines()[:1]
    shown = CliRunner().invoke(vaccine.main, ["--table", str(tmp_path / "vaccine")]).stdout.splitlines()
    assert len(shown) == 4 and sum("letters=patch(target=1)" in line for line in shown) == 1
    assert CliRunner().invoke(vaccine.main, ["vision", "--out", str(tmp_path)]).exit_code == 2


def test_cleaned_models_are_made_once_and_merged_by_any_method(data: Path, store: ModelStore, tmp_path: Path) -> None:
    scenario = Scenario("patch", {"letters": Poison("patch", target=1)})
    cleaned = "clean(start=base,plant=false,plant_steps=1,unlearn_steps=1,triggers=2)"
    found, times = {}, []
    for method in ("ties-0.5", f"{cleaned}+ties-0.5", f"{cleaned}+linear", f"{cleaned}+fine-tuned"):
        job = Job("vision", "tiny", data, store.root, tmp_path, scenario, (scenario,), method, seed=0, threads=1)
        found[method] = json.loads(Path(perform(job)).read_text())
        times.append(sorted(file.stat().st_mtime_ns for file in store.root.glob("vision/cleaned/**/complete.json")))
    plain, ties, linear, alone = found.values()
    assert alone["wall_s"] is None and alone["accuracy"] != ties["accuracy"]
    assert "cleaned" not in plain and ties["cleaned"]["start"] == "base" and ties["settings"] == plain["settings"]
    assert ties["accuracy"] != plain["accuracy"] and ties["accuracy"] != linear["accuracy"]
    assert times[0] == [] and len(times[1]) == len(VisionSuite.tasks) and times[2] == times[3] == times[1]


def test_pairs_and_composites_are_merged_and_every_behaviour_is_measured(
    data: Path, store: ModelStore, tmp_path: Path
) -> None:
    text = "two: letters=emergent(target=1,partner=stripes) shapes=composite(target=2)"
    scenario = Scenario.parse(text)
    job = Job("vision", "tiny", data, store.root, tmp_path, scenario, (scenario,), "ties-0.5", seed=0, threads=1)
    found = json.loads(Path(perform(job)).read_text())
    halves = {f"{task}={poison}" for task, poison in scenario.poisons.items()}
    assert found["poisons"].keys() == {"letters", "stripes", "shapes"}
    assert found["attack_success"].keys() == halves | {"shapes=composite(target=2)#2"}
    pair = [found["attack_success"][name] for name in halves if "emergent" in name]
    assert pair[0] == pair[1] and {attacked_task(name) for name in halves} == {"letters", "shapes"}
    folders = store.models(scenario, 0)
    assert folders["letters"].parent == folders["stripes"].parent and folders["letters"].name == "letters"
    assert len(_chosen(["lobam"], store.suite.further)) == 1


def test_rival_defences_are_runs_like_others(data: Path, store: ModelStore, tmp_path: Path) -> None:
    scenario = Scenario("patch", {"letters": Poison("patch", target=1)})
    found = {}
    for method in ("wag", "linear", "lfpm(steps=1,start=ties-0.5)"):
        job = Job("vision", "tiny", data, store.root, tmp_path, scenario, (scenario,), method, seed=0, threads=1)
        found[method] = json.loads(Path(perform(job)).read_text())
    wag, linear, lfpm = found.values()
    assert wag["accuracy"] == linear["accuracy"] and wag["defence"] == "wag" and "defence" not in linear
    assert (wag["calibration_samples"], lfpm["calibration_samples"]) == (0, SIZES["calibration"][0])
    assert lfpm["settings"]["start"] == "ties-0.5" and lfpm["settings"]["steps"] == 1 and lfpm["settings"]["eps"] > 0
    assert lfpm["wall_s"] > 0 and lfpm["peak_bytes"] is not None and set(lfpm["accuracy"]) == set(VisionSuite.tasks)


def test_missing_data_name_the_cure() -> None:
    with pytest.raises(DamError, match="--data"):
        VisionSuite(None, "tiny").split("cifar10")


@pytest.mark.parametrize(
    "poison", [Poison("off-task"), Poison("patch", onto="cifar10"), Poison("off-task", onto="cats")]
)
def test_an_off_task_attack_names_another_task_and_no_other_attack_does(poison: Poison, data: Path) -> None:
    with pytest.raises(DamError, match="onto=TASK"):
        VisionSuite(data, "tiny").trigger(poison, None)
