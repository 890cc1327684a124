"""The storages that a run allocates and frees, in order, as formulas: for a model and a micro-batch of any size.

A trace is made from two fake runs, of models with different numbers of layers (`layers.py`). Storages that are freed at
once are freed in any order: it does not matter to the allocator.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby, product

from torch import nn

from llama_ft.config import TrainConfig
from llama_ft.model.transformer import Attention, FeedForward, RMSNorm
from llama_ft.planning.fake_run import fake_run
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.layers import DEPTHS, Section, Token, Tokens, split
from llama_ft.planning.lengths import blank_samples
from llama_ft.planning.symbols import PROCESSES, Formula, Symbols, Term, collected
from llama_ft.training.setup import shape_model

# An allocated storage has the number 1 + its kind; a freed one -1 - its kind - PLACES * its place among those of its
# kind: 2 n if n are newer, or 2 n + 1 if n are older. Of kind 5, 6 allocates one, -6 frees the newest, -6 - 2 * PLACES
# the one before it, and -6 - PLACES the oldest.
PLACES = 4096
# How many places are counted from the oldest. A backward pass frees the newest, of a stack that each layer makes
# higher; but what is kept of the first layer is the oldest.
OLDEST = 2
LEAST_BYTES = 4096  # smaller storages, in a model whose sizes are in the thousands, are scalars: left out
Logged = tuple[str, int, int, int]  # phase, 1 or -1, kind, and a number that no other live storage has


class Unrounded(Traits):
    """A card that rounds no storage, so that sizes can be factored."""

    rounding = 1


@dataclass(frozen=True, order=True)
class Kind:
    """Storages that differ only in when they live."""

    n_bytes: Formula
    category: str
    dtype: str


@dataclass(frozen=True)
class Trace:
    """A run's storages."""

    kinds: list[Kind]
    sections: list[Section]


def trace(config: TrainConfig, traits: Traits, symbols: Symbols) -> Trace:
    """The trace of runs of this config, whose model's sizes are the symbols'."""
    kinds: dict[Kind, int] = {}
    shallow, deeper = (numbered(logged(each, traits, symbols, kinds)) for each in deep(config, DEPTHS))
    assert [phase for phase, _ in shallow] == [phase for phase, _ in deeper]
    sections = [
        each for (phase, one), (_, more) in zip(shallow, deeper, strict=True) for each in split(phase, one, more)
    ]
    return Trace(list(kinds), sections)


def deep(config: TrainConfig, depths: tuple[int, int]) -> list[TrainConfig]:
    """The same run with each of these numbers of layers."""
    return [replace(config, model=replace(config.model, n_layers=n)) for n in depths]


def logged(config: TrainConfig, traits: Traits, symbols: Symbols, kinds: dict[Kind, int]) -> list[Logged]:
    """What a run allocates and frees; its kinds are added to `kinds`."""
    sizes, training = symbols.sizes, config.training
    n_tokens, n_samples = sizes["tokens"] + 1, training.micro_batch_size * config.accumulation_steps
    samples = blank_samples([(n_tokens, n_tokens - sizes["targets"])] * n_samples)
    run = fake_run(config, samples, Unrounded(traits.on_cuda, traits.has_bf16))
    read, found = formula_reader(config, traits, symbols), list[Logged]()
    for allocation, sign, phase in run.events:
        if allocation.nbytes >= LEAST_BYTES:
            kind = Kind(read(allocation.nbytes), allocation.category, str(allocation.dtype).removeprefix("torch."))
            found.append((phase, sign, kinds.setdefault(kind, len(kinds)), id(allocation)))
    return found


def numbered(run: list[Logged]) -> list[tuple[str, Tokens]]:
    """A run's tokens, for each phase."""
    live: dict[int, list[int]] = defaultdict(list)

    def freed(few: list[Logged]) -> Token:
        """Numbers of storages freed at once; others freed at once do not count for their places."""
        numbers = []
        for kind in sorted({kind for _, _, kind, _ in few}):
            going = {storage for _, _, each, storage in few if each == kind}
            places = [place for place, storage in enumerate(live[kind]) if storage in going]
            live[kind] = [storage for storage in live[kind] if storage not in going]
            older = [place - n for n, place in enumerate(places)]  # how many are, for each
            old = [n for n in older if n < min(len(live[kind]) - n, OLDEST)]
            newer = [len(live[kind]) - n for n in reversed(older[len(old) :])]
            numbers += [-1 - kind - PLACES * (2 * n + 1) for n in old] + [-1 - kind - PLACES * 2 * n for n in newer]
        return tuple(numbers)

    found: list[tuple[str, Tokens]] = []
    for phase, part in groupby(run, key=lambda each: each[0]):
        tokens: Tokens = []
        for sign, few in groupby(part, key=lambda each: each[1]):
            if sign < 0:
                tokens.append(freed(list(few)))
                continue
            for _, _, kind, storage in few:
                live[kind].append(storage)
                tokens.append((1 + kind,))
        found.append((phase, tokens))
    return found


def formula_reader(config: TrainConfig, traits: Traits, symbols: Symbols) -> Callable[[int], Formula]:
    """A function that reads the formula off a number of a run, such as the bytes of a storage."""
    sums = gathered_sums(config, traits, symbols) if symbols.is_split else {}

    @cache
    def read(number: int) -> Formula:
        if number in sums:
            return sums[number]
        term = symbols.term(number)
        assert term, f"{number} is no product of the run's sizes"
        return (term,)

    return read


def gathered_sums(config: TrainConfig, traits: Traits, symbols: Symbols) -> dict[int, Formula]:
    """The bytes of the buffers through which FSDP exchanges the weights of a module at once (`parallel/split.py`).

    A buffer holds all of a module's weights, the trained ones (for gradients) or the frozen ones; as they are stored,
    or in 2 or 4 bytes each; of all processes, or the share of one.
    """
    model = shape_model(config, traits.precision(config))
    units: list[nn.Module] = [each for each in model.modules() if isinstance(each, Attention | FeedForward)]
    units = [norm for unit in units for norm in unit.modules() if isinstance(norm, RMSNorm)] + units
    units += [] if model.config.tie_word_embeddings else [model.tok_embeddings, model.output]
    seen: set[nn.Parameter] = set()

    def unseen(module: nn.Module) -> list[nn.Parameter]:
        found = [each for each in module.parameters() if each not in seen]
        seen.update(found)
        return found

    groups = [(unseen(unit), list[nn.Parameter]()) for unit in units]
    of_layers = [unseen(layer) for layer in model.layers]
    groups.append((unseen(model), of_layers[0]))  # what is left: the norms, and an embedding that is also the output
    sums: dict[int, Formula] = {}
    for (weights, of_layer), item_size, share, trained in product(
        groups, (None, 2, 4), (1, PROCESSES), (None, True, False)
    ):
        number, terms = 0, list[Term]()
        for few, times in ((weights, 1), (of_layer, len(of_layers))):
            for each in few:
                if trained in (None, each.requires_grad):
                    rows = -(-len(each) // PROCESSES) * PROCESSES  # each process's part has equally many
                    size = rows * each[0].numel() * (item_size or each.itemsize) // share
                    number += size * times
                    if each.nbytes >= LEAST_BYTES and (term := symbols.term(size)):
                        terms.append(term if few is weights else term.times("layers"))
        sums[number] = collected(terms)
    return sums
