"""Defense-Aware Merging for mergekit: merge fine-tuned models without merging a backdoor."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_merged"]


def __getattr__(name: str) -> Any:
    # lazy: the autoload hook imports this package, and that must stay cheap
    if name == "load_merged":
        from mergekit_dam.heads import load_merged

        return load_merged
    raise AttributeError(f"module 'mergekit_dam' has no attribute {name!r}")
