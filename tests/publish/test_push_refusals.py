"""What `mergekit-dam push` does not send, and what it says instead; the command itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from mergekit_dam.cli.push import push as push_command
from mergekit_dam.errors import DamError
from mergekit_dam.publish.push import PushPlan, plan_push, push
from tests.helpers.hub import NAME, content
from tests.helpers.hub_server import TOKEN, HubServer


def _without(name: str) -> Callable[[Path], object]:
    return lambda out: (out / name).unlink()


def _cut(out: Path) -> None:
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def _secret(out: Path) -> None:
    (out / "notes.txt").write_text("token: hf_" + "A" * 34)


def _own_token(out: Path) -> None:
    (out / "dam" / "run.json").write_text(json.dumps({"env": TOKEN}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("config.json"), "a file that mergekit writes when a merge has succeeded"),
        (_without("model.safetensors"), "model.safetensors"),
        (_without("mergekit_config.yml"), "mergekit_config.yml"),
        (_cut, "truncated or damaged"),
        (_secret, "no access token"),
        (_own_token, "no access token"),
    ],
)
def test_an_incomplete_or_telling_merge_is_not_sent(
    hub: HubServer, merged_copy: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(merged_copy)
    with pytest.raises(DamError, match=message) as caught:
        push(plan_push(merged_copy, NAME))
    assert "hf_A" not in str(caught.value) and hub.count("POST .*(preupload|commit)") == 0


def test_pickles_hidden_files_and_links_out_stay_here(hub: HubServer, merged_copy: Path, tmp_path: Path) -> None:
    for name in ("optimizer.pt", ".env", "dam/.cache/x.json"):
        (merged_copy / name).parent.mkdir(exist_ok=True)
        (merged_copy / name).write_text("x")
    (tmp_path / "private.txt").write_text("x")
    (merged_copy / "link.txt").symlink_to(tmp_path / "private.txt")
    plan = plan_push(merged_copy, NAME)
    push(plan)
    assert not {"optimizer.pt", ".env", "dam/.cache/x.json", "link.txt"} & set(content(hub))
    assert any("optimizer.pt is not published" in warning for warning in plan.warnings)


def test_dry_run_prints_the_card_and_sends_nothing(hub: HubServer, merged: Path) -> None:
    done = CliRunner().invoke(push_command, [str(merged), NAME, "--dry-run", "--json"])
    told = json.loads(done.stdout)
    assert done.exit_code == 0 and "model.safetensors" in told["files"]
    assert ModelCard(told["card"]).data.base_model_relation == "merge"
    assert hub.count("POST|PUT") == 0 and not hub.repos


def test_command_with_a_card_of_ones_own(hub: HubServer, merged: Path, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("---\nlicense: mit\n---\nMine.\n")
    done = CliRunner().invoke(push_command, [str(merged), NAME, "--card", str(tmp_path / "card.md"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["url"] == f"{hub.url}/{NAME}"
    assert content(hub)["README.md"].endswith(b"Mine.\n")


@pytest.mark.parametrize("name", ["merge", "a/b/c", "org/na me", "org/", "/x", "org/x.git"])
def test_only_full_ids(hub: HubServer, merged: Path, name: str) -> None:
    with pytest.raises(DamError, match="expected ORG/NAME"):
        plan_push(merged, name)


def test_no_token_is_said_before_any_call(hub: HubServer, push_plan: PushPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(DamError, match="hf auth login"):
        push(push_plan)
    assert hub.calls == []
