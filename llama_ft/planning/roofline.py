"""The least time that a run can take on a card: each operator at the rate of its matrix units or of the memory.

After the roofline model (Williams, Waterman and Patterson 2009, doi.org/10.1145/1498765.1498785). No kernel reaches it,
so it is shown as a bound; what share of it a card reaches is measured (`calibration.py`).
"""

from llama_ft.config import GpuConfig
from llama_ft.planning.operators import Operators

TERA, GIGA = 1e12, 1e9
RATES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}  # PyTorch multiplies fp32 in fp32, not in TF32


def bound_by_resource(operators: Operators, gpu: GpuConfig) -> dict[str, float] | None:
    """Seconds by what binds: `memory`, or matrix products in a format; None where a rate is not known."""
    if gpu.bandwidth_gb_s is None:
        return None
    seconds_by: dict[str, float] = {"memory": 0.0}
    for (dtype, flops, n_bytes), count in operators.items():
        resource, seconds = "memory", n_bytes / (gpu.bandwidth_gb_s * GIGA)
        if flops:
            rate = getattr(gpu.tflops, RATES.get(dtype, ""), None)
            if rate is None:
                return None
            if (computing := flops / (rate * TERA)) > seconds:
                resource, seconds = RATES[dtype], computing
        seconds_by[resource] = seconds_by.get(resource, 0.0) + seconds * count
    return seconds_by
