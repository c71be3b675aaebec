"""`mergekit-dam push` against a Hub on localhost: what arrives, what is refused, and what happens when calls fail."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from mergekit_dam.errors import DamError
from mergekit_dam.publish.push import PushPlan, plan_push, push
from tests.helpers.hub import NAME, content
from tests.helpers.hub_server import TOKEN, HubServer


@pytest.mark.parametrize("include_masks", [False, True])
def test_what_arrives_is_what_was_merged(hub: HubServer, merged: Path, include_masks: bool) -> None:
    before = {p: p.read_bytes() for p in merged.rglob("*") if p.is_file()}
    plan = plan_push(merged, NAME, include_masks=include_masks)
    done = push(plan)
    arrived = content(hub)
    sent = {p.relative_to(merged).as_posix() for p in before} - (
        {"dam/.lock"} if include_masks else {"dam/.lock", "dam/dam_masks.safetensors"}
    )
    assert set(arrived) == sent and "model.safetensors" in sent and "dam/heads/a.safetensors" in sent
    with_paths = {name for name in sent if plan.paths.shortened_file(merged / name) is not None}
    assert with_paths <= {name for name in sent if name.endswith((".json", ".yml", ".md"))}
    for name in sent - with_paths - {"README.md", "dam/dam_masks.safetensors"}:
        assert hashlib.sha256(arrived[name]).digest() == hashlib.sha256((merged / name).read_bytes()).digest(), name
    assert {p: p.read_bytes() for p in merged.rglob("*") if p.is_file()} == before, "the merge itself was changed"
    assert done.private is True and hub.repos["model", NAME].private
    assert done.commit == hub.repos["model", NAME].commit_id("main")
    assert not hub.unauthorised_secrets, "the token went to the storage"
    assert all(TOKEN.encode() not in body for body in arrived.values())


def test_the_card_keeps_mergekits_fields_and_claims_nothing(hub: HubServer, merged: Path) -> None:
    push(plan_push(merged, NAME, licence="apache-2.0"))
    card = ModelCard(content(hub)["README.md"].decode())
    data = card.data.to_dict()
    assert data["base_model"] == [] or "base_model" not in data  # local inputs are no ids
    assert {"mergekit", "merge", "mergekit-dam", "dam", "backdoor-defense"} <= set(data["tags"])
    assert data["library_name"] == "transformers" and data["base_model_relation"] == "merge"
    assert data["license"] == "apache-2.0" and data["pipeline_tag"] == "image-feature-extraction"
    assert "model-index" not in data
    assert "Nothing: neither clean accuracy nor the success of any attack was measured" in card.text
    assert yaml.safe_load(card.text.partition("```yaml\n")[2].partition("```")[0])["merge_method"] == "dam"


def test_measured_figures_reach_card_and_model_index(hub: HubServer, merged_copy: Path, tmp_path: Path) -> None:
    figures = {
        "accuracy": {"a": [90, 120]},
        "datasets": {"a": "cars"},
        "attack_success": {"patch": {"a": [3, 96], "b": [0, 0]}},
    }
    (merged_copy / "dam" / "evaluation.json").write_text(json.dumps({"before": {}, "after": figures}))
    push(plan_push(merged_copy, NAME))
    card = ModelCard(content(hub)["README.md"].decode())
    results = {(r.metric_type, r.task_name): r for r in card.data.eval_results}
    assert set(results) == {("accuracy", "a"), ("attack_success_rate", "a")}, "a rate of no samples is no measurement"
    assert results["accuracy", "a"].metric_value == 75.0
    assert results["attack_success_rate", "a"].metric_args == {"hits": 3, "total": 96}
    assert "75.0 % (90/120)" in card.text and "3.1 % (3/96)" in card.text and "`cars`" in card.text
    (tmp_path / "wrong.json").write_text(json.dumps({"accuracy": {"a": [130, 120]}}))
    with pytest.raises(DamError, match=r"not \[hits, total\]"):
        plan_push(merged_copy, NAME, results=tmp_path / "wrong.json")


def test_private_by_default_and_never_into_a_public_one_unasked(hub: HubServer, merged: Path) -> None:
    hub.add(NAME, {})
    with pytest.raises(DamError, match=r"a repository that is public already.*--public"):
        push(plan_push(merged, NAME))
    assert content(hub) == {}
    push(plan_push(merged, NAME, public=True, licence="mit"))
    assert "model.safetensors" in content(hub)


def test_public_needs_a_licence_and_inputs_may_give_it(hub: HubServer, merged_copy: Path) -> None:
    with pytest.raises(DamError, match=r"licence of a public model.*unknown.*--license"):
        plan_push(merged_copy, NAME, public=True)
    recipe = yaml.safe_load((merged_copy / "mergekit_config.yml").read_text())
    for i, entry in enumerate([recipe, *recipe["models"]]):
        key = "base_model" if i == 0 else "model"
        hub.add(f"lab/m{i}", {}, card={"license": "mit"})
        entry[key] = f"lab/m{i}"
    (merged_copy / "mergekit_config.yml").write_text(yaml.safe_dump(recipe))
    plan = plan_push(merged_copy, NAME, public=True)
    data = ModelCard(plan.card).data
    assert data.license == "mit" and any("'mit' is the licence of all inputs" in w for w in plan.warnings)
    assert data.base_model == ["lab/m0", "lab/m1", "lab/m2"]
    hub.repos["model", "lab/m2"].card = {"license": "cc-by-nc-4.0"}
    with pytest.raises(DamError, match=r"lab/m2: cc-by-nc-4\.0"):
        plan_push(merged_copy, NAME, public=True)
    assert ModelCard(plan_push(merged_copy, NAME).card).data.license is None


def test_pull_request_leaves_the_main_branch_alone(hub: HubServer, merged: Path) -> None:
    hub.add(NAME, {"README.md": b"theirs"})
    done = push(plan_push(merged, NAME, create_pr=True))
    assert content(hub) == {"README.md": b"theirs"}
    assert done.pull_request == f"{hub.url}/{NAME}/discussions/1"
    assert "model.safetensors" in content(hub, "refs/pr/1")


REFUSED = "Invalid credentials in Authorization header"
COMMIT, PREUPLOAD, STORAGE, CREATE = "/commit/", "/preupload/", "/storage/", "/repos/create"
PASSING: list[tuple[str, str, int, dict[str, Any]]] = [
    ("POST", CREATE, 503, {}),
    ("POST", PREUPLOAD, 429, {"headers": {"Retry-After": "3"}}),
    ("PUT", STORAGE, 500, {}),
    ("PUT", STORAGE, 0, {}),
    ("POST", COMMIT, 503, {"times": 2}),
    ("POST", COMMIT, 429, {"headers": {"Retry-After": "7"}}),
    ("POST", COMMIT, 0, {}),
    ("POST", COMMIT, 0, {"after": True}),
    ("GET", "/tree/", 502, {}),
]


@pytest.mark.parametrize(("method", "pattern", "status", "options"), PASSING)
def test_a_passing_fault_is_waited_out(
    hub: HubServer, merged: Path, push_plan: PushPlan, method: str, pattern: str, status: int, options: dict[str, Any]
) -> None:
    hub.fail(method, pattern, status, **options)
    push(push_plan)
    assert content(hub)["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert not any(fault.times for fault in hub.faults), "the fault never happened"
    assert len(hub.repos["model", NAME].branches) == 1


LASTING: list[tuple[str, str, int, dict[str, str], str]] = [
    ("GET", f"/models/{NAME}", 401, {"X-Error-Message": REFUSED}, "token was refused"),
    ("POST", CREATE, 403, {}, "write access to that namespace"),
    ("POST", COMMIT, 403, {}, "write access to that namespace"),
    ("POST", COMMIT, 409, {}, "wait until it has ended"),
    ("POST", COMMIT, 412, {}, "wait until it has ended"),
    ("POST", COMMIT, 429, {}, "Wait some minutes"),
    ("POST", COMMIT, 500, {}, "run the command again later"),
    ("PUT", STORAGE, 0, {}, "Check the network and HF_ENDPOINT"),
    ("POST", COMMIT, 0, {}, "Check the network and HF_ENDPOINT"),
]


@pytest.mark.parametrize(("method", "pattern", "status", "headers", "cure"), LASTING)
def test_a_lasting_fault_is_one_line_with_its_cure(
    hub: HubServer,
    merged: Path,
    push_plan: PushPlan,
    method: str,
    pattern: str,
    status: int,
    headers: dict[str, str],
    cure: str,
) -> None:
    hub.fail(method, pattern, status, headers=headers, times=100)
    with pytest.raises(DamError, match=cure) as caught:
        push(push_plan)
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    if status in {401, 403, 409, 412}:
        assert hub.count(pattern) == 1 or pattern != COMMIT, "such an answer does not change by asking again"
    hub.faults.clear()
    push(push_plan)  # the same command later goes through
    assert content(hub)["model.safetensors"] == (merged / "model.safetensors").read_bytes()


def test_a_lost_answer_opens_no_second_pull_request(hub: HubServer, merged: Path) -> None:
    hub.add(NAME, {})
    hub.fail("POST", COMMIT, 0, after=True)
    with pytest.raises(DamError, match=r"none .*run the command again"):
        push(plan_push(merged, NAME, create_pr=True))
    assert set(hub.repos["model", NAME].branches) == {"main", "refs/pr/1"}


def test_other_content_on_the_hub_is_noticed(
    hub: HubServer, push_plan: PushPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers.hub_handler import Handler

    entry = Handler._entry

    def damaged(repo: Any, name: str, data: bytes) -> dict[str, Any]:
        return entry(repo, name, data + b"x" if name == "config.json" else data)

    monkeypatch.setattr(Handler, "_entry", staticmethod(damaged))
    with pytest.raises(DamError, match=r"config.json .*other content"):
        push(push_plan)
