"""Recipes, names, configs and links from strangers: bounded, kept inside, and printed as one harmless line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.common import ModelReference

from mergekit_dam import load_merged
from mergekit_dam.cli.main import main
from mergekit_dam.errors import DamError
from mergekit_dam.io.untrusted import file_safe, load_json, load_yaml, plain_name, require_no_links_out
from mergekit_dam.models.plan import _task_names, model_input
from mergekit_dam.plugin.output import place_artifact
from tests.helpers.hostile import CASES
from tests.helpers.tiny_models import make_model

quick = settings(max_examples=CASES, deadline=None, database=None, derandomize=True)
LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9))
BOMBS = {
    "billion laughs": (LAUGHS, "once its aliases are followed"),
    "merge keys": (MERGES, "once its aliases are followed"),
    "alias in itself": ("a: &a [*a]", "inside the value"),
    "deep": ("[" * 50_000, "nested too deeply"),
    "large": ("a: " + "x" * (1 << 21), "at most"),
    "python object": ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "two documents": ("a: 1\n---\nb: 2", "single document"),
    "not hashable": ("{[1]: 2}", "while constructing a mapping"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_yaml_bombs_are_refused_at_once(name: str, tmp_path: Path) -> None:
    text, reason = BOMBS[name]
    began = time.process_time()
    with pytest.raises(DamError, match="expected YAML of plain values") as caught:
        load_yaml(text, "recipe x")
    assert reason in str(caught.value) and time.process_time() - began < 5
    (tmp_path / "r.yml").write_text(text)
    result = CliRunner().invoke(main, ["check", str(tmp_path / "r.yml")])
    assert result.exit_code in (1, 3) and reason in result.output and "Traceback" not in result.output


@quick
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_plain_yaml_is_read_as_pyyaml_reads_it(value: object) -> None:
    text = yaml.safe_dump(value)
    assert load_yaml(text, "r") == yaml.safe_load(text)


@quick
@given(st.lists(st.text(max_size=200), min_size=2, max_size=5))
def test_task_names_are_unique_plain_files(paths: list[str]) -> None:
    names = _task_names([ModelReference.model_validate({"model": {"path": path}}) for path in paths])
    assert len({name.casefold() for name in names}) == len(paths) and "base" not in names
    for name in names:
        assert plain_name(name, "task") == name
        assert (Path("heads") / f"{name}.safetensors").parent == Path("heads")


@quick
@given(st.text())
def test_file_safe_names_stay_in_their_folder(text: str) -> None:
    assert plain_name(file_safe(text), "x") and Path("/a", file_safe(text)).parent == Path("/a")


@pytest.mark.parametrize("task", ["../secret", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0", "C:x", "\u202etxt"])
def test_a_task_cannot_name_another_folder(task: str, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "out" / "dam" / "heads").mkdir(parents=True)
    with pytest.raises(DamError, match="plain name"):
        load_merged(tmp_path / "out", task)


CONFIGS = [
    ({"model_type": "bert", "num_hidden_layers": 10**9}, "num_hidden_layers"),
    ({"model_type": "clip", "vision_config": {"image_size": 10**9}}, "vision_config.image_size"),
    ({"model_type": "gpt2", "n_positions": 10**6}, "n_positions"),
    ({"model_type": "bert", "num_labels": 10**9}, "num_labels"),
    ({"model_type": "bert", "max_position_embeddings": 1e300}, "max_position_embeddings"),
]


@pytest.mark.parametrize(("values", "entry"), CONFIGS, ids=[entry for _, entry in CONFIGS])
def test_configs_that_would_fill_the_memory(values: dict[str, object], entry: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    began = time.process_time()
    with pytest.raises(DamError, match=f"config.json: {entry}: expected at most"):
        _input(tmp_path)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "\x00"])
def test_json_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DamError, match="expected a JSON object"):
        load_json(tmp_path / "x.json")
    with pytest.raises(DamError, match="at most 3 are read"):
        load_json(tmp_path / "x.json", max_bytes=3) if len(text) > 3 else load_json(_longer(tmp_path), max_bytes=3)


def _longer(folder: Path) -> Path:
    (folder / "y.json").write_text('{"a": 1}')
    return folder / "y.json"


def _input(folder: Path) -> None:
    from mergekit.options import MergeOptions

    from mergekit_dam.config import ModelSettings

    model_input("x", ModelReference.model_validate(str(folder)), ModelSettings(), MergeOptions())


MARKER = "raise SystemExit(open(%r, 'w').write('ran'))"


def test_code_beside_a_model_is_not_run(tmp_path: Path) -> None:
    """Config, tokenizer and a kept head that name code of their own: a message, and the code has not run."""
    from mergekit_dam.tasks.readout import tokenizer_of

    trap = tmp_path / "trap"
    model = make_model("BertModel", tmp_path / "m")
    (model / "evil.py").write_text(MARKER % str(trap))
    config = json.loads((model / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoTokenizer": ["evil.Tokenizer", None]}
    changed = {**config, "model_type": "evil", "auto_map": auto}
    (model / "config.json").write_text(json.dumps(changed))
    with pytest.raises(DamError, match="--trust-remote-code"):
        _input(model)
    settings_file = model / "tokenizer_config.json"
    text = {**json.loads(settings_file.read_text()), "auto_map": auto, "tokenizer_class": "EvilTokenizer"}
    settings_file.write_text(json.dumps(text))
    with pytest.raises(DamError, match="code in it is never run"):
        tokenizer_of([model], "m")
    heads = tmp_path / "out" / "dam" / "heads"
    heads.mkdir(parents=True)
    (heads / "m.json").write_text(json.dumps(changed))
    (heads / "evil.py").write_text(MARKER % str(trap))
    with pytest.raises(DamError, match="code that comes with a model is not run here"):
        load_merged(tmp_path / "out", "m")
    assert not trap.exists()


def test_pickled_adapters_are_refused_before_anything_loads_them(tmp_path: Path) -> None:
    model, adapter = make_model("BertModel", tmp_path / "m"), tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(DamError, match=r"expected adapter_model.safetensors, got adapter_model.bin"):
        _input(Path(f"{model}+{adapter}"))


def test_a_pickled_clip_gives_no_heads(tmp_path: Path) -> None:
    """`zero_shot_model` is a whole model of its own."""
    import torch
    from safetensors.torch import load_file

    from mergekit_dam.tasks.readout import zero_shot_head

    clip = make_model("CLIPModel", tmp_path / "clip")
    torch.save(load_file(clip / "model.safetensors"), clip / "pytorch_model.bin")
    (clip / "model.safetensors").unlink()
    with pytest.raises(DamError, match=r"zero_shot_model of m: expected a full CLIP .*safetensors"):
        zero_shot_head(["cat", "dog"], str(clip), "m", torch.device("cpu"))


def test_links_that_lead_out_of_the_output(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    for name in ("model.safetensors", "dam", "dam/heads", "dam/dam_masks.safetensors", "dam/heads/a.json"):
        out = tmp_path / name.replace("/", "-") / "out"
        (out / name).parent.mkdir(parents=True)
        (out / name).symlink_to(outside if name.endswith(("dam", "heads")) else outside / "precious")
        with pytest.raises(DamError, match="whose entries stay inside it"):
            require_no_links_out(out)
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a").touch()
    (inside / "b").symlink_to("a")
    require_no_links_out(inside)
    require_no_links_out(tmp_path / "not there yet")


def test_kept_files_replace_a_link_and_never_follow_it(tmp_path: Path) -> None:
    """Even one that appears after the check."""
    folder, out, precious = tmp_path / "cache", tmp_path / "out", tmp_path / "precious"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("new")
    precious.write_text("mine")
    (out / "dam").mkdir(parents=True)
    (out / "dam" / "metrics.jsonl").symlink_to(precious)
    place_artifact(folder, out)
    assert precious.read_text() == "mine" and (out / "dam" / "metrics.jsonl").read_text() == "new"
    assert not (out / "dam" / "metrics.jsonl").is_symlink()


@quick
@given(st.text(), st.text())
def test_errors_are_one_printable_line(subject: str, got: str) -> None:
    message = str(DamError(subject, expected="x", got=got + "\x1b[2J\u202e", cure="y"))
    assert message.isprintable() and len(message.splitlines()) == 1
