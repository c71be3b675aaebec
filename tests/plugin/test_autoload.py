"""How an unmodified mergekit finds `dam`: each rule of the hook, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **env},
    )


@pytest.mark.parametrize(
    "first",
    [
        "import mergekit.merge_methods",
        "import mergekit.merge_methods.registry",
        "import mergekit_dam.plugin.method",
        "import mergekit_dam.models.plan, mergekit_dam.plugin.method",
    ],
)
def test_dam_is_known_in_every_order_of_imports(first: str) -> None:
    done = _python(f"{first}\nfrom mergekit.merge_methods import get\nprint(get('dam').spec.name)")
    assert done.stdout.strip() == "dam" and "not available" not in done.stderr, done.stderr


def test_torch_alone_loads_neither_mergekit_nor_us_but_leaves_dam_to_be_found() -> None:
    code = "import torch, sys; print([m for m in sys.modules if m.split('.')[0] in ('mergekit', 'mergekit_dam')])\n"
    done = _python(code + "from mergekit.merge_methods import get\nprint(get('dam').spec.name)")
    assert done.stdout.split() == ["[]", "dam"] and "not available" not in done.stderr, done.stderr


@pytest.mark.parametrize("switch", ["MERGEKIT_DAM_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_both_opt_outs(switch: str) -> None:
    code = "from mergekit.merge_methods import registered_methods as r; print('dam' in {m.spec.name for m in r()})"
    assert _python(code, **{switch: "0"}).stdout.strip() == "False"


def test_a_broken_method_warns_and_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "mergekit_dam" / "plugin").mkdir(parents=True)
    (tmp_path / "mergekit_dam" / "__init__.py").touch()
    (tmp_path / "mergekit_dam" / "plugin" / "method.py").write_text("raise OSError('broken on purpose')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    code += "from mergekit.merge_methods import get; print(get('ties').spec.name)"
    done = _python(code)
    assert done.returncode == 0 and done.stdout.strip() == "ties"
    assert "broken on purpose" in done.stderr


def test_wheel_installs_works_and_leaves_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    source = tmp_path / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((root / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)],
        check=True,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=120)
    python = venv / "bin" / "python"
    (site,) = (venv / "lib").glob("python*/site-packages")
    # the dependencies of the running environment, but not its own installation of this project
    import torch

    shared = Path(torch.__file__).parents[1]
    for entry in shared.iterdir():
        if "mergekit_dam" not in entry.name and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    check = "import torch; from mergekit.merge_methods import registered_methods as r\n"
    check += "print('dam' in {m.spec.name for m in r()})"

    def run(*command: str) -> str:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
            cwd=tmp_path,
            env={**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "HF_HUB_OFFLINE": "1"},
        )
        return done.stdout.strip()

    run(*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel))
    assert run(str(python), "-c", check) == "True"
    assert (site / "_mergekit_dam_autoload.py").is_file() and (site / "mergekit_dam" / "py.typed").is_file()
    assert (site / "mergekit_dam" / "models" / "architectures" / "vit.json").is_file()
    run(*pip, "--python", str(python), "uninstall", "-q", "-y", "mergekit-dam")
    assert run(str(python), "-c", check) == "False"
    assert not list(site.glob("*mergekit_dam*"))
