"""The real commands: mergekit-yaml as users run it, chains in mergekit-multi, LoRA inputs, slices, our own CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_dam import load_merged
from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.models.verify import verify_output
from tests.conftest import FAST, Merge
from tests.helpers.tiny_models import make_model


def _command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name(name)), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def _recipe(vit: Path, images: Path, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "dam",
        "base_model": str(vit / "base"),
        "dtype": "float32",
        "models": [{"model": str(vit / n), "parameters": {"calibration": str(images)}} for n in ("a", "b")],
        "parameters": dict(FAST),
        **more,
    }


def test_the_recipe_of_the_readme_runs_twice_in_unmodified_mergekit_yaml_and_learns_once(
    images: Path, tmp_path: Path
) -> None:
    """Copied from the README, with its paths replaced by models that exist."""
    readme = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
    recipe = readme.split("```yaml\n")[1].split("```")[0]
    base = make_model("ViTModel", tmp_path / "vit-base")
    for i, name in enumerate(("flowers", "cars")):
        make_model("ViTForImageClassification", tmp_path / name, seed=i, labels=3 + i, body=base)
    recipe = recipe.replace("/models/", f"{tmp_path}/").replace("/data/flowers.parquet", str(images))
    recipe = recipe.replace("/data/cars-images/", str(images))
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(yaml.safe_load(recipe) | {"parameters": dict(FAST)}))
    first = _command("mergekit-yaml", str(tmp_path / "dam.yml"), str(tmp_path / "one"))
    assert first.returncode == 0 and "missing (" not in first.stderr, first.stderr
    assert first.stderr.count(f"`mergekit-dam audit {tmp_path / 'one'}` does it") == 1, "it is not scanned here"
    assert {"config.json", "README.md", "mergekit_config.yml", "dam"} <= {p.name for p in (tmp_path / "one").iterdir()}
    model = load_merged(tmp_path / "one", task="flowers")
    assert model(torch.zeros(1, 3, 16, 16)).logits.shape == (1, 3)
    again = _command("mergekit-yaml", str(tmp_path / "one" / "mergekit_config.yml"), str(tmp_path / "two"))
    assert again.returncode == 0 and "nothing is learned" in again.stderr
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_mergekit_yaml_shows_one_line_for_bad_input(vit: Path, tmp_path: Path) -> None:
    recipe = _recipe(vit, tmp_path / "missing.parquet")
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(recipe))
    done = _command("mergekit-yaml", str(tmp_path / "dam.yml"), str(tmp_path / "out"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert any(line.startswith("Error: calibration of a") for line in done.stderr.splitlines())


def test_a_chain_with_ties_in_mergekit_multi(tmp_path: Path, texts: Path) -> None:
    """A merge by dam goes into one by ties, and that into another by dam."""
    base = make_model("LlamaForCausalLM", tmp_path / "base")
    models = [make_model("LlamaForCausalLM", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2, 3, 4)]
    parameters = {"dam": {**FAST, "calibration": str(texts)}, "ties": {"weight": 0.5, "density": 0.5}}
    stages: list[dict[str, Any]] = [
        {"name": "first", "models": [{"model": str(m)} for m in models[:2]]},
        {"name": "second", "models": [{"model": "first"}, {"model": str(models[2])}]},
        {"models": [{"model": "second"}, {"model": str(models[3])}]},
    ]
    for stage, method in zip(stages, ("dam", "ties", "dam"), strict=True):
        stage |= {"merge_method": method, "base_model": str(base), "dtype": "float32", "parameters": parameters[method]}
    (tmp_path / "multi.yml").write_text(yaml.safe_dump_all(stages))
    done = _command(
        "mergekit-multi",
        str(tmp_path / "multi.yml"),
        "-I",
        str(tmp_path / "stages"),
        "--out-path",
        str(tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, masks in (("stages/first", True), ("stages/second", False), ("out", True)):
        verify_output(tmp_path / folder, base, dtype=torch.float32)
        assert (tmp_path / folder / "dam" / "dam_masks.safetensors").is_file() == masks


def test_lora_inputs(merge: Merge, tmp_path: Path, texts: Path) -> None:
    import peft
    import transformers

    base = make_model("LlamaForCausalLM", tmp_path / "base")
    refs = []
    for i in (1, 2):
        torch.manual_seed(i)
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config).save_pretrained(
            tmp_path / f"l{i}"
        )
        refs.append({"model": f"{base}+{tmp_path / f'l{i}'}"})
    options = {"lora_merge_cache": str(tmp_path / "loras")}
    out = merge(base, refs, parameters={**FAST, "calibration": str(texts)}, dtype="float32", options=options)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1)}


def test_slices_in_place_work_and_moved_ones_are_refused(tmp_path: Path, texts: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    base = make_model("LlamaForCausalLM", tmp_path / "base")
    models = [make_model("LlamaForCausalLM", tmp_path / f"m{i}", seed=i, body=base) for i in (1, 2)]

    def run(ranges: list[list[int]]) -> None:
        slices = [{"sources": [{"model": str(m), "layer_range": r} for m in (base, *models)]} for r in ranges]
        config = {"merge_method": "dam", "base_model": str(base), "slices": slices, "dtype": "float32"}
        config["parameters"] = {**FAST, "calibration": str(texts)}
        run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "out"), MergeOptions(quiet=True))

    run([[0, 1], [1, 2]])
    verify_output(tmp_path / "out", base)
    with pytest.raises(DamError, match="every model's layers in their own place"):
        run([[1, 2], [0, 1]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_types(dtype: str, merge: Merge, vit: Path, images: Path) -> None:
    parameters = {**FAST, "calibration": str(images)}
    out = merge(vit / "base", [vit / "a", vit / "b"], parameters=parameters, dtype="float32", out_dtype=dtype)
    verify_output(out, vit / "base", dtype=getattr(torch, dtype))


def test_one_config_object_can_be_run_twice(vit: Path, images: Path, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    config = MergeConfiguration.model_validate(_recipe(vit, images))
    for name in ("one", "two"):
        run_merge(config, str(tmp_path / name), MergeOptions(quiet=True))
        assert (tmp_path / name / "dam" / "dam_masks.safetensors").is_file()


def test_own_commands(vit: Path, images: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    good, bad = tmp_path / "dam.yml", tmp_path / "bad.yml"
    good.write_text(yaml.safe_dump(_recipe(vit, images)))
    bad.write_text(yaml.safe_dump(_recipe(vit, images) | {"parameters": {**FAST, "granularty": "row"}}))
    facts = json.loads(runner.invoke(main, ["check", "--json", str(good)], catch_exceptions=False).stdout)
    assert set(facts["models"]) == {"a", "b"} and facts["settings"]["steps"] == FAST["steps"]
    refused = runner.invoke(main, ["check", str(bad)])
    assert refused.exit_code == 3 and "Did you mean 'granularity'?" in refused.output
    refused = runner.invoke(main, ["merge", str(bad), str(tmp_path / "out")])
    assert refused.exit_code == 1 and not (tmp_path / "out").exists()
    done = runner.invoke(main, ["merge", str(good), str(tmp_path / "out"), "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    state = json.loads(runner.invoke(main, ["doctor"], catch_exceptions=False).stdout)
    assert state["dam registered"] and state["autoload"]["hook loaded"]


def test_an_output_with_a_gap_is_refused(merge: Merge, vit: Path, images: Path) -> None:
    from safetensors.torch import save_file

    parameters = {**FAST, "calibration": str(images)}
    out = merge(vit / "base", [vit / "a", vit / "b"], parameters=parameters, dtype="float32")
    tensors = load_file(out / "model.safetensors")
    name = "encoder.layer.0.attention.attention.key.weight"
    removed = tensors.pop(name)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(DamError, match=f"1 missing \\({name}\\)"):
        verify_output(out, vit / "base")
    save_file(tensors | {name: removed[:, :8].contiguous()}, out / "model.safetensors")
    with pytest.raises(DamError, match=r"expected \(16, 16\)"):
        verify_output(out, vit / "base")


SABOTAGE = """
import sys
sys.argv = ["mergekit-yaml", *sys.argv[1:]]
from mergekit.io.tensor_writer import TensorWriter
from mergekit.scripts.run_yaml import main
save = TensorWriter.save_tensor
TensorWriter.save_tensor = lambda self, name, **more: None if {lost!r} in name else save(self, name, **more)
main()
"""


def test_a_gap_in_the_output_is_an_error_of_plain_mergekit_yaml(vit: Path, images: Path, tmp_path: Path) -> None:
    lost = "layer.1.attention.output.dense"
    (tmp_path / "dam.yml").write_text(yaml.safe_dump(_recipe(vit, images)))
    command = [sys.executable, "-c", SABOTAGE.format(lost=lost), str(tmp_path / "dam.yml"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "2 missing (encoder.layer.1.attention.output.dense.bias" in done.stderr
