"""The calls of a Hub on localhost: create, preupload, LFS, commit, info, tree and resolve."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import urllib.parse
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.helpers.hub_repo import TOKEN, Fault, Repo

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class Handler(BaseHTTPRequestHandler):
    hub: Any  # the HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _any(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(size)
        self.url = urllib.parse.urlsplit(self.path)
        self.route = urllib.parse.unquote(self.url.path)
        self.hub.calls.append((self.command, self.path))
        fault = self._fault()
        if fault is not None and not fault.after:
            return self._lose() if fault.status == 0 else self._answer(fault.status, {"error": "x"}, fault.headers)
        for pattern, act in _ROUTES:
            found = re.fullmatch(pattern, f"{self.command} {self.route}")
            if found is not None:
                self.lost = fault is not None
                return act(self, *found.groups())
        return self._answer(404, {"error": f"no such call: {self.command} {self.path}"})

    do_GET = do_POST = do_PUT = do_HEAD = _any

    def _fault(self) -> Fault | None:
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.search(fault.pattern, self.path):
                fault.times -= 1
                return fault
        return None

    def _lose(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, body: Any = None, headers: Mapping[str, str] | None = None) -> None:
        if getattr(self, "lost", False):
            return self._lose()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent.append((self.path, len(content)))
            self.wfile.write(content)

    def _signed_in(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, kind: str, name: str) -> Repo | None:
        """The repository if this caller may see it; else the answer has been sent."""
        repo = self.hub.repos.get((kind.rstrip("s"), name))
        if self.headers.get("Authorization") and not self._signed_in():
            self._answer(401, {"error": "no"}, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and not self._signed_in()):
            self._answer(404 if self._signed_in() else 401, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        else:
            return repo
        return None

    def create(self) -> None:
        wanted = json.loads(self.body)
        if not self._signed_in():
            return self._answer(401, {"error": "Invalid username or password."})
        name = f"{wanted['organization']}/{wanted['name']}"
        if ("model", name) in self.hub.repos:
            return self._answer(409, {"error": "You already created this model repo"})
        self.hub.repos["model", name] = Repo(
            private=wanted.get("visibility") == "private" or wanted.get("private") is True
        )
        return self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})

    def validate_yaml(self) -> None:
        self._answer(200, {"errors": [], "warnings": []})

    def info(self, kind: str, name: str, _: str | None, revision: str | None) -> None:
        repo = self._repo(kind, name)
        if repo is None:
            return None
        branch = repo.resolve(revision or "main")
        if branch is None:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        files = [{"rfilename": f, "size": len(c)} for f, c in repo.branches[branch].items()]
        return self._answer(
            200,
            {
                "id": name,
                "sha": repo.commit_id(branch),
                "private": repo.private,
                "siblings": files,
                "tags": [],
                "gated": "manual" if repo.gated else False,
                "cardData": repo.card,
                "downloads": 0,
                "likes": 0,
                "lastModified": "2026-01-01T00:00:00.000Z",
                "createdAt": "2026-01-01T00:00:00.000Z",
            },
        )

    def tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        repo = self._repo(kind, name)
        if repo is None:
            return None
        files = repo.files_at(revision)
        if files is None:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        start = f"{folder}/" if folder else ""
        inside = {f: c for f, c in sorted(files.items()) if f.startswith(start)}
        if inside == {} and folder:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "EntryNotFound"})
        if "recursive=true" in self.url.query.lower():
            return self._answer(200, [self._entry(repo, f, c) for f, c in inside.items()])
        deeper = dict.fromkeys(start + f[len(start) :].partition("/")[0] for f in inside if "/" in f[len(start) :])
        entries = [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in deeper]
        entries += [self._entry(repo, f, c) for f, c in inside.items() if "/" not in f[len(start) :]]
        return self._answer(200, entries)

    def auth_check(self, kind: str, name: str) -> None:
        repo = self._repo(kind, name)
        if repo is not None:
            headers = {"X-Error-Code": "GatedRepo"} if repo.gated else {}
            self._answer(403 if repo.gated else 200, {}, headers)

    @staticmethod
    def _entry(repo: Repo, name: str, content: bytes) -> dict[str, Any]:
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob}
        if name in repo.lfs:
            oid = hashlib.sha256(content).hexdigest()
            entry |= {"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}}
        return entry

    def preupload(self, name: str, revision: str) -> None:
        repo = self._repo("model", name)
        if repo is None:
            return None
        if not self._signed_in():
            return self._answer(403, {"error": "no"})
        present = repo.branches["main"]
        modes = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith((".safetensors", ".png"))
            known = present.get(file["path"])
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if known is not None:
                entry["oid"] = self._entry(repo, file["path"], known)["oid"]
                if large:
                    entry["oid"] = hashlib.sha256(known).hexdigest()
            modes.append(entry)
        return self._answer(200, {"files": modes, "commitOid": repo.commit_id("main")})

    def lfs_batch(self, name: str) -> None:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.objects:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/storage/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.url}/verify/{wanted['oid']}"},
                }
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def store(self, oid: str) -> None:
        if self.headers.get("Authorization"):
            self.hub.unauthorised_secrets.append(self.path)
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._answer(400, {"error": "content does not match its hash"})
        self.hub.objects[oid] = self.body
        return self._answer(200, {})

    def verify(self, oid: str) -> None:
        self._answer(200 if oid in self.hub.objects else 404, {})

    def commit(self, name: str, revision: str) -> None:
        repo = self._repo("model", name)
        if repo is None:
            return None
        pull_request = "create_pr=1" in self.url.query
        branch = "main"
        if pull_request:
            branch = f"refs/pr/{sum(b.startswith('refs/pr') for b in repo.branches) + 1}"
            repo.branches[branch] = dict(repo.branches["main"])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                repo.branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                repo.branches[branch][value["path"]] = self.hub.objects[value["oid"]]
                repo.lfs.add(value["path"])
        oid = repo.commit_id(branch)
        number = branch.rpartition("/")[2]
        return self._answer(
            200,
            {
                "commitOid": oid,
                "commitUrl": f"{self.hub.url}/{name}/commit/{oid}",
                "pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}" if pull_request else None,
            },
        )

    def resolve(self, kind: str | None, name: str, revision: str, file: str) -> None:
        repo = self._repo(kind or "model", name)
        if repo is None:
            return None
        if repo.gated:
            return self._answer(403 if self._signed_in() else 401, {"error": "no"}, {"X-Error-Code": "GatedRepo"})
        branch = repo.resolve(revision)
        if branch is None:
            return self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        head = {"X-Repo-Commit": repo.commit_id(branch)}
        content = repo.branches[branch].get(file)
        if content is None:
            return self._answer(404, {"error": "no"}, {**head, "X-Error-Code": "EntryNotFound"})
        head |= {"ETag": f'"{self._entry(repo, file, content)["oid"]}"', "Accept-Ranges": "bytes"}
        wanted = _RANGE.fullmatch(self.headers.get("Range") or "")
        if wanted is not None:
            start, stop = int(wanted[1]), int(wanted[2] or len(content) - 1) + 1
            head["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
            return self._answer(206, content[start:stop], {**head, "Content-Type": "application/octet-stream"})
        return self._answer(200, content, {**head, "Content-Type": "application/octet-stream"})


_ID = r"([\w.-]+/[\w.-]+|[\w.-]+)"
_ROUTES: list[tuple[str, Any]] = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"POST /api/models/{_ID}/preupload/(.+)", Handler.preupload),
    (rf"POST /{_ID}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /storage/(\w+)", Handler.store),
    (r"POST /verify/(\w+)", Handler.verify),
    (rf"POST /api/models/{_ID}/commit/(.+)", Handler.commit),
    (rf"GET /api/(models|datasets)/{_ID}/tree/([^/]+|refs/pr/\d+)(?:/(.*))?", Handler.tree),
    (rf"GET /api/(models|datasets)/{_ID}/auth-check", Handler.auth_check),
    (rf"GET /api/(models|datasets)/{_ID}(/revision/(.+))?", Handler.info),
    (rf"(?:GET|HEAD) /(?:(datasets)/)?{_ID}/resolve/([^/]+|refs/pr/\d+)/(.+)", Handler.resolve),
]
