"""The W&B dashboard that is made by code: its JSON, without a network."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import run

from llama_ft import report
from llama_ft.config import ReportConfig, UserError
from llama_ft.config.groups import UploadConfig
from llama_ft.records.metrics import EvalMetrics, StepMetrics
from llama_ft.records.result import Result

pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")

from llama_ft.tracking import dashboard


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dashboard.dashboard("someone", "llama_ft", "table2")._spec


def test_its_charts_draw_what_runs_log() -> None:
    logged = set(StepMetrics.__dataclass_fields__) | set(EvalMetrics.__dataclass_fields__)
    assert {*dashboard.CURVES.values()} <= logged
    assert {*dashboard.BARS.values(), *dashboard.COLUMNS} <= set(Result.__dataclass_fields__)


def panels_of(spec: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The panels of each section, by its name."""
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections if section["panels"]}


def test_it_has_the_charts_that_the_docs_name(spec: dict[str, Any]) -> None:
    assert json.loads(json.dumps(spec)) == spec
    shown = {
        name: [(panel["viewType"], panel["config"].get("chartTitle")) for panel in panels]
        for name, panels in panels_of(spec).items()
    }
    bars = [("Bar Chart", title) for title in dashboard.BARS]
    assert shown["Combinations"] == [*bars, ("Scatter Plot", "Runtime against peak memory")]
    assert shown["Training"] == [("Run History Line Plot", title) for title in dashboard.CURVES]
    assert [kind for kind, _ in shown["Table"]] == ["Media Browser"]


def test_each_chart_draws_its_own_numbers(spec: dict[str, Any]) -> None:
    drawn = {
        name: {panel["config"].get("chartTitle"): panel["config"].get("metrics") for panel in panels}
        for name, panels in panels_of(spec).items()
    }
    assert drawn["Training"] == {title: [key] for title, key in dashboard.CURVES.items()}
    bars = {title: [f"summary_metrics.{key}"] for title, key in dashboard.BARS.items()}
    assert drawn["Combinations"] == bars | {"Runtime against peak memory": None}


def test_it_shows_one_sweep() -> None:
    view = dashboard.dashboard("someone", "llama_ft", "table2")
    assert view.runset_settings.filters == "Metric(\"Group\") == 'table2'"
    assert (view.entity, view.project) == ("someone", "llama_ft")


@pytest.mark.parametrize(
    ("config", "variables", "expected"),
    [
        (UploadConfig(), {}, ("of the key", "llama_ft", "table2")),
        (UploadConfig(), {"WANDB_RUN_GROUP": "morning", "WANDB_PROJECT": "mine"}, ("of the key", "mine", "morning")),
        (UploadConfig(), {"WANDB_ENTITY": "us"}, ("us", "llama_ft", "table2")),
        (
            UploadConfig(entity="team", project="p", group="g"),
            {"WANDB_RUN_GROUP": "morning"},
            ("team", "p", "g"),
        ),
    ],
)
def test_it_is_saved_where_the_runs_are(
    config: UploadConfig,
    variables: dict[str, str],
    expected: tuple[str, str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved: list[tuple[str, str, str]] = []
    settings = SimpleNamespace(
        entity=variables.get("WANDB_ENTITY"),
        run_group=variables.get("WANDB_RUN_GROUP"),
        project=variables.get("WANDB_PROJECT"),
    )
    monkeypatch.setattr(dashboard.wandb, "Api", lambda: SimpleNamespace(default_entity="of the key"))
    monkeypatch.setattr(dashboard.wandb, "setup", lambda: SimpleNamespace(settings=settings))

    def save(self: Any) -> None:
        saved.append((self.entity, self.project, self.runset_settings.filters))

    monkeypatch.setattr(dashboard.Workspace, "save", save)
    monkeypatch.setattr(dashboard.Workspace, "url", "https://wandb.ai/view")
    assert dashboard.save_dashboard(config, "table2") == "https://wandb.ai/view"
    entity, project, group = expected
    assert saved == [(entity, project, f"Metric(\"Group\") == '{group}'")]


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
    assert done.stderr.splitlines() == [
        "error: tracker.dashboard=true is W&B's, and tracker=disabled: leave one of them out"
    ]
    done = run("llama_ft.report", "a", "tracker.dashboard=true", "tracker.mode=offline", cwd=tmp_path)
    assert done.stderr.startswith("error: tracker.dashboard=true needs W&B online")


def test_a_remark_names_what_has_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    typed = ["tracker.dashboard=true", "tracker.group=g", "tracker.artifacts=true"]
    config = ReportConfig(UploadConfig(dashboard=True, group="g", artifacts=True))
    report.check(config, [Path("a")], [], typed)
    assert capsys.readouterr().err == "tracker.artifacts=true: no effect without tracker.upload=true\n"
    report.check(ReportConfig(), [Path("a")], [], ["tracker.group=g"])
    assert "tracker.group=g: no effect without tracker.upload=true or tracker.dashboard=true" in capsys.readouterr().err
