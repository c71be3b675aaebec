"""Paths of this machine, taken out of what is published: a model or a data set on this disk is named by its folder.

A path tells a stranger the user's name, projects and disks. Which paths there are is read from the records of the
merge themselves (recipe, masks, report, evaluation), and then their folders are cut off wherever they stand, in
every spelling that JSON, YAML and HTML give them.
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
_LONGEST = 4096  # characters of a path
_WITHIN = re.compile(r"(?<=[\s=+(,\"'])~?/[^\s\"'(),;]+")


class LocalPaths:
    """What is cut off.

    Args:
        records: JSON or YAML values whose strings may be, or hold, paths.
        folders: of this machine whose path may stand in any file, such as the merge's own.
    """

    def __init__(self, records: Iterable[Any], folders: Iterable[Path] = ()) -> None:
        found = {part for record in records for text in _strings(record) for part in _parts(text)}
        absolute = {path for path in found if _is_absolute(path)}
        absolute |= {str(Path(path).expanduser()) for path in absolute if path.startswith("~")}
        inside = {str(form / "x") for folder in folders for form in (folder.absolute(), folder.resolve())}
        absolute |= {str(Path(path).parent) for path in inside}
        absolute |= {os.path.realpath(path) for path in absolute if not path.startswith("~")}
        relative = {path for path in found - absolute if _is_relative(path, absolute)}
        rules = [*_absolute_rules(absolute | inside), *_relative_rules(relative)]
        self._rules = [
            (re.compile(pattern), replacement) for _, pattern, replacement in sorted(rules, key=lambda rule: -rule[0])
        ]

    def shorten(self, text: str) -> str:
        """The text with names of folders and files in place of paths."""
        for pattern, replacement in self._rules:
            text = pattern.sub(replacement, text)
        return text

    def shortened_file(self, path: Path) -> str | None:
        """What is published of a text file; None where it stays as it is."""
        if path.suffix not in _TEXT:
            return None
        try:
            text = path.read_text("utf-8")
        except ValueError:
            return None
        short = self.shortened(text, path.suffix)
        return None if short == text else short

    def value(self, value: Any) -> Any:
        """A JSON or YAML value with every string in it shortened."""
        if isinstance(value, str):
            return self.shorten(value)
        if isinstance(value, Mapping):
            return {self.value(key): self.value(entry) for key, entry in value.items()}
        return [self.value(entry) for entry in value] if isinstance(value, list) else value

    def shortened(self, text: str, suffix: str) -> str:
        """`shorten`, also where YAML or JSON breaks a path over lines, or escapes it in a way of its own."""
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
        except (ValueError, yaml.YAMLError, RecursionError):  # it is neither: what a stranger wrote there
            return short
        try:
            if read(short) == content:
                return short
        except (ValueError, yaml.YAMLError):  # a name that needs quotes without its folder
            pass
        return write(content)


def _absolute_rules(paths: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """(length, pattern, replacement): the folders that lie above each path are cut off."""
    above = {str(Path(path).parent) for path in paths if len(Path(path).parts) > 1}
    for folder in above - {os.sep, "~", "."}:
        deep = len(Path(folder).parts) > 2
        for spelling in _spellings(folder):
            # a short one such as /data may be the tail of another path or of an address
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
    """How files write it: plain, and as JSON, HTML and YAML escape what is no ASCII letter."""
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
    """The text itself, both paths of a model with a LoRA, and paths within other words, as of a trigger's picture."""
    text = text.strip()
    if not text or len(text) > _LONGEST or "\n" in text:
        return []
    return [text, *text.split("+"), *_WITHIN.findall(text)]


def _is_absolute(text: str) -> bool:
    return text.startswith(("/", "~/")) and len(Path(text).parts) > 1


def _is_relative(text: str, absolute: Iterable[str]) -> bool:
    """`models/a` may be an id of the Hub: it is a path if it lies here, or if a record has it with its folders."""
    if "/" not in text or text.startswith("/"):
        return False
    if text.startswith(("./", "../")):
        return True
    try:
        return any(path.endswith(f"/{text}") for path in absolute) or Path(text).exists()
    except OSError:
        return False
