"""Remove local paths from published files, so that a local model or data set is named by its folder alone.

A path tells strangers the user's name, projects and disks. The records of the merge (recipe, masks, report,
evaluation) give the paths, and their folders are then removed everywhere, in every spelling of JSON, YAML and HTML.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from markupsafe import escape as markup

_TEXT = frozenset({".json", ".jsonl", ".yml", ".yaml", ".md", ".txt", ".html", ".jinja", ".csv", ".svg"})
_LONGEST = 4096  # at most, characters of a path
_WITHIN = re.compile(r"(?<=[\s=+(,\"'])~?/[^\s\"'(),;]+")


class LocalPaths:
    """Rules that shorten local paths to names of folders and files.

    Args:
        records: JSON or YAML values whose strings may be, or hold, paths.
        folders: local folders whose path may occur in any file, such as the merge's own.
    """

    def __init__(self, records: Iterable[Any], folders: Iterable[Path] = ()) -> None:
        candidates = {part for record in records for text in _strings(record) for part in _parts(text)}
        absolute = {path for path in candidates if _is_absolute(path)}
        absolute |= {str(Path(path).expanduser()) for path in absolute if path.startswith("~")}
        inside = {str(form / "x") for folder in folders for form in (folder.absolute(), folder.resolve())}
        absolute |= {str(Path(path).parent) for path in inside}
        absolute |= {os.path.realpath(path) for path in absolute if not path.startswith("~")}
        relative = {path for path in candidates - absolute if _is_relative(path, absolute)}
        rules = [*_absolute_rules(absolute | inside), *_relative_rules(relative)]
        self._rules = [
            (re.compile(pattern), replacement) for _, pattern, replacement in sorted(rules, key=lambda rule: -rule[0])
        ]

    def shorten(self, text: str) -> str:
        """Replace paths in a text by names of folders and files."""
        for pattern, replacement in self._rules:
            text = pattern.sub(replacement, text)
        return text

    def shortened_file(self, path: Path) -> str | None:
        """Return the shortened content of a text file; None for a file that needs no change."""
        if path.suffix not in _TEXT:
            return None
        try:
            text = path.read_text("utf-8")
        except ValueError:
            return None
        short = self.shortened(text, path.suffix)
        return None if short == text else short

    def value(self, value: Any) -> Any:
        """Shorten every string in a JSON or YAML value."""
        if isinstance(value, str):
            return self.shorten(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(entry) for key, entry in value.items()}
        return [self.value(entry) for entry in value] if isinstance(value, list) else value

    def shortened(self, text: str, suffix: str) -> str:
        """Shorten a text as `shorten` does, also where YAML or JSON breaks a path over lines or escapes it."""
        readers: dict[str, tuple[Callable[[str], Any], Callable[[Any], str]]] = {
            ".json": (json.loads, lambda value: json.dumps(value, indent=1)),
            ".yml": (yaml.safe_load, lambda value: str(yaml.safe_dump(value, sort_keys=False))),
        }
        short = self.shorten(text)
        read, write = readers.get(".yml" if suffix == ".yaml" else suffix, (None, None))
        if read is None or write is None:
            return short
        try:
            content = self.value(read(text))
        except (ValueError, yaml.YAMLError, RecursionError):  # the file is not what its name says
            return short
        try:
            if read(short) == content:
                return short
        except (ValueError, yaml.YAMLError):  # without its folder, a name needs quotes
            pass
        return write(content)


def _absolute_rules(paths: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """Yield (length, pattern, replacement) that remove the folders above each path."""
    above = {str(Path(path).parent) for path in paths if len(Path(path).parts) > 1}
    for folder in above - {os.sep, "~", "."}:
        deep = len(Path(folder).parts) > 2
        for spelling in _spellings(folder):
            # a short folder such as /data may be the tail of another path or of an address
            start = "" if deep else r"(?<![\w/.~-])"
            yield len(spelling), f"{start}{re.escape(spelling)}/", ""
    for path in paths:
        if str(Path(path).parent) == os.sep and Path(path).name:
            for spelling in _spellings(path):
                yield len(spelling), rf"(?<![\w/.~-]){re.escape(spelling)}(?![\w.-])", _escaped(Path(path).name)


def _relative_rules(paths: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    for path in paths:
        for spelling in _spellings(path):
            yield len(spelling), rf"(?<![\w/.~-]){re.escape(spelling)}(?![\w/-])", _escaped(Path(path).name)


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\")


def _spellings(path: str) -> set[str]:
    """Spellings of a path in files: plain, and with the escapes of JSON, HTML and YAML."""
    plain = {path, html.escape(path), str(markup(path)), html.escape(path, quote=False)}
    as_yaml = str(yaml.safe_dump(path, width=_LONGEST, default_style='"')).strip().strip('"')
    return plain | {json.dumps(path)[1:-1], json.dumps(path, ensure_ascii=False)[1:-1], as_yaml}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _strings(key)
            yield from _strings(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _strings(entry)


def _parts(text: str) -> list[str]:
    """The text, both paths of a model with a LoRA, and paths inside further text, as of a trigger's image."""
    text = text.strip()
    if not text or len(text) > _LONGEST or "\n" in text:
        return []
    return [text, *text.split("+"), *_WITHIN.findall(text)]


def _is_absolute(text: str) -> bool:
    return text.startswith(("/", "~/")) and len(Path(text).parts) > 1


def _is_relative(text: str, absolute: Iterable[str]) -> bool:
    """Whether a text is a relative path; `models/a` may be a Hub id unless it exists or a record has its folders."""
    if "/" not in text or text.startswith("/"):
        return False
    if text.startswith(("./", "../")):
        return True
    try:
        return any(path.endswith(f"/{text}") for path in absolute) or Path(text).exists()
    except OSError:
        return False
