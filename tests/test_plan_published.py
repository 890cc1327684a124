"""The planner against what others published: measured runs on a real card, and another implementation's sums."""

import json

import pytest
from conftest import CHECKOUT

from benchmarks.plan_published import LITGPT, OTHERS, Computed, Published, litgpt, other, tables

FOLDER = CHECKOUT / "benchmarks" / "plan-published"


@pytest.mark.parametrize("run", LITGPT, ids=lambda run: run.name)
def test_litgpts_runs_on_a_real_a100(run: Published) -> None:
    found = litgpt(run)
    assert found["fits"] is (run.gb is not None)
    if run.gb is not None:
        assert found["planned_gb"] == pytest.approx(run.gb, rel=0.05)


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row.arguments)
def test_another_implementation_counts_as_much(row: Computed) -> None:
    assert other(row)["ours_gib"] == pytest.approx(row.gib, rel=row.tolerance)


def test_the_tables_in_benchmarks_are_what_was_computed() -> None:
    found = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
    table = tables(found["litgpt"], found["others"])
    assert (FOLDER / "published.md").read_text(encoding="utf-8") == table
    section = (CHECKOUT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert table in section
