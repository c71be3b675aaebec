"""`make dist`: the version is one, and the archives hold what they must and nothing else."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = {"_mergekit_dam_autoload.py", "mergekit_dam/py.typed", "mergekit_dam/models/architectures/vit.json"}
FOREIGN = re.compile(r"(^|/)(tests|examples|benchmarks|docs|build)/|\.(ipynb|parquet|safetensors|pyc)$")


def versions() -> None:
    found = {
        name: re.search(pattern, (ROOT / name).read_text("utf-8"), re.MULTILINE)
        for name, pattern in {
            "mergekit_dam/__init__.py": r'^__version__ = "(.+)"$',
            "CITATION.cff": r"^version: (.+)$",
            "CHANGELOG.md": r"^## \[?(\d[^\]\s]*)",
        }.items()
    }
    told = {name: match and match[1] for name, match in found.items()}
    if len({told["mergekit_dam/__init__.py"], told["CITATION.cff"]}) != 1:
        sys.exit(f"versions differ: {told}")
    if told["CHANGELOG.md"] != told["CITATION.cff"]:
        print(f"note: the changelog's latest release is {told['CHANGELOG.md']}", file=sys.stderr)


def files(folder: Path) -> None:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    inside = set(zipfile.ZipFile(wheel).namelist())
    if missing := NEEDED - inside:
        sys.exit(f"{wheel.name} lacks {sorted(missing)}")
    if foreign := sorted(name for name in inside if FOREIGN.search(name)):
        sys.exit(f"{wheel.name} holds {foreign[:3]}")
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mergekit_dam").rglob("*.py")}
    if missing := modules - inside:
        sys.exit(f"{wheel.name} lacks {sorted(missing)[:3]}")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    if missing := {"LICENSE", "README.md", "setup.cfg", "pyproject.toml", *NEEDED, *modules} - names:
        sys.exit(f"{sdist.name} lacks {sorted(missing)[:3]}")
    print(f"{wheel.name}: {len(inside)} files; {sdist.name}: {len(names)} files")


if __name__ == "__main__":
    versions() if sys.argv[1] == "versions" else files(Path(sys.argv[2]))
