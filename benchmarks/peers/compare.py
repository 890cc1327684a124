"""Summarizes runs: medians with their spread, ratios if the sides did the same work, shares of the limit."""

from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any

from benchmarks.peers.limit import Length, limit
from benchmarks.peers.workload import OURS, Row
from experiments.study import table

Run = dict[str, Any]  # a run's line
MACHINE = "machine"
MAX_OTHERS = 0.08  # processors that others may use during a run: on two, a busy one slows OpenMP's loops many times
LABELS = {
    "transformers_loop": "transformers + PEFT, loop",
    "transformers_trainer": "transformers Trainer + PEFT",
    "litgpt": "LitGPT",
    "torchtune": "torchtune",
    OURS: "llama_ft",
}
TOLERANCES = {"fp32": 1e-5, "16 bit": 2e-3}  # relative, of the first loss
NOTES = """\
- tokens/s and peak RSS: median of the repeats (smallest–largest). Each run is a fresh process; the sides take turns.
- Ratios: ours to the fastest peer, and to the peer with the smallest RSS. There are none where the first losses, of the
  samples of the first update, differ by more than 1e-5 of the loss (16 bit: 2e-3).
- Alike for all: weights, samples and their order, fused AdamW at a constant rate, 16-bit format, threads, and the
  environment of our runs (`llama_ft/launch/process.py`: pages kept, less spinning), which peers would not have by
  themselves.
- Time is that of training alone, peak RSS that of the whole process; making weights and a warm-up of four samples, each
  with an optimizer step at rate 0, come before. Trainer makes its optimizer's state in the timed part.
- Ours clips gradients to norm 1; the others do not. With GA, ours and Trainer divide by the window's target tokens; the
  others take the mean of the samples' means.
- MP: the peers' is autocast over fp32 weights; ours stores frozen weights in 16 bit.
- …_packed: ours lays the samples of a window end to end in one pass; the peers' figures are those of the row without.
- The limit: of each pass the matrix products over the machine's rate at their shapes, or the bytes of weights read
  twice and gradients written over its bandwidth, whichever takes longer; then AdamW's 28 bytes a trained parameter over
  the bandwidth. Both rates are measured, the best of the repeats counts. Activations' traffic is left out. Under MP the
  rate is that of the faster format.
"""


def summary(row: Row, runs: Sequence[Run], samples: Sequence[Length]) -> dict[str, Any]:
    """A row's numbers, in JSON's types."""
    sides = {}
    for side in LABELS:
        if own := [run for run in runs if (run["side"], run["row"]) == (side, row.of_side(side))]:
            keys = ("tokens_per_s", "peak_rss_mib", "first_loss", "last_loss", "others_cpu")
            sides[side] = {key: [run[key] for run in own] for key in keys}
    found: dict[str, Any] = {"row": row, "sides": sides, "refused": disagreement(row, sides)}
    peers = [each for side, each in sides.items() if side != OURS]
    if peers and OURS in sides and found["refused"] is None:
        speed, rss = median(sides[OURS]["tokens_per_s"]), median(sides[OURS]["peak_rss_mib"])
        found["to_fastest_peer"] = speed / max(median(each["tokens_per_s"]) for each in peers)
        found["to_smallest_peer"] = rss / min(median(each["peak_rss_mib"]) for each in peers)
    if machine := [run for run in runs if run["side"] == MACHINE]:
        rates = {key: max(run["gflop_s"][key] for run in machine) for key in machine[0]["gflop_s"]}
        found["limit"] = limit(row, samples, rates, max(run["bandwidth_gb_s"] for run in machine))
        for each in sides.values():
            each["share_of_limit"] = median(each["tokens_per_s"]) / found["limit"]["tokens_per_s"]
    return found


def disagreement(row: Row, sides: dict[str, dict[str, list[float]]]) -> str | None:
    """Explain why the sides cannot be compared: they did not begin with the same loss. None if they did."""
    losses = [loss for side in sides.values() for loss in side["first_loss"]]
    tolerance = TOLERANCES["16 bit" if row.has("mp") else "fp32"]
    if all(abs(one - other) <= tolerance * abs(one) for one, other in product(losses, losses)):  # NaN equals nothing
        return None
    return "first losses differ: " + ", ".join(
        f"{LABELS[side]} {median(numbers['first_loss']):.6g}" for side, numbers in sides.items()
    )


def markdown(summaries: Sequence[dict[str, Any]]) -> str:
    """A table with three lines per row, and notes."""
    shown = [side for side in LABELS if any(side in each["sides"] for each in summaries)]
    lines = []
    for each in summaries:
        sides = [each["sides"].get(side) for side in shown]
        bound, refused = each.get("limit"), each["refused"]
        speed, rss = (
            [spread(side[key]) if side else "–" for side in sides] for key in ("tokens_per_s", "peak_rss_mib")
        )
        ratios = [f"{each[key]:.2f}" if key in each else "–" for key in ("to_fastest_peer", "to_smallest_peer")]
        name, most = each["row"], f"{bound['tokens_per_s']:,.0f}" if bound else "–"
        lines.append([name, "tokens/s", *speed, f"not compared: {refused}" if refused else ratios[0], most])
        lines.append(["", "peak RSS, MiB", *rss, ratios[1], ""])
        if bound:
            shares = [f"{side['share_of_limit']:.0%}" if side else "–" for side in sides]
            lines.append(["", "of the limit", *shares, "", ""])
    titles = ["row", "", *(LABELS[side] for side in shown), "ours to the best peer", "limit, tokens/s"]
    others = [others for each in summaries for side in each["sides"].values() for others in side["others_cpu"]]
    if n_disturbed := sum(each > MAX_OTHERS for each in others):
        warning = f"beside {n_disturbed} of {len(others)} runs, others used more than {MAX_OTHERS} processors"
        return f"{table(titles, lines)}\n- NOT TO BE QUOTED: {warning}.\n{NOTES}"
    return f"{table(titles, lines)}\n{NOTES}"


def spread(values: Sequence[float]) -> str:
    """`median (smallest–largest)`."""
    middle, low, high = (f"{value:,.0f}" for value in (median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"
