"""The planner against what others published: measured runs on a real card, and another implementation's sums."""

import json

import pytest
import torch
from conftest import CHECKOUT

from benchmarks.native_allocator import native_reserved_bytes
from benchmarks.plan_published import LITGPT, OTHERS, Computed, Published, litgpt, other, tables
from llama_ft.measure.memory import Allocation
from llama_ft.system import MIB

FOLDER = CHECKOUT / "benchmarks" / "plan-published"


@pytest.mark.parametrize("run", LITGPT, ids=lambda run: run.name)
def test_litgpts_runs_on_a_real_a100(run: Published) -> None:
    found = litgpt(run)
    assert found["fits"] is (run.gb is not None)
    if run.gb is not None:
        assert found["planned_gb"] == pytest.approx(run.gb, rel=run.tolerance)


@pytest.mark.parametrize("row", OTHERS, ids=lambda row: row.arguments)
def test_another_implementation_counts_as_much(row: Computed) -> None:
    assert other(row)["ours_gib"] == pytest.approx(row.gib, rel=row.tolerance)


def test_the_native_allocator_takes_whole_segments_and_splits_them() -> None:
    """By hand: 3 MiB from a segment of 20; 15 MiB from that too; 12 MiB from one of its own; small ones from 2 MiB."""
    first, second, third, small = (Allocation(n * MIB // 2, torch.float32, "activation") for n in (6, 30, 24, 1))
    come = [(each, 1, "forward") for each in (first, second, third, small)]
    assert native_reserved_bytes(come) == (20 + 12 + 2) * MIB
    after = [*come, (third, -1, "forward"), (Allocation(11 * MIB, torch.float32, "activation"), 1, "backward")]
    assert native_reserved_bytes(after) == (20 + 12 + 2) * MIB  # 11 MiB fit where 12 were
    joined = [*come[:2], (first, -1, ""), (second, -1, ""), (Allocation(20 * MIB, torch.float32, ""), 1, "")]
    assert native_reserved_bytes(joined) == 20 * MIB  # neighbors join


def test_the_tables_in_benchmarks_are_what_was_computed() -> None:
    found = json.loads((FOLDER / "published.json").read_text(encoding="utf-8"))
    table = tables(found["litgpt"], found["others"])
    assert (FOLDER / "published.md").read_text(encoding="utf-8") == table
    section = (CHECKOUT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert table in section
