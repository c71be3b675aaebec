"""Text of strangers in Markdown and HTML: model ids, task names, settings and metadata are shown, never interpreted.

Model cards and reports are rendered in browsers. Whatever came from a model, an artefact or a recipe goes through one
of these before it is put into such a page.
"""

from __future__ import annotations

import html as _html
import json
import re

_LONGEST = 300  # characters shown of one value
# ASCII punctuation that CommonMark can give a meaning (spec 0.31, section 2.4): all of it may be escaped
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~:@$^=])")


def plain(text: object, *, longest: int = _LONGEST) -> str:
    """One line of printable characters: line ends, control codes and bidirectional marks become visible escapes."""
    shown = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in shown)
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def html(text: object, *, longest: int = _LONGEST) -> str:
    """For the content of an element or a quoted attribute; not for scripts, styles or URLs."""
    return _html.escape(plain(text, longest=longest), quote=True)


def markdown(text: object, *, longest: int = _LONGEST) -> str:
    """For a paragraph, a list entry or a table cell: neither markup, link, raw HTML nor an entity survives."""
    return _MARKDOWN.sub(r"\\\1", _html.escape(plain(text, longest=longest), quote=False))


def code_span(text: object, *, longest: int = _LONGEST) -> str:
    """For Markdown: `text` as code. The fence is longer than any run of backticks in it, and no table is split."""
    shown = plain(text, longest=longest).replace("|", "\\|")
    runs = [len(run) for run in re.findall(r"`+", shown)]
    fence = "`" * (max(runs, default=0) + 1)
    return f"{fence} {shown} {fence}" if runs or not shown.strip() else f"{fence}{shown}{fence}"


def yaml_scalar(text: object, *, longest: int = _LONGEST) -> str:
    """For the front matter of a card: a double-quoted scalar (JSON's strings are YAML's)."""
    return json.dumps(plain(text, longest=longest), ensure_ascii=False)  # YAML has no surrogate pairs
