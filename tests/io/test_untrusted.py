"""What people write by hand: the place of a fault in YAML, other encodings, and ~ in settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_dam.errors import DamError
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.io.untrusted import load_yaml, read_utf8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a:\n  b: 1\n\tc: 2\n", r"line 3, column 1.*indent with spaces"),
        ("a:\xa0\n  b: 1\n", r"line 2.*no-break space"),
        ("a: 1\nb: \x07\n", r"line 2, column 4"),
        ("a: [1\nb: 2\n", r"line 2"),
    ],
)
def test_a_fault_in_yaml_is_named_with_its_line(text: str, said: str) -> None:
    with pytest.raises(DamError, match=said):
        load_yaml(text, "recipe")


def test_other_encodings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yml"
    file.write_bytes("a: 1".encode("utf-16"))
    with pytest.raises(DamError, match="Save it as UTF-8"):
        read_utf8(file, "recipe")
    file.write_bytes("a: 1".encode("utf-8-sig"))
    assert read_utf8(file, "recipe") == "a: 1"


def test_the_cache_may_be_given_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MERGEKIT_DAM_CACHE", "~/cache")
    assert cache_folder() == tmp_path / "cache"
