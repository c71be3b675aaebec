"""Every file of examples/recipes does what it says, with small models in the places that it names."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from mergekit.scripts.multimerge import main as mergekit_multi
from peft import LoraConfig, get_peft_model

from mergekit_dam import load_merged, merge
from mergekit_dam.artifact.masks_file import MASKS_FILE
from mergekit_dam.cli.main import main
from mergekit_dam.models.verify import verify_output
from tests.helpers.hub_server import TOKEN, HubServer
from tests.helpers.tiny_models import make_model, save_tokenizer

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SMALL = {
    "steps": 2,
    "scan_steps": 2,
    "batch_size": 4,
    "num_samples": 8,
    "max_length": 12,
}


def adapter(base: Path, path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), config).save_pretrained(path)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path, texts: Path) -> Path:
    """A working directory with the images and texts under data/ that the recipes name."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("cars", "eurosat", "flowers"):
        shutil.copytree(images, f"data/{name}")
        Path(f"data/{name}.txt").write_text("one movie\none film\n")
    pictures = [{"bytes": path.read_bytes(), "path": None} for path in sorted(images.iterdir())]
    table = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    table.to_parquet("data/cars.parquet")
    lines = texts.read_text().splitlines()
    for name in ("chat", "code", "law", "math", "summaries", "questions", "prompts"):
        Path(f"data/{name}.txt").write_text("\n".join(lines))
    datasets.Dataset.from_dict({"sentence": lines, "idx": range(len(lines))}).to_parquet("data/sst2.parquet")
    datasets.Dataset.from_dict({"text": lines}).to_json("data/agnews.jsonl")
    chats = [[{"role": "user", "content": line}, {"role": "assistant", "content": "great"}] for line in lines]
    datasets.Dataset.from_dict({"messages": chats}).to_json("data/assistant.jsonl")
    datasets.Dataset.from_dict({"instruction": lines, "output": lines}).to_json("data/support.jsonl")
    return tmp_path


def language_models(*names: str) -> Path:
    base = make_model("LlamaForCausalLM", Path("models/base").absolute())
    for seed, name in enumerate(names, start=1):
        make_model("LlamaForCausalLM", Path("models") / name, seed=seed, body=base)
    return base


def chatting() -> Path:
    base = language_models("assistant", "support")
    for name in ("base", "assistant", "support"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(f"models/{name}")
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}it "
        tokenizer.save_pretrained(f"models/{name}")
    return base


def classifiers() -> Path:
    base = make_model("ViTModel", Path("models/vit-base").absolute())
    for seed, (name, labels) in enumerate({"flowers": 3, "cars": 5}.items(), start=1):
        make_model("ViTForImageClassification", Path("models") / name, seed=seed, labels=labels, body=base)
    return base


def clip() -> Path:
    base = make_model("CLIPModel", Path("openai/clip-vit-base-patch32").absolute())
    save_tokenizer(base)
    tower = transformers.CLIPVisionModel.from_pretrained(base)
    for seed, name in enumerate(("stanford-cars", "eurosat")):
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in tower.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        target = Path(f"tanganke/clip-vit-base-patch32_{name}")
        tower.save_pretrained(target)
        shutil.copy(base / "preprocessor_config.json", target)
    return base


def encoders() -> Path:
    base = make_model("BertModel", Path("models/bert-base").absolute())
    for seed, (name, labels) in enumerate({"sst2": 2, "agnews": 4}.items(), start=1):
        make_model("BertForSequenceClassification", Path("models") / name, seed=seed, labels=labels, body=base)
    return base


def adapters() -> Path:
    base = language_models()
    for seed, name in enumerate(("summaries", "questions")):
        adapter(base, Path("adapters") / name, seed)
    return base


BUILD: dict[str, Callable[[], Path]] = {
    "images.yml": classifiers,
    "clip.yml": clip,
    "text.yml": encoders,
    "chat.yml": chatting,
    "causal-lm.yml": lambda: language_models("code", "chat"),
    "windows.yml": lambda: language_models("code", "chat", "math", "law"),
    "cleaned-ties.yml": lambda: language_models("found-a", "found-b"),
    "lora.yml": adapters,
    "ties-chain.yml": lambda: language_models("found-a", "found-b", "own"),
    "gpus.yml": lambda: language_models("code", "chat"),
}


def paths(recipe: Any) -> Iterator[str]:
    """Every model and data file that a recipe names."""
    for value in [recipe["base_model"], *(entry["model"] for entry in recipe["models"])]:
        yield from (value["model"] if isinstance(value, dict) else value).split("+")
    for entry in recipe["models"]:
        own = entry.get("parameters") or {}
        yield from (own[key] for key in ("calibration", "classes") if key in own)


def test_no_recipe_is_left_out() -> None:
    assert set(BUILD) == {path.name for path in RECIPES.glob("*.yml")}
    listed = (RECIPES / "README.md").read_text()
    assert all(f"[{path.name}]" in listed for path in RECIPES.iterdir() if path.name != "README.md")


OTHERWISE = ("ties-chain.yml", "gpus.yml", "cleaned-ties.yml")  # tested by themselves


@pytest.mark.parametrize("name", [name for name in BUILD if name not in OTHERWISE])
def test_recipe(name: str, place: Path, registered: None) -> None:
    base = BUILD[name]()
    recipe = yaml.safe_load((RECIPES / name).read_text())
    assert all(Path(path).exists() for path in paths(recipe)), "the stand-ins are not where the recipe looks"
    out = merge(recipe, place / "out", **SMALL)
    assert (out / "dam" / MASKS_FILE).is_file()
    tasks = [p.stem for p in (out / "dam" / "heads").glob("*.safetensors")]
    heads = {"text.yml": {"sst2", "agnews"}, "images.yml": {"flowers", "cars"}}
    assert heads.get(name, set(tasks)) == set(tasks)
    assert load_merged(out, tasks[0] if tasks else None).num_parameters() > 0
    assert base.is_dir()


def test_mergekit_yaml_learns_in_two_processes_with_one_bar(place: Path) -> None:
    """On the CPU, by gloo."""
    base = BUILD["gpus.yml"]()
    recipe = yaml.safe_load((RECIPES / "gpus.yml").read_text())
    assert all(Path(path).exists() for path in paths(recipe)), "the stand-ins are not where the recipe looks"
    assert recipe["parameters"]["num_processes"] > 2
    recipe["parameters"] |= {**SMALL, "num_processes": 2}
    # without network mergekit itself refuses relative paths, after the merge, when it writes the card
    Path("gpus.yml").write_text(yaml.safe_dump(recipe).replace("models/", f"{place}/models/"))
    program = Path(sys.executable).with_name("mergekit-yaml")
    done = subprocess.run([program, "gpus.yml", "out"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("dam: masks:   0%") == 1, "a bar of each process"
    assert (place / "out" / "dam" / MASKS_FILE).is_file()
    assert json.loads((place / "out" / "dam" / "run.json").read_text())["processes"] == 2
    verify_output(place / "out", base, dtype=torch.bfloat16)
    assert load_merged(place / "out").num_parameters() > 0


def test_chain_in_mergekit_multi(place: Path, registered: None) -> None:
    base = BUILD["ties-chain.yml"]()
    first, second = yaml.safe_load_all((RECIPES / "ties-chain.yml").read_text())
    assert all(Path(path).exists() for path in [*paths(first), *paths(second)] if path != first["name"])
    first["parameters"] = SMALL
    # without network mergekit itself refuses relative paths, after the merge, when it writes the card
    absolute = yaml.safe_dump_all([first, second]).replace("models/", f"{place}/models/")
    Path("chain.yml").write_text(absolute)
    from mergekit_dam.plugin.method import register_dam

    register_dam()
    done = CliRunner().invoke(
        mergekit_multi, ["chain.yml", "-I", str(place / "stages"), "--out-path", str(place / "out")]
    )
    assert done.exit_code == 0, done.output
    verify_output(place / "out", base, dtype=torch.float32)
    assert (place / "stages" / "screened" / "dam" / MASKS_FILE).is_file()


def test_cleaned_models_are_merged_by_ties(place: Path) -> None:
    base = BUILD["cleaned-ties.yml"]()
    text = (RECIPES / "cleaned-ties.yml").read_text()
    first, second = (line[1:].strip(" \\") for line in text.splitlines() if line.startswith("#   "))
    command = f"{first} {second}".removeprefix("mergekit-dam ").split()
    (place / "constants.json").write_text('{"answer_tokens": 2}')
    few = "--triggers 1 --held-out 1 --plant-steps 1 --unlearn-steps 1 --batch-size 4 --max-length 24"
    few += f" --constants {place / 'constants.json'}"
    done = CliRunner().invoke(main, [*command, *few.split(), "--quiet"])
    assert done.exit_code == 0, done.output
    out = merge(yaml.safe_load(text), place / "out")
    verify_output(out, base, dtype=torch.float32)
    assert load_merged(out).num_parameters() > 0


def stub(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def test_slurm_starts_every_node_once_and_merges_on_the_first(place: Path) -> None:
    tools = place / "tools"
    tools.mkdir()
    stub(tools, "scontrol", "printf 'n7\\nn8\\nn9\\n'")
    stub(tools, "srun", 'shift; for id in 0 1 2; do SLURM_NODEID=$id "$@" || exit 1; done')
    stub(tools, "accelerate", 'echo "accelerate $*" >> calls')
    stub(tools, "mergekit-dam", 'echo "mergekit-dam $* $MERGEKIT_DAM_CACHE" >> calls')
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "SLURM_NNODES": "3",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_JOB_NODELIST": "n[7-9]",
    }
    subprocess.run(["bash", RECIPES / "nodes.slurm", "dam.yml", "out dir"], env=environment, check=True)
    *learn, last = Path("calls").read_text().splitlines()
    assert [line.split("--machine_rank ")[1].split()[0] for line in learn] == ["0", "1", "2"]
    for line in learn:
        assert "--num_machines 3" in line and "--num_processes 12" in line and "--main_process_ip n7" in line
        assert line.endswith("-m mergekit_dam learn dam.yml out dir-masks")
    assert last == f"mergekit-dam merge dam.yml out dir {place}/.dam-cache"
    stub(tools, "accelerate", "exit 3")
    Path("calls").unlink()
    done = subprocess.run(["bash", RECIPES / "nodes.slurm", "dam.yml", "out"], env=environment, check=False)
    assert done.returncode != 0 and not Path("calls").exists(), "a failed node must not be followed by a merge"


def test_slurm_learns_on_two_nodes_that_are_this_machine(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script with the real accelerate: two nodes with one process each, by gloo. Its last command is run here."""
    recipe = yaml.safe_load((RECIPES / "causal-lm.yml").read_text())
    models = ["base", "code", "chat"]
    language_models("code", "chat")
    recipe["parameters"] = {**SMALL, "window": 2}
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    tools = place / "tools"
    tools.mkdir()
    stub(tools, "scontrol", "echo 127.0.0.1")
    stub(tools, "srun", 'shift; SLURM_NODEID=0 "$@" & one=$!; SLURM_NODEID=1 "$@" && wait $one')
    stub(tools, "mergekit-dam", 'echo "$*" > last')
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_NODELIST": "here",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "MERGEKIT_DAM_CACHE": str(place / "cache"),
    }
    done = subprocess.run(
        ["bash", RECIPES / "nodes.slurm", "recipe.yml", "out"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads(Path("out-masks/run.json").read_text())
    assert run["processes"] == 2
    sizes = [Path("models", name, "model.safetensors").stat().st_size for name in models]
    # rows of all models; and two models whole, for their answers and for what the merge is to make
    for read in run["bytes_read"]:
        assert read <= 1.1 * (sum(sizes) + 2 * sum(sizes[1:])) / 2
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", str(place / "cache"))
    merged = CliRunner().invoke(main, Path("last").read_text().split())
    assert merged.exit_code == 0, merged.output
    masks = [Path(folder, MASKS_FILE).read_bytes() for folder in ("out-masks", "out/dam")]
    assert masks[0] == masks[1], "the merge learned anew"


def test_hub_to_hub_as_a_user_does(hub: HubServer, place: Path) -> None:
    """The real commands in processes of their own, which know the Hub by HF_ENDPOINT alone."""
    encoders()
    recipe = yaml.safe_load((RECIPES / "text.yml").read_text())
    for name in ("bert-base", "sst2", "agnews"):
        folder = Path("models") / name
        hub.add(
            f"lab/{name}", {p.name: p.read_bytes() for p in folder.iterdir()}, card={"license": "mit"}, private=True
        )
    recipe["base_model"] = "lab/bert-base"
    for entry in recipe["models"]:
        entry["model"] = entry["model"].replace("models/", "lab/")
    recipe["parameters"] = SMALL
    Path("recipe.yml").write_text(yaml.safe_dump(recipe))
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(place / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "MERGEKIT_DAM_CACHE": str(place / "cache"),
    }
    done = subprocess.run(
        ["sh", RECIPES / "hub-to-hub.sh", "recipe.yml", "out", "me/merged"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    arrived = hub.repos["model", "me/merged"].branches["main"]
    assert hub.repos["model", "me/merged"].private
    assert arrived["model.safetensors"] == Path("out/model.safetensors").read_bytes()
    card = arrived["README.md"].decode()
    assert "license: mit" in card and "- lab/sst2" in card
    assert hub.repos["model", "lab/sst2"].commit_id("main") in card
    assert TOKEN not in done.stdout + done.stderr and all(TOKEN.encode() not in body for body in arrived.values())
    assert load_merged("me/merged", "sst2").classifier.out_features == 2
