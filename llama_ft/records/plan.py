"""`plan.json`: the predicted memory and time of runs on cards."""

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal

from llama_ft.config.checks import Settings
from llama_ft.records import SCHEMA_VERSION
from llama_ft.records.result import RESULT_FILE, MemoryItem, Status

PLAN_FILE = "plan.json"
SAME = 0.01  # share of the value before, up to which Table 1 shows no change


@dataclass(frozen=True)
class MemoryPoint:
    """Memory that is alive after an event of an optimizer step."""

    event: int  # counted from the step's first
    phase: str  # of the step
    memory_mib: dict[str, float]  # by category


@dataclass
class PlanRow:
    """A run on a card. None is unknown; everything is None if `error` says why the run is impossible."""

    optim: dict[str, bool]
    combination: str
    gpu: str
    error: str | None = None
    peak_memory_mib: float | None = None
    peak_phase: str | None = None
    memory_mib: dict[str, float] | None = None  # by category, at the peak
    memory_max_mib: dict[str, float] | None = None  # by category, each one's own maximum
    breakdown: list[MemoryItem] = field(default_factory=list)
    managed_mib: float | None = None  # of optimizer state that the driver moves to the host if the card is full
    reserved_mib: float | None = None  # by the CUDA allocator
    context_mib: float | None = None  # of the CUDA context
    host_memory_mib: float | None = None  # pinned, of offloaded tensors
    required_mib: float | None = None  # reserved and context
    total_memory_mib: float | None = None  # of the card
    fits: bool | None = None
    margin_mib: float | None = None
    trainable_params: int | None = None
    total_params: int | None = None
    steps: int | None = None  # optimizer steps
    samples: int | None = None
    tokens: int | None = None
    flops: dict[str, float] | None = None  # by dtype
    bytes_moved: float | None = None
    parallel: Settings | None = None  # the strategy and its processes; then all numbers are of one card
    sent_mib: float | None = None  # to other cards per optimizer step; as much is received
    operators: float | None = None
    runtime_s: float | None = None
    tokens_per_s: float | None = None
    bound_runtime_s: float | None = None  # at the full rate of the card's units or memory
    binds: str | None = None  # the resource that limits for longest
    bound_s: dict[str, float] | None = None  # seconds of the bound by resource
    timeline: list[MemoryPoint] = field(default_factory=list)  # of the last optimizer step, only on the first card
    settings: Settings = field(default_factory=dict)  # by full name, in which rows differ besides the switches

    @property
    def status(self) -> Status:
        """`ok` if there are numbers, as in a result."""
        return "error" if self.error else "ok"

    @property
    def key(self) -> str:
        """Equal for the rows of one run on several cards."""
        return row_key(self.combination, self.settings)


def row_key(combination: str, settings: Settings) -> str:
    """A unique key among the rows of a card."""
    return json.dumps([combination, settings])


def arrow(before: float, after: float, same: float = SAME) -> str:
    """Up, down, or a dash where the change is at most the share `same` of the value before."""
    if abs(after - before) <= same * abs(before):
        return "–"
    return "↑" if after > before else "↓"


@dataclass(frozen=True)
class Table1Cell:
    """The change made by a technique: an arrow, and the numbers behind it."""

    arrow: str
    before: float
    after: float
    unit: str
    note: str = ""


@dataclass(frozen=True)
class Table1Row:
    """A technique in the course's Table 1."""

    technique: str
    name: str
    choice: str
    cells: dict[str, Table1Cell]  # by category of memory, and of `computation`


@dataclass(frozen=True)
class Table1:
    """The course's Table 1 for a card."""

    baseline: str  # in words
    rows: list[Table1Row]
    notes: list[str]


@dataclass
class Advice:
    """Advice on a run."""

    goal: str
    gpu: str | None  # None if it is for several cards
    combination: str | None = None
    settings: Settings = field(default_factory=dict)  # by full name, to set besides the combination
    longest_sequence: int | None = None  # tokens of a sample; None if none fits or it was not searched for
    largest_micro_batch: int | None = None  # samples of this data
    packing: int | None = None  # tokens of the largest packed rows, if the plan packs
    lines: list[str] = field(default_factory=list)  # for display

    @property
    def title(self) -> str:
        """The request: goal and card."""
        return f"goal={self.goal}" + (f", gpu={self.gpu}" if self.gpu else "")


@dataclass(frozen=True)
class PlannedData:
    """The samples that a plan is made for."""

    name: str
    about: str
    is_stand_in: bool  # the lengths are made up
    samples: int
    longest: int  # tokens
    tokens: int


@dataclass(frozen=True)
class PlannedTime:
    """The meaning of the rows' `runtime_s`."""

    kind: Literal["bound", "calibrated"]
    about: str


@dataclass
class Plan:
    """A plan."""

    command: str
    versions: dict[str, str | None]
    model: str
    data: PlannedData
    techniques: dict[str, Settings]
    training: Settings
    gpus: list[Settings]
    time: PlannedTime
    rows: list[PlanRow]
    table1: Table1 | None = None
    advice: Advice | None = None
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        names = [gpu.get("name") for gpu in self.gpus]
        runs = dict.fromkeys(row.key for row in self.rows)
        if not self.rows or [(row.gpu, row.key) for row in self.rows] != list(product(names, runs)):
            raise ValueError("rows must be one for each run on each of gpus")

    @property
    def is_sweep(self) -> bool:
        """True if the rows differ in more than their techniques."""
        return any(row.settings for row in self.rows)

    def settings_of(self, row: PlanRow) -> Settings:
        """A row's settings of each technique, of training and of parallel."""
        sections = {**self.techniques, "training": self.training, "parallel": row.parallel or {}}
        settings = {name: dict(section) for name, section in sections.items()}
        for section, _, key in (full.partition(".") for full in row.settings):
            if key:
                settings[section][key] = row.settings[f"{section}.{key}"]
        return settings

    def rows_on(self, gpu: str) -> list[PlanRow]:
        """The rows of a card, in the plan's order."""
        return [row for row in self.rows if row.gpu == gpu]


def is_plan(folder: Path) -> bool:
    """Return True if a folder is a plan's: it has `plan.json`, and no run in it or below it."""
    return (folder / PLAN_FILE).is_file() and next(folder.rglob(RESULT_FILE), None) is None
