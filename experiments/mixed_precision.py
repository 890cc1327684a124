"""`python -m experiments.mixed_precision`: the effect of 16 bit on gradients, updates and memory.

Gradients are those of the built-in model on built-in records, in the library's precisions; memory is planned.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.figure import BLUE, GRAY, ORANGE, drawn
from experiments.mixed_precision_runs import memory_map, scaling, underflow, updates
from experiments.study import Claim, Log, Numbers, Options, Study, main, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCALES, QUICK_SCALES = (0, 4, 8, 16, 24), (0, 16, 24)  # exponents of 2 of the loss scale
FIRST_SCALE = 16  # GradScaler's first exponent
MODELS = {"tiny": "3.4M", "llama3_2_1b": "1.2B", "llama2_7b": "6.7B"}
TOKENS, QUICK_TOKENS = (128, 1024, 8192, 65536), (128, 65536)  # of a micro-batch
FEW, MANY = "128", "65536"
LABELS = {"full": "full", "lora_plain": "LoRA (fp32)", "lora_16bit": "LoRA (16 bit)"}
"""The trained weights, and the storage of frozen ones."""
NONE = 1e-6  # percent in the figure
HALVED = 0.6  # of the memory before, or less


def measure(options: Options, log: Log) -> Numbers:
    """Compute gradients, take steps, plan memory."""
    losses = underflow(QUICK_SCALES if options.quick else SCALES, log)
    log("updates, GradScaler")
    numbers = {"underflow": losses, "updates": updates(), "scaling": scaling()}
    log("memory, planned")
    return numbers | {
        "memory": memory_map(LABELS, MODELS, QUICK_TOKENS if options.quick else TOKENS),
        "accumulated": memory_map(["full_ga"], ["llama2_7b"], [int(FEW)]),
    }


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    return [
        *_gradient_claims(**numbers["underflow"]),
        *_step_claims(numbers["updates"], numbers["scaling"]),
        *_memory_claims(numbers["memory"], numbers["accumulated"]["peak"]["full_ga"]["llama2_7b"][FEW]),
    ]


def _gradient_claims(start: Numbers, later: Numbers) -> list[Claim]:
    first = str(FIRST_SCALE)
    return [
        Claim(
            "in fp16 without a scaled loss 5 percent or more of the gradient's elements become 0 when the loss has"
            " fallen, 10 times the share of the start or more",
            later["fp16"]["0"]["lost"] >= max(0.05, 10 * start["fp16"]["0"]["lost"]),
            {
                "loss": start["loss"],
                "percent lost": 100 * start["fp16"]["0"]["lost"],
                "later, loss": later["loss"],
                "then percent lost": 100 * later["fp16"]["0"]["lost"],
            },
        ),
        Claim(
            f"with the loss times 2^{FIRST_SCALE}, where GradScaler begins, 0.1 percent or less are lost then",
            later["fp16"][first]["lost"] <= 0.001,
            {"percent lost": 100 * later["fp16"][first]["lost"]},
        ),
        Claim(
            f"too large a scale overflows: at 2^{max(SCALES)} half of the first gradient or more is not finite",
            start["fp16"][str(max(SCALES))]["not_finite"] >= 0.5,
            {f"percent at 2^{n}": 100 * start["fp16"][str(n)]["not_finite"] for n in (FIRST_SCALE, max(SCALES))},
        ),
        Claim(
            "bf16 loses nothing without a scaled loss, but is coarser: its error at the start is 4 times that of fp16"
            " or more",
            later["bf16"]["0"]["lost"] == 0 and 0 < start["fp16"]["0"]["error"] <= start["bf16"]["0"]["error"] / 4,
            {
                "percent lost later": 100 * later["bf16"]["0"]["lost"],
                "error, bf16": start["bf16"]["0"]["error"],
                "fp16": start["fp16"]["0"]["error"],
            },
        ),
    ]


def _step_claims(lost: Numbers, scaler: Numbers) -> list[Claim]:
    overflow, growth, first = scaler["overflow_at"], scaler["growth_interval"], scaler["first"]
    shares = {name: lost[name] for name in ("fp16", "bf16", "bf16_run")}
    return [
        Claim(
            f"without fp32 masters a first step at a learning rate of {lost['lr']:g} leaves weights as they are: a"
            " third of them or more in fp16, three quarters in bf16",
            lost["fp16"] >= 1 / 3 and min(lost["bf16"], lost["bf16_run"]) >= 0.75,
            {f"percent, {name}": 100 * share for name, share in shares.items()},
        ),
        Claim(
            "a step that overflows is skipped and halves the scale",
            scaler["steps_that_moved_nothing"] == [overflow] and scaler["changes"][:1] == [[overflow, first / 2]],
            {"steps skipped": len(scaler["steps_that_moved_nothing"]), "scale before": first},
        ),
        Claim(
            f"{growth} steps without an overflow double it",
            scaler["changes"] == [[overflow, first / 2], [overflow + growth, first]],
            {"changes of the scale": len(scaler["changes"])},
        ),
    ]


def _memory_claims(memory: Numbers, with_ga: float) -> list[Claim]:
    peak, activation = memory["peak"], memory["activation"]["full"]
    full, seven = peak["full"], {setting: models["llama2_7b"] for setting, models in peak.items()}
    halved = [ratio for model in MODELS for ratio in full[model].values() if ratio <= HALVED]
    kept = [ratio for model in MODELS for ratio in activation[model].values()]
    return [
        Claim(
            f"in full fine-tuning memory is roughly halved, to {100 * HALVED:g} percent or less, nowhere: not even"
            " activations by themselves are",
            not halved and min(kept) > HALVED,
            {f"percent, {MODELS[model]}, {MANY} tokens": 100 * full[model][MANY] for model in MODELS}
            | {"activations of 6.7B": 100 * activation["llama2_7b"][MANY]},
        ),
        Claim(
            f"fully fine-tuning 6.7B on {FEW} tokens it saves nothing, and with GA it costs 5 percent or more",
            seven["full"][FEW] >= 0.99 and with_ga >= 1.05,
            {"percent": 100 * seven["full"][FEW], "with GA": 100 * with_ga},
        ),
        Claim(
            f"under LoRA plain AMP, frozen weights in fp32, raises the peak of 6.7B on {FEW} tokens by 30 percent or"
            f" more; frozen weights in 16 bit bring it to {100 * HALVED:g} percent or less, on few tokens and on many",
            seven["lora_plain"][FEW] >= 1.3 and max(seven["lora_16bit"].values()) <= HALVED,
            {"percent, plain AMP": 100 * seven["lora_plain"][FEW]}
            | {f"16 bit, {n} tokens": 100 * seven["lora_16bit"][n] for n in (FEW, MANY)},
        ),
    ]


def table_of(numbers: Numbers) -> str:
    """The memory map."""
    memory = numbers["memory"]
    rows = [[name, *(f"{percent:.0f}%" for percent in percents)] for name, percents in _rows(memory).items()]
    return table(("peak with MP, of that without, by tokens in a micro-batch", *map(str, memory["tokens"])), rows)


def _rows(memory: Numbers) -> dict[str, list[float]]:
    """Peaks with mixed precision, as percentages of those without, by setting and model."""
    return {
        f"{LABELS[setting]}, {MODELS[model]}": [100 * ratios[str(n)] for n in memory["tokens"]]
        for setting, models in memory["peak"].items()
        for model, ratios in models.items()
    }


def draw(numbers: Numbers, file: Path) -> None:
    """Draw the share of lost elements against the loss scale, and the map of memory."""
    with drawn(file, ("gradient in fp16, percent of its elements", "peak with MP, percent")) as (lost, memory):
        for stage, color, name in (("start", BLUE, "at the start"), ("later", ORANGE, "loss has fallen")):
            by_power = numbers["underflow"][stage]["fp16"]
            powers = [int(power) for power in by_power]
            for key, style, what in (("lost", "o-", "become 0"), ("not_finite", "x--", "overflow")):
                shares = [max(NONE, 100 * result[key]) for result in by_power.values()]
                lost.plot(powers, shares, style, color=color, lw=3, ms=10, mew=3, label=f"{name}, {what}")
        lost.vlines(FIRST_SCALE, 0.5 * NONE, 100, color=GRAY, ls=":", lw=3)
        lost.text(FIRST_SCALE - 0.4, 100, "GradScaler's\nfirst scale", color=GRAY, va="top", ha="right")
        lost.set(yscale="log", xlabel="loss times 2 to the power of", ylim=(0.5 * NONE, 1e5), xticks=list(SCALES))
        lost.minorticks_off()
        lost.set_yticks([NONE, 1e-4, 1e-2, 1, 100], ["none", "0.0001", "0.01", "1", "100"])
        lost.legend(frameon=False, loc="upper left", fontsize=13, ncols=2)
        _draw_map(memory, numbers["memory"])


def _draw_map(axes: "Axes", memory: Numbers) -> None:
    """Draw settings and models from top to bottom, tokens from left to right; red is more than without, blue less."""
    tokens, rows = [str(n) for n in memory["tokens"]], _rows(memory)
    axes.imshow(list(rows.values()), cmap="RdBu_r", vmin=40, vmax=160, aspect="auto")
    for y, row in enumerate(rows.values()):
        for x, ratio in enumerate(row):
            color = "white" if ratio < 60 or ratio > 140 else "black"
            axes.text(x, y, f"{ratio:.0f}", ha="center", va="center", fontsize=14, color=color)
    axes.set_xticks(range(len(tokens)), tokens)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.tick_params(length=0, labelsize=13)
    axes.set_xlabel("tokens in a micro-batch")


STUDY = Study("mixed_precision", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
