"""`python -m experiments.gradient_accumulation`: compares micro-batches' gradients with the whole batch's."""

import math
from pathlib import Path

from experiments.figure import BLUE, GREEN, ORANGE, drawn
from experiments.gradient_accumulation_runs import (
    MICRO_BATCHES,
    N_NORM,
    NORMS,
    language_model,
    linear_model,
    norms,
    statistics,
)
from experiments.study import Claim, Log, Numbers, Options, Study, main, table

EQUAL = 1e-10  # relative, in fp64
MIN_BIAS = 0.05  # of a mean of means, relative to the gradient
NEAR_LAW = 0.25  # relative


def measure(options: Options, log: Log) -> Numbers:
    """Compute all gradients."""
    sizes = [2, 4, 8, 16, 32]
    return {
        "linear": linear_model(),
        "language_model": language_model(1 if options.quick else 4, log),
        "micro_batch_sizes": sizes,
        "norms": norms(sizes),
        "statistics": statistics(sizes),
    }


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    return [*_mean_claims(numbers["linear"], numbers["language_model"]), *_norm_claims(numbers)]


def _mean_claims(linear: Numbers, model: Numbers) -> list[Claim]:
    bias = model["mean_of_means_error"]
    return [
        Claim(
            f"linear model, MSE: {MICRO_BATCHES} micro-batches, each loss divided by the window's count, give the"
            " gradient of the whole batch",
            linear["divided_error"] <= EQUAL,
            {"relative error": linear["divided_error"]},
        ),
        Claim(
            f"without the division the gradient is {MICRO_BATCHES} times as large",
            linear["not_divided_error"] <= EQUAL,
            {"times": linear["not_divided_times"], "relative error": linear["not_divided_error"]},
        ),
        Claim(
            "language model, Alpaca's lengths: divided by the window's target tokens, micro-batches give the gradient"
            " of the whole batch",
            max(model["micro_batch_error"]) <= EQUAL,
            {"relative error at most": max(model["micro_batch_error"])},
        ),
        Claim(
            f"a mean of the micro-batches' means is off by {100 * MIN_BIAS:g} percent of the gradient or more",
            min(bias) >= MIN_BIAS,
            {"percent at least": 100 * min(bias), "percent at most": 100 * max(bias)},
        ),
    ]


def _norm_claims(numbers: Numbers) -> list[Claim]:
    sizes, by_norm = numbers["micro_batch_sizes"], numbers["norms"]
    batch_norm, (means, variances) = by_norm["BatchNorm"], numbers["statistics"].values()
    by_law = [math.sqrt((N_NORM - size) / ((N_NORM - 1) * size)) for size in sizes]  # drawn without replacement
    other = max(by_norm["LayerNorm"] + by_norm["RMSNorm"])
    return [
        Claim(
            "with BatchNorm micro-batches give another gradient, the more so the smaller they are",
            min(batch_norm) > 1e-3 and batch_norm == sorted(batch_norm, reverse=True),
            {f"percent off by {size}": 100 * error for size, error in zip(sizes, batch_norm, strict=True)},
        ),
        Claim(
            f"for its statistics are others: the mean of a micro-batch of n of {N_NORM} samples is about"
            f" sqrt(({N_NORM} - n) / ({N_NORM - 1} n)) standard deviations from that of all, to {100 * NEAR_LAW:g}"
            " percent of it, and the variance is off too, the more so the smaller n is",
            all(abs(mean / law - 1) <= NEAR_LAW for mean, law in zip(means, by_law, strict=True))
            and variances == sorted(variances, reverse=True)
            and variances[-1] > EQUAL,
            {f"deviations by {size}": mean for size, mean in zip(sizes, means, strict=True)}
            | {f"variance off by {sizes[0]}": variances[0]},
        ),
        Claim("with LayerNorm and RMSNorm they give the same", other <= EQUAL, {"relative error at most": other}),
    ]


def table_of(numbers: Numbers) -> str:
    """The norms' errors by micro-batch size."""
    columns = {f"{name}, relative error": numbers["norms"][name] for name in NORMS}
    columns["BatchNorm's mean, deviations off"] = numbers["statistics"]["mean"]
    columns["its variance, relative"] = numbers["statistics"]["variance"]
    rows = list(zip(numbers["micro_batch_sizes"], *columns.values(), strict=True))
    return table(("samples in a micro-batch", *columns), rows)


def draw(numbers: Numbers, file: Path) -> None:
    """Draw the bias of each window, and the norms' errors against the micro-batch size."""
    model, sizes = numbers["language_model"], numbers["micro_batch_sizes"]
    titles = ("gradient of 8 ragged samples, one by one", "gradient of 64 samples in micro-batches")
    with drawn(file, titles) as (bias, by_size):
        means, exact = ([100 * error for error in model[f"{key}_error"]] for key in ("mean_of_means", "micro_batch"))
        windows = range(1, 1 + len(means))
        bias.bar(windows, means, color=ORANGE, label="mean of means")
        bias.bar(windows, exact, color=BLUE, label=f"token-weighted: {max(exact):.0e}")
        bias.set(xlabel="window", ylabel="percent off that of the whole", xticks=list(windows))
        bias.set_ylim(top=1.3 * max(means))
        bias.legend(frameon=False, loc="upper right")
        for name, color, style in zip(NORMS, (ORANGE, BLUE, GREEN), ("o-", "s-", "^--"), strict=True):
            errors = [100 * error for error in numbers["norms"][name]]
            by_size.plot(sizes, errors, style, color=color, lw=3, ms=9, label=name)
        by_size.set_xscale("log", base=2)
        by_size.set_xticks(list(sizes), [str(size) for size in sizes])
        by_size.set(xlabel="samples in a micro-batch", ylabel="percent off that of the whole")
        by_size.legend(frameon=False)


STUDY = Study("gradient_accumulation", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
