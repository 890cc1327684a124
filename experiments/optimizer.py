"""`python -m experiments.optimizer`: AdamW's state, its memory during a step, its weight decay, and the schedule.

The optimizer and the schedule are the library's, compared with PyTorch's other forms and its Adam.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from experiments.figure import BLUE, GRAY, GREEN, ORANGE, drawn
from experiments.study import Claim, Log, Numbers, Options, Study, main, table
from llama_ft.config import TrainingConfig
from llama_ft.measure.memory import MemoryTracker
from llama_ft.system import MIB
from llama_ft.training.optimizers import make_optimizer
from llama_ft.training.setup import make_schedule

FORMS = ("fused", "foreach", "loop")
N_LAYERS, WIDTH = 8, 256  # of the network whose step is tracked
STATE_BYTES = 8  # per parameter: two moments in fp32
STEPS, WARMUP, LR = 100, 0.1, 1e-3
DECAY = 0.1
EXACT = 1e-6


def measure(options: Options, log: Log) -> Numbers:
    """Track steps, decay weights, follow schedules."""
    log("steps of three forms, decay, schedules")
    return {"memory": {form: memory_of(form) for form in FORMS}, "decays": decays(), "schedules": schedules()}


def optimizer_of(form: str, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The library's AdamW, which is fused, or PyTorch's in another form."""
    if form == "fused":
        return make_optimizer(parameters, TrainingConfig())
    return torch.optim.AdamW(list(parameters), foreach=form == "foreach")


def memory_of(form: str) -> dict[str, float]:
    """Bytes per parameter of AdamW's state, and of everything else at the peak of a step."""
    network = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(N_LAYERS)))
    parameters = list(network.parameters())
    optimizer, n_parameters = optimizer_of(form, parameters), N_LAYERS * WIDTH * WIDTH
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # creates the state
    states = [tensor for values in optimizer.state.values() for tensor in values.values()]
    state = sum(tensor.nbytes for tensor in states)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with MemoryTracker(network, optimizer, [*states, *gradients]) as tracker:
        optimizer.step()
    more = tracker.result().peak_mib * MIB - state - 8 * n_parameters  # without parameters and gradients
    return {"state": state / n_parameters, "temporary": more / n_parameters}


def decays() -> dict[str, list[float]]:
    """The share of a weight removed by 100 steps of decay, for gradients of different sizes.

    The gradient's sign alternates, so that it does not move the weight; only its size differs.
    """

    def after(make: Callable[..., torch.optim.Optimizer], size: float, **options: Any) -> float:
        weight = nn.Parameter(torch.ones(1))
        optimizer = make([weight], **options)
        for step in range(STEPS):
            weight.grad = torch.full_like(weight, size if step % 2 else -size)
            optimizer.step()
        return weight.item()

    shares: dict[str, list[float]] = {"AdamW": [], "Adam": []}
    for size in (0.01, 1.0, 100.0):
        without = after(torch.optim.AdamW, size, lr=LR, weight_decay=0.0)
        ours = after(make_optimizer, size, config=TrainingConfig(lr=LR, weight_decay=DECAY))
        shares["AdamW"].append(without - ours)
        shares["Adam"].append(without - after(torch.optim.Adam, size, lr=LR, weight_decay=DECAY))
    return shares


def schedules() -> dict[str, list[float]]:
    """The learning rates of a run's steps, and of PyTorch's cosine up to twice its T_max."""

    def rates(make: Callable[[torch.optim.Optimizer], Any], n_steps: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=LR)
        schedule, history = make(optimizer), []
        for _ in range(n_steps):
            history.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return history

    return {
        "ours": rates(lambda optimizer: make_schedule(optimizer, STEPS, TrainingConfig(warmup_ratio=WARMUP)), STEPS),
        "cosine": rates(lambda optimizer: CosineAnnealingLR(optimizer, T_max=STEPS), 2 * STEPS + 1),
    }


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    return [
        *_memory_claims(numbers["memory"]),
        *_decay_claims(numbers["decays"]["AdamW"], numbers["decays"]["Adam"]),
        *_schedule_claims(**numbers["schedules"]),
    ]


def _memory_claims(memory: Numbers) -> list[Claim]:
    return [
        Claim(
            f"AdamW keeps {STATE_BYTES} bytes a parameter, whatever its form",
            all(abs(memory[form]["state"] - STATE_BYTES) < 0.01 for form in FORMS),
            {form: memory[form]["state"] for form in FORMS},
        ),
        Claim(
            "fused, which the library takes, needs nothing else while it steps; foreach another copy of all parameters",
            memory["fused"]["temporary"] < 0.01 and abs(memory["foreach"]["temporary"] - 4) < 0.01,
            {f"{form}, bytes a parameter": memory[form]["temporary"] for form in FORMS},
        ),
        Claim(
            f"the loop needs three tensors as large as the one at hand: with {N_LAYERS} equal ones 3 * 4 / {N_LAYERS}"
            " bytes",
            abs(memory["loop"]["temporary"] - 12 / N_LAYERS) < 0.01,
            {form: memory[form]["temporary"] for form in ("loop", "foreach")},
        ),
    ]


def _decay_claims(adamw: list[float], adam: list[float]) -> list[Claim]:
    expected = 1 - (1 - LR * DECAY) ** STEPS
    return [
        Claim(
            "AdamW decays a weight by lr * decay a step, whatever the size of its gradient",
            all(abs(share / expected - 1) < 0.01 for share in adamw),
            {"by formula": expected, "at least": min(adamw), "at most": max(adamw)},
        ),
        Claim(
            "Adam's decay, which is part of the gradient, is lost where gradients are large: 100 times less, or more",
            max(adam) / min(adam) >= 100,
            {"small gradient": adam[0], "large gradient": adam[-1]},
        ),
    ]


def _schedule_claims(ours: list[float], cosine: list[float]) -> list[Claim]:
    peak = ours.index(max(ours))
    return [
        Claim(
            f"the run's schedule rises for {100 * WARMUP:g} percent of its steps and falls to nearly 0 at the last one",
            peak == round(WARMUP * STEPS) - 1
            and all(one > next_ for one, next_ in pairwise(ours[peak + 1 :]))
            and ours[-1] < 0.01 * LR,
            {"peak at step": peak + 1, "last over peak": ours[-1] / max(ours)},
        ),
        Claim(
            "CosineAnnealingLR past T_max rises again, and is where it began at 2 T_max",
            abs(cosine[STEPS]) < EXACT * LR
            and all(one < next_ for one, next_ in pairwise(cosine[STEPS:]))
            and abs(cosine[-1] / LR - 1) < EXACT,
            {"over its start at T_max": cosine[STEPS] / LR, "at 2 T_max": cosine[-1] / LR},
        ),
    ]


def table_of(numbers: Numbers) -> str:
    """Bytes per parameter by form."""
    rows = [[form, numbers["memory"][form]["state"], numbers["memory"][form]["temporary"]] for form in FORMS]
    return table(("AdamW, bytes a parameter", "state", "more while it steps"), rows)


def draw(numbers: Numbers, file: Path) -> None:
    """Draw bytes per parameter by form, and the schedules."""
    with drawn(file, ("AdamW, bytes a parameter", "learning rate, share of the peak")) as (bars, lines):
        state, more = ([numbers["memory"][form][key] for form in FORMS] for key in ("state", "temporary"))
        bars.bar(FORMS, state, color=BLUE, label="state")
        bars.bar(FORMS, more, bottom=state, color=ORANGE, label="more while it steps")
        bars.set_ylim(top=1.35 * max(one + other for one, other in zip(state, more, strict=True)))
        bars.legend(frameon=False, loc="upper left")
        ours, cosine = numbers["schedules"]["ours"], numbers["schedules"]["cosine"]
        lines.plot([rate / LR for rate in cosine], color=ORANGE, lw=3, label="CosineAnnealingLR")
        lines.plot([rate / LR for rate in ours], color=GREEN, lw=3, label="ours")
        lines.vlines(STEPS, 0, 1.15, color=GRAY, ls=":", lw=3)
        lines.text(STEPS + 4, 1.06, "T_max, end of the run", color=GRAY)
        lines.set(xlabel="optimizer step", ylim=(0, 1.5))
        lines.legend(frameon=False, loc="upper left")


STUDY = Study("optimizer", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
