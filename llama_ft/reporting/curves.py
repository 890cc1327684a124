"""A run's curves over its optimizer steps, as a small SVG picture."""

import io
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

from llama_ft.measure.result import METRICS_FILE

CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens/s",
    "memory_mb": "memory, MB",
}
MOST_POINTS = 500  # of a curve; more cannot be told apart
COLOUR = "#0072B2"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last one that was cut short is left out."""
    file = run_dir / METRICS_FILE
    lines = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def curves_svg(metrics: list[dict[str, Any]]) -> str:
    """A panel for each curve."""
    every = -(-len(metrics) // MOST_POINTS)
    shown = metrics[::every]
    figure = Figure(figsize=(11, 1.9), layout="constrained")
    panels = figure.subplots(1, len(CURVES))
    for axes, (key, title) in zip(panels, CURVES.items(), strict=True):
        points = [(line["step"], line[key]) for line in shown if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=COLOUR, linewidth=1.2, marker="." if len(points) == 1 else "")
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.margins(y=0.1)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("optimizer step", fontsize=8)
    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llama_ft"}):
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    return out.getvalue()[out.getvalue().index("<svg") :]
