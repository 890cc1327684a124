"""Advice: the search against brute force over real fake runs, the choice of cards and combinations, what is said."""

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
from helpers.planning import CPU_PROFILE, SHORT, WIDE_HEAD
from helpers.planning import card as profile
from helpers.training import COMBINATIONS
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_ft.config import DataConfig, Goal, GpuConfig, OptimConfig, PlanConfig, TrainingConfig, UserError
from llama_ft.planning import fit
from llama_ft.planning.advice import SPARE, Adviser, by_size, fastest, has_room, smallest
from llama_ft.planning.fit import MAX_LENGTH, MICRO_BATCH, PACKING, largest, reserved_mib, varied
from llama_ft.planning.gpu_traits import traits_of, workspace_bytes
from llama_ft.planning.lengths import Lengths
from llama_ft.planning.predict import predict
from llama_ft.records.plan import Advice, PlanRow
from llama_ft.system import no_progress

CONTEXT = WIDE_HEAD.max_seq_len


def card(name: str, memory_mib: int | None, **others: Any) -> GpuConfig:
    return profile(name, memory_mib, context_mib=10, **({"bandwidth_gb_s": 500.0} | others))


def config_for(goal: Goal = Goal.fit, optim: OptimConfig | None = None) -> PlanConfig:
    gpu = card("a", 1000) if goal is Goal.fit else GpuConfig("all")
    return PlanConfig(WIDE_HEAD, "random", None, optim or OptimConfig(), data=DataConfig("sample"), gpu=gpu, goal=goal)


def need(config: PlanConfig, lengths: Lengths = SHORT) -> float:
    return reserved_mib(config, lengths, traits_of(config.gpu), workspace_bytes(config.gpu))


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other processes: they would begin with importing torch."""
    monkeypatch.setattr("llama_ft.planning.processes.MAX_PROCESSES", 1)


# The search


@settings(deadline=None, max_examples=150)
@given(
    highest=st.integers(0, 60),
    step=st.integers(1, 60),
    limit=st.floats(0, 300),
    needs=st.lists(st.floats(0, 300), min_size=60, max_size=60),
    is_sorted=st.booleans(),
)
def test_what_is_found_fits_and_one_more_does_not(
    highest: int, step: int, limit: float, needs: list[float], is_sorted: bool
) -> None:
    """Whatever the needs are, rising or not: what was found was run, and so was the next, unless it is beyond."""
    needs, tried = sorted(needs) if is_sorted else needs, []

    def reserved(config: PlanConfig, lengths: Lengths, *card: Any) -> float:
        tried.append(config.training.micro_batch_size)
        return needs[tried[-1] - 1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "reserved_mib", reserved)
        traits = traits_of(card("a", 1000))
        number = largest(MICRO_BATCH, config_for(), SHORT, traits, 0, limit, range(1, highest + 1), step)
    assert 0 <= number <= highest
    assert number == 0 or (number in tried and needs[number - 1] <= limit)
    assert number == highest or (number + 1 in tried and needs[number] > limit)
    assert len(tried) == len(set(tried)) <= 14
    if is_sorted:
        assert number == sum(each <= limit for each in needs[:highest])


def test_search_on_real_fake_runs_equals_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(optim=OptimConfig(lora=True))
    needs = {n: need(*varied(MAX_LENGTH, config, SHORT, n)) for n in range(12, CONTEXT + 1)}
    assert len(set(needs.values())) >= 2
    monkeypatch.setattr(fit, "reserved_mib", lambda _, lengths, *card: needs[lengths[0][0]])
    for limit in sorted({*needs.values(), *(mib - 0.5 for mib in needs.values())}):
        fitting = [n for n in needs if needs[n] <= limit and needs.get(n + 1, limit + 1) > limit]
        number = largest(MAX_LENGTH, config, SHORT, traits_of(config.gpu), 0, limit, range(12, CONTEXT + 1), 5)
        assert number in (fitting or [11])


def test_a_run_that_cannot_begin_ends_the_search() -> None:
    config = replace(config_for(optim=OptimConfig(lora=True)))
    config.lora.targets = ["wx"]
    with pytest.raises(UserError, match="no linear layer"):
        largest(MAX_LENGTH, config, SHORT, traits_of(config.gpu), 0, 1.0, range(2, CONTEXT + 1), 20)


# What is advised


@pytest.fixture(scope="module")
def needs() -> dict[str, float]:
    """Reserved MiB of the sixteen combinations on a card, workspaces included."""
    return {optim.combination: need(config_for(optim=optim)) for optim in COMBINATIONS}


def rows_on(gpus: list[GpuConfig], needs: dict[str, float], seconds: dict[str, float]) -> list[PlanRow]:
    rows = []
    for gpu in gpus:
        for optim in COMBINATIONS:
            required, name = needs[optim.combination] + gpu.context_mib, optim.combination
            row = PlanRow(asdict(optim), name, gpu.name, runtime_s=seconds.get(name), context_mib=gpu.context_mib)
            row.peak_memory_mib, row.required_mib, row.total_memory_mib = required - 5, required, gpu.memory_mib
            if gpu.memory_mib is not None:
                row.fits, row.margin_mib = required <= gpu.memory_mib, gpu.memory_mib - required
            rows.append(row)
    return rows


TIMES = {optim.combination: 10.0 + 7 * n % 16 for n, optim in enumerate(COMBINATIONS)}


def advise(gpus: list[GpuConfig], rows: list[PlanRow], goal: Goal = Goal.fit, **others: Any) -> Advice:
    config = others.pop("config", config_for(goal))
    return Adviser(config, rows, gpus, others.pop("profiles", gpus), SHORT, no_progress).advise()


def with_size(config: PlanConfig, micro_batch_size: int) -> PlanConfig:
    return replace(config, training=replace(config.training, micro_batch_size=micro_batch_size))


def test_fastest_that_fits_is_named_with_its_limits(needs: dict[str, float]) -> None:
    gpu = card("a", int(min(needs.values()) + 60))
    limit = (1 - SPARE) * (gpu.usable_mib or 0)
    fitting = {name: TIMES[name] for name, mib in needs.items() if mib <= limit}
    assert 0 < len(fitting) < 16
    advice = advise([gpu], rows_on([gpu], needs, TIMES))
    best = min(fitting, key=fitting.__getitem__)
    assert (advice.goal, advice.gpu, advice.combination) == ("fit", "a", best)
    optim = next(optim for optim in COMBINATIONS if optim.combination == best)
    assert advice.lines[0].startswith(f"fastest that fits a: {optim.as_typed} (")
    assert f"of {gpu.memory_mib:,} MiB, {fitting[best]:,.1f} s at best)" in advice.lines[0]
    config, longest, size = config_for(optim=optim), advice.longest_sequence, advice.largest_micro_batch
    assert longest is not None
    assert size is not None
    assert need(*varied(MAX_LENGTH, config, SHORT, longest)) <= limit
    assert longest == CONTEXT or need(*varied(MAX_LENGTH, config, SHORT, longest + 1)) > limit
    assert need(with_size(config, size)) <= limit
    assert size == len(SHORT) or need(with_size(config, size + 1)) > limit
    assert f"data.max_length={longest}" in advice.lines[1]
    assert f"training.micro_batch_size={size}" in advice.lines[2]


def test_time_that_is_not_known_leaves_the_smallest_need(needs: dict[str, float]) -> None:
    rows = rows_on([card("a", 4000)], needs, {})
    advice = advise([card("a", 4000)], rows)
    assert advice.combination == smallest(rows).combination
    assert advice.lines[0].startswith("smallest that fits a: optim=")
    assert "its time is not known" in advice.lines[0]


def test_on_the_cpu_there_is_nothing_to_fit_into(needs: dict[str, float]) -> None:
    rows = rows_on([CPU_PROFILE], needs, TIMES)
    for row in rows:
        row.required_mib = None
    advice = advise([CPU_PROFILE], rows)
    assert advice.combination == smallest(rows).combination
    assert (advice.longest_sequence, advice.largest_micro_batch) == (None, None)
    assert "cpu" in advice.lines[0]
    assert "gpu=CARD" in advice.lines[1]


def test_what_to_change_where_nothing_fits() -> None:
    """Three samples a micro-batch are too many; fewer, or shorter ones, are not."""
    optim = OptimConfig(lora=True)
    config = with_size(config_for(), 3)
    (row,) = predict([replace(config, optim=optim)], [card("a", 1000)], SHORT)
    required = row.required_mib or 0
    least = need(with_size(replace(config, optim=optim), 1)) + 10
    assert least < required
    gpu, enough = card("a", int(required - 1)), math.ceil((required - 10) / (1 - SPARE)) + 10
    larger = [card("d", 9000), card("b", enough), card("c", enough + 1), card("too_small", enough - 1)]
    advice = advise([gpu], predict([replace(config, optim=optim)], [gpu], SHORT), config=config, profiles=larger)
    text, needed = "\n".join(advice.lines), f"{required:,.0f} of {required - 1:,.0f} MiB, 1 MiB too much"
    assert advice.lines[0] == f"nothing fits a: the smallest, optim=lora, needs {needed}"
    assert f"optim=lora data.max_length={advice.longest_sequence}" in text
    assert f"optim=lora training.micro_batch_size={advice.largest_micro_batch}" in text
    assert 2 <= (advice.longest_sequence or 0) < 20
    assert advice.largest_micro_batch in (1, 2)
    assert "gpu=b (" in text
    changed = with_size(replace(config, optim=optim), advice.largest_micro_batch)
    assert need(changed) <= (1 - SPARE) * (gpu.usable_mib or 0)


def test_nothing_helps_on_a_card_that_holds_no_weights(needs: dict[str, float]) -> None:
    gpu = card("a", 20)
    advice = advise([gpu], rows_on([gpu], needs, TIMES), profiles=[gpu])
    assert advice.combination is None
    assert advice.lines[1:] == ["no data.max_length is short enough", "no larger card is known"]


def test_several_cards_have_a_line_each(needs: dict[str, float]) -> None:
    gpus = [card("small", 20), card("large", 4000)]
    advice = advise(gpus, rows_on(gpus, needs, TIMES))
    assert (advice.gpu, advice.combination) == (None, None)
    assert advice.lines[0].startswith("nothing fits small: ")
    assert advice.lines[1].startswith("fastest that fits large: ")


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_cheapest_card_is_the_smallest_with_a_fitting_row(
    needs: dict[str, float], offset: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Adviser, "_largest", lambda *_: (7, 2))
    edge = math.ceil(min(needs.values()) / (1 - SPARE)) + 10
    gpus = [
        card("huge", 9000),
        card("slow", edge + offset, bandwidth_gb_s=100.0),
        card("quick", edge + offset, bandwidth_gb_s=900.0),
        card("tiny", 20),
    ]
    rows = rows_on(gpus, needs, TIMES)
    assert any(has_room(row) for row in rows if row.gpu == "slow") == (offset >= 0)
    expected = "huge" if offset < 0 else "slow"
    advice = advise(gpus, rows, Goal.cheapest_gpu)
    assert (advice.goal, advice.gpu) == ("cheapest_gpu", expected)
    best = fastest([row for row in rows if row.gpu == expected])
    assert best is not None
    assert advice.combination == best.combination
    assert advice.lines[0] == f"smallest card on which something fits: gpu={expected}"
    if offset < 0:
        assert advice.lines[-1].startswith("the next smaller card: fastest that fits quick: ")
        assert advice.lines[-1].endswith("; less than 5% to spare: it may not fit")
    else:
        assert advice.lines[-1].startswith("the next smaller card: nothing fits tiny: the smallest, optim=")
        assert advice.lines[-1].endswith(" MiB too much")


def test_no_card_is_large_enough(needs: dict[str, float]) -> None:
    gpus = [card("a", 20), card("b", 25)]
    advice = advise(gpus, rows_on(gpus, needs, TIMES), Goal.cheapest_gpu)
    assert (advice.gpu, advice.combination) == ("b", None)
    assert advice.lines[0] == "no known card is large enough; the largest is b"


def test_rows_that_cannot_run_are_passed_over(needs: dict[str, float]) -> None:
    gpu, error = card("a", 4000), "bf16 is not there"
    rows = rows_on([gpu], needs, TIMES)
    some = [replace(row, error=error if row.optim["mp"] else None) for row in rows]
    assert "mp" not in (advise([gpu], some).combination or "mp")
    assert advise([gpu], [replace(row, error=error) for row in rows]).lines == [f"a: {error}"]


def test_cards_whose_memory_is_not_known_are_not_sorted() -> None:
    assert [gpu.name for gpu in by_size([card("b", 3000), card("x", None), card("a", 2000)])] == ["a", "b"]


@pytest.mark.parametrize("packing", [20, 70])
def test_with_packing_it_is_the_packed_row_that_is_made_larger_or_smaller(packing: int) -> None:
    """Five samples an update have 66 tokens to be packed together."""
    optim = OptimConfig(ga=True, lora=True)
    config = replace(config_for(), optim=optim, training=TrainingConfig(packing=packing))

    def needed(n_tokens: int) -> float:
        return need(*varied(PACKING, config, SHORT, n_tokens))

    assert needed(20) < needed(40) < needed(66) == needed(1000)  # in whole pages
    gpu = card("a", 10 + math.ceil((needed(40) + 1) / (1 - SPARE)))
    advice = advise([gpu], predict([replace(config, optim=optim)], [gpu], SHORT), config=config)
    assert advice.largest_micro_batch is None
    assert 40 <= (advice.packing or 0) < 66
    assert needed(advice.packing or 0) <= (1 - SPARE) * (gpu.usable_mib or 0) < needed((advice.packing or 0) + 1)
    smaller = "with a smaller packing it fits: optim=ga_lora"
    how = "largest packing of this data that fits, 5% to spare:" if packing == 20 else smaller
    assert f"{how} training.packing={advice.packing}" in advice.lines
