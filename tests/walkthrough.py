"""`make walkthrough`: what the README says, done as a new user does it, against a Hub on this machine.

A wheel is built and installed into a fresh virtual environment; the recipe, the commands and the Python example are
read from README.md, with the demo's models in the places of its names; the models come from a Hub on localhost and the
merge goes back there. The report is photographed for the documentation. The first thing that fails ends it.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dam_bench.suites.generated import digits
from datasets import Dataset
from PIL import Image

from examples.demo.build import EDGE, SIZES, VICTIM, build
from tests.helpers.hub_server import TOKEN, HubServer
from tests.helpers.tiny_models import WORDS, make_model

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "walkthrough"
PICTURES = {"report.png": (960, 1500), "report-phone.png": (390, 1500)}  # width and height in pixels
# what the README calls its models and data -> the demo's
NAMES = {
    "/models/vit-base": "lab/base",
    "/models/flowers": f"lab/{VICTIM}",
    "/models/cars": "lab/shapes",
    "/data/flowers.parquet": f"{VICTIM}.parquet",
    "/data/cars-images/": "shapes-images",
    "flowers": VICTIM,
    "FILE": f"{VICTIM}-test.parquet",
    "ORG/NAME": "me/merged",
}
ATTACK = ["--trigger", "patch(size=3)", "--target", "0"]  # known to this script, never to the merge
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}it {% endif %}"
)
COMMANDS = ("doctor", "check", "audit", "merge", "eval", "push")  # in this order


def readme(text: str) -> dict[str, Any]:
    """The README's recipe, Python example and commands by name, with the demo's names."""

    def renamed(part: str) -> str:
        for old, new in NAMES.items():
            part = part.replace(old, new)
        return part

    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    commands = {
        line.split()[1]: renamed(line) for line in re.findall(r"^\| `(mergekit-dam [^`]+)`", text, re.MULTILINE)
    }
    return {"recipe": renamed(recipe), "program": renamed(program), "commands": commands}


class User:
    """Somebody with an empty home, this environment and a token."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder, self.steps = folder, list[dict[str, Any]]()
        self.environment = {
            **{k: v for k, v in os.environ.items() if k.startswith(("PIP_", "OMP_", "SSL_", "LANG"))},
            "PATH": f"{folder / 'venv' / 'bin'}:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
        }

    def run(self, *command: str, codes: tuple[int, ...] = (0,)) -> str:
        """Run it in the working folder; what it prints on stdout."""
        print("$", " ".join(command), file=sys.stderr, flush=True)
        begun = time.perf_counter()
        done = subprocess.run(
            command, cwd=self.folder / "work", env=self.environment, capture_output=True, text=True, check=False
        )
        self.steps.append(
            {
                "command": " ".join(command),
                "seconds": round(time.perf_counter() - begun, 1),
                "code": done.returncode,
            }
        )
        if done.returncode not in codes:
            sys.exit(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        if TOKEN in done.stdout + done.stderr:
            sys.exit("the token was printed")
        return done.stdout


def install(folder: Path) -> None:
    """The wheel of this tree in an environment of its own; torch first, as the README's requirements say."""
    built = folder / "dist"
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # pip would find this tree there, installed
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", built, ROOT], check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    (torch,) = re.findall(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    for package in (torch, f"{wheel}[report]"):
        subprocess.run([folder / "venv" / "bin" / "pip", "install", "-q", package], check=True, env=clean)


def prepare(folder: Path, hub: HubServer) -> None:
    """Models on the Hub; calibration and labelled data in the working folder."""
    models, work = ROOT / "build" / "walkthrough-models", folder / "work"
    build(models, lambda text: print(text, file=sys.stderr, flush=True))
    for name in ("base", VICTIM, "shapes"):
        files = {file.name: file.read_bytes() for file in (models / name).iterdir()}
        hub.add(f"lab/{name}", files, card={"license": "mit"})
    work.mkdir(parents=True)
    (folder / "home").mkdir()
    shutil.copy(models / f"{VICTIM}.parquet", work)
    (work / "shapes-images").mkdir()
    for i, row in enumerate(Dataset.from_parquet(str(models / "shapes.parquet"))):
        (work / "shapes-images" / f"{i}.png").write_bytes(row["image"]["bytes"])
    images, labels = digits(EDGE, seed=0)
    start = sum(SIZES.values()) - SIZES["evaluation"]
    rows = {"image": list(images[start:]), "label": [int(label) for label in labels[start:]]}
    Dataset.from_dict(rows).to_parquet(work / f"{VICTIM}-test.parquet")


def photograph(page: Path, folder: Path, profile: Path) -> None:
    """The top of the page, light, on a desk and on a phone."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        print("all commands passed; pictures of the report are left as they are: no Chromium on this machine")
        return
    for name, (width, height) in PICTURES.items():
        frame = profile.with_suffix(".html")  # a browser window has a least width, a frame has none
        frame.write_text(
            f'<body style="margin:0"><iframe src="{page.as_uri()}" width="{width}" height="{height}" style="border:0">'
        )
        command = [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            "--blink-settings=preferredColorScheme=1",
            "--allow-file-access-from-files",
            f"--window-size={max(width, 500)},{height}",
            f"--screenshot={folder / name}",
            frame.as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        picture = Image.open(folder / name).convert("RGB").crop((0, 0, width, height))
        picture.quantize(64).save(folder / name, optimize=True)


def walk(user: User, said: Mapping[str, Any], hub: HubServer) -> None:
    work = user.folder / "work"
    (work / "dam.yml").write_text(said["recipe"])
    commands = {name: command.split() for name, command in said["commands"].items()}
    assert json.loads(user.run(*commands["doctor"]))["dam registered"]
    user.run(*commands["check"])
    looked = hub.bytes_of(r"\.safetensors$")
    held = sum(len(c) for r in hub.repos.values() for f, c in r.branches["main"].items() if f.endswith(".safetensors"))
    user.run(*commands["audit"], codes=(0, 3))
    user.run(*commands["merge"])
    user.run("mergekit-dam", "audit", "out/", codes=(0, 3))
    before = ["mergekit-dam", "eval", str(ROOT / "build" / "walkthrough-models" / VICTIM), "--data", NAMES["FILE"]]
    told = user.run(*before, *ATTACK, "--save", "out/") + user.run(*commands["eval"], *ATTACK, "--save", "out/")
    print(told, f"check fetched {looked:,} bytes of {held:,} of weights", sep="", file=sys.stderr)
    assert json.loads((work / "out" / "dam" / "report.json").read_text())["evaluation"].keys() == {"before", "after"}
    user.run(*commands["push"])
    arrived = hub.repos["model", "me/merged"]
    assert (
        arrived.private
        and arrived.branches["main"]["model.safetensors"] == (work / "out" / "model.safetensors").read_bytes()
    )
    loaded = (
        "from mergekit_dam import load_merged\n"
        f"here, there = (load_merged(p, task='{VICTIM}').state_dict() for p in ('out', 'me/merged'))\n"
        "assert here.keys() == there.keys() and all((here[k] == there[k]).all() for k in here)\n"
    )
    user.run("python", "-c", loaded)
    user.run("python", "-c", said["program"].replace('"out"', '"out-python"'))


def prepare_chat(work: Path) -> None:
    """Two chat models on a base whose embedding has rows without a token, conversations, and recipes for both."""
    base = make_model("LlamaForCausalLM", work / "chat-base")
    models = [make_model("LlamaForCausalLM", work / f"chat-{i}", seed=i, body=base) for i in (1, 2)]
    for folder in (base, *models):
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    draw = random.Random(0)
    turns = [[" ".join(draw.choices(WORDS, k=5)), " ".join(draw.choices(WORDS, k=2))] for _ in range(24)]
    rows = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in turns]
    (work / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    entries = "".join(
        f"  - {{model: {work}/chat-{i}, parameters: {{calibration: {work}/chats.jsonl}}}}\n" for i in (1, 2)
    )
    (work / "constants.json").write_text(json.dumps({"answer_tokens": 4}))
    (work / "chat.yml").write_text(
        f"merge_method: dam\nbase_model: {work}/chat-base\nmodels:\n{entries}tokenizer: {{source: base}}\n"
        "parameters: {steps: 20, num_samples: 24, constants: constants.json}\n"
    )
    cleaned = "".join(
        f"  - {{model: {work}/cleaned/chat-{i}, parameters: {{weight: 0.5, density: 0.5}}}}\n" for i in (1, 2)
    )
    (work / "ties.yml").write_text(f"merge_method: ties\nbase_model: {work}/chat-base\nmodels:\n{cleaned}")


def walk_with_chats(user: User) -> None:
    """Conversations, a padded vocabulary, an audit whose scan the merge takes, and cleaned inputs for TIES."""
    work = user.folder / "work"
    prepare_chat(work)
    assert "2 models" in user.run("mergekit-dam", "check", "chat.yml")
    user.run("mergekit-dam", "audit", "chat.yml", "--out", "chat-audit", codes=(0, 3))
    user.run("mergekit-dam", "merge", "chat.yml", "chat-out")
    scanned = json.loads((work / "chat-audit" / "audit.json").read_text())["seconds"]
    seconds = json.loads((work / "chat-out" / "dam" / "run.json").read_text())["seconds"]
    assert 0 < seconds["scan"] <= scanned + 0.1, "the merge scanned again what the audit had scanned"
    rows = json.loads((work / "chat-out" / "config.json").read_text())["vocab_size"]
    assert rows == len(WORDS) + 4, f"{rows} rows of the embedding"
    answer = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "model, words = M.from_pretrained('chat-out'), T.from_pretrained('chat-out')\n"
        "ask = [{'role': 'user', 'content': 'the movie was'}]\n"
        "text = words.apply_chat_template(ask, add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "model.generate(**text, max_new_tokens=3)\n"
    )
    user.run("python", "-c", answer)
    inputs = [str(work / "chat-1"), str(work / "chat-2")]
    user.run(
        "mergekit-dam",
        "clean",
        *inputs,
        "--base",
        "chat-base",
        "--data",
        "chats.jsonl",
        "-o",
        "cleaned",
        "--plant-steps",
        "10",
        "--unlearn-steps",
        "10",
    )
    user.run("mergekit-yaml", "ties.yml", "ties-out")
    assert (work / "ties-out" / "model.safetensors").is_file()


def main() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    hub = HubServer()
    try:
        user = User(WORK, hub)
        install(WORK)
        prepare(WORK, hub)
        walk(user, readme((ROOT / "README.md").read_text("utf-8")), hub)
        walk_with_chats(user)
        photograph(WORK / "work" / "out" / "dam" / "report.html", ROOT / "docs" / "pictures", WORK / "profile")
    finally:
        hub.close()
    for step in user.steps:
        print(f"{step['seconds']:>7} s  {step['command'].splitlines()[0][:100]}")


if __name__ == "__main__":
    main()
