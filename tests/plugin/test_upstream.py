"""The proposal to mergekit applies to the mergekit that is installed, and does what it says."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mergekit
import pytest
from mergekit.merge_methods import registry

PATCH = Path(__file__).parents[2] / "docs" / "upstream" / "mergekit-entry-points.patch"
BROKEN = "raise ImportError('broken on purpose')\n"


@pytest.fixture
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The patched module beside the real one, and a package with four plugins."""
    target = tmp_path / "mergekit" / "merge_methods" / "registry.py"
    target.parent.mkdir(parents=True)
    shutil.copy(Path(mergekit.__file__).parent / "merge_methods" / "registry.py", target)
    subprocess.run(["patch", "-p1", "--fuzz=0", "-i", PATCH], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    for name, code in {"fine": FINE, "broken": BROKEN}.items():
        (tmp_path / f"plugin_{name}.py").write_text(code)
    (tmp_path / "plugins-1.dist-info").mkdir()
    (tmp_path / "plugins-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1\n")
    (tmp_path / "plugins-1.dist-info" / "entry_points.txt").write_text(
        "[mergekit.merge_methods]\nours = plugin_fine:Ours\nmade = plugin_fine:made\nother = plugin_fine:Ours\n"
        "broken = plugin_broken:Ours\nlinear = plugin_broken:Ours\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location("patched_registry", target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FINE = """
from mergekit.merge_methods.base import GroupMergeMethod, MergeMethodSpec

class Ours(GroupMergeMethod):
    def __init__(self, name="ours"):
        self.spec = MergeMethodSpec(name=name)

    def merge_group(self, group, /, **parameters):
        return group.base.tensor

def made():
    return Ours("made")
"""


def test_plugins_are_found_and_loaded_only_when_asked_for(patched: ModuleType) -> None:
    assert {"ours", "made", "other", "broken"} <= patched.plugin_names()
    assert "plugin_fine" not in sys.modules
    assert patched.get("ours").spec.name == "ours" and patched.get("ours") is patched.get("ours")
    assert patched.get("made").spec.name == "made"
    assert {method.spec.name for method in registry.registered_methods()} <= {
        *(method.spec.name for method in patched.registered_methods()),
        "dam",
    }


def test_a_bad_plugin_harms_only_those_who_ask_for_it(patched: ModuleType) -> None:
    with pytest.raises(RuntimeError, match=r"broken \(plugin_broken:Ours\) cannot be loaded") as caught:
        patched.get("broken")
    assert "broken on purpose" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="does not provide a merge method named other"):
        patched.get("other")
    with pytest.raises(RuntimeError, match=r"Unimplemented merge method tise \(known: .*ours.*ties"):
        patched.get("tise")
    assert patched.get("linear").spec.name == "linear", "a plugin took the place of a built-in method"
    assert patched.get("ours").spec.name == "ours"


def test_our_own_entry_point_would_do(patched: ModuleType) -> None:
    from importlib.metadata import EntryPoint

    from mergekit_dam.plugin.method import DAM

    method = patched._load(EntryPoint("dam", "mergekit_dam.plugin.method:DAM", patched.ENTRY_POINT_GROUP))
    assert isinstance(method, DAM)
