"""Advice: the search against brute force over real fake runs, the choice of cards and combinations, what is said."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ft.config import DataConfig, DeviceChoice, Goal, GpuConfig, ModelConfig, OptimConfig, PlanConfig, UserError
from llama_ft.measure.memory import Allocation
from llama_ft.planning import advice as advice_module
from llama_ft.planning.advice import SPARE, Adviser, by_size, fastest, has_room, smallest, typed
from llama_ft.planning.allocator import reserved_bytes
from llama_ft.planning.gpu_traits import traits_of, workspace_bytes
from llama_ft.planning.predict import combinations, predict, row
from llama_ft.planning.search import EXPECTED_TRIES, Tried, largest, side_by_side, try_run, uniform

MIB = 2**20
CONTEXT = 24
LENGTHS = [(12, 4), (20, 6), (9, 2), (16, 3), (14, 9)]
# A wide head over few layers: a fake run is quick, and a token needs enough for pages to differ.
MODEL = ModelConfig("small", 32, 1, 2, 2, 48, 100_000, CONTEXT)


def card(name: str, memory_mib: int | None, **others: Any) -> GpuConfig:
    return GpuConfig(name, DeviceChoice.cuda, memory_mib, 10, "8.0", **({"bandwidth_gb_s": 500.0} | others))


def config_for(goal: Goal = Goal.fit, optim: OptimConfig | None = None) -> PlanConfig:
    data = DataConfig("sample")
    gpu = card("a", 1000) if goal is Goal.fit else GpuConfig("all")
    return PlanConfig(MODEL, "random", None, optim or OptimConfig(), data=data, gpu=gpu, goal=goal)


def one_by_one(function: Callable[..., Any], jobs: dict[Any, tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
    for key, arguments in jobs.items():
        try:
            yield key, function(*arguments)
        except UserError as error:
            yield key, error


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes: they would begin with importing torch."""
    monkeypatch.setattr(advice_module, "processes", lambda n: nullcontext(one_by_one))


# The search


def follow(search: Any, need: Callable[[int], Tried]) -> tuple[int, list[int]]:
    """What a search finds, and the numbers that it tried."""
    tried: list[int] = []
    try:
        number = next(search)
        while True:
            tried.append(number)
            number = search.send(need(number))
    except StopIteration as end:
        return end.value, tried


@settings(deadline=None, max_examples=150)
@given(
    highest=st.integers(0, 60),
    first=st.integers(1, 60),
    limit=st.floats(0, 300),
    needs=st.lists(st.floats(0, 300), min_size=60, max_size=60),
    is_sorted=st.booleans(),
)
def test_what_is_found_fits_and_one_more_does_not(highest, first, limit, needs, is_sorted):
    """Whatever the needs are, rising or not: what was found was run, and so was the next, unless it is beyond."""
    needs = sorted(needs) if is_sorted else needs
    found, tried = follow(largest(limit, 1, highest, first, 0), lambda n: Tried(needs[n - 1], [n * MIB], [1]))
    assert 0 <= found <= highest
    assert found == 0 or (found in tried and needs[found - 1] <= limit)
    assert found == highest or (found + 1 in tried and needs[found] > limit)
    assert len(tried) == len(set(tried))
    if is_sorted:
        assert found == sum(need <= limit for need in needs[:highest])


@pytest.mark.parametrize("kb_per_token", [100, 1000, 5000])
def test_few_tries_are_needed_where_sizes_are_on_lines(kb_per_token):
    """Blocks of a fixed size and others that grow with the number, some of which make room for the next."""

    def need(n: int) -> Tried:
        sizes = [700 * MIB, *[n * kb_per_token * 1024 // 8] * 8, 5 * MIB, n * kb_per_token * 512]
        log = [1, 2, 3, 4, 5, -3, 6, -5, 7, 8, 9, 10, 11]
        storages = [Allocation(size, torch.uint8, "") for size in sizes]
        events = [(storages[abs(which) - 1], 1 if which > 0 else -1, "") for which in log]
        return Tried(reserved_bytes(events) / MIB, sizes, log)

    for limit in range(800, 3000, 137):
        found, tried = follow(largest(limit, 2, 100_000, 405, 0), need)
        assert need(found).reserved_mib <= limit < need(found + 1).reserved_mib
        assert len(tried) <= 5


def test_search_on_real_fake_runs_equals_brute_force():
    config = config_for(optim=OptimConfig(lora=True))
    traits, workspace = traits_of(config.gpu), workspace_bytes(config.gpu)
    known = {n: try_run(config, uniform(n, config, LENGTHS), traits, workspace) for n in range(2, CONTEXT + 1)}
    needs = {n: run.reserved_mib for n, run in known.items()}
    assert len(set(needs.values())) >= 3
    for limit in sorted({*needs.values(), *(need - 0.5 for need in needs.values())}):
        fitting = [n for n in needs if needs[n] <= limit and needs.get(n + 1, limit + 1) > limit]
        found, tried = follow(largest(limit, 2, CONTEXT, 20, workspace), known.__getitem__)
        assert found in (fitting or [1])
        assert len(tried) <= 8


def test_searches_run_side_by_side_and_progress_adds_up():
    asked: list[set[str]] = []
    told: list[int] = []
    needs = {"a": lambda n: float(n), "b": lambda n: 3.0 * n}

    def run(_: Any, jobs: dict[Any, tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
        asked.append(set(jobs))
        for name, (n,) in jobs.items():
            yield name, Tried(needs[name](n), [n], [1])

    searches = {name: largest(30.0, 1, 100, 1, 0) for name in needs} | {"none": largest(30.0, 1, 0, 1, 0)}
    found = side_by_side(searches, {name: lambda n: (n,) for name in searches}, run, told.append)
    assert found == {"a": 30, "b": 10, "none": 0}
    assert asked[0] == {"a", "b"}
    assert sum(told) == len(searches) * EXPECTED_TRIES


def test_a_run_that_cannot_be_tried_ends_the_search():
    def run(_: Any, jobs: dict[Any, tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
        yield from ((name, UserError("no such layer")) for name in jobs)

    with pytest.raises(UserError, match="no such layer"):
        side_by_side({"a": largest(1.0, 1, 9, 1, 0)}, {"a": lambda n: (n,)}, run, lambda n: None)


# What is advised


@pytest.fixture(scope="module")
def needs() -> dict[str, float]:
    """Reserved MiB of the sixteen combinations on a card, workspaces included."""
    gpu = card("a", 1000)
    optims = combinations(with_gc=True)
    traits, workspace = traits_of(gpu), workspace_bytes(gpu)
    runs = {each.combination: try_run(config_for(optim=each), LENGTHS, traits, workspace) for each in optims}
    return {combination: run.reserved_mib for combination, run in runs.items()}


def rows_on(gpus: list[GpuConfig], needs: dict[str, float], seconds: dict[str, float | None]) -> list[dict[str, Any]]:
    rows = []
    for gpu in gpus:
        for optim in combinations(with_gc=True):
            need = needs[optim.combination] + gpu.context_mib
            rows.append(
                {
                    "optim": {name: getattr(optim, name) for name in ("ga", "mp", "lora", "gc")},
                    "combination": optim.combination,
                    "gpu": gpu.name,
                    "error": None,
                    "peak_memory_mib": need - 5,
                    "required_mib": need,
                    "total_memory_mib": gpu.memory_mib,
                    "context_mib": gpu.context_mib,
                    "fits": None if gpu.memory_mib is None else need <= gpu.memory_mib,
                    "margin_mib": None if gpu.memory_mib is None else gpu.memory_mib - need,
                    "runtime_s": seconds.get(optim.combination),
                }
            )
    return rows


TIMES: dict[str, float | None] = {
    optim.combination: 10.0 + 7 * n % 16 for n, optim in enumerate(combinations(with_gc=True))
}


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    assert total > 0
    yield lambda n: None


def advise(gpus: list[GpuConfig], rows: list[dict[str, Any]], goal: Goal = Goal.fit, **others: Any) -> dict[str, Any]:
    config = others.pop("config", config_for(goal))
    profiles = others.pop("profiles", gpus)
    return Adviser(config, rows, gpus, profiles, LENGTHS, no_progress, **others).advise()


def test_fastest_that_fits_is_named_with_its_limits(needs):
    gpu = card("a", int(min(needs.values()) + 60))
    rows = rows_on([gpu], needs, TIMES)
    limit = (1 - SPARE) * gpu.usable_mib
    fitting = {name: TIMES[name] for name, need in needs.items() if need <= limit}
    assert 0 < len(fitting) < 16
    found = advise([gpu], rows)
    best = min(fitting, key=lambda name: fitting[name])
    assert (found["goal"], found["gpu"], found["combination"]) == ("fit", "a", best)
    optim = next(optim for optim in combinations(with_gc=True) if optim.combination == best)
    assert found["lines"][0].startswith(f"fastest that fits a: {typed(optim)} (")
    assert f"of {gpu.memory_mib:,} MiB, {fitting[best]:,.1f} s at best)" in found["lines"][0]
    config, traits, workspace = config_for(optim=optim), traits_of(gpu), workspace_bytes(gpu)

    def fit(config: PlanConfig, lengths: list[tuple[int, int]]) -> bool:
        return try_run(config, lengths, traits, workspace).reserved_mib <= limit

    longest, size = found["longest_sequence"], found["largest_micro_batch"]
    assert fit(config, uniform(longest, config, LENGTHS))
    assert longest == CONTEXT or not fit(config, uniform(longest + 1, config, LENGTHS))
    assert fit(with_size(config, size), LENGTHS)
    assert size == len(LENGTHS) or not fit(with_size(config, size + 1), LENGTHS)
    assert f"data.max_length={found['longest_sequence']}" in found["lines"][1]
    assert f"training.micro_batch_size={found['largest_micro_batch']}" in found["lines"][2]


def with_size(config: PlanConfig, micro_batch_size: int) -> PlanConfig:
    return replace(config, training=replace(config.training, micro_batch_size=micro_batch_size))


def test_time_that_is_not_known_leaves_the_smallest_need(needs):
    rows = rows_on([card("a", 4000)], needs, {})
    found = advise([card("a", 4000)], rows)
    assert found["combination"] == smallest(rows)["combination"]
    assert found["lines"][0].startswith("smallest that fits a: optim=")
    assert "no time is known" in found["lines"][0]


def test_on_the_cpu_there_is_nothing_to_fit_into(needs):
    cpu = GpuConfig("cpu", DeviceChoice.cpu)
    rows = rows_on([cpu], needs, TIMES)
    for each in rows:
        each["required_mib"] = None
    found = advise([cpu], rows)
    assert found["combination"] == smallest(rows)["combination"]
    assert (found["longest_sequence"], found["largest_micro_batch"]) == (None, None)
    assert "cpu" in found["lines"][0]
    assert "gpu=CARD" in found["lines"][1]


def test_what_to_change_where_nothing_fits(needs):
    """Two samples a micro-batch are too many; one, or shorter ones, are not."""
    config = config_for()
    config = replace(config, training=replace(config.training, micro_batch_size=3))
    everything = OptimConfig(lora=True)
    rows = predict(config, [everything], [card("a", 1000)], LENGTHS)
    need = rows[0]["required_mib"]
    one = replace(config, optim=everything, training=replace(config.training, micro_batch_size=1))
    traits, workspace = traits_of(config.gpu), workspace_bytes(config.gpu)
    least = try_run(one, LENGTHS, traits, workspace).reserved_mib + 10
    assert least < need
    gpu = card("a", int(need - 1))
    enough = math.ceil((need - 10) / (1 - SPARE)) + 10
    larger = [card("d", 9000), card("b", enough), card("c", enough + 1), card("too_small", enough - 1)]
    rows = predict(config, [everything], [gpu], LENGTHS)
    found = advise([gpu], rows, config=config, profiles=larger)
    text = "\n".join(found["lines"])
    assert (
        found["lines"][0]
        == f"nothing fits a: the smallest, optim=lora, needs {need:,.0f} of {need - 1:,.0f} MiB, 1 MiB too many"
    )
    assert f"optim=lora data.max_length={found['longest_sequence']}" in text
    assert f"optim=lora training.micro_batch_size={found['largest_micro_batch']}" in text
    assert 2 <= found["longest_sequence"] < 20
    assert found["largest_micro_batch"] in (1, 2)
    assert "gpu=b (" in text
    changed = with_size(replace(config, optim=everything), found["largest_micro_batch"])
    assert try_run(changed, LENGTHS, traits, workspace).reserved_mib <= (1 - SPARE) * gpu.usable_mib


def test_nothing_helps_on_a_card_that_holds_no_weights(needs):
    gpu = card("a", 20)
    found = advise([gpu], rows_on([gpu], needs, TIMES), profiles=[gpu])
    assert found["combination"] is None
    assert found["lines"][1:] == ["no data.max_length is short enough", "no larger card is known"]


def test_several_cards_have_a_line_each(needs):
    gpus = [card("small", 20), card("large", 4000)]
    found = advise(gpus, rows_on(gpus, needs, TIMES))
    assert (found["gpu"], found["combination"]) == (None, None)
    assert found["lines"][0].startswith("nothing fits small: ")
    assert found["lines"][1].startswith("fastest that fits large: ")


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_cheapest_card_is_the_smallest_with_a_fitting_row(needs, offset, monkeypatch):
    monkeypatch.setattr(Adviser, "_largest", lambda *_, **__: {"tokens": 7, "samples": 2})
    edge = math.ceil(min(needs.values()) / (1 - SPARE)) + 10
    gpus = [
        card("huge", 9000),
        card("slow", edge + offset, bandwidth_gb_s=100.0),
        card("quick", edge + offset, bandwidth_gb_s=900.0),
        card("tiny", 20),
    ]
    rows = rows_on(gpus, needs, TIMES)
    fitting = [gpu for gpu in gpus if any(has_room(row) for row in rows if row["gpu"] == gpu.name)]
    expected = min(fitting, key=lambda gpu: (gpu.memory_mib, gpu.bandwidth_gb_s)).name
    assert expected == ("huge" if offset < 0 else "slow")
    found = advise(gpus, rows, Goal.cheapest_gpu)
    assert (found["goal"], found["gpu"]) == ("cheapest_gpu", expected)
    best = fastest([row for row in rows if row["gpu"] == expected])
    assert best is not None
    assert found["combination"] == best["combination"]
    assert found["lines"][0] == f"smallest card on which something fits: gpu={expected}"
    if offset < 0:
        assert found["lines"][-1].startswith("one card smaller, fastest that fits quick: ")
        assert found["lines"][-1].endswith("; less than 5% to spare: it may not fit")
    else:
        assert found["lines"][-1].startswith("one card smaller, nothing fits tiny: the smallest, optim=")
        assert found["lines"][-1].endswith(" MiB too many")


def test_no_card_is_large_enough(needs):
    gpus = [card("a", 20), card("b", 25)]
    found = advise(gpus, rows_on(gpus, needs, TIMES), Goal.cheapest_gpu)
    assert (found["gpu"], found["combination"]) == ("b", None)
    assert found["lines"][0] == "no known card is large enough; the largest is b"


def test_rows_that_cannot_run_are_passed_over(needs):
    gpu = card("a", 4000)
    rows = rows_on([gpu], needs, TIMES)
    for each in rows:
        if each["optim"]["mp"]:
            config = replace(config_for(), optim=OptimConfig(**each["optim"]))
            each |= row(config, gpu, UserError("bf16 is not there"))
    found = advise([gpu], rows)
    assert "mp" not in found["combination"]
    for each in rows:
        each["error"] = "bf16 is not there"
    assert advise([gpu], rows)["lines"] == ["a: bf16 is not there"]


def test_names_are_typed_as_presets():
    assert typed(OptimConfig()) == "optim=baseline"
    assert typed(OptimConfig(mp=True, lora=True)) == "optim=mp_lora"
    assert typed({"ga": True, "mp": False, "lora": True, "gc": True}) == "optim=ga_lora optim.gc=true"
    assert typed(OptimConfig(gc=True)) == "optim=baseline optim.gc=true"
    assert [gpu.name for gpu in by_size([card("b", 3000), card("x", None), card("a", 2000)])] == ["a", "b"]


def test_enforcing_is_not_for_plan():
    with pytest.raises(UserError, match=r"plan\.enforce=false is for train"):
        PlanConfig(MODEL, "random", data=DataConfig("sample"), plan=replace(config_for().plan, enforce=False))
