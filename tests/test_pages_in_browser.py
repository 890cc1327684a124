"""The pages of sweeps and plans in a real browser."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import SIXTEEN, gpu, plan_of, row, write, write_steps
from helpers.web import DESKTOP, PHONE, Visit, browser
from rich.console import Console

from llama_ft.reporting.reports import report_sweep, write_plan

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sweep's page, with a failed run, and a plan's."""
    sweep, plan = tmp_path_factory.mktemp("sweep"), tmp_path_factory.mktemp("plan")
    for name in SIXTEEN:
        write(sweep, name, "oom" if name == "ga_mp" else "ok")
        write_steps(sweep / name, 30)
    report_sweep(sweep, Console(file=io.StringIO()))
    card = gpu("a100_40gb")
    write_plan(plan_of([row(name, card) for name in SIXTEEN], card), plan)
    return {"sweep": sweep / "report.html", "plan": plan / "plan.html"}


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("name", ["sweep", "plan"])
def test_a_page_needs_nothing_else_and_can_be_read_by_all(
    opened: Any, pages: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    visit = Visit(opened, pages[name], "", size)
    visit.page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    assert visit.others_asked() == []
    assert visit.problems == []
    assert visit.overflow() <= 0
    assert visit.accessibility() == []


@pytest.mark.parametrize("name", ["sweep", "plan"])
def test_all_pictures_of_a_page_are_drawn(opened: Any, pages: dict[str, Path], name: str) -> None:
    visit = Visit(opened, pages[name])
    visit.page.evaluate("document.querySelectorAll('details').forEach((each) => (each.open = true))")
    visit.page.wait_for_function("[...document.images].every((image) => image.complete)")
    widths = visit.page.evaluate("[...document.images].map((image) => image.naturalWidth)")
    assert widths
    assert min(widths) > 0
