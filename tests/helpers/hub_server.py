"""A Hub on localhost that keeps files in memory, checks tokens, hashes what arrives, and fails on request."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from typing import Any

from tests.helpers.hub_handler import Handler
from tests.helpers.hub_repo import TOKEN, Fault, Repo

__all__ = ["TOKEN", "HubServer"]


class HubServer:
    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.calls: list[tuple[str, str]] = []
        self.sent: list[tuple[str, int]] = []  # path and bytes of every answer's body
        self.unauthorised_secrets: list[str] = []  # storage URLs that were sent a token
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: Mapping[str, bytes], *, kind: str = "model", **options: Any) -> Repo:
        repo = self.repos[kind, name] = Repo(**options)
        repo.branches["main"] = dict(files)
        repo.lfs = {f for f in files if f.endswith((".safetensors", ".parquet"))}
        return repo

    def fail(self, method: str, pattern: str, status: int, **options: Any) -> None:
        self.faults.append(Fault(method, pattern, status, **options))

    def bytes_of(self, pattern: str) -> int:
        """Bytes sent in answers to paths that match."""
        return sum(size for path, size in self.sent if re.search(pattern, path))

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, f"{method} {path}") is not None for method, path in self.calls)
