"""The W&B dashboard that is made by code: its JSON, without a network."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run

from llama_ft.config import UserError
from llama_ft.config.groups import UploadConfig
from llama_ft.records.metrics import EvalMetrics, StepMetrics
from llama_ft.records.result import Result

pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")

from llama_ft.tracking import dashboard


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dashboard.dashboard("someone", "llama_ft", "table2")._spec


def keys_in(value: Any) -> set[str]:
    """All strings in a JSON value."""
    if isinstance(value, dict):
        return {key for each in value.values() for key in keys_in(each)}
    if isinstance(value, list):
        return {key for each in value for key in keys_in(each)}
    return {value} if isinstance(value, str) else set()


def test_its_charts_draw_what_runs_log() -> None:
    logged = set(StepMetrics.__dataclass_fields__) | set(EvalMetrics.__dataclass_fields__)
    assert {key for keys in dashboard.CURVES.values() for key in keys} <= logged
    assert {*dashboard.BARS.values(), *dashboard.COLUMNS} <= set(Result.__dataclass_fields__)


def test_it_has_the_charts_that_the_docs_name(spec: dict[str, Any]) -> None:
    text = json.dumps(spec)
    assert json.loads(text) == spec
    found = keys_in(spec)
    for key in ("loss", "eval_loss", "lr", "grad_norm", "tokens_per_s", "memory_mib"):
        assert key in found
    for key in ("peak_memory_mib", "runtime_s"):
        assert any(key in each for each in found)
    assert {"Combinations", "Training", "Table"} <= found


def test_it_shows_one_sweep(spec: dict[str, Any]) -> None:
    found = keys_in(spec)
    assert "table2" in found
    assert "group" in found


def test_what_wandb_refuses_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        default_entity = "someone"

    monkeypatch.setattr(dashboard.wandb, "Api", Refused)

    def refuse(self: Any) -> None:
        raise ValueError("permission denied\nmore")

    monkeypatch.setattr(dashboard.Workspace, "save", refuse)
    with pytest.raises(UserError, match=r"tracker\.dashboard=true: .*permission denied\)$"):
        dashboard.save_dashboard(UploadConfig(project="mine"), "table2")


@pytest.mark.process
def test_the_command_refuses_it_for_two_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    done = run("llama_ft.report", "a", "b", "tracker.dashboard=true", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: tracker.dashboard=true sends one sweep")
    done = run("llama_ft.report", "a", "tracker.dashboard=true", "tracker=disabled", cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith("error: tracker.dashboard=true is W&B's, and tracker=disabled")
