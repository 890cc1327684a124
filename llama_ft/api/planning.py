"""Planning: what a run would need on a card."""

from collections.abc import Sequence

from llama_ft.config import (
    TECHNIQUES,
    DataConfig,
    GpuConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    TrainingConfig,
    UserError,
)
from llama_ft.config.presets import preset
from llama_ft.planning.predict import predict as _predict
from llama_ft.records.plan import PlanRow


def predict(
    model: str = "llama2_7b",
    gpu: str = "a100_40gb",
    *,
    techniques: Sequence[str] = (),
    lengths: Sequence[int] = (512,),
    micro_batch_size: int = 1,
    epochs: int = 1,
) -> PlanRow:
    """What fine-tuning would need on a card that need not be here, and how long it would take at best.

    Args:
        model: a name of `conf/model`.
        gpu: a name of `conf/gpu`.
        techniques: those that are on, such as `("mp", "lora")`, with their defaults.
        lengths: tokens of each sample.

    Raises:
        UserError: if a name is unknown, or the card cannot run such a combination.
    """
    if unknown := set(techniques) - {technique.name for technique in TECHNIQUES}:
        names = ", ".join(technique.name for technique in TECHNIQUES)
        raise UserError(f"{min(unknown)} is no technique: there are {names}")
    config = PlanConfig(
        model=preset("model", model, ModelConfig),
        optim=OptimConfig(**dict.fromkeys(techniques, True)),
        training=TrainingConfig(micro_batch_size=micro_batch_size, epochs=epochs),
        data=DataConfig("sample"),
        gpu=preset("gpu", gpu, GpuConfig),
    )
    row = _predict(config, [config.optim], [config.gpu], [(length, 1) for length in lengths])[0]
    if row.error is not None:
        raise UserError(row.error)
    return row
