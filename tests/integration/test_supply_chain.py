"""Dependencies are declared, justified and pinned; importing and merging open no connection."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import mergekit_dam
from tests.helpers.tiny_models import make_model

ROOT = Path(__file__).parents[2]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def _names(text: str) -> set[str]:
    found = (re.match(r"[A-Za-z0-9_.-]+", line.strip()) for line in text.splitlines())
    return {_normal(match[0]) for match in found if match}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


DIRECT = _names(SETUP["options"]["install_requires"])
EXTRAS = {name: _names(text) for name, text in SETUP["options.extras_require"].items()}


def test_every_direct_dependency_is_justified() -> None:
    rows = re.findall(r"^\| ([\w-]+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "extending.md").read_text(), re.M)
    documented = {_normal(name) for name, what, _ in rows if name not in ("package", "---")}
    assert documented == DIRECT
    assert all(len(what) > 8 for name, what, _ in rows if name not in ("package", "---"))


def test_what_is_imported_is_declared() -> None:
    """By the package itself; the benchmark may use its extra."""
    providers, own = packages_distributions(), {"mergekit_dam", "_mergekit_dam_autoload"}
    for file in sorted((ROOT / "mergekit_dam").rglob("*.py")):
        allowed = DIRECT | set().union(*EXTRAS.values()) - EXTRAS["dev"]
        if file.parts[-2] != "bench":
            allowed = DIRECT | EXTRAS["report"] | EXTRAS["lm-eval"] | EXTRAS["kernels"]
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [str(node.module)]
            for top in {module.split(".")[0] for module in modules} - own - set(sys.stdlib_module_names):
                assert {_normal(name) for name in providers.get(top, [top])} & allowed, f"{file} imports {top}"


def test_what_is_declared_is_pinned() -> None:
    pinned = _names((ROOT / "constraints.txt").read_text())
    wanted = DIRECT | EXTRAS["dev"] | EXTRAS["demo"]
    assert wanted - pinned <= {"setuptools", "wheel", "build"}, wanted - pinned
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all("==" in line for line in lines)


WATCH = """
import json, pkgutil, sys
seen = []
def watch(event, args):
    if event == "socket.bind" and args[-1] == ("::1", 0):
        return  # urllib3, which older datasets import, asks in this way whether the machine has IPv6
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto", "urllib.Request"):
        seen.append(event + " " + repr(args[-1] if event == "socket.connect" else args[:2])[:80])
sys.addaudithook(watch)
import mergekit_dam
for module in pkgutil.walk_packages(mergekit_dam.__path__, "mergekit_dam."):
    if not module.name.startswith("dam_bench"):
        __import__(module.name)
imported = list(seen)
from pathlib import Path
from tests.faults.child import Job, merge_here
root, texts = Path(sys.argv[1]), sys.argv[2]
parameters = {"calibration": texts, "steps": 1, "num_samples": 4, "scan_steps": 2, "max_length": 8}
recipe = {"merge_method": "dam", "base_model": str(root / "base"), "parameters": parameters,
          "models": [{"model": str(root / name)} for name in "ab"]}
merge_here(Job(recipe, root / "out", root, root / "log"))
from mergekit_dam import load_merged
load_merged(root / "out", "a")
print(json.dumps({"import": imported, "all": seen}))
"""


def test_importing_and_merging_open_no_connection(tmp_path: Path, texts: Path) -> None:
    """Seen by an audit hook in a process that is not told to be offline."""
    base = make_model("BertModel", tmp_path / "base")
    for i, name in enumerate("ab"):
        make_model("BertForSequenceClassification", tmp_path / name, seed=i, body=base)
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path), str(texts)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={
            **environment,
            "PYTHONPATH": str(Path(mergekit_dam.__file__).parents[1]),
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"import": [], "all": []}


def test_a_test_cannot_reach_the_network() -> None:
    """The hook of conftest.py refuses every address that is not this machine's."""
    import socket

    with pytest.raises(RuntimeError, match="tests must not use the network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(RuntimeError, match="tests must not use the network"):
        socket.getaddrinfo("example.org", 443)
