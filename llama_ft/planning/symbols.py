"""Reads formulas off numbers: which of a model's and a micro-batch's sizes a number is the product of.

A fake run costs the same at any sizes. So one is made for a model each of whose sizes has a prime factor of its own:
the bytes of a tensor, or the FLOPs of an operator, then factor in only one way, and the formula holds for all sizes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Any

from llama_ft.config import ModelConfig

MODEL_SIZES = ("dim", "ffn", "vocab", "heads", "kv_heads", "head_dim", "rank", "context")
SYMBOLS = (*MODEL_SIZES, "samples", "tokens", "targets", "rows", "processes", "layers")
PROCESSES = 7  # each size that is split over processes is a multiple of it
Sizes = Mapping[str, int]  # of a run, by symbol


@dataclass(frozen=True, order=True)
class Term:
    """A factor times powers of the symbols, in their order."""

    factor: float
    powers: tuple[int, ...]

    def at(self, sizes: Sizes) -> float:
        """The number for these sizes."""
        powers = zip(SYMBOLS, self.powers, strict=True)
        return self.factor * prod(float(sizes[name]) ** power for name, power in powers if power)

    def times(self, symbol: str) -> "Term":
        """This term times a symbol."""
        powers = list(self.powers)
        powers[SYMBOLS.index(symbol)] += 1
        return replace(self, powers=tuple(powers))


Formula = tuple[Term, ...]  # their sum


@dataclass(frozen=True)
class Symbols:
    """The sizes of a run whose numbers can be factored.

    Besides the model's: a micro-batch has `samples` of `tokens`, of which `targets` are trained on. FlashAttention's
    backward pass works on `rows` of each sample: its tokens in whole blocks of 128, or 128 more in a packed row.
    """

    grouped: bool  # fewer heads of keys and values than of queries
    packed: bool = False  # samples are put end to end
    is_split: bool = False  # over processes

    @cached_property
    def primes(self) -> dict[str, int]:
        """The prime factor of each size that no other has, but for those of `heads`, a multiple of `kv_heads`.

        157 + 1 and 157 + 2 have other factors: weights of queries and of keys that FSDP exchanges together are a sum.
        """
        own = {
            "dim": 11,
            "ffn": 13,
            "vocab": 17,
            "heads": 157,
            "kv_heads": 19,
            "head_dim": 3,
            "rank": 29,
            "context": 37,
        }
        own |= {"samples": 41, "targets": 43}
        own |= {"tokens": 3041, "rows": 3169} if self.packed else {"tokens": 3967, "rows": 31}
        if not self.grouped:
            own["heads"] = own.pop("kv_heads")
        return own

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Each size: its prime, times what makes it whole blocks of quantized weights, of kernels and of processes."""
        times = {"dim": 128 * 7, "ffn": 128 * 7, "vocab": 64 * 7, "heads": 8 * 7, "kv_heads": 8 * 7, "head_dim": 32}
        times |= {"rank": 8 * 7, "context": 256, "rows": 1 if self.packed else 128}
        sizes = {name: prime * times.get(name, 1) for name, prime in self.primes.items()}
        sizes["heads"] *= self.primes.get("kv_heads", 1)
        sizes.setdefault("kv_heads", sizes["heads"])
        return sizes | {"processes": PROCESSES if self.is_split else 1}

    def term(self, number: int) -> Term | None:
        """The one product of sizes that is this number, times a factor of 2s and 5s; None if there is none."""
        powers = {name: power_in(number, prime) for name, prime in self.primes.items()}
        powers["kv_heads"] = powers.get("kv_heads", powers["heads"]) - powers["heads"]
        whole = prod(self.sizes[name] ** power for name, power in powers.items() if power > 0)
        rest = Fraction(number, whole)
        powers["processes"] = power_in(rest.numerator, PROCESSES) - power_in(rest.denominator, PROCESSES)
        rest /= Fraction(PROCESSES) ** powers["processes"]
        left = rest.numerator * rest.denominator
        if min(powers[name] for name in self.primes) < 0 or powers["kv_heads"] < 0:
            return None
        if left != 2 ** power_in(left, 2) * 5 ** power_in(left, 5) or (powers["processes"] and not self.is_split):
            return None
        return Term(float(rest), tuple(powers.get(name, 0) for name in SYMBOLS))

    def model(self, n_layers: int, **features: Any) -> ModelConfig:
        """A model of these sizes."""
        sizes = self.sizes
        return ModelConfig(
            "symbols",
            sizes["dim"],
            n_layers,
            sizes["heads"],
            sizes["kv_heads"],
            sizes["ffn"],
            sizes["vocab"],
            sizes["context"],
            head_size=sizes["head_dim"],
            **features,
        )


def power_in(number: int, prime: int) -> int:
    """How often a prime divides a number, which is not 0."""
    power = 0
    while number % prime == 0:
        number, power = number // prime, power + 1
    return power


def collected(terms: Iterable[Term]) -> Formula:
    """A sum with each product of sizes once."""
    factors: dict[tuple[int, ...], float] = defaultdict(float)
    for term in terms:
        factors[term.powers] += term.factor
    return tuple(sorted(Term(factor, powers) for powers, factor in factors.items() if factor))
