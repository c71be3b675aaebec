"""Push a finished merge to the Hub: plan it without sending anything, upload with retries, and compare the result."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from mergekit_dam.artifact.masks_file import MASKS_FILE, load, save
from mergekit_dam.errors import DamError
from mergekit_dam.evaluation.results import read_results
from mergekit_dam.io.cache import cache_folder
from mergekit_dam.io.digests import file_digest
from mergekit_dam.io.hub_client import is_hub_id, with_retries
from mergekit_dam.publish.card import model_card
from mergekit_dam.publish.contents import Publication, contents_of, files_to_publish, refuse_secrets
from mergekit_dam.publish.local_paths import LocalPaths
from mergekit_dam.publish.provenance import provenance

LOG = logging.getLogger(__name__)
_CHUNK = 1 << 24  # bytes hashed at a time


@dataclass(frozen=True)
class PushPlan:
    """Files, card and options of a push.

    Attributes:
        repo_id: ORG/NAME.
        public: whether a new repository is public.
        create_pr: whether to open a pull request.
        files: path in the repository -> file, without the card.
        card: text of README.md.
        paths: local paths, which are shortened in the card and in every text file.
        warnings: for the user to read before the push.
    """

    repo_id: str
    public: bool
    create_pr: bool
    files: Mapping[str, Path]
    card: str
    paths: LocalPaths
    warnings: tuple[str, ...]

    @property
    def size(self) -> int:
        """Total size in bytes."""
        return sum(path.stat().st_size for path in self.files.values()) + len(self.card.encode())


@dataclass(frozen=True)
class PushResult:
    """Repository and commit of a finished push."""

    repo_id: str
    url: str
    commit: str
    pull_request: str | None
    private: bool | None

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def plan_push(
    folder: Path,
    repo_id: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    include_masks: bool = False,
    licence: str | None = None,
    results: Path | None = None,
    card: Path | None = None,
) -> PushPlan:
    """Check the merge, write its card and list its files, without sending anything.

    Args:
        folder: directory that `mergekit-dam merge` or mergekit-yaml wrote.
        repo_id: ORG/NAME.
        public: whether a new repository is public; a licence is then needed.
        create_pr: whether to open a pull request.
        include_masks: publish dam_masks.safetensors, too, which others can apply again.
        licence: an identifier of the Hub such as apache-2.0; None derives it from the inputs.
        results: file of measured results (see `read_results`); None: the results in dam/, if any.
        card: a README.md to send in place of the generated card.

    Raises:
        DamError: an incomplete merge, an invalid id, no licence for a public model, or an access token in a file.
    """
    _check_id(repo_id)
    publication = contents_of(folder)
    files, notes = files_to_publish(publication, include_masks=include_masks)
    sources = [results] if results else publication.records
    measured = next((m for s in sources if (m := read_results(s, required=results is not None))), None)
    if measured is None:
        notes.append("no results were given (--results): the card says that nothing was measured")
    inputs, warnings = provenance(publication, HfApi(), licence=licence, public=public)
    paths = local_paths(publication, results)
    shortened = replace(publication, recipe_text=paths.shortened(publication.recipe_text, ".yml"))
    text = card.read_text("utf-8") if card else model_card(repo_id, shortened, inputs, measured)
    return PushPlan(repo_id, public, create_pr, files, paths.shorten(text), paths, tuple(notes + warnings))


def local_paths(publication: Publication, results: Path | None = None) -> LocalPaths:
    """Collect the local paths in the merge's records: models, data, heads and images.

    Args:
        publication: the merge.
        results: the user's own file of measured results.
    """
    records: list[Any] = [publication.recipe, publication.masks, publication.merge_audit]
    for file in (*publication.records, results):
        if file is not None:
            records.append(json.loads(file.read_text("utf-8", errors="replace")))
    return LocalPaths(records, (publication.folder, Path.cwd(), Path.home(), cache_folder()))


def push(plan: PushPlan) -> PushResult:
    """Create the repository if it is missing, upload the files, and compare the Hub's files with them.

    Raises:
        DamError: no token, no permission, a conflict, no answer from the Hub, or different content there.
    """
    token = get_token()
    if token is None:
        raise DamError(
            f"push to {plan.repo_id}",
            expected="an access token",
            got="none",
            cure="Set HF_TOKEN, or run `hf auth login`; the token is never written anywhere.",
        )
    api, subject = HfApi(), f"push to {plan.repo_id}"
    private = _ensure_repository(api, plan, subject)
    with _staged(plan) as folder:
        refuse_secrets(((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file()), [token])
        done = with_retries(
            lambda: api.upload_folder(
                repo_id=plan.repo_id,
                folder_path=folder,
                create_pr=plan.create_pr or None,
                commit_message="Upload a merge made with mergekit-dam",
            ),
            subject,
            write=True,
            # a pull request may be open though the answer was lost: another call would open a second pull request
            repeat_lost=not plan.create_pr,
        )
        _compare(api, plan.repo_id, done.oid, folder, subject)
    url = f"{api.endpoint}/{plan.repo_id}"
    return PushResult(plan.repo_id, url, done.oid, done.pr_url, private)


def _check_id(repo_id: str) -> None:
    if "/" not in repo_id or not is_hub_id(repo_id):
        raise DamError(
            "repository",
            expected="ORG/NAME",
            got=repr(repo_id),
            cure="Name the user or organisation, too; both may have letters, digits, '-', '_' and '.'.",
        )


def _ensure_repository(api: HfApi, plan: PushPlan, subject: str) -> bool | None:
    """Create the repository if it is missing, never change its visibility, and return whether it is private."""

    def look() -> Any | None:
        try:
            return api.model_info(plan.repo_id)
        except RepositoryNotFoundError as error:
            if "Invalid credentials" in str(error):
                raise
            return None

    info = with_retries(look, subject, write=True)
    if info is None:
        with_retries(lambda: api.create_repo(plan.repo_id, private=not plan.public, exist_ok=True), subject, write=True)
        return not plan.public
    if info.private is False and not plan.public and not plan.create_pr:
        raise DamError(
            f"push to {plan.repo_id}",
            expected="a private repository",
            got="a repository that is public already",
            cure="Confirm with --public, use --create-pr, or choose another name.",
        )
    if info.private and plan.public:
        LOG.warning("%s stays private: its settings page can make it public", plan.repo_id)
    return bool(info.private) if info.private is not None else None


@contextmanager
def _staged(plan: PushPlan) -> Iterator[Path]:
    """Yield a folder with exactly the files to send: links, and shortened copies of files with local paths."""
    with tempfile.TemporaryDirectory(prefix="mergekit-dam-push-") as name:
        folder = Path(name)
        for path, source in plan.files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            short = plan.paths.shortened_file(source)
            if path == f"dam/{MASKS_FILE}":
                masks = load(source)
                save(folder / path, replace(masks, metadata=plan.paths.value(dict(masks.metadata))))
            elif short is not None:
                (folder / path).write_text(short, encoding="utf-8")
            else:
                os.symlink(source.resolve(), folder / path)
        (folder / "README.md").write_text(plan.card, encoding="utf-8")
        yield folder


def _compare(api: HfApi, repo_id: str, commit: str, folder: Path, subject: str) -> None:
    """Compare every file's hash on the Hub with the local file: SHA-256 of large files, git's SHA-1 of small files."""
    uploaded = {
        entry.path: entry
        for entry in with_retries(lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)), subject)
        if isinstance(entry, RepoFile)
    }
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        entry = uploaded.get(name)
        if entry is None:
            got = "no such file"
        elif entry.lfs is not None:
            got = "" if entry.lfs.sha256 == file_digest(path) else "other content"
        else:
            got = "" if entry.blob_id == _git_blob_id(path) else "other content"
        if got:
            raise DamError(
                f"file {name} in {repo_id} at {commit}",
                expected="the content that was sent",
                got=got,
                cure="Push again; if it happens again, another user may be writing to this repository.",
            )


def _git_blob_id(path: Path) -> str:
    """The id (SHA-1, hex) that git gives a file's content."""
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
