"""Constants for tests: in a file for recipes, which name it, and in the settings of a plan."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from mergekit_dam.config import DamConfig
from mergekit_dam.constants import Constants


def constants_file(**values: Any) -> str:
    """Path of a JSON file with these constants, for the setting `constants`."""
    text = json.dumps(values, sort_keys=True)
    file = _folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    file.write_text(text)
    return str(file)


def in_a_file(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a recipe takes them, from settings and constants side by side."""
    own = {name: value for name, value in settings.items() if name in Constants.model_fields}
    rest = {name: value for name, value in settings.items() if name not in own}
    return rest | ({"constants": constants_file(**own)} if own else {})


def with_constants(config: DamConfig, **values: Any) -> DamConfig:
    """The same settings with other constants."""
    return config.model_copy(update={"constants": config.constants.model_copy(update=values)})


@cache
def _folder() -> Path:
    """Of this process; removed when it ends."""
    folder = tempfile.mkdtemp(prefix="dam-constants-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
