"""One writer per output, none over an input, and no stale file beside new ones."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import pytest
import transformers
from filelock import FileLock
from safetensors.torch import load_file

import mergekit_dam
from mergekit_dam.errors import DamError
from mergekit_dam.plugin.output import OutputLocks, place_artifact, remove_stale_files
from tests.conftest import FAST, Merge

RECIPE = {**FAST, "scan_steps": 2, "steps": 1}


class _Life:
    """Something that lives as long as a merge."""


def _lock(out: Path) -> FileLock:
    return FileLock(out / "dam" / ".lock", thread_local=False)


def test_an_output_is_free_again_when_its_merge_is_over(tmp_path: Path) -> None:
    locks, life = OutputLocks(), _Life()
    locks.claim(tmp_path / "out", [], until=life)
    with pytest.raises(TimeoutError):
        _lock(tmp_path / "out").acquire(blocking=False)
    del life
    gc.collect()
    _lock(tmp_path / "out").acquire(blocking=False).lock.release()


def test_the_same_thread_may_merge_again_another_may_not(tmp_path: Path) -> None:
    locks, lives, said = OutputLocks(), [_Life(), _Life(), _Life()], []
    locks.claim(tmp_path / "out", [], until=lives[0])
    locks.claim(tmp_path / "out", [], until=lives[1])  # its first merge is over, though something still refers to it

    def other() -> None:
        try:
            locks.claim(tmp_path / "out", [], until=lives[2])
        except DamError as error:
            said.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert said and "expected no other merge that writes there, got a running merge" in said[0]
    del lives[0]  # the end of the first must not free what the second holds
    gc.collect()
    with pytest.raises(TimeoutError):
        _lock(tmp_path / "out").acquire(blocking=False)


def test_a_real_merge_holds_its_output_until_it_returns(merge: Merge, vit: Path, images: Path, tmp_path: Path) -> None:
    parameters = {**RECIPE, "calibration": str(images)}
    with _lock(tmp_path / "out"), pytest.raises(DamError, match="got a running merge"):
        merge(vit / "base", [vit / "a", vit / "b"], parameters=parameters)
    # without tokenizers to copy: mergekit logs an error about them, and the captured log would keep the merge alive
    out = merge(vit / "base", [vit / "a", vit / "b"], parameters=parameters, options={"copy_tokenizer": False})
    gc.collect()
    _lock(out).acquire(blocking=False).lock.release()


def test_an_input_is_not_an_output(merge: Merge, vit: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(vit / "a")
    before = (vit / "a" / "model.safetensors").read_bytes()
    with pytest.raises(DamError, match="a model that is merged"):
        merge(vit / "base", [vit / "a", vit / "b"], parameters={**RECIPE, "calibration": str(images)})
    assert (vit / "a" / "model.safetensors").read_bytes() == before


def test_an_older_output_in_other_shards_is_not_loaded(merge: Merge, vit: Path, images: Path) -> None:
    """transformers prefers model.safetensors to an index: a stale one would be loaded in place of the new merge."""
    parameters = {**RECIPE, "calibration": str(images)}
    old = merge(vit / "base", [vit / "a", vit / "b"], parameters=parameters, dtype="float32")
    stale = load_file(old / "model.safetensors")
    out = merge(
        vit / "base",
        [vit / "a", vit / "b"],
        parameters={**parameters, "seed": 1},
        dtype="float32",
        options={"out_shard_size": 4000},
    )
    assert out == old and not (out / "model.safetensors").exists()
    parts = {k: v for file in out.glob("model-*-of-*.safetensors") for k, v in load_file(file).items()}
    assert any(not parts[name].equal(tensor) for name, tensor in stale.items())
    loaded = transformers.ViTModel.from_pretrained(out)
    assert loaded.layernorm.weight.equal(parts["layernorm.weight"])


def test_files_that_are_not_weights_stay(tmp_path: Path) -> None:
    out, folder = tmp_path / "out", tmp_path / "cache"
    (out / "dam" / "heads").mkdir(parents=True)
    folder.mkdir()
    stay = [
        "notes.txt",
        "model-1.safetensors",
        "model_card.safetensors",
        "dam/report.html",
    ]
    go = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "generation_config.json",
        "special_tokens_map.json",
        "tokenizer.model",
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "dam/.abc.tmp",
        "dam/heads/.abc.tmp",
    ]
    for name in (*stay, *go):
        (out / name).touch()
    place_artifact(folder, out)
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == set(stay)


_RESULTS = ("evaluation.json", "report.json", "report.html", "inputs.json", "audit.json", "figures/loss.png")


@pytest.mark.parametrize("same", [True, False])
def test_results_stay_with_the_masks_that_they_were_measured_with(same: bool, tmp_path: Path) -> None:
    """What was measured on another merge, and its heads and triggers, would be published as this one's."""
    out, folder = tmp_path / "out" / "dam", tmp_path / "cache"
    for place, masks, own in ((out, b"older", "older"), (folder, b"older" if same else b"newer", "newer")):
        (place / "heads").mkdir(parents=True)
        (place / "dam_masks.safetensors").write_bytes(masks)
        (place / "heads" / f"{own}.safetensors").touch()
    (out / "figures").mkdir()
    for name in ("triggers.safetensors", "metrics.jsonl", *_RESULTS):
        (out / name).touch()
    place_artifact(folder, out.parent)
    left = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    kept = {name for name in _RESULTS if not name.startswith("audit")} if same else set()
    assert left == {"dam_masks.safetensors", "heads/newer.safetensors"} | kept


def test_a_merge_by_another_method_leaves_nothing_of_dams(vit: Path, images: Path, tmp_path: Path) -> None:
    models = [{"model": str(vit / name), "parameters": {"calibration": str(images)}} for name in ("a", "b")]
    recipe = {"base_model": str(vit / "base"), "dtype": "float32"}
    mergekit_dam.merge({**recipe, "merge_method": "dam", "models": models, "parameters": RECIPE}, tmp_path / "out")
    assert (tmp_path / "out" / "dam" / "dam_masks.safetensors").is_file()
    plain = [{"model": one["model"], "parameters": {"weight": 0.5}} for one in models]
    mergekit_dam.merge({**recipe, "merge_method": "task_arithmetic", "models": plain}, tmp_path / "out")
    assert not [
        p for p in (tmp_path / "out" / "dam").rglob("*") if p.is_file() and p.suffix != ".lock" and p.name != ".lock"
    ]


def test_a_lock_may_be_released_while_its_thread_claims_another(tmp_path: Path) -> None:
    """The garbage collector runs finalizers anywhere, also within `claim`."""
    locks, life = OutputLocks(), _Life()
    locks.claim(tmp_path / "out", [], until=life)
    ((path, (lock, _)),) = locks._held.items()

    def released() -> None:
        with locks._guard:
            locks.release(path, lock)

    thread = threading.Thread(target=released, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and not locks._held


def test_a_merge_replaces_read_only_files_and_leaves_none_of_an_older_model(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "adapter_config.json", "notes.txt"):
        (tmp_path / name).write_text("old")
        (tmp_path / name).chmod(0o444)
    with remove_stale_files(tmp_path):
        assert (tmp_path / "tokenizer.json").stat().st_mode & 0o200
        (tmp_path / "tokenizer.json").write_text("newer")
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer.json", "notes.txt"}
