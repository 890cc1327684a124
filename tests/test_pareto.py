"""The Pareto front of memory, time and held-out loss: which runs are on it, its picture, and where there is none."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import write
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llama_ft.reporting.best import best_lines, front, objective_of
from llama_ft.reporting.reports import report_sweep


def is_beaten(point: tuple[int, ...], by: tuple[int, ...]) -> bool:
    return all(b <= a for a, b in zip(point, by, strict=True)) and any(b < a for a, b in zip(point, by, strict=True))


@given(st.integers(1, 3).flatmap(lambda n: st.lists(st.tuples(*[st.integers(0, 6)] * n), max_size=25)))
def test_no_member_is_beaten_and_every_other_point_is_by_a_member(points: list[tuple[int, ...]]) -> None:
    members = front(points)
    assert members == sorted(set(members))
    assert not any(is_beaten(points[n], by) for n in members for by in points)
    for n in set(range(len(points))) - set(members):
        assert any(is_beaten(points[n], points[member]) for member in members)


def test_in_one_figure_the_front_is_the_least_and_equal_points_are_all_in_it() -> None:
    assert front([(3.0,), (1.0,), (2.0,), (1.0,)]) == [1, 3]
    assert front([(1.0, 2.0), (2.0, 1.0), (2.0, 2.0), (1.0, 2.0)]) == [0, 1, 3]
    assert front([]) == []


# What a run tells the sweeper, and which is called the best


@pytest.mark.parametrize(
    ("status", "values", "objective", "told"),
    [
        ("ok", {"eval_loss": 1.5}, [], 1.5),
        ("ok", {}, [], 6.125),  # train_loss_after
        ("ok", {"eval_loss": 1.5}, ["runtime_s"], 10.0),
        ("ok", {"eval_loss": 1.5}, ["peak_memory_mib", "eval_loss"], [100.0, 1.5]),
        ("ok", {"eval_loss": math.nan}, [], math.inf),
        ("ok", {"eval_loss": math.inf}, ["runtime_s", "eval_loss"], None),
        ("oom", {}, ["runtime_s"], math.inf),
        ("oom", {}, ["runtime_s", "peak_memory_mib"], None),
        ("killed", {}, [], None),
        ("error", {"eval_loss": 1.5}, ["eval_loss"], None),
    ],
)
def test_what_a_run_tells_the_sweeper(
    tmp_path: Path, status: str, values: dict[str, Any], objective: list[str], told: object
) -> None:
    assert objective_of(write(tmp_path, "lora", status, **values), objective) == told


def test_the_best_run_is_named_with_its_folder(tmp_path: Path) -> None:
    for name, loss, seconds in (("ga", 2.0, 1.0), ("mp", 1.25, 3.0), ("lora", math.nan, 0.1), ("baseline", 2.5, 2.0)):
        write(tmp_path, name, eval_loss=loss, runtime_s=seconds)
    write(tmp_path, "ga_mp", "oom")
    groups = report_sweep(tmp_path, Console(file=io.StringIO()))
    assert best_lines(groups, []) == best_lines(groups, ["eval_loss"]) == [f"best: eval_loss 1.25: {tmp_path / 'mp'}"]
    title, *lines = best_lines(groups, ["eval_loss", "runtime_s"])
    assert title == "Pareto-optimal in eval_loss and runtime_s:"
    assert lines == [
        f"  eval_loss {loss}, runtime_s {seconds}: {tmp_path / name}"
        for name, loss, seconds in (("mp", 1.25, 3), ("ga", 2, 1))
    ]
    assert best_lines(groups[:0], ["eval_loss"]) == []


# The picture


def reported(folder: Path) -> str:
    written = io.StringIO()
    report_sweep(folder, Console(file=written, width=200))
    return written.getvalue()


def test_the_front_is_drawn_noted_and_on_the_page_where_three_runs_have_a_held_out_loss(tmp_path: Path) -> None:
    figures = {
        "baseline": (100.0, 10.0, 1.0),
        "ga": (100.0, 12.0, 2.0),
        "mp": (80.0, 9.0, 1.5),
        "lora": (60.0, 9.5, 1.5),
    }
    for name, (mib, seconds, loss) in figures.items():
        write(tmp_path, name, peak_memory_mib=mib, runtime_s=seconds, eval_loss=loss)
    write(tmp_path, "ga_mp", "oom")
    printed = reported(tmp_path)
    note = "Pareto-optimal in memory, time and held-out loss: baseline; LoRA; MP."
    assert note in printed
    assert note in (tmp_path / "table2.md").read_text(encoding="utf-8")
    assert "report.html, pareto.png in" in printed
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "held-out loss over peak memory, MiB" in page
    assert "held-out loss over runtime, s" in page


def test_without_held_out_losses_there_is_no_picture_and_an_earlier_one_goes(tmp_path: Path) -> None:
    for name in ("baseline", "ga", "mp"):
        write(tmp_path, name, eval_loss=None if name == "mp" else 1.0)
    (tmp_path / "table2.csv").write_text("combination\n")  # a report of ours was here
    (tmp_path / "pareto.png").write_bytes(b"earlier")
    printed = reported(tmp_path)
    assert "No other run" not in printed
    assert "pareto.png" not in printed
    assert not (tmp_path / "pareto.png").exists()
    assert "held-out loss over" not in (tmp_path / "report.html").read_text(encoding="utf-8")
