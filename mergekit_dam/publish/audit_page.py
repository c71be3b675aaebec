"""Write the files of an audit, and read those that stand beside a merge back for its report and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mergekit_dam.artifact.folder import AUDIT_HTML, AUDIT_JSON, AUDIT_TRIGGERS, TRIGGERS_FILE
from mergekit_dam.artifact.triggers_file import load_triggers, save_triggers
from mergekit_dam.errors import DamError
from mergekit_dam.io.files import write_atomic
from mergekit_dam.io.untrusted import load_json, require_no_links_out
from mergekit_dam.models.checkpoint import Checkpoint
from mergekit_dam.publish.page import render, shown_triggers
from mergekit_dam.scan.audit import Audit

_MOST = 1024  # models, characters of a name, and entries of a list that a report draws
Name = Annotated[str, Field(max_length=_MOST)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


def write_audit(folder: Path, audit: Audit, *, title: str) -> Path:
    """Write audit.json, audit.html and the recovered triggers into a folder; return the page's path.

    Raises:
        DamError: a link in the folder leads elsewhere, or there is no right to write.
    """
    require_no_links_out(folder, ("",))
    file = folder / (TRIGGERS_FILE if audit.facts["merge"] is None else AUDIT_TRIGGERS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_triggers(file, audit.findings, audit.tasks, audit.suspects)
        page = render("audit.html.j2", title=title, facts=audit.facts, triggers=shown_triggers(load_triggers(file)))
        write_atomic(folder / AUDIT_JSON, json.dumps(audit.facts, indent=1))
        write_atomic(folder / AUDIT_HTML, page)
    except OSError as error:
        raise DamError(
            f"output {folder}", expected="a folder that can be written", got=str(error), cure="Choose another --out."
        ) from error
    return folder / AUDIT_HTML


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class _Row(_Part):
    role: Literal["merge", "model", "base", "own", "other"]
    name: Name
    success: Share
    plain: Share | None


class _Class(_Part):
    task: Name
    target: int | Name
    kind: Name
    suspicion: float
    success: float
    control: float
    shared: float = 0.0
    suspect: bool
    evidence: list[_Row] = Field(default_factory=list, max_length=_MOST)


class _Entry(_Part):
    name: Name
    suspicion: float | None
    over: bool
    defended: bool
    classes: list[_Class] = Field(max_length=1 << 16)


class _Scanned(_Part):
    sha256: Name


class _Facts(_Part):
    """What report and card read of audit.json; further entries are left out."""

    created: Name
    merge: _Scanned
    threshold: float
    models: list[_Entry] = Field(max_length=_MOST)
    over: list[Name] = Field(max_length=_MOST)
    notes: list[str] = Field(max_length=_MOST)
    next: list[str] = Field(max_length=_MOST)


def read_merge_audit(output: Path) -> dict[str, Any] | None:
    """Read what the scan of a merge found, from `dam/audit.json`.

    Args:
        output: directory of the merge.

    Returns:
        `created`, `threshold`, `over` (tasks), `notes`, `next`, `scored` (number of targets) and `suspects` (findings
        with their evidence); None if the merge was not scanned, or its weights have changed since.

    Raises:
        DamError: a damaged file, or no weights beside it.
    """
    file = output / "dam" / AUDIT_JSON
    if not file.is_file():
        return None
    try:
        facts = _Facts.model_validate(load_json(file)).model_dump()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise DamError(
            f"{file}",
            expected="the file that `mergekit-dam audit` wrote beside a merge",
            got=f"{'.'.join(map(str, first['loc']))}: {first['msg']}",
            cure="Remove it, and scan the merge again.",
        ) from error
    if Checkpoint.open(output).digest() != facts.pop("merge")["sha256"]:
        return None
    found = [one for entry in facts.pop("models") for one in entry["classes"]]
    suspects = sorted((one for one in found if one["suspect"]), key=lambda one: -one["suspicion"])
    scored = len({(one["task"], str(one["target"])) for one in found})
    return facts | {"scored": scored, "suspects": suspects}
