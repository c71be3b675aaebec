"""examples/quickstart.ipynb runs from a fresh kernel, and prints what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]


def test_quickstart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # nobody's own settings
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "scale = 1.0" in first.source
    first.source = first.source.replace("scale = 1.0", "scale = 0.05")
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    printed = "".join(
        o.get("text", "") for c in notebook.cells for o in c.get("outputs", []) if o.get("name") == "stdout"
    )
    assert re.search(r"plain +mean accuracy +[\d.]+ %, attack success [\d.]+ % \(\d+/\d+\)", printed)
    assert re.search(r"defended +mean accuracy", printed)
    assert "base_model_relation: merge" in printed and "## What was measured" in printed and "model-index" in printed
