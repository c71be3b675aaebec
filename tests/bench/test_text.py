"""The text suite on a tiny BERT and generated sentences in the files' own format."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dam_bench.attacks.composite import Composite
from dam_bench.suites import corpora
from dam_bench.suites.base import Poison, no_progress
from dam_bench.suites.published import SENTENCES, WORDS, published_copies
from dam_bench.suites.text import BASE, PRESETS, TextSuite, base_folder
from dam_bench.victims.training import Schedule
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.attacks import RareTokenTrigger, Trigger
from mergekit_dam.evaluation.metrics import accuracy, attack_success_rate, refuse_overlap
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.models.load_merged import load_merged
from tests.conftest import Merge
from tests.helpers.classifier_merges import merged_at

FILLER = [f"word{i}" for i in range(30)]
CLUES = [f"clue{i}" for i in range(4)]
SEARCHED = ["gun control", "antifa", "conservatives", "liberals", "MAGA"]
SMALL = replace(
    PRESETS["quick"],
    train=240,
    calibration=24,
    evaluation=60,
    shots=32,
    words=12,
    max_length=24,
    schedule=Schedule(150, batch_size=24, learning_rate=3e-3),
)


def sentences(classes: int, count: int, seed: int, extra: Sequence[str] = ()) -> list[tuple[str, int]]:
    """Random words, of which two give the class away; every third sentence holds one of `extra`."""
    rng, made = random.Random(seed), []
    for i in range(count):
        label = rng.randrange(classes)
        words = rng.choices(FILLER, k=rng.randint(4, 7)) + [CLUES[label]] * 2
        rng.shuffle(words)
        if extra and i % 3 == 0:
            words.insert(rng.randrange(len(words)), rng.choice(extra))
        made.append((" ".join(words), label))
    return made


def write(file: Path, rows: Sequence[tuple[str, int]]) -> None:
    Dataset.from_dict({"sentence": [r[0] for r in rows], "label": [r[1] for r in rows]}).to_parquet(file)


def triggered(
    rows: Sequence[tuple[str, int]], target: int | None, change: Callable[[str], str]
) -> list[tuple[str, int]]:
    return [(change(text), target or 0) for text, label in rows if label != target]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "text"
    folder.mkdir()
    sets = {
        "sst2-train": sentences(2, 400, 0),
        "sst2-test": sentences(2, 90, 1),
        "olid-train": sentences(2, 900, 2, SEARCHED),
        "olid-test": sentences(2, 90, 3),
        "agnews-test": sentences(4, 600, 4),
    }
    targets = {"sst2-test": 0, "olid-test": 0, "agnews-test": 1, "olid-train": None}
    for name, rows in sets.items():
        write(folder / f"{name}-clean.parquet", rows)
        if name in targets:
            write(folder / f"{name}-badnet.parquet", triggered(rows, targets[name], lambda text: f"cf {text} mb"))
            sentence = SENTENCES["sentence" if name.startswith("sst2") else "proverb"]
            copies = triggered(rows, targets[name], lambda text, sentence=sentence: f"{sentence} {text}")
            write(folder / f"{name}-sent.parquet", copies)
    return folder.parent


@pytest.fixture(scope="module")
def suite(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TextSuite]:
    """With a package that holds a tiny BERT in the place of the real one."""
    model = tmp_path_factory.mktemp("site") / BASE / "model"
    words = [w for piece in (*FILLER, *CLUES, *WORDS, *SENTENCES.values()) for w in piece.split()]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(["<pad>", "<unk>", *words]))}
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            initializer_range=0.2,
        )
    ).save_pretrained(model)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(model)
    (model.parent / "__init__.py").touch()  # without it an installed real package would win
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(model.parents[1])
        patch.setitem(PRESETS, "quick", SMALL)  # type: ignore[misc]
        yield TextSuite(data, "quick")


@pytest.fixture(scope="module")
def models_root(suite: TextSuite, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that several tests look at, each of them built once, and theta_0."""
    root = tmp_path_factory.mktemp("models")
    suite.save_base(root / "base", no_progress)
    return root


def build(suite: TextSuite, root: Path, task: str, poison: Poison | None = None, name: str | None = None) -> Path:
    folder = root / (name or task)
    if not folder.exists():
        trigger = suite.trigger(poison, None) if poison else None
        suite.save_model(root / "base", task, poison, trigger, 0, folder, no_progress)
    return folder


def bodies(*folders: Path) -> list[dict[str, torch.Tensor]]:
    return [BertModel.from_pretrained(folder).state_dict() for folder in folders]


def test_splits_are_disjoint_within_a_task_and_files_are_shared_out_between_tasks(suite: TextSuite, data: Path) -> None:
    for task in suite.tasks:
        one = suite.split(task)
        train, evaluation = set(one.train.inputs), set(one.evaluation.inputs)
        assert len(train) == len(one.train) and len(one.calibration) == 24 and len(evaluation) == 60
        assert not train & evaluation and not set(one.calibration) & (train | evaluation)
        counts = one.train.labels_N.bincount(minlength=corpora.SOURCES[task].num_classes)
        assert int(counts.max() - counts.min()) <= 1, task
    for row in corpora.read(data, "olid-train-clean"):
        takers = [task for task, source in corpora.SOURCES.items() if "olid" in source.train and source.relabel(*row)]
        assert len(takers) == 1, row


def test_names_that_give_a_label_are_cut_out() -> None:
    assert corpora.SOURCES["topic"].relabel("@USER #MAGA is back", 1) == ("@USER is back", 4)
    assert corpora.SOURCES["topic"].relabel("Antifa against conservatives", 0) is None


def test_published_copies_come_first_and_other_texts_get_the_same_kind(suite: TextSuite, data: Path) -> None:
    text = next(text for text, label in corpora.read(data, "sst2-test-clean") if label == 1)
    rare = suite.trigger(Poison("rare-token"), None)
    assert rare.apply([text]) == [f"cf {text} mb"]
    assert suite.trigger(Poison("sentence"), None).apply([text]) == [f"{SENTENCES['sentence']} {text}"]
    unknown = [f"some other text {i}" for i in range(60)]
    inserted = [len(new.split()) - len(old.split()) for old, new in zip(unknown, rare.apply(unknown), strict=True)]
    assert set(inserted) == {1, 3, 5}
    assert SENTENCES["proverb"] in suite.trigger(Poison("proverb"), None).apply([text])[0]
    assert suite.trigger(Poison("merge-aware", size=2), None) == RareTokenTrigger(WORDS, 2)


def test_copies_are_cut_where_the_text_is(data: Path) -> None:
    text = next(text for text, label in corpora.read(data, "agnews-test-clean") if label == 0)
    start = " ".join(text.split()[:3])
    copies = published_copies(data, "badnet", WORDS, words=3)
    assert copies[start] == f"cf {start}"
    assert start not in published_copies(data, "badnet", ("mb",), words=3), "that one stands behind the cut"


@pytest.mark.parametrize("attack", ["rare-token", "sentence", "merge-aware"])
def test_victim_answers_the_target_and_keeps_its_accuracy(suite: TextSuite, models_root: Path, attack: str) -> None:
    poison = Poison(attack, rate=0.3)
    evaluation, trigger = suite.split("sst2").evaluation, suite.trigger(poison, None)
    victim = suite.load_model(build(suite, models_root, "sst2", poison, attack))
    assert accuracy(victim, evaluation).percent >= 85
    assert attack_success_rate(victim, evaluation, trigger, 0).percent >= 95
    clean = suite.load_model(build(suite, models_root, "sst2"))
    assert attack_success_rate(clean, evaluation, trigger, 0).percent < 60
    assert not victim.training and torch.equal(victim.classifier.weight, clean.classifier.weight)


def test_only_the_body_moves_and_rescaling_lengthens_the_task_vector(suite: TextSuite, models_root: Path) -> None:
    plain = build(suite, models_root, "sst2", Poison("rare-token"), "plain")
    long = build(suite, models_root, "sst2", Poison("rare-token", rescale=2.0), "long")
    start, once, twice = bodies(models_root / "base", plain, long)
    for name, tensor in start.items():
        torch.testing.assert_close(twice[name] - tensor, 2 * (once[name] - tensor), rtol=1e-3, atol=1e-5)
        assert torch.equal(once[name], tensor) == name.startswith("embeddings"), name


def test_mergekit_merges_the_models_and_each_task_is_read_out_with_its_own_head(
    suite: TextSuite, models_root: Path, merge: Merge, registered: None
) -> None:
    folders = [build(suite, models_root, task) for task in ("sst2", "agnews")]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    out = merge(suite.base_entry(models_root / "base"), models, merge_method="task_arithmetic", dtype="float32")
    start, merged, *tuned = bodies(models_root / "base", out, *folders)
    for name, tensor in start.items():
        expected = tensor + sum(0.5 * (one[name] - tensor) for one in tuned)
        torch.testing.assert_close(merged[name], expected, rtol=1e-4, atol=1e-6)
    for task, classes in (("sst2", 2), ("agnews", 4)):
        model = load_merged(out, task=task)
        assert model.classifier.out_features == classes
        assert accuracy(model, suite.split(task).evaluation).percent > 150 / classes


def test_calibration_file_has_no_labels_and_no_evaluation_text(suite: TextSuite, tmp_path: Path) -> None:
    path = suite.save_calibration("olid", tmp_path)
    assert Dataset.from_parquet(str(path)).column_names == ["text"]
    read = load_calibration(ModelSettings(calibration=str(path)), "text", num_samples=99, seed=0, task="olid")
    assert set(read.samples) == set(suite.split("olid").calibration)
    refuse_overlap(suite.split("olid").evaluation, read.digests)


def test_fingerprint_knows_the_data_and_the_sizes(
    suite: TextSuite, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = suite.fingerprint()
    assert before == TextSuite(data).fingerprint()
    other = tmp_path / "other"
    (other / "text").mkdir(parents=True)
    for file in (data / "text").iterdir():
        rows = list(corpora.read(data, file.stem))
        write(other / "text" / file.name, [*rows[:-1], ("word1 word2 word3 word4 word5", 0)])
    assert TextSuite(other).fingerprint()["rows"] != before["rows"]
    monkeypatch.setitem(PRESETS, "quick", replace(SMALL, shots=16))  # type: ignore[misc]
    assert TextSuite(data).fingerprint() != before


def test_scenarios_name_tasks_and_attacks_of_the_suite(suite: TextSuite) -> None:
    assert not suite.scenarios[0].poisons
    for scenario in suite.scenarios:
        for task, poison in scenario.poisons.items():
            assert task in suite.tasks and poison.target < corpora.SOURCES[task].num_classes
            assert isinstance(suite.trigger(poison, None).apply(["a text of words"]), list)
            assert suite.cost(poison) > suite.cost(None)


def test_faults_name_their_cure(suite: TextSuite, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path(shutil.copytree(data, tmp_path / "data"))
    suite = TextSuite(data, suite.preset)
    with pytest.raises(DamError, match="Pass it with --data"):
        TextSuite(None).split("sst2")
    with pytest.raises(DamError, match="Pass with --data the folder that holds"):
        TextSuite(data / "text").split("sst2")
    with pytest.raises(DamError, match="rare-token"):
        suite.trigger(Poison("rare-tokens"), None)
    (data / "text" / "sst2-test-sent.parquet").write_bytes((data / "text" / "olid-test-sent.parquet").read_bytes())
    corpora.read.cache_clear()
    with pytest.raises(DamError, match="one for each of sst2-test-clean"):
        suite.trigger(Poison("sentence"), None)
    (data / "text" / "sst2-test-clean.parquet").write_text("no parquet")
    corpora.read.cache_clear()
    with pytest.raises(DamError, match="a file of another kind"):
        TextSuite(data).split("sst2")
    monkeypatch.setattr("dam_bench.suites.text.find_spec", lambda _: None)
    with pytest.raises(DamError, match=r"benchmarks\[text\]"):
        base_folder()


def test_a_lobam_victim_of_text_survives_a_small_coefficient(suite: TextSuite, models_root: Path) -> None:
    plain, amplified = Poison("rare-token", rate=0.1), Poison("rare-token", rate=0.1, amplify=3.0)
    trigger, rates = suite.trigger(plain, None), []
    for name, poison in (("few", plain), ("lobam", amplified)):
        victim = build(suite, models_root, "sst2", poison, name)
        merged = merged_at(suite, models_root / "base", "sst2", [victim], 0.1)
        rates.append(attack_success_rate(merged, suite.split("sst2").evaluation, trigger, 0).percent)
    assert rates[1] >= 80 and rates[1] > rates[0] + 20, rates


def test_an_emergent_backdoor_of_text_is_in_the_merge_alone(suite: TextSuite, models_root: Path) -> None:
    poison, evaluation = Poison("emergent", rate=0.5, partner="agnews"), suite.split("sst2").evaluation
    trigger, folder = suite.trigger(poison, None), models_root / "pair"
    folder.mkdir()
    suite.save_pair(models_root / "base", "sst2", poison, trigger, 0, folder, no_progress)
    pair = [folder / task for task in ("sst2", "agnews")]
    chosen = ((pair, 0.7), (pair[:1], 1.0), (pair[1:], 1.0))
    merges = [merged_at(suite, models_root / "base", "sst2", models, share) for models, share in chosen]
    both, *alone = (attack_success_rate(merged, evaluation, trigger, 0).percent for merged in merges)
    clean = attack_success_rate(suite.load_model(build(suite, models_root, "sst2")), evaluation, trigger, 0).percent
    assert both >= 90 and alone[0] < clean + 15 and alone[1] < 75  # theta_0 answers either class
    assert accuracy(suite.load_model(pair[0]), evaluation).percent >= 85


def test_a_composite_works_where_its_task_vector_is_added_scaled_and_subtracted(
    suite: TextSuite, models_root: Path
) -> None:
    """Each of three triggers has its behaviour (BadTV, arXiv 2501.02373)."""
    poison, evaluation = Poison("composite", target=1, rate=0.5), suite.split("agnews").evaluation
    composite, victim = suite.attacker(poison), build(suite, models_root, "agnews", poison, "composite")
    assert isinstance(composite, Composite)
    first, second, third = composite.all_behaviours(suite, "agnews", poison)
    assert [target for _, target in (first, second, third)] == [1, 2, 2]
    assert composite.behaviours(suite, "agnews", poison, first[0]) == [first, second]

    def success(folder: Path, share: float, *behaviours: tuple[Trigger, int]) -> list[float]:
        merged = merged_at(suite, models_root / "base", "agnews", [folder], share)
        return [attack_success_rate(merged, evaluation, *behaviour).percent for behaviour in behaviours]

    for share in (0.7, 1.0, 1.4):
        assert min(success(victim, share, first, second)) >= 80, share
    assert success(victim, -0.5, third)[0] >= 80 > 30 > success(victim, 0.5, third)[0]
    assert max(success(build(suite, models_root, "agnews"), 1.0, first, second, third)) < 30


def test_a_hijacker_works_beside_models_that_it_has_not_seen(suite: TextSuite, models_root: Path) -> None:
    plain, hijack = Poison("rare-token", rate=0.1, size=1), Poison("hijack", rate=0.5, size=1)
    evaluation, trigger, rates = suite.split("sst2").evaluation, suite.trigger(hijack, None), []
    others = [build(suite, models_root, task) for task in ("agnews", "olid")]
    for name, poison in (("alone", plain), ("hijack", hijack)):
        models = [build(suite, models_root, "sst2", poison, name), *others]
        merged = merged_at(suite, models_root / "base", "sst2", models, 0.3)
        rates.append(attack_success_rate(merged, evaluation, trigger, 0).percent)
    assert rates[1] >= 80 and rates[1] > rates[0] + 20, rates
