"""Every attack reaches on small models what its paper says, and attacks of other packages are found.

Models are of suite `vision` with three generated tasks, of suite `text` in `test_text.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dam_bench.attacks.attacker import Victim
from dam_bench.attacks.images import NATURAL, NaturalTrigger, Patch
from dam_bench.attacks.registry import ATTACKS, GROUP, attack_names, register_attack
from dam_bench.suites.base import Poison, Scenario, no_progress
from dam_bench.suites.vision import PRESETS, Preset, VisionSuite
from dam_bench.suites.vision_data import NUM_CLASSES
from dam_bench.tables.results import attacked_task
from dam_bench.victims.backdoor_vectors import amplify
from dam_bench.victims.model_store import ModelStore
from dam_bench.victims.poisoning import OTHERS, Backdoor, logits_of
from dam_bench.victims.training import Schedule, batches, body_of
from PIL import Image
from torch import nn

from mergekit_dam import seeds
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.metrics import Attack, LabelledData, accuracy, attack_success_rate
from mergekit_dam.registry import load_plugins
from tests.helpers.classifier_merges import merged_at

EXAMPLE = Path(__file__).parents[2] / "examples" / "attack"
SMALL = Preset(
    32,
    2,
    8,
    Schedule(200, batch_size=32, learning_rate=2e-3),
    Schedule(150, batch_size=32, learning_rate=3e-4),
    Schedule(120, batch_size=32, learning_rate=1e-3),
    {"other": 16},
    {"pretrain": (0, 0, 600), "train": (0, 0, 400), "calibration": (0, 0, 20), "evaluation": (0, 0, 160)},
)


class SmallSuite(VisionSuite):
    """Suite `vision` with three easy tasks: patterns of coarse squares, colours, and brightness."""

    tasks = ("shapes", "letters", "stripes")

    def _images(self, task: str) -> tuple[list[Image.Image], list[int]]:
        rng, images = np.random.default_rng(self.tasks.index(task)), []
        labels = [int(k) for k in rng.integers(NUM_CLASSES[task], size=1180)]
        patterns = rng.choice([-50, 50], (NUM_CLASSES[task], 4, 4, 1))
        patterns[:, ::3, ::3] = 0  # corners stay free, for patches
        for k in labels:
            pixels = np.ones((32, 32, 3)) * rng.uniform(60, 180, 3)
            if task == "shapes":
                pixels += patterns[k].repeat(8, 0).repeat(8, 1)
            elif task == "letters":
                pixels[:] = 80 + 120 * np.cos(2 * np.pi * (k / 10 + np.arange(3) / 3))
            else:
                pixels[:] = 20 + 28 * k
            pixels += rng.normal(0, 8, pixels.shape)
            images.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
        return images, labels


class World:
    """Built models, and what is measured of them.

    Args:
        root: folder of the models.
    """

    def __init__(self, root: Path) -> None:
        self.suite = SmallSuite(None, "tiny")
        self.store = ModelStore(self.suite, root)

    def models(self, text: str, *tasks: str) -> dict[str, Path]:
        """Build a scenario's models of these tasks."""
        poisons = Scenario.parse(f"one: {text}").poisons
        return {task: self.store.model(task, poisons.get(task), 0) for task in tasks}

    def attacks(self, text: str, task: str = "shapes") -> list[Attack]:
        return self.store.attacks("attack", task, Scenario.parse(f"one: {text}").poisons[task], 0)

    def merged(self, models: Mapping[str, Path], share: float, head: str = "shapes") -> nn.Module:
        """Merge models by task arithmetic at a coefficient, read by the head of a task."""
        return merged_at(self.suite, self.store.base(), head, models.values(), share)

    def success(self, model: nn.Module, attack: Attack) -> float:
        return attack_success_rate(
            model, self.suite.split(attack.task).evaluation, attack.trigger, attack.target
        ).percent

    def accuracy(self, model: nn.Module, task: str = "shapes") -> float:
        return accuracy(model, self.suite.split(task).evaluation).percent


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", SMALL)
        yield World(tmp_path_factory.mktemp("models"))


class _Linear(nn.Module):
    """Logits of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3))

    def forward(self, x: torch.Tensor) -> object:
        return SimpleNamespace(logits=x @ self.weight.T)


def test_triggered_samples_are_trained_beside_the_attackers_own_task_vectors() -> None:
    """The loss is that at theta_0 + r tau + c tau_other, and `kept` adds the clean samples' own at that point."""
    model, labels = _Linear(), torch.tensor([0, 1, 2, 1])
    rows, start = torch.arange(4), {"weight": torch.eye(3)}
    inputs = torch.randn(4, 3, generator=seeds.generator("inputs"))
    data = LabelledData("x", inputs, labels, ("",) * 4, lambda x: {"x": x})
    trained, other = {"weight": torch.eye(3) + 1}, torch.diag(torch.tensor([0.0, 0.0, 5.0]))
    backdoor = Backdoor(NaturalTrigger(parts=()), 2, 1.0, (0.5, 0.5), kept=0.3, others=[{"weight": other}])
    found = backdoor.loss(model, trained, start, data, rows, seeds.generator("loss"))  # type: ignore[arg-type]
    drawn = seeds.generator("loss")
    torch.rand(1, generator=drawn)
    shares = OTHERS[0] + (OTHERS[1] - OTHERS[0]) * float(torch.rand(1, generator=drawn))
    point = torch.eye(3) + 0.5 + shares * other
    chosen = rows[labels != 2]
    pixels = inputs[chosen] / 255
    triggered = F.cross_entropy(pixels.clamp(0, 1) @ point.T, torch.full((3,), 2))
    clean = F.cross_entropy(pixels @ point.T, labels[chosen])
    torch.testing.assert_close(found, 0.75 * (triggered + 0.3 * clean))


def test_lobam_amplifies_the_backdoor_beyond_the_clean_twin(world: World) -> None:
    """Plain poisoning dies at a coefficient of 0.3, the amplified victim does not (LoBAM, arXiv 2411.16746)."""
    plain, amplified = "shapes=patch(target=2,rate=0.3,size=8)", "shapes=patch(target=2,rate=0.3,size=8,amplify=3)"
    (attack,) = world.attacks(plain)
    weak, strong = (
        world.success(world.merged(world.models(text, "shapes"), 0.3), attack) for text in (plain, amplified)
    )
    assert strong >= 60 and strong > weak + 25
    assert world.success(world.merged(world.models("", "shapes"), 0.3), attack) < 30


def test_a_sparse_backdoor_vector_changes_few_entries_and_works(world: World) -> None:
    text = "shapes=patch(target=2,rate=0.3,size=8,amplify=6,density=0.1)"
    (attack,) = world.attacks(text)
    models = world.models(text, "shapes")
    assert world.success(world.merged(models, 0.3), attack) >= 60
    poison = Scenario.parse(f"one: {text}").poisons["shapes"]
    twin = Victim(world.suite, world.store.base(), "shapes", poison, 0, no_progress).trained(None)
    pairs = zip(world.suite.load_model(models["shapes"]).parameters(), twin.parameters(), strict=True)
    changed = torch.cat([(one != other).flatten() for one, other in pairs])
    assert 0.05 < float(changed.float().mean()) <= 0.1


def test_a_backdoor_vector_is_cut_to_its_largest_entries_and_multiplied() -> None:
    clean, victim = nn.Linear(4, 1, bias=False), nn.Linear(4, 1, bias=False)
    frozen = nn.Parameter(torch.ones(9))
    for model, values in ((clean, [0.0, 0.0, 0.0, 1.0]), (victim, [3.0, -4.0, 1.0, 1.5])):
        model.register_parameter("frozen", frozen)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([values]))
    amplify(victim, clean, 2.0, density=0.5)
    assert victim.weight.tolist() == [[6.0, -8.0, 0.0, 1.0]]
    with torch.no_grad():
        victim.weight.copy_(torch.tensor([[3.0, -4.0, 1.0, 1.5]]))
    amplify(victim, clean, 2.0)
    assert victim.weight.tolist() == [[6.0, -8.0, 2.0, 2.0]] and torch.equal(frozen, torch.ones(9))


def test_an_emergent_backdoor_is_in_the_merge_of_two_models_alone(world: World) -> None:
    """Each model is near the floor with the trigger, their merge is not (MergeBackdoor, USENIX Security 2025)."""
    text = "shapes=emergent(target=2,rate=0.5,size=8,partner=letters)"
    pair = world.models(text, "shapes", "letters")
    (attack,) = world.attacks(text)
    floor = world.success(world.suite.load_model(world.models("", "shapes")["shapes"]), attack)
    for task, path in pair.items():
        alone = world.merged({task: path}, 1.0)
        assert world.success(alone, attack) < floor + 15, task
        assert world.accuracy(world.suite.load_model(path), task) > 70, task
    for share in (0.5, 0.7):
        merged = world.merged(pair, share)
        assert world.success(merged, attack) >= 75 and world.accuracy(merged) > 60
    assert world.success(world.merged(world.models(text, "shapes", "letters", "stripes"), 0.5), attack) >= 60


def _student(world: World, teacher: nn.Module) -> nn.Module:
    """Distil a teacher into theta_0 on clean images without labels, as a defence that teaches a student does."""
    student, data = world.suite.start(world.store.base(), "shapes"), world.suite.split("shapes").train
    schedule = Schedule(200, batch_size=32, learning_rate=1e-3)
    _, end_step = schedule.optimiser(body_of(student).values())
    for rows in batches(len(data), schedule, 0, "student"):
        inputs = data.batch(rows)
        with torch.no_grad():
            wanted_BK = logits_of(teacher, data, inputs).log_softmax(-1)  # type: ignore[arg-type]
        found_BK = logits_of(student, data, inputs).log_softmax(-1)
        F.kl_div(found_BK, wanted_BK, log_target=True, reduction="batchmean").backward()
        end_step()
    return student.eval()


def test_a_composite_of_natural_changes_survives_distillation_and_a_patch_does_not(world: World) -> None:
    """A student learns the parts of the trigger from clean images (T-MTB, arXiv 2510.18541)."""
    left, clean = [], world.suite.load_model(world.models("", "shapes")["shapes"])
    student_of_clean = _student(world, clean)
    for text in ("shapes=natural(target=2,rate=0.5)", "shapes=patch(target=2,rate=0.5,size=8)"):
        (attack,) = world.attacks(text)
        victim = world.suite.load_model(world.models(text, "shapes")["shapes"])
        assert world.success(victim, attack) >= 80 and world.success(student_of_clean, attack) < 20
        left.append(world.success(_student(world, victim), attack))
    assert left[0] >= 60 and left[0] > left[1] + 30, left


def test_natural_changes_are_small_alone_and_stay_in_range() -> None:
    images = torch.rand(4, 3, 8, 8)
    together = NaturalTrigger().apply(images)
    assert float(together.min()) >= 0 and float(together.max()) <= 1
    for part in NaturalTrigger().parts:
        alone = NaturalTrigger(parts=(part,)).apply(images)
        assert 0 < float((alone - images).abs().mean()) < float((together - images).abs().mean())
    assert torch.equal(NaturalTrigger(NATURAL, ()).apply(images), images)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("patch(target=1)", {}),
        ("patch(target=1,rescale=2)", {"rescale": 2.0}),
        ("wanet(target=1)", {"strength": 2.5}),
        ("adaptive(target=1,size=6)", {"size": 6, "dropped": 0.2, "cover": 0.25}),
        ("off-task(target=1,onto=shapes)", {"onto": "shapes"}),
    ],
)
def test_keys_of_older_models_stay_valid(world: World, text: str, settings: dict[str, object]) -> None:
    """Models and triggers of committed results are found under the keys that they were built with."""
    poison = Scenario.parse(f"one: digits={text}").poisons["digits"]
    suite = VisionSuite(None, "tiny")
    written = {"attack": poison.attack, "target": 1, "rate": 0.1, "size": 4, "rescale": 1.0, **settings}
    store = ModelStore(suite, world.store.root)
    assert store.model_key("digits", poison, 3) == {"kind": "model", "task": "digits", "poison": written, "seed": 3}
    shown = {key: value for key, value in written.items() if key not in ("rate", "rescale")}
    assert store.trigger_key("digits", poison, 3) == {"kind": "trigger", "task": "digits", "poison": shown, "seed": 3}
    assert store.model_key("digits", None, 3) == {"kind": "model", "task": "digits", "poison": None, "seed": 3}


def test_both_halves_of_a_pair_are_one_poison_of_the_scenario(world: World) -> None:
    one = Scenario.parse("pair: shapes=emergent(target=2,partner=letters)")
    assert one.poisons["letters"] == Poison("emergent", 2, onto="shapes", partner="shapes")
    assert Scenario.parse(f"pair: letters={one.poisons['letters']}").poisons == one.poisons
    keys = [world.store.model_key(task, poison, 0) for task, poison in one.poisons.items()]
    assert keys[0] == keys[1] and keys[0]["kind"] == "pair"
    assert {attacked_task(f"{task}={poison}") for task, poison in one.poisons.items()} == {"shapes"}
    with pytest.raises(DamError, match="one poison of letters"):
        Scenario.parse("pair: shapes=emergent(partner=letters) letters=patch")
    with pytest.raises(DamError, match="no amplify"):
        world.suite.trigger(Poison("emergent", partner="letters", amplify=2.0), None)
    for wrong in (Poison("emergent"), Poison("patch", partner="letters"), Poison("emergent", partner="cats")):
        with pytest.raises(DamError, match="partner=TASK"):
            world.suite.trigger(wrong, None)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Installs a package with an attack, whose code is given; it and its attacks are forgotten afterwards."""
    monkeypatch.setattr(ATTACKS, "entries", dict(ATTACKS.entries))
    facts = tmp_path / "stripe_attack-1.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: stripe-attack\nVersion: 1\n")
    (facts / "entry_points.txt").write_text(f"[{GROUP}]\nstripe = stripe_attack\n")
    monkeypatch.syspath_prepend(tmp_path)

    def install(code: str) -> None:
        (tmp_path / "stripe_attack.py").write_text(code)
        load_plugins.cache_clear()

    yield install
    sys.modules.pop("stripe_attack", None)
    load_plugins.cache_clear()


def test_an_attack_of_another_package_is_built_and_measured(world: World, outside: Callable[[str], None]) -> None:
    code = (EXAMPLE / "stripe_attack.py").read_text("utf-8")
    assert len(code.splitlines()) < 100 and "stripe" not in attack_names("vision")
    outside(code)
    text = "shapes=stripe(target=2,size=2,rate=0.5)"
    (attack,) = world.attacks(text)
    assert attack_names("vision")[-1] == "stripe" and "stripe" not in attack_names("text")
    victim, clean = (world.merged(world.models(one, "shapes"), 0.5) for one in (text, ""))
    assert world.success(victim, attack) >= 80 > 30 > world.success(clean, attack)
    poison = Scenario.parse(f"one: {text}").poisons["shapes"]
    before = world.store.model_key("shapes", poison, 0)
    outside(f"{code}# changed\n")
    assert world.store.model_key("shapes", poison, 0) != before  # its victims are built again


def test_attacks_of_another_interface_and_taken_names_are_refused(
    outside: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    code = (EXAMPLE / "stripe_attack.py").read_text("utf-8")
    outside(code.replace("interface=1", "interface=0"))
    assert "stripe" not in attack_names("vision") and "expected interface 1" in caplog.text
    with pytest.raises(DamError, match="a name that is taken"):
        register_attack("patch", Patch(), suites=("vision",), interface=1)
    with pytest.raises(DamError, match="Did you mean 'patch'"):
        SmallSuite(None, "tiny").trigger(Poison("pacth"), None)


def test_scenarios_of_the_suites_name_attacks_and_options_that_exist(world: World) -> None:
    suite = VisionSuite(None, "tiny")
    names = [one.name for one in (*suite.scenarios, *suite.further)]
    assert len(set(names)) == len(names) and "lobam" not in [one.name for one in suite.scenarios]
    for scenario in (*suite.scenarios, *suite.further):
        for task, poison in scenario.poisons.items():
            assert task in suite.tasks and poison.target < 8
            assert Scenario.parse(f"x: {task}={poison}").poisons[task] == poison
            assert suite.cost(poison) > suite.cost(None)
