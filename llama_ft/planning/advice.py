"""What to run on a card: the fastest combination that fits, how far it goes, and what to change if nothing fits."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from llama_ft.config import Goal, GpuConfig, OptimConfig, PlanConfig, UserError
from llama_ft.planning.gpu_traits import relevant_traits, traits_of, workspace_bytes
from llama_ft.planning.predict import Lengths, processes
from llama_ft.planning.search import EXPECTED_TRIES, largest, side_by_side, try_run, uniform

# The share of a card that advice leaves free: real runs of others reserved up to 4.3 % more than is planned for them
# (benchmarks/plan-published), and a run that goes out of memory costs more than some memory that is not used.
SPARE = 0.05
MIN_TOKENS = 2  # of a sample: one to predict from, and one to predict
Row = dict[str, Any]  # of `plan.json`


class Progress(Protocol):
    """Shows a title and how much of a total is done."""

    def __call__(self, title: str, total: int, /) -> AbstractContextManager[Any]:
        """What is given is called with how much more is done."""
        ...


@dataclass
class Advice:
    """What is advised: `plan["advice"]`."""

    goal: str
    gpu: str | None  # None where it is for several cards
    combination: str | None = None
    longest_sequence: int | None = None  # tokens of a sample; None where none fits or it was not looked for
    largest_micro_batch: int | None = None  # samples of this data
    lines: list[str] = field(default_factory=list)  # for people


@dataclass(frozen=True)
class Adviser:
    """Advises from a plan's rows, and from further fake runs.

    Args:
        rows: all combinations on the cards of `gpus`.
        profiles: every card that is known.
        time_note: what follows a time, such as "at best".
    """

    config: PlanConfig
    rows: Sequence[Row]
    gpus: Sequence[GpuConfig]
    profiles: Sequence[GpuConfig]
    lengths: Lengths
    progress: Progress
    time_note: str = "at best"

    def advise(self) -> dict[str, Any]:
        """The advice that the config's goal asks for, in plain JSON types."""
        if self.config.goal is Goal.cheapest_gpu:
            return asdict(self._cheapest())
        if len(self.gpus) == 1:
            return asdict(self._for_card(self.gpus[0]))
        advice = Advice("fit", None, lines=[self._in_a_line(gpu) for gpu in self.gpus])
        advice.lines.append("gpu=CARD says of one card how long a sequence and how large a micro-batch still fit")
        return asdict(advice)

    def _for_card(self, gpu: GpuConfig) -> Advice:
        advice = Advice("fit", gpu.name, lines=[self._in_a_line(gpu)])
        rows = self._usable(gpu)
        if not rows:
            return advice
        if best := fastest(rows):
            advice.combination = best["combination"]
            self._add_limits(advice, best, gpu)
        elif gpu.memory_mib is None or rows[0]["required_mib"] is None:
            advice.combination = smallest(rows)["combination"]
            advice.lines.append("gpu=CARD names a card to fit into")
        else:
            self._add_changes(advice, smallest(rows), gpu)
        return advice

    def _cheapest(self) -> Advice:
        """The smallest card on which something fits."""
        cards = by_size(self.gpus)
        best = [fastest(self._usable(gpu)) for gpu in cards]
        roomy = [n for n, row in enumerate(best) if row and has_room(row)]
        place = next(iter(roomy or [n for n, row in enumerate(best) if row]), None)
        if place is None:
            advice = self._for_card(cards[-1])
            advice.goal = "cheapest_gpu"
            advice.lines.insert(0, f"no known card is large enough; the largest is {cards[-1].name}")
            return advice
        advice = self._for_card(cards[place])
        advice.goal = "cheapest_gpu"
        advice.lines.insert(0, f"smallest card on which something fits: gpu={cards[place].name}")
        if place > 0:
            advice.lines.append(f"one card smaller, {self._in_a_line(cards[place - 1])}")
        return advice

    @property
    def _longest(self) -> int:
        """Tokens of the data's longest sample."""
        return max(length for length, _ in self.lengths)

    def _usable(self, gpu: GpuConfig) -> list[Row]:
        return [row for row in self.rows if row["gpu"] == gpu.name and row["error"] is None]

    def _in_a_line(self, gpu: GpuConfig) -> str:
        """The fastest combination on a card, or how much memory is missing for the smallest."""
        rows = self._usable(gpu)
        if not rows:
            return next(f"{gpu.name}: {row['error']}" for row in self.rows if row["gpu"] == gpu.name)
        if best := fastest(rows):
            n_unknown = sum(row["fits"] and row["runtime_s"] is None for row in rows)
            how, time = "smallest", "; no time is known"
            if best["runtime_s"] is not None:
                seconds = best["runtime_s"]
                number = f"{seconds:,.1f}" if seconds >= 1 else f"{seconds:.2g}"
                how, time = "fastest", f", {number} s {self.time_note}".rstrip()
                time += f"; {n_unknown} more fit, whose time is not known" if n_unknown else ""
            tight = "" if has_room(best) else f"; less than {SPARE:.0%} to spare: it may not fit"
            return f"{how} that fits {gpu.name}: {typed(best['optim'])} ({_of(best)}{time}){tight}"
        least = smallest(rows)
        if least["fits"] is None:
            need = f"{typed(least['optim'])}, {least['peak_memory_mib']:,.1f} MiB of tensors"
            return f"{gpu.name}: how much memory there is is not known; the smallest need is that of {need}"
        return (
            f"nothing fits {gpu.name}: the smallest, {typed(least['optim'])}, needs {_of(least)},"
            f" {-least['margin_mib']:,.0f} MiB too many"
        )

    def _add_limits(self, advice: Advice, row: Row, gpu: GpuConfig) -> None:
        """How long a sequence, and how large a micro-batch of this data, fit with a combination that fits."""
        context = self.config.model.max_seq_len
        found = self._largest(row, gpu, most_tokens=context, most_samples=len(self.lengths))
        tokens, samples = found["tokens"], found["samples"]
        advice.largest_micro_batch = samples
        longest = self._longest
        size = self.config.training.micro_batch_size
        beside = f", {size} in a micro-batch" if size > 1 else ""
        spared = f", {SPARE:.0%} to spare" if has_room(row) else ""
        if tokens >= MIN_TOKENS:  # else it is the prompts, which are not trained on, that let the data fit
            advice.longest_sequence = tokens
            note = ", the model's whole context" if tokens == context else ""
            if tokens < longest:
                note = f"; those of this data, of up to {longest}, fit since their prompts are not trained on"
            advice.lines.append(f"longest samples that fit{beside}{spared}: data.max_length={tokens}{note}")
        all_of_them = ", all of the data" if samples == len(self.lengths) else ""
        advice.lines.append(
            f"largest micro-batch of this data that fits{spared}: training.micro_batch_size={samples}{all_of_them}"
        )

    def _add_changes(self, advice: Advice, row: Row, gpu: GpuConfig) -> None:
        """What would let the smallest combination fit: shorter samples, fewer of them, a larger card."""
        longest, size = self._longest, self.config.training.micro_batch_size
        found = self._largest(row, gpu, most_tokens=longest - 1, most_samples=size - 1)
        tokens, samples = found["tokens"], found["samples"]
        combination = typed(row["optim"])
        if tokens >= MIN_TOKENS:
            advice.combination, advice.longest_sequence = row["combination"], tokens
            advice.lines.append(f"with shorter samples it fits: {combination} data.max_length={tokens}")
        else:
            advice.lines.append("no data.max_length is short enough")
        if samples >= 1:
            advice.combination, advice.largest_micro_batch = row["combination"], samples
            advice.lines.append(
                f"with smaller micro-batches it fits: {combination} training.micro_batch_size={samples}"
            )
        elif size > 1:
            advice.lines.append("no training.micro_batch_size is small enough")
        advice.lines.append(self._smallest_card(row, gpu))

    def _largest(self, row: Row, gpu: GpuConfig, most_tokens: int, most_samples: int) -> dict[str, int]:
        """The most tokens of a sample, and samples of a micro-batch; one below the least there can be if none fit."""
        config = self._config(row)
        traits, workspace = traits_of(gpu), workspace_bytes(gpu)
        limit_mib = gpu.usable_mib or 0.0
        if has_room(row) or not row["fits"]:
            limit_mib *= 1 - SPARE
        searches = {
            "tokens": largest(limit_mib, MIN_TOKENS, most_tokens, self._longest, workspace),
            "samples": largest(limit_mib, 1, most_samples, config.training.micro_batch_size, workspace),
        }

        def batch(n_samples: int) -> tuple[Any, ...]:
            training = replace(config.training, micro_batch_size=n_samples)
            return replace(config, training=training), self.lengths, traits, workspace

        jobs = {
            "tokens": lambda n: (config, uniform(n, config, self.lengths), traits, workspace),
            "samples": batch,
        }
        title = "longest sequence, largest micro-batch"
        with self.progress(title, len(searches) * EXPECTED_TRIES) as advance, processes(len(searches)) as run:
            return side_by_side(searches, jobs, run, advance)

    def _smallest_card(self, row: Row, gpu: GpuConfig) -> str:
        """The smallest card that is known on which a combination fits, in a line."""
        assert gpu.memory_mib is not None
        config = self._config(row)
        cards = [card for card in by_size(self.profiles) if (card.memory_mib or 0) > gpu.memory_mib]
        if not cards:
            return "no larger card is known"
        kinds = {card.name: (relevant_traits(traits_of(card), config), workspace_bytes(card)) for card in cards}
        jobs = {kind: (config, self.lengths, *kind) for kind in kinds.values()}
        with self.progress("larger cards", len(jobs)) as advance, processes(len(jobs)) as run:
            tried = {}
            for kind, outcome in run(try_run, jobs):
                tried[kind] = outcome
                advance(1)
        for card in cards:
            outcome = tried[kinds[card.name]]
            if not isinstance(outcome, UserError) and outcome.reserved_mib <= (1 - SPARE) * (card.usable_mib or 0):
                need = f"{outcome.reserved_mib + card.context_mib:,.0f} of {card.memory_mib:,} MiB"
                return f"smallest known card on which {typed(row['optim'])} fits: gpu={card.name} ({need})"
        return f"{typed(row['optim'])} fits no card that is known"

    def _config(self, row: Row) -> PlanConfig:
        return replace(self.config, optim=OptimConfig(**row["optim"]))


def has_room(row: Row) -> bool:
    """Whether a combination fits and leaves enough free to rely on that."""
    usable = row["total_memory_mib"] - row["context_mib"] if row["fits"] else 0
    return bool(row["fits"] and row["margin_mib"] >= SPARE * usable)


def fastest(rows: Sequence[Row]) -> Row | None:
    """Of the combinations that fit, with room if there are such, the fastest; where no time is known, the smallest.

    None if none fits.
    """
    fitting = [row for row in rows if has_room(row)] or [row for row in rows if row["fits"]]
    timed = [row for row in fitting if row["runtime_s"] is not None]
    if timed:
        return min(timed, key=lambda row: (row["runtime_s"], row["required_mib"]))
    return smallest(fitting) if fitting else None


def smallest(rows: Sequence[Row]) -> Row:
    """The combination that needs the least memory."""
    return min(rows, key=lambda row: (row["required_mib"] or row["peak_memory_mib"], row["peak_memory_mib"]))


def by_size(gpus: Sequence[GpuConfig]) -> list[GpuConfig]:
    """Cards by their memory, then by its bandwidth, smallest first; without those whose memory is not known."""
    known = [gpu for gpu in gpus if gpu.memory_mib is not None]
    return sorted(known, key=lambda gpu: (gpu.memory_mib or 0, gpu.bandwidth_gb_s or 0))


def typed(optim: dict[str, bool] | OptimConfig) -> str:
    """A combination as one types it: the preset without gradient checkpointing, and that beside it."""
    chosen = optim if isinstance(optim, OptimConfig) else OptimConfig(**optim)
    preset = replace(chosen, gc=False).combination
    return f"optim={preset} optim.gc=true" if chosen.gc else f"optim={preset}"


def _of(row: Row) -> str:
    return f"{row['required_mib']:,.0f} of {row['total_memory_mib']:,} MiB"
