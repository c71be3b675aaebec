"""Fixtures: a localhost Hub that huggingface_hub of this process talks to, and a merge to publish."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import constants

from mergekit_dam.publish.push import PushPlan, plan_push
from tests.helpers.hub_server import TOKEN, HubServer

NAME = "org/merge"


def content(server: HubServer, branch: str = "main") -> dict[str, bytes]:
    """Files by name that the Hub holds of NAME."""
    return server.repos["model", NAME].branches[branch]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A server, an empty cache, a token in the environment, and no pauses between attempts."""
    server = HubServer()
    for name, value in {
        "ENDPOINT": server.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda _: None)
    huggingface_hub.close_session()  # the client of an offline process refuses every call
    yield server
    huggingface_hub.close_session()
    server.close()


@pytest.fixture(scope="module")
def merged(vit: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dam merge of two small ViTs, with masks and heads."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    from mergekit_dam.plugin.method import register_dam

    register_dam()
    config = {
        "merge_method": "dam",
        "base_model": str(vit / "base"),
        "dtype": "float32",
        "models": [{"model": str(vit / name), "parameters": {"calibration": str(images)}} for name in "ab"],
        "parameters": {"steps": 2, "batch_size": 4, "num_samples": 8, "scan_steps": 2},
    }
    out = tmp_path_factory.mktemp("merged") / "out"
    source = yaml.safe_dump(config)
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(quiet=True), config_source=source)
    return out


@pytest.fixture(scope="module")
def push_plan(merged: Path) -> PushPlan:
    """The inputs of this merge are local: nothing of the Hub enters the plan."""
    return plan_push(merged, NAME)


@pytest.fixture
def merged_copy(merged: Path, tmp_path: Path) -> Path:
    """The merge, to be changed."""
    return Path(shutil.copytree(merged, tmp_path / "out"))
