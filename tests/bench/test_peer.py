"""The driver of the peer, with a stand-in for its program: what it is told, and what its failures become."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from dam_bench.runs import peer
from dam_bench.runs.methods import LEARNED_STEPS
from dam_bench.runs.peer import PeerSettings, merge_with_fusion_bench, peer_merge, peer_python, peer_report
from datasets import Dataset
from safetensors.torch import load_file

from mergekit_dam import load_merged
from mergekit_dam.errors import DamError

# a program that takes the peer's arguments, notes them, and answers with theta_0 itself as the merged body
STAND_IN = """
import json, os, pathlib, shutil, sys
arguments = sys.argv[1:]
value = lambda key: pathlib.Path(arguments[arguments.index(key) + 1])
for file in value("--base").iterdir():
    shutil.copy(file, value("--out"))
(value("--out") / "peer.json").write_text(json.dumps({"argv": arguments, "path": os.environ.get("PYTHONPATH")}))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    return program


def test_the_peer_is_told_all_settings_and_its_body_loads_with_heads(
    vit: Path, tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    models = {vit / "a": tmp_path / "a.parquet", vit / "b": tmp_path / "b.parquet"}
    settings = PeerSettings(steps=7, coefficient_steps=3, batch_size=4, num_samples=9, max_length=8, seed=5)
    out = peer_merge(vit / "base", models, tmp_path / "out", settings=settings, python=sys.executable, script=stand_in)
    told = peer_report(out)
    assert told["path"] is None
    expected = ["--base", str(vit / "base"), "--out", str(out)]
    expected += ["--model", str(vit / "a"), str(tmp_path / "a.parquet")]
    expected += ["--model", str(vit / "b"), str(tmp_path / "b.parquet")]
    expected += ["--steps", "7", "--coefficient-steps", "3", "--batch-size", "4", "--num-samples", "9"]
    assert told["argv"] == [*expected, "--max-length", "8", "--seed", "5", "--device", "cpu"]
    merged, body = load_merged(out, "b").state_dict(), load_file(vit / "base" / "model.safetensors")
    assert torch.equal(merged["classifier.weight"], load_file(vit / "b" / "model.safetensors")["classifier.weight"])
    assert torch.equal(merged["vit.layernorm.weight"], body["layernorm.weight"])


def test_the_benchmark_gives_the_peer_its_own_number_of_steps(
    vit: Path, tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer, "FOLDER", tmp_path)
    monkeypatch.setenv(peer.PYTHON_VARIABLE, sys.executable)
    stand_in.rename(tmp_path / "run.py")
    calibration = {"a": tmp_path / "a.parquet", "b": tmp_path / "b.parquet"}
    out = merge_with_fusion_bench(vit / "base", {"b": vit / "b", "a": vit / "a"}, calibration, seed=3, folder=tmp_path)
    told = peer_report(out)["argv"]
    assert told[told.index("--steps") + 1] == told[told.index("--coefficient-steps") + 1] == str(LEARNED_STEPS)
    assert told[told.index("--seed") + 1] == "3"
    assert told[told.index("--model") :][:3] == ["--model", str(vit / "b"), str(tmp_path / "b.parquet")]
    assert load_merged(out, "a").num_labels == 3


def test_the_real_program_knows_every_setting_of_the_driver() -> None:
    text = (peer.FOLDER / "run.py").read_text()
    for key in PeerSettings.__dataclass_fields__:
        assert f'"--{key.replace("_", "-")}"' in text
    pinned = (peer.FOLDER / "constraints.txt").read_text().splitlines()
    assert {"fusion-bench==0.2.33", "torch==2.13.0"} <= set(pinned)


@pytest.mark.skipif(not (peer.FOLDER / ".venv").is_dir(), reason="`make -C benchmarks/peer` has not been run")
def test_fusion_bench_itself_merges_our_models(vit: Path, images: Path, tmp_path: Path) -> None:
    rows = [{"image": {"bytes": file.read_bytes(), "path": None}} for file in sorted(images.iterdir())]
    Dataset.from_list(rows).to_parquet(tmp_path / "images.parquet")
    models = dict.fromkeys((vit / "a", vit / "b"), tmp_path / "images.parquet")
    settings = PeerSettings(steps=2, coefficient_steps=2, batch_size=4)
    out = peer_merge(vit / "base", models, tmp_path / "out", settings=settings)
    merged, base = load_file(out / "model.safetensors"), load_file(vit / "base" / "model.safetensors")
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in base.items()}
    moved = [n for n in base if not torch.equal(merged[n], base[n])]
    assert len(moved) > 30 and all(bool(torch.isfinite(t).all()) for t in merged.values())
    report = peer_report(out)
    assert len(report["seconds"]["mask_steps"]) == 2 and report["samples"] == {"a": 12, "b": 12}
    assert report["peak_rss_bytes"] > 100_000_000
    assert load_merged(out, "b")(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 5)


def test_a_missing_interpreter_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DamError, match=r"no file .*/nowhere/python\. Run `make -C benchmarks/peer`"):
        peer_python(tmp_path / "nowhere" / "python")
    monkeypatch.setenv(peer.PYTHON_VARIABLE, str(tmp_path / "unset"))
    with pytest.raises(DamError, match=r"no file .*/unset"):
        peer_python()
    monkeypatch.setenv(peer.PYTHON_VARIABLE, sys.executable)
    assert peer_python() == Path(sys.executable)


def test_failures_of_the_peer_are_one_line(vit: Path, tmp_path: Path, stand_in: Path) -> None:
    models = {vit / "a": tmp_path / "a.parquet", vit / "b": tmp_path / "b.parquet"}
    stand_in.write_text("raise SystemExit('no module named fusion_bench')")
    with pytest.raises(DamError, match=r"got exit code 1: no module named fusion_bench\. Read the log"):
        peer_merge(vit / "base", models, tmp_path / "out", python=sys.executable, script=stand_in)
    assert not (tmp_path / "out" / "mergekit_config.yml").exists()
    with pytest.raises(DamError, match="program of the peer"):
        peer_merge(vit / "base", models, tmp_path / "out", python=sys.executable, script=tmp_path / "none.py")
    with pytest.raises(DamError, match="different last parts"):
        peer_merge(vit / "base", {vit / "a": tmp_path, tmp_path / "a": tmp_path}, tmp_path / "out")
