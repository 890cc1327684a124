"""Advises what to run on a card: the fastest combination that fits, its limits, and what to change if nothing fits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import nlargest
from typing import Literal, NamedTuple

from llama_ft.bitsandbytes import is_installed
from llama_ft.config import Goal, GpuConfig, OptimConfig, PlanConfig
from llama_ft.planning.fit import MAX_LENGTH, MICRO_BATCH, PACKING, fewest_cards, largest, on_cards, reserved_mib
from llama_ft.planning.gpu_traits import Traits, relevant_traits, traits_of, workspace_bytes
from llama_ft.planning.last_resort import NEEDS_PACKAGE, last_resorts, typed
from llama_ft.planning.lengths import Lengths
from llama_ft.planning.predict import refusal
from llama_ft.planning.processes import side_by_side
from llama_ft.records.plan import Advice, PlanRow, row_key
from llama_ft.system import Progress

# The share of a card that advice leaves free: others' published runs reserved up to 1.0 % more than planned, 5.8 % with
# 4-bit weights (benchmarks/plan-published); running out of memory costs more than unused memory.
SPARE = 0.05
MIN_TOKENS = 2  # of a sample: one to predict from, and one to predict


class Size(NamedTuple):
    """A setting that decides how much is computed at once."""

    key: str
    name: str  # for messages
    field: str  # of `Advice`
    now: int
    most: int  # the value that covers all of `whole`
    whole: str


@dataclass(frozen=True)
class Adviser:
    """Advises from a plan's rows, and from further fake runs."""

    config: PlanConfig
    rows: Sequence[PlanRow]  # of all combinations on the cards of `gpus`
    gpus: Sequence[GpuConfig]
    profiles: Sequence[GpuConfig]  # all known cards
    lengths: Lengths
    progress: Progress
    time_kind: Literal["bound", "calibrated"] = "bound"  # of the rows' times, as in `PlannedTime`
    predict: Callable[[Sequence[PlanConfig], Sequence[GpuConfig]], list[PlanRow]] | None = None  # rows of further runs

    def advise(self) -> Advice:
        """The advice for the config's goal."""
        if self.config.goal is Goal.cheapest_gpu:
            return self._cheapest()
        if len(self.gpus) == 1:
            return self._for_card(self.gpus[0])
        more = "gpu=CARD adds the longest sequence and the largest micro-batch that fit one card"
        return Advice("fit", None, lines=[*map(self._in_a_line, self.gpus), more])

    def _for_card(self, gpu: GpuConfig) -> Advice:
        advice = Advice("fit", gpu.name, lines=[self._in_a_line(gpu)])
        if not (rows := self._usable(gpu)):
            return advice
        if best := fastest(rows):
            advice.combination, advice.settings = best.combination, best.settings
            self._add_limits(advice, best, gpu)
        elif gpu.memory_mib is None or rows[0].required_mib is None:
            advice.combination = smallest(rows).combination
            advice.lines.append("gpu=CARD names a card to fit into")
        else:
            self._add_changes(advice, smallest(rows), gpu)
        return advice

    def _cheapest(self) -> Advice:
        """Advice for the smallest card on which something fits."""
        cards = by_size(self.gpus)
        best = [fastest(self._usable(gpu)) for gpu in cards]
        in_4_bits = next((row for row in best if row and row.settings), None)
        if any(row and not row.settings for row in best):
            best = [row and (None if row.settings else row) for row in best]
        fitting = [index for index, row in enumerate(best) if row]
        index = next((index for index in fitting if has_room(best[index])), fitting[0] if fitting else -1)
        advice = self._for_card(cards[index])
        advice.goal = "cheapest_gpu"
        if fitting:
            advice.lines.insert(0, f"smallest card on which something fits: gpu={cards[index].name}")
        else:
            advice.lines.insert(0, f"no known card is large enough; the largest is {cards[index].name}")
        if index > 0:
            advice.lines.append(f"the next smaller card: {self._in_a_line(cards[index - 1])}")
        if in_4_bits and in_4_bits.gpu not in (card.name for card in cards[max(index - 1, 0) :]):
            card = next(card for card in cards if card.name == in_4_bits.gpu)
            advice.lines.append(f"smallest card with 4-bit weights: {self._in_a_line(card)}")
        return advice

    def _usable(self, gpu: GpuConfig) -> list[PlanRow]:
        """The combinations that the card can run, and QLoRA if none of them fits."""
        return [row for row in (*self.rows, *self._last_rows) if row.gpu == gpu.name and row.error is None]

    @cached_property
    def _last_rows(self) -> list[PlanRow]:
        """QLoRA on the cards on which no combination fits."""
        full = {gpu.name for gpu in self.gpus} - {row.gpu for row in self.rows if row.fits is not False}
        if not (runs := last_resorts(self.config)) or not full or self.predict is None:
            return []
        cards = [gpu for gpu in self.gpus if gpu.name in full]
        rows = self.predict([run for run, _ in runs], cards)
        for row, (_, settings) in zip(rows, runs * len(cards), strict=True):
            row.settings = settings
        return rows

    def _in_a_line(self, gpu: GpuConfig) -> str:
        """The fastest combination on a card, or how much memory is missing for the smallest."""
        if not (rows := self._usable(gpu)):
            return next(f"{gpu.name}: {row.error}" for row in self.rows if row.gpu == gpu.name)
        if best := fastest(rows):
            how = "smallest" if best.runtime_s is None else "fastest"
            tight = "" if has_room(best) else f"; less than {SPARE:.0%} to spare: it may not fit"
            only = "only 4-bit weights fit; " if best.settings else ""
            return f"{only}{how} that fits {gpu.name}: {_typed(best)} ({_need(best)}{self._time(best, rows)}){tight}"
        row = smallest(rows)
        if row.fits is None:
            need = f"{_typed(row)}, {row.peak_memory_mib:,.1f} MiB of tensors"
            return f"{gpu.name}: its memory is not known; the smallest need is that of {need}"
        missing = (row.required_mib or 0) - (row.total_memory_mib or 0)
        return f"nothing fits {gpu.name}: the smallest, {_typed(row)}, needs {_need(row)}, {missing:,.0f} MiB too much"

    def _time(self, row: PlanRow, rows: Sequence[PlanRow]) -> str:
        """A combination's time, to follow its need."""
        if row.runtime_s is None:
            return "; its time is not known"
        n_unknown = sum(bool(other.fits) and other.runtime_s is None for other in rows)
        number = f"{row.runtime_s:,.1f}" if row.runtime_s >= 1 else f"{row.runtime_s:.2g}"
        others = f"; {n_unknown} more fit, but their time is not known" if n_unknown else ""
        return f", {number} s{' at best' if self.time_kind == 'bound' else ''}{others}"

    def _add_limits(self, advice: Advice, row: PlanRow, gpu: GpuConfig) -> None:
        """Add the longest sequence and the largest micro-batch or packed row of this data with which a row fits."""
        context, longest, size = self.config.model.max_seq_len, max(self.lengths)[0], self._size(row)
        # The planned size fits, so the search starts above it.
        tokens, number = self._largest(row, gpu, range(MIN_TOKENS, context + 1), range(size.now + 1, size.most + 1))
        at_once = f", {size.now} in a micro-batch" if size.key == MICRO_BATCH and size.now > 1 else ""
        spared = f", {SPARE:.0%} to spare" if has_room(row) else ""
        if tokens >= MIN_TOKENS:  # else the data fit only because their prompts are not trained on
            advice.longest_sequence = tokens
            note = ", the model's whole context" if tokens == context else ""
            if tokens < longest:
                note = f"; this data's samples, of up to {longest}, fit because prompts are not trained on"
            advice.lines.append(f"longest samples that fit{at_once}{spared}: data.max_length={tokens}{note}")
        note = f", all of {size.whole}" if number >= size.most else ""
        advice.lines.append(f"largest {size.name} of this data that fits{spared}: {size.key}={number}{note}")
        setattr(advice, size.field, number)

    def _add_changes(self, advice: Advice, row: PlanRow, gpu: GpuConfig) -> None:
        """Add changes that let the smallest combination fit: shorter samples, fewer at once, a larger card."""
        size, longest = self._size(row), max(self.lengths)[0]
        tokens, number = self._largest(row, gpu, range(MIN_TOKENS, longest), range(1, size.now))
        if tokens >= MIN_TOKENS:
            advice.combination, advice.settings, advice.longest_sequence = row.combination, row.settings, tokens
            advice.lines.append(f"with shorter samples it fits: {_typed(row)} data.max_length={tokens}")
        else:
            advice.lines.append("no data.max_length is short enough")
        if number >= 1:
            advice.combination, advice.settings = row.combination, row.settings
            advice.lines.append(f"with a smaller {size.name} it fits: {_typed(row)} {size.key}={number}")
            setattr(advice, size.field, number)
        elif size.now > 1:
            advice.lines.append(f"no {size.key} is small enough")
        advice.lines.append(self._smallest_card(row, gpu))
        run, limit_mib = self._run(row), (1 - SPARE) * (gpu.usable_mib or 0.0)
        if n := fewest_cards(run, self.lengths, traits_of(gpu), workspace_bytes(gpu), limit_mib):
            advice.lines.append(f"fewest cards of this kind on which it fits: {_typed(row)} {on_cards(n)}")
        advice.lines += [] if is_installed() else [NEEDS_PACKAGE]

    def _run(self, row: PlanRow) -> PlanConfig:
        lasts = {row_key(run.optim.combination, settings): run for run, settings in last_resorts(self.config)}
        return lasts[row.key] if row.settings else replace(self.config, optim=OptimConfig(**row.optim))

    def _size(self, row: PlanRow) -> Size:
        """The setting that decides how much is computed at once: the micro-batch size or the tokens of a packed row."""
        size, packing = self.config.training.micro_batch_size, self.config.training.packing
        if packing is None:
            return Size(MICRO_BATCH, "micro-batch", "largest_micro_batch", size, len(self.lengths), "the data")
        update = nlargest(size * self._run(row).accumulation_steps, (tokens for tokens, _ in self.lengths))
        return Size(PACKING, "packing", "packing", packing, sum(update) - len(update), "an update")

    def _largest(self, row: PlanRow, gpu: GpuConfig, tokens: range, numbers: range) -> tuple[int, int]:
        """The most tokens of a sample, and the largest size, that fit; each is one below its range if nothing fits."""
        limit_mib = gpu.usable_mib or 0.0
        if has_room(row) or not row.fits:
            limit_mib *= 1 - SPARE
        size, run = self._size(row), (self._run(row), self.lengths, traits_of(gpu), workspace_bytes(gpu), limit_mib)
        searched = {MAX_LENGTH: (tokens, max(self.lengths)[0]), size.key: (numbers, size.now)}
        found: dict[str, int] = {}
        with self.progress(f"longest sequence, largest {size.name}", len(searched)) as advance:
            for key, number in side_by_side(largest, {key: (key, *run, *each) for key, each in searched.items()}):
                found[key] = number
                advance(1)
        return found[MAX_LENGTH], found[size.key]

    def _smallest_card(self, row: PlanRow, gpu: GpuConfig) -> str:
        """A line that names the smallest known card on which a combination fits."""
        config = self._run(row)
        cards = [card for card in by_size(self.profiles) if (card.memory_mib or 0) > (gpu.memory_mib or 0)]
        if not cards:
            return "no larger card is known"
        needs: dict[tuple[Traits, int], float] = {}
        for card in cards:
            kind = relevant_traits(traits_of(card), config), workspace_bytes(card)
            if refusal(config, card) is None and kind not in needs:
                needs[kind] = reserved_mib(config, self.lengths, *kind)
            if (mib := needs.get(kind, math.inf)) <= (1 - SPARE) * (card.usable_mib or 0):
                need = f"{mib + card.context_mib:,.0f} of {card.memory_mib:,} MiB"
                return f"smallest known card on which {_typed(row)} fits: gpu={card.name} ({need})"
        return f"{_typed(row)} fits no known card"


def has_room(row: PlanRow | None) -> bool:
    """Return True if a combination fits and leaves enough memory free to rely on that."""
    if row is None or not row.fits:
        return False
    return (row.margin_mib or 0) >= SPARE * ((row.total_memory_mib or 0) - (row.context_mib or 0))


def fastest(rows: Sequence[PlanRow]) -> PlanRow | None:
    """The fastest combination that fits, with room if one does; the smallest if no times are known."""
    fitting = [row for row in rows if has_room(row)] or [row for row in rows if row.fits]
    if timed := [row for row in fitting if row.runtime_s is not None]:
        return min(timed, key=lambda row: (row.runtime_s or 0.0, row.required_mib or 0.0))
    return smallest(fitting) if fitting else None


def smallest(rows: Sequence[PlanRow]) -> PlanRow:
    """The combination that needs the least memory."""
    return min(rows, key=lambda row: (row.required_mib or row.peak_memory_mib or 0.0, row.peak_memory_mib or 0.0))


def by_size(gpus: Sequence[GpuConfig]) -> list[GpuConfig]:
    """Cards by memory, then by bandwidth, smallest first, without those whose memory is not known."""
    known = [gpu for gpu in gpus if gpu.memory_mib is not None]
    return sorted(known, key=lambda gpu: (gpu.memory_mib or 0, gpu.bandwidth_gb_s or 0))


def _typed(row: PlanRow) -> str:
    """The combination as typed on the command line."""
    return typed(OptimConfig(**row.optim), row.settings)


def _need(row: PlanRow) -> str:
    return f"{row.required_mib:,.0f} of {row.total_memory_mib:,} MiB"
