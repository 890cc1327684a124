"""The operators of a step as formulas, for a model and a micro-batch of any size, from a few fake steps."""

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

from llama_ft.config import TrainConfig
from llama_ft.planning.fake_run import fake_step, give_gradients, micro_batch, update
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.operators import LINK, OperatorCounter, scale, total
from llama_ft.planning.symbols import Formula, Symbols, Term, collected
from llama_ft.planning.trace import LEAST_BYTES, deep, formula_reader

Key = tuple[str, Term | None, Formula]  # dtype of the products or `LINK`, FLOPs of whole products, bytes
FEW_LAYERS = (1, 2)  # each adds the same operators
PARTS = ("micro_batch", "accumulated", "update")


@dataclass(frozen=True)
class Cost:
    """Equal operators of a part of a step.

    Those without products, which memory binds, are one operator. Of causal attention the FLOPs are those of all scores:
    for `tokens` n, kernels compute the share (n + 1) / 2n of them.
    """

    dtype: str
    flops: Term | None
    n_bytes: Formula
    count: float  # of a model without layers
    per_layer: float


class FormulaCounter(OperatorCounter):
    """Counts operators by their formulas."""

    def __init__(self, symbols: Symbols, read: Callable[[int], Formula]) -> None:
        super().__init__()
        self.symbols, self.read = symbols, read
        self.found: Counter[Key] = Counter()

    def _formula(self, sizes: list[int]) -> Formula:
        return collected(term for size in sizes if size >= LEAST_BYTES for term in self.read(size))

    def add(self, dtype: str, flops: int, share: float, moved: list[int], n: int) -> None:
        """Count operators; those without products one for each tensor size, so that they can be added up."""
        if flops:
            self.found[dtype, self.symbols.term(flops), self._formula(moved)] += n
        else:
            for term in self._formula(moved):
                self.found["", None, (term,)] += 1

    def send(self, n_bytes: int) -> None:
        """Count the bytes of all processes: each sends (N - 1) / N of them."""
        for term in self._formula([n_bytes]):
            self.found[LINK, None, (term,)] += 1


def costs(config: TrainConfig, traits: Traits, symbols: Symbols) -> dict[str, list[Cost]]:
    """The operators of each part of an optimizer step.

    `micro_batch` is the forward and backward pass of one, `accumulated` what adding its gradients to others' takes
    more, and `update` the rest of the step.
    """
    shallow, deeper = (counted(each, traits, symbols) for each in deep(config, FEW_LAYERS))
    return {part: per_layer(shallow[part], deeper[part]) for part in PARTS}


def counted(config: TrainConfig, traits: Traits, symbols: Symbols) -> dict[str, Counter[Key]]:
    """The operators of each part of a step of one depth."""
    sizes, samples = symbols.sizes, symbols.sizes["samples"]
    read = formula_reader(config, traits, symbols)

    def count(run: Callable[[], object]) -> Counter[Key]:
        counter = FormulaCounter(symbols, read)
        with counter:
            run()
        return counter.found

    with fake_step(config, traits) as step:
        if symbols.packed:
            width, n_targets = samples * sizes["tokens"], samples * sizes["targets"]
            batch = micro_batch(width, n_targets, 1, sizes["tokens"])
        else:
            batch = micro_batch(sizes["tokens"], sizes["targets"], samples)
        give_gradients(step)
        update(step)  # creates the optimizer's state
        give_gradients(step)
        after = count(lambda: update(step))
        one, two = (count(lambda n=n: step([batch] * n)) for n in (1, 2))  # type: ignore[misc]
    return {
        "micro_batch": total([one, scale(after, -1)]),
        "accumulated": total([two, scale(one, -2), after]),
        "update": after,
    }


def per_layer(shallow: Counter[Key], deeper: Counter[Key]) -> list[Cost]:
    """Costs with counts that are linear in the number of layers."""
    found: list[Cost] = []
    fixed: dict[str, list[Term]] = defaultdict(list)  # without products, by dtype
    each_layer: dict[str, list[Term]] = defaultdict(list)
    for key in sorted(shallow.keys() | deeper.keys(), key=repr):
        dtype, flops, n_bytes = key
        slope = deeper[key] - shallow[key]
        count = shallow[key] - FEW_LAYERS[0] * slope
        if flops is not None and (count or slope):
            found.append(Cost(dtype, flops, n_bytes, count, slope))
        elif flops is None:
            fixed[dtype] += [replace(term, factor=count * term.factor) for term in n_bytes]
            each_layer[dtype] += [replace(term, factor=slope * term.factor) for term in n_bytes]
    found += [Cost(dtype, None, collected(terms), 1, 0) for dtype, terms in fixed.items()]
    return found + [Cost(dtype, None, collected(terms), 0, 1) for dtype, terms in each_layer.items()]
