"""`python -m experiments.lora`: LoRA's size, savings and costs, and the effect of changing tasks on merged weights.

The layer is the library's. FLOPs are counted by PyTorch while the built-in model runs, and are reproducible.
"""

from pathlib import Path

import torch

from experiments.figure import BLUE, GRAY, GREEN, ORANGE, drawn
from experiments.lora_costs import LENGTH, ROLES, backward_flops, flops, latency, tiny
from experiments.shared import model_config, relative_error
from experiments.study import Claim, Log, Numbers, Options, Study, main, table
from llama_ft.model.weights import build
from llama_ft.techniques.lora import LoRALinear, add_lora

SIDE = 64  # of the square layer whose parameters are counted
RANKS = (4, 8, 16, 32, 64)  # of LLaMA-2-7B's
TARGETS = {"q, v": ["wq", "wv"], "all linear": ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]}
COURSE_PERCENT = 0.1243  # printed by PEFT for LLaMA-2-7B, r = 16, q and v
SWITCHES = 64
MIN_SLOWDOWN = 1.02
ROUNDING = {"fp32": 1e-5, "bf16": 1e-3}


def measure(options: Options, log: Log) -> Numbers:
    """Count, time, merge."""
    log("parameters, FLOPs, latency, changing tasks")
    return {
        "at_the_start": at_the_start(),
        "factor_parameters": factor_parameters(),
        "trainable_percent": {name: trainable_percent(targets) for name, targets in TARGETS.items()},
        "flops": flops(),
        "backward": {"full": backward_flops(lora=False), "lora": backward_flops(lora=True)},
        "latency": latency(100 if options.quick else 400),
        "switching": {"fp32": switching(torch.float32), "bf16": switching(torch.bfloat16)},
    }


def at_the_start() -> float:
    """The largest difference that a new adapter makes to the logits."""
    tokens = torch.arange(1, LENGTH)[None]
    with torch.inference_mode():
        return float((tiny(lora=True)(tokens) - tiny(lora=False)(tokens)).abs().max())


def factor_parameters() -> list[int]:
    """The parameters of A and B for a square layer, by rank from 1 to its side."""
    base = torch.nn.Linear(SIDE, SIDE, bias=False)
    layers = [LoRALinear(base, rank, 1.0) for rank in range(1, SIDE + 1)]
    return [layer.lora_A.numel() + layer.lora_B.numel() for layer in layers]


def trainable_percent(targets: list[str]) -> list[float]:
    """The trainable share of LLaMA-2-7B by rank, of all parameters including the adapter's, as PEFT counts it."""
    percents = []
    for rank in RANKS:
        model = build(model_config("llama2_7b"))
        add_lora(model, rank, targets=targets)
        counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        percents.append(100 * sum(n for n, trained in counts if trained) / sum(n for n, _ in counts))
    return percents


def switching(dtype: torch.dtype) -> list[float]:
    """The weight's relative distance from its start as two tasks' adapters are merged and removed in turn."""
    torch.manual_seed(0)
    base = torch.nn.Linear(256, 256, bias=False, dtype=dtype)
    before, tasks, distances = base.weight.detach().double().clone(), [], []
    for _ in range(2):
        tasks.append(LoRALinear(base, 16, 32.0))
        torch.nn.init.normal_(tasks[-1].lora_B, std=0.02)
    for number in range(SWITCHES):
        tasks[number % 2].merge()
        tasks[number % 2].unmerge()
        distances.append(relative_error(base.weight.double(), before))
    return distances


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    return [*_size_claims(numbers), *_cost_claims(numbers), *_switching_claims(**numbers["switching"])]


def _size_claims(numbers: Numbers) -> list[Claim]:
    counts, percents = numbers["factor_parameters"], numbers["trainable_percent"]
    fewer = [rank for rank, count in enumerate(counts, start=1) if count < SIDE * SIDE]
    course, all_linear = (percents[name][RANKS.index(16)] for name in TARGETS)
    return [
        Claim(
            "a fresh adapter changes no logit", numbers["at_the_start"] == 0, {"difference": numbers["at_the_start"]}
        ),
        Claim(
            f"A and B have fewer parameters than an n x n weight for r below n / 2 (n = {SIDE}), and as many at n / 2",
            fewer == list(range(1, SIDE // 2)) and counts[SIDE // 2 - 1] == SIDE * SIDE,
            {"largest r with fewer": max(fewer, default=0)},
        ),
        Claim(
            f"of LLaMA-2-7B with r = 16 on q and v {COURSE_PERCENT} percent of the parameters are trained",
            abs(course - COURSE_PERCENT) < 5e-5,
            {"percent": course, "all linear, r 16": all_linear},
        ),
    ]


def _cost_claims(numbers: Numbers) -> list[Claim]:
    flop, slower = numbers["flops"], numbers["latency"]["beside"] / numbers["latency"]["merged"]
    total = {name: {role: sum(flops[role].values()) for role in ROLES} for name, flops in numbers["backward"].items()}
    times = {name: sum(flops.values()) / numbers["backward"][name]["forward"] for name, flops in total.items()}
    of_weights, of_inputs = (total["lora"][role] / total["full"][role] for role in ROLES)
    return [
        Claim(
            "beside the weights the adapter adds FLOPs to the forward pass, merged it adds none",
            flop["forward_merged"] == flop["forward"] < flop["forward_beside"],
            {"percent beside": 100 * (flop["forward_beside"] / flop["forward"] - 1)},
        ),
        Claim(
            f"merged a token takes less time: beside the weights {MIN_SLOWDOWN} times as long, or longer",
            slower >= MIN_SLOWDOWN,
            {"times": slower},
        ),
        Claim(
            "backward of all weights of 7B has twice the forward pass's FLOPs, or a little more; under LoRA weights'"
            " gradients fall to 1 percent or less, those of inputs stay, and backward has about those of forward",
            2 <= times["full"] <= 2.1 and of_weights <= 0.01 and of_inputs >= 0.9 and abs(times["lora"] - 1) <= 0.1,
            {
                "full over forward": times["full"],
                "LoRA over forward": times["lora"],
                "percent of weights' left": 100 * of_weights,
                "of inputs'": 100 * of_inputs,
            },
        ),
    ]


def _switching_claims(fp32: list[float], bf16: list[float]) -> list[Claim]:
    return [
        Claim(
            f"adding and taking out updates {SWITCHES} times leaves an fp32 weight where it was to"
            f" {ROUNDING['fp32']:g}, an error that grows",
            2 * fp32[0] <= fp32[-1] <= ROUNDING["fp32"],
            {"relative": fp32[-1], "after the first": fp32[0]},
        ),
        Claim(
            f"a bf16 weight it moves by {ROUNDING['bf16']:g} or more, which grows too",
            bf16[-1] >= max(ROUNDING["bf16"], 2 * bf16[0]),
            {"relative": bf16[-1], "after the first": bf16[0]},
        ),
    ]


def table_of(numbers: Numbers) -> str:
    """Trained percent by rank and targets; FLOPs of the backward pass by purpose."""
    percents, (full, lora) = numbers["trainable_percent"], (numbers["backward"][name] for name in ("full", "lora"))
    trained = list(zip(RANKS, *(percents[name] for name in TARGETS), strict=True))
    rows = [["forward", full["forward"] / 1e9, lora["forward"] / 1e9]]
    rows += [
        [f"{role}, {operator}", *(flops[role].get(operator, 0) / 1e9 for flops in (full, lora))]
        for role in ROLES
        for operator in full[role] | lora[role]
    ]
    of_7b = table(("r", *(f"{name}, percent trained of 7B" for name in TARGETS)), trained)
    return of_7b + "\n" + table(("GFLOP of 7B: forward, then backward", "all weights", "LoRA"), rows)


def draw(numbers: Numbers, file: Path) -> None:
    """Draw trained percent against the rank, FLOPs of backward, and a weight's drift as tasks are changed."""
    titles = ("trained, percent of LLaMA-2-7B", "7B, TFLOP of 404 tokens", "merged weight's distance from its start")
    with drawn(file, titles) as (left, middle, right):
        for (name, percents), color in zip(numbers["trainable_percent"].items(), (BLUE, ORANGE), strict=True):
            left.plot(RANKS, percents, "o-", color=color, lw=3, ms=9, label=name)
        left.set(xscale="log", yscale="log", xlabel="r")
        left.set_xticks(list(RANKS), [str(rank) for rank in RANKS])
        left.set_yticks([0.03, 0.1, 0.3, 1, 3], ["0.03", "0.1", "0.3", "1", "3"])
        left.minorticks_off()
        left.legend(frameon=False)
        ends, backward = [0.0, 0.0], [numbers["backward"][name] for name in ("full", "lora")]
        heights = {"forward": [flops["forward"] for flops in backward]}
        heights |= {role: [sum(flops[role].values()) for flops in backward] for role in reversed(ROLES)}
        for (part, flops), color in zip(heights.items(), (GRAY, BLUE, ORANGE), strict=True):
            middle.bar(["all weights", "LoRA"], [n / 1e12 for n in flops], 0.6, bottom=ends, color=color, label=part)
            ends = [end + n / 1e12 for end, n in zip(ends, flops, strict=True)]
        middle.set_ylim(top=1.6 * max(ends))
        middle.legend(frameon=False, loc="upper right", reverse=True, fontsize=13)
        for name, color in (("bf16", ORANGE), ("fp32", GREEN)):
            values = numbers["switching"][name]
            right.plot(range(1, 1 + len(values)), values, color=color, lw=3, label=name)
        right.set(yscale="log", xlabel="updates added and taken out", ylim=(1e-9, 1))
        right.legend(frameon=False, loc="upper left")


STUDY = Study("lora", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
