"""Read untrusted files within bounds on size and depth, and refuse names and links that leave their folder.

Models, recipes and artefacts come from strangers. Nothing here runs what it reads; each bound is far above the needs
of real files, and a file beyond a bound is refused by name before memory or time is spent on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mergekit_dam.errors import DamError, first_line, permission_denied

_YAML_BYTES = 1 << 20  # a recipe of a thousand models has 100 kB
_YAML_NODES = 100_000  # after all aliases are followed; ten lines of aliases to aliases would make 10^9
_JSON_BYTES = 1 << 26  # the shard index of the largest models has 10 MB
_NAME_BYTES = 128  # of a name that becomes part of a file's name (systems allow 255 bytes)
# entries of config.json that decide how many objects or how much memory a model takes before a weight is read
_CONFIG_LIMITS: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_local_experts"), 4096),
    **dict.fromkeys(("hidden_size", "intermediate_size", "n_embd", "dim", "hidden_dim", "projection_dim"), 1 << 21),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 1 << 27),
    **dict.fromkeys(("num_labels", "image_size", "patch_size", "num_channels", "type_vocab_size"), 1 << 20),
    "n_positions": 1 << 15,  # GPT-2 keeps a mask of n_positions^2 in memory
}


def load_yaml(text: str, where: str) -> Any:
    """Parse YAML of plain values (no tags that make objects), at most 1 MB and 100,000 nodes with aliases followed.

    Raises:
        DamError: not YAML, too large, too deep, or aliases that contain themselves.
    """
    try:
        if len(text) > _YAML_BYTES:
            raise ValueError(f"{len(text)} characters, at most {_YAML_BYTES} are read")
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            size = _nodes(node, {})
            if size > _YAML_NODES:
                raise ValueError(f"{size:.3g} values once its aliases are followed, at most {_YAML_NODES} are read")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise DamError(where, expected="YAML of plain values", **_yaml_fault(error, text)) from error
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise DamError(
            where, expected="YAML of plain values", got=_reason(error), cure="See the example in the README."
        ) from error


def _yaml_fault(error: yaml.YAMLError, text: str) -> dict[str, str]:
    """The got and cure of a YAML error, with line and column; the cure names a tab or no-break space there."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        number, column = before.count("\n") + 1, error.position - before.rfind("\n")
        got = f"the character {error.character!r}"
    elif mark is not None:
        number, column = mark.line + 1, mark.column + 1
        parts = (getattr(error, "context", None), getattr(error, "problem", None))
        got = ", ".join(part for part in parts if part)
    else:
        return {"got": first_line(error), "cure": "See the example in the README."}
    lines = text.splitlines()
    line = next((text for text in lines[max(0, number - 2) : number] if "\t" in text or "\xa0" in text), "")
    if "\t" in line:
        cure = "The line has a tab: indent with spaces."
    elif "\xa0" in line:
        cure = "The line has a no-break space, as web pages have: type a plain space."
    else:
        cure = "Correct this line or the one before it."
    return {"got": f"{got} (line {number}, column {column})", "cure": cure}


def read_utf8(path: Path, where: str) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Raises:
        DamError: no right to read it, or another encoding.
    """
    try:
        return path.read_text("utf-8-sig")
    except PermissionError as error:
        raise permission_denied(where) from error
    except UnicodeDecodeError as error:
        raise DamError(
            where,
            expected="text in UTF-8",
            got=f"another encoding ({error.reason} at byte {error.start})",
            cure="Save it as UTF-8; the > of Windows PowerShell writes UTF-16.",
        ) from error


def _nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """Count `node` and the nodes below it, each alias as a copy; Python's integers do not overflow."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError("an alias inside the value that it stands for")
        return known[id(node)]
    known[id(node)] = 0  # being counted
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_nodes(child, known) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_nodes(key, known) + _nodes(value, known) for key, value in node.value)
    known[id(node)] = total
    return total


def load_json(path: Path, *, where: str | None = None, max_bytes: int = _JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object from a file of bounded size.

    Raises:
        DamError: no right to read it, too large, too deep, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{size} bytes, at most {max_bytes} are read")
        values = json.loads(path.read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a {type(values).__name__}")
        return values
    except PermissionError as error:
        raise permission_denied(where or str(path)) from error
    except (OSError, ValueError, RecursionError) as error:
        raise DamError(
            where or str(path), expected="a JSON object", got=_reason(error), cure="Download or save this file again."
        ) from error


def require_plausible_config(folder: Path) -> None:
    """Refuse a config.json whose sizes would exhaust memory or time before a weight is read.

    Raises:
        DamError: an entry exceeds its limit.
    """
    path = folder / "config.json"
    if not path.is_file():
        return  # loading the model reports the missing file
    values = load_json(path)
    labels = values.get("id2label")
    if isinstance(labels, Mapping):
        values = {**values, "num_labels": max(len(labels), _number(values.get("num_labels")))}
    pending: list[tuple[str, Any]] = [("", values)]
    while pending:
        prefix, part = pending.pop()
        for key, value in part.items():
            limit = _CONFIG_LIMITS.get(key)
            if limit is not None and _number(value) > limit:
                raise DamError(
                    f"{path}: {prefix}{key}",
                    expected=f"at most {limit}",
                    got=f"{value:.3g}",
                    cure="This is no model that can be merged here; check where it comes from.",
                )
            if isinstance(value, Mapping):
                pending.append((f"{prefix}{key}.", value))


def _number(value: Any) -> float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else 0


def plain_name(name: str, what: str) -> str:
    """Return the name if it stays in its folder on every system: no separator, not only dots, no control character.

    Raises:
        DamError: any other name.
    """
    if (
        not name.strip(". ")
        or len(name.encode("utf-8", "surrogatepass")) > _NAME_BYTES
        or any(c in '/\\:*?"<>|' or not c.isprintable() for c in name)
    ):
        raise DamError(
            what,
            expected="a plain name without separators",
            got=repr(name[:80]),
            cure="Names that lead to another folder are refused.",
        )
    return name


def file_safe(name: str) -> str:
    """Make a plain name of `name`: characters other than letters, digits and `-_.` become `-`; at most 96 bytes."""
    kept = "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
    kept = kept.encode("utf-8", "replace")[:96].decode("utf-8", "ignore")
    return kept if kept.strip(".") else "model"


def require_no_links_out(folder: Path, names: tuple[str, ...] = ("", "dam", "dam/heads", "dam/figures")) -> None:
    """Refuse an output folder in which a symbolic link would make the merge write outside it.

    Args:
        folder: the output; it need not exist. It may be a link itself, since the user named it.
        names: the folders below it that a merge writes to.

    Raises:
        DamError: a link leads outside the folder.
    """
    root = folder.resolve()
    for name in names:
        try:
            entries = [*os.scandir(root / name)] if (root / name).is_dir() else []
        except OSError:
            entries = []  # writing to a folder that cannot be listed fails with a message of its own
        for entry in entries:
            if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                raise DamError(
                    f"output {folder}",
                    expected="a folder whose entries stay inside it",
                    got=f"the link {entry.name} to {os.readlink(entry.path)}",
                    cure="Remove the link, or choose another output directory.",
                )


def _reason(error: Exception) -> str:
    return "values nested too deeply" if isinstance(error, RecursionError) else first_line(error)
