"""The notes under a plan's tables: what each number is."""

from typing import Any

from llama_ft.reporting.plan_file import Plan, Rows
from llama_ft.reporting.table2 import technique_notes

# What runs when memory peaks, short enough for eight columns beside each other, and in words.
INSTANTS = {
    "load": ("load", "loading the weights"),
    "forward": ("fwd", "the forward pass"),
    "backward": ("bwd", "the backward pass"),
    "optimizer step": ("step", "the optimizer step"),
}


def short_instant(phase: str) -> str:
    """An instant's short name."""
    return INSTANTS.get(phase, (phase,))[0]


def all_notes(plan: Plan, gpus: list[dict[str, Any]], rows: Rows, with_times: bool = True) -> list[str]:
    """The notes on these rows of these cards."""
    optims = [row["optim"] for row in rows]
    size = plan["training"]["micro_batch_size"]
    notes = technique_notes(optims, plan["techniques"], size)
    if not any(optim["ga"] for optim in optims):
        notes.append(f"Micro-batches of {size} (training.micro_batch_size), an update after each.")
    if any(optim["mp"] for optim in optims) and plan["techniques"]["mp"]["trainable_weights"] == "compute":
        notes.append("MP: trainable weights, gradients and optimizer state are in 16 bit too.")
    computed = sorted({dtype for row in rows if row["optim"]["mp"] for dtype in row["flops"] or {}} - {"float32"})
    if computed:
        notes.append(f"MP computes in {' and '.join(computed)}.")
    if not any(optim["gc"] for optim in optims):
        notes.append("GC is off.")
    notes += [*_memory_notes(gpus, rows), f"Data: {' '.join(plan['data']['about'].split())}."]
    if with_times:
        notes += time_notes(plan, rows)
    return notes + _errors(rows, with_gpu=len(gpus) > 1)


def _memory_notes(gpus: list[dict[str, Any]], rows: Rows) -> list[str]:
    if not any(row["reserved_mib"] is not None for row in rows):
        notes = ["Peak memory: bytes of tensors."]
    else:
        notes = [
            "Peak memory: tensors, each rounded up as the CUDA allocator does, and cuBLAS workspaces. bytes.",
            "Reserved: found by a model of PyTorch's allocator with expandable segments, fed with the step's tensors.",
            _context_note(gpus),
        ]
        if len(gpus) == 1 and gpus[0]["memory_mib"]:
            notes[-1] = f"{notes[-1][:-1]}; {gpus[0]['name']} has {gpus[0]['memory_mib']:,} MiB."
    if any(row["fits"] is False for row in rows):
        notes.append("×: needs more memory than the card has.")
    if any(row["fits"] is None and not row["error"] for row in rows):
        notes.append("–: not known, since no profile says how much memory there is.")
    if len(gpus) == 1:
        during = dict.fromkeys(row["phase"] for row in rows if row["phase"] in INSTANTS)
        words = [f"{short} is {long}" for short, long in map(INSTANTS.__getitem__, during) if short != "load"]
        notes += [f"During: {', '.join(words)}."] if words else []
    return notes


def _context_note(gpus: list[dict[str, Any]]) -> str:
    sizes = sorted({gpu["context_mib"] for gpu in gpus if gpu["context_mib"]})
    unknown = [gpu["name"] for gpu in gpus if not gpu["context_mib"] and gpu["device"] == "cuda"]
    if not sizes:
        return "Needed: reserved; the CUDA context is not counted, since its size is not known (gpu.context_mib)."
    context = f"{sizes[0]:,} MiB" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,} MiB, by card,"
    without = f" (of {', '.join(unknown)} not known and not counted)" if unknown else ""
    return f"Needed: reserved, and {context} for the CUDA context and its libraries{without}."


def time_notes(plan: Plan, rows: Rows) -> list[str]:
    """What the runtimes are, and whose are not known."""
    about, is_bound = " ".join(plan["time"]["about"].split()), plan["time"]["kind"] == "bound"
    if not is_bound:
        return [f"Runtime: seconds, {about}."]
    notes = [f"Runtime: seconds, {about}."] if any(row["runtime_s"] is not None for row in rows) else []
    without = dict.fromkeys(row["gpu"] for row in rows if row["runtime_s"] is None and not row["error"])
    if without:
        notes.append(f"Runtime is not known where no rates are: gpu={', '.join(without)}.")
    return notes


def _errors(rows: Rows, with_gpu: bool) -> list[str]:
    """Why rows failed, each reason once."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["error"]:
            reason = " ".join(row["error"].split())
            reasons.setdefault(reason, {}).setdefault(row["combination"], []).append(row["gpu"])
    notes = []
    for reason, found in reasons.items():
        gpus = dict.fromkeys(gpu for names in found.values() for gpu in names)
        notes.append(f"{', '.join(found)}{f' on {_listed(gpus)}' if with_gpu else ''}: {reason}")
    return notes


def _listed(names: Any) -> str:
    return ", ".join(names)
