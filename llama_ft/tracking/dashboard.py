"""A sweep's dashboard in W&B, made by code. wandb-workspaces, an extra, is imported here only."""

import wandb
from wandb_workspaces import expr
from wandb_workspaces.reports.v2 import interface as panels
from wandb_workspaces.workspaces import RunsetSettings, Section, Workspace

from llama_ft.config import TrackerConfig, UserError
from llama_ft.tracking.base import in_time, reason

SECONDS_TO_SAVE = 60
CURVES = {  # title to what is drawn over the optimizer steps
    "Training loss": "loss",
    "Held-out loss": "eval_loss",
    "Held-out token accuracy": "eval_token_accuracy",
    "Learning rate": "lr",
    "Gradient norm": "grad_norm",
    "Tokens/s": "tokens_per_s",
    "Memory after each step, MiB": "memory_mib",
}
BARS = {"Peak memory, MiB": "peak_memory_mib", "Runtime, s": "runtime_s", "Tokens/s": "tokens_per_s"}
COLUMNS = ("peak_memory_mib", "runtime_s", "tokens_per_s", "trainable_percent", "train_loss_after", "status")


def dashboard(entity: str, project: str, group: str) -> Workspace:
    """The view of one sweep, the runs of W&B's `group`: bars and the trade-off, curves, and the table."""
    comparison: list[panels.PanelTypes] = [
        *(panels.BarPlot(title=title, metrics=[panels.SummaryMetric(key)]) for title, key in BARS.items()),
        panels.ScatterPlot(
            title="Runtime against peak memory",
            x=panels.SummaryMetric("runtime_s"),
            y=panels.SummaryMetric("peak_memory_mib"),
        ),
    ]
    curves = [panels.LinePlot(title=title, x="Step", y=[key]) for title, key in CURVES.items()]
    pictures = panels.MediaBrowser(title="Pictures", media_keys=["pictures/table2", "pictures/losses"])
    return Workspace(
        entity=entity,
        project=project,
        name=f"llama_ft {group}",
        sections=[
            Section(name="Combinations", panels=comparison, is_open=True),
            Section(name="Training", panels=list(curves), is_open=True),
            Section(name="Table", panels=[pictures], is_open=True),
        ],
        runset_settings=RunsetSettings(
            filters=expr.And(expr.Metric("Group") == group),
            order=[expr.Ordering(expr.Metric("Name"), ascending=True)],
            pinned_columns=[f"summary:{key}" for key in COLUMNS],
        ),
    )


def save_dashboard(config: TrackerConfig, sweep: str) -> str:
    """Save the view of a sweep into the tracker's project, and return its address.

    The runs are those that `upload_runs` sends: keys not given come from the environment or W&B's settings. A UserError
    if W&B does not take it.
    """
    saved: list[str] = []

    def save() -> None:
        settings = wandb.setup().settings
        if (entity := config.entity or settings.entity or wandb.Api().default_entity) is None:
            raise ValueError("the API key has no default entity: tracker.entity=NAME gives one")
        group = config.group or settings.run_group or sweep
        view = dashboard(entity, config.project or settings.project or "llama_ft", group)
        view.save()  # type: ignore[no-untyped-call]
        saved.append(view.url)

    try:
        in_time(SECONDS_TO_SAVE, save)
    except Exception as error:
        raise UserError(f"tracker.dashboard=true: W&B has not saved it ({reason(error)})") from error
    return saved[0]
