"""What the Hub on localhost keeps, and what can go wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOKEN = "hf_localhost"


@dataclass
class Repo:
    """Files by branch; a commit's id is the hash of its content."""

    private: bool = False
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    lfs: set[str] = field(default_factory=set)
    card: dict[str, Any] = field(default_factory=dict)

    def commit_id(self, branch: str) -> str:
        digest = hashlib.sha1()
        for name, content in sorted(self.branches[branch].items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def files_at(self, revision: str) -> dict[str, bytes] | None:
        if revision in self.branches:
            return self.branches[revision]
        return next((f for b, f in self.branches.items() if self.commit_id(b) == revision), None)

    def resolve(self, revision: str) -> str | None:
        return next((b for b in self.branches if revision in {b, self.commit_id(b)}), None)


@dataclass
class Fault:
    """What goes wrong: the next `times` calls that match get this answer, or none at all (status 0)."""

    method: str
    pattern: str
    status: int
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    after: bool = False  # carry the call out first, then lose the answer
