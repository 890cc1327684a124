"""Results and plans made by hand, so that every number of a report is known beforehand; readers of what is written."""

import base64
import csv
import io
import itertools
import re
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest.mock import patch

from omegaconf import OmegaConf
from rich.console import Console

from llama_ft.config import UserError
from llama_ft.config.techniques import combinations
from llama_ft.records import CATEGORIES
from llama_ft.records.metrics import StepMetrics, line_of
from llama_ft.records.plan import MemoryPoint, Plan, PlannedData, PlannedTime, PlanRow
from llama_ft.records.result import MemoryItem, Result, write_result
from llama_ft.reporting import comparison_report, figure, page
from llama_ft.reporting.comparison_report import report_comparison
from llama_ft.reporting.reports import report_sweep

EVIL = "<script>alert('&\"')</script>"
SWITCHES = ("ga", "mp", "lora", "gc")
TECHNIQUES = {
    "ga": {"steps": 8},
    "mp": {"dtype": "auto", "frozen_weights": "compute", "trainable_weights": "fp32"},
    "lora": {"rank": 16, "targets": ["wq", "wv"]},
    "gc": {"every": 1},
}
SIXTEEN = [optim.combination for optim in combinations(["gc"])]
EIGHT = SIXTEEN[:8]
VOID = {"meta", "img", "br", "link", "input"}


def optim(combination: str) -> dict[str, bool]:
    return {name: name in combination.split("_") for name in SWITCHES}


def memory(total: float) -> dict[str, float]:
    return {name: share * total for name, share in zip(CATEGORIES, (0.4, 0.2, 0.2, 0.15, 0.0, 0.05), strict=True)}


def write(folder: Path, name: str, status: Any = "ok", **values: Any) -> Result:
    """A run's result in `folder/name`; nothing is measured unless the run is ok, as in real ones."""
    combination = name.partition(",")[0]
    fixed = ("tiny", "sample", "auto", optim(combination), TECHNIQUES, 1, "python -m llama_ft.train")
    result = Result(combination, *fixed, status, config_hash=f"hash of {name}")
    if status != "ok":
        result.error = f"why {combination} is {status}"
    else:
        peak = values.get("peak_memory_mib", 100.0)
        result = replace(result, device="a processor", runtime_s=10.0, samples=200, tokens=14_000, tokens_per_s=1_400.0)
        result = replace(result, peak_memory_mib=peak, peak_rss_mib=2.5 * peak, memory_mib=memory(peak))
        result = replace(result, memory_max_mib=memory(1.5 * peak), trainable_params=1_000, total_params=4_000)
        result = replace(result, trainable_percent=25.0, loss_first=7.5, loss_last=6.5, versions={})
        result = replace(result, train_loss_before=7.25, train_loss_after=6.125)
    result = replace(result, **values)
    (folder / name).mkdir(parents=True)
    write_result(folder / name, result)
    return result


def write_varied(folder: Path, name: str, config: dict[str, Any] | None, status: Any = "ok", **values: Any) -> None:
    """A run with settings of its own, nested as in its `config.yaml`; None of one that was refused."""
    write(folder, name, status, settings_hash=None if config is None else str(config), **values)
    if config is not None:
        OmegaConf.save(OmegaConf.create(config), folder / name / "config.yaml")


def step(number: int, **values: Any) -> str:
    """A line of `metrics.jsonl`."""
    line = StepMetrics(number, 24, 7 - 0.1 * number, 2.0 + number % 3, 1e-4 / number, 70 * number, 1e3 + number, 350, 1)
    return line_of(replace(line, **values))


def write_steps(run_dir: Path, count: int, more: str = "") -> None:
    (run_dir / "metrics.jsonl").write_text("".join(step(n) for n in range(1, count + 1)) + more)


def gpu(name: str, memory_mib: int | None = 40_325, device: str = "cuda") -> dict[str, Any]:
    return {"name": name, "device": device, "memory_mib": memory_mib, "context_mib": 500 if device == "cuda" else 0}


def row(name: str, card: dict[str, Any], peak: float = 20_000.0, seconds: float | None = 10.0) -> PlanRow:
    """100 MiB are reserved beyond the peak, and 500 are the context's; on the CPU neither is."""
    known = PlanRow(optim(name), name, card["name"], None, peak, "backward", memory(peak), memory(1.5 * peak))
    known.breakdown = [MemoryItem("parameter", "float32", 0.4 * peak)]
    known.total_memory_mib, known.context_mib = card["memory_mib"], card["context_mib"]
    if card["device"] == "cuda":
        known.reserved_mib, known.required_mib = peak + 100, peak + 600
        if card["memory_mib"] is not None:
            known.margin_mib = card["memory_mib"] - known.required_mib
            known.fits = known.margin_mib >= 0
    known = replace(known, trainable_params=1_000, total_params=4_000, steps=25, samples=200, tokens=14_000)
    known.flops, known.bytes_moved = {"bfloat16" if "mp" in name else "float32": 1e15}, 1e13
    if seconds is not None:
        timed = {"tokens_per_s": 14_000 / seconds, "binds": "memory", "bound_s": {"memory": seconds}}
        known = replace(known, runtime_s=seconds, **timed)
    phases = enumerate(("forward", "backward", "backward", "optimizer step"))
    known.timeline = [MemoryPoint(n, phase, memory(peak * (n + 1) / 4)) for n, phase in phases]
    return known


def failed(name: str, card: dict[str, Any], error: str) -> PlanRow:
    return PlanRow(optim(name), name, card["name"], error)


def plan_of(rows: list[PlanRow], *cards: dict[str, Any], **values: Any) -> Plan:
    data = PlannedData("sample", "200 samples", False, 200, 99, 14_000)
    time, versions = PlannedTime("bound", "at best: at full rates"), {"torch": "2.13.0", "cuda": None}
    training = {"micro_batch_size": 1, "epochs": 1}
    plan = Plan("python -m llama_ft.plan", versions, "tiny", data, TECHNIQUES, training, list(cards), time, rows)
    return replace(plan, **values)


@contextmanager
def undrawn():
    """Pictures are left out: drawing takes most of a report's time."""
    with ExitStack() as stack:
        for module in (figure, comparison_report):
            stack.enter_context(patch.object(module, "draw_panels", lambda *_, **__: None))
        for module in (page, comparison_report):
            stack.enter_context(patch.object(module, "svg_panel", lambda *_, **__: b""))
        yield


def report(*folders: Path, columns: int = 80, terminal: bool = False) -> CompletedProcess[str]:
    """As the command would end, without starting it: a process for each test would take seconds."""
    out = io.StringIO()
    console = Console(file=out, width=columns, force_terminal=terminal, no_color=True)
    try:
        (report_sweep if len(folders) == 1 else report_comparison)(*folders, console)
    except UserError as error:
        return CompletedProcess([], 2, out.getvalue(), f"error: {error}\n")
    return CompletedProcess([], 0, out.getvalue(), "")


def tables(text: str) -> list[dict[str, list[str]]]:
    """The tables of a Markdown text, each its rows' cells by the row's name: a name given again gets a second mark, a
    name below a row without cells follows that row's.
    """
    result: list[dict[str, list[str]]] = []
    for is_table, lines in itertools.groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        if is_table:
            result.append({})
            section = ""
            for line in lines:
                name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
                section = section if any(cells) else name
                name = f"{section} {name}".strip() if any(cells) else name
                result[-1][name if name not in result[-1] else f"{name} (2)"] = cells
    return result


def csv_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


class Page(HTMLParser):
    """Reads a page, and complains of what is no HTML, or needs more than itself."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert self.open == []
        assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in self.tags}
        sources = [attributes[name] for _, attributes in self.tags for name in ("src", "href") if name in attributes]
        assert all(str(source).startswith("data:image/svg+xml;base64,") for source in sources)
        assert not re.search(r"@import|url\(|https?://|[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self, beginning: str = "") -> dict[str, str]:
        """The SVG text of the pictures whose alternative text begins so, by that text."""
        images = {str(image["alt"]): str(image["src"]).partition(",")[2] for image in self.named("img")}
        return {alt: base64.b64decode(src).decode() for alt, src in images.items() if alt.startswith(beginning)}


def paths(svg: str, color: str = "#0072b2") -> list[list[tuple[float, float]]]:
    """The points of the lines in a color, in order."""
    drawn = re.findall(rf'<path d="([^"]*)"[^>]*fill: none; stroke: {color}', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)] for path in drawn]
