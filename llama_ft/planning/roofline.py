"""The least time that a run can take on a card: each operator at the rate of its matrix units or of the memory.

After the roofline model (Williams, Waterman and Patterson 2009, doi.org/10.1145/1498765.1498785). No kernel reaches it,
so it is shown as a bound; what share of it a card reaches is learned from runs (`calibration.py`).
"""

from dataclasses import dataclass

from llama_ft.config import GpuConfig
from llama_ft.planning.operators import Operators, bytes_of, flops_of, mapped_bytes_of
from llama_ft.planning.run_costs import RunCosts

TERA, GIGA = 1e12, 1e9
RATES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # PyTorch multiplies fp32 in fp32, not in TF32


@dataclass(frozen=True)
class Bound:
    """A run at efficiency 1."""

    steps: int
    samples: int
    tokens: int
    flops: dict[str, float]  # by dtype
    bytes_moved: float
    mapped_bytes: float  # of them, those written to new large blocks
    n_operators: float
    seconds: float | None  # None where the profile has no rates
    by_resource: dict[str, float] | None  # seconds that each resource binds; they sum to `seconds`
    binds: str | None  # the resource that binds longest


def bound(costs: RunCosts, gpu: GpuConfig) -> Bound:
    """The least time of a run on a card."""
    spent = by_resource(costs.operators, gpu)
    return Bound(
        costs.steps,
        costs.samples,
        costs.tokens,
        flops_of(costs.operators),
        bytes_of(costs.operators),
        mapped_bytes_of(costs.operators),
        sum(costs.operators.values()),
        sum(spent.values()) if spent else None,
        spent,
        max(spent, key=spent.__getitem__) if spent else None,
    )


def by_resource(operators: Operators, gpu: GpuConfig) -> dict[str, float] | None:
    """Seconds by what binds: `memory`, or matrix products in a format; None where a rate is not known."""
    if gpu.bandwidth_gb_s is None:
        return None
    spent: dict[str, float] = {"memory": 0.0}
    for (dtype, flops, moved, _), count in operators.items():
        name, seconds = "memory", moved / (gpu.bandwidth_gb_s * GIGA)
        if flops:
            unit = RATES[dtype]
            rate = getattr(gpu.tflops, unit)
            if rate is None:
                return None
            if (computing := flops / (rate * TERA)) > seconds:
                name, seconds = unit, computing
        spent[name] = spent.get(name, 0.0) + seconds * count
    return spent
