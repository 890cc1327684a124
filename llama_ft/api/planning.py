"""Planning: the memory and time of a run on a card."""

from collections.abc import Sequence

from llama_ft.config import FROM_CHECKPOINT, DataConfig, GpuConfig, ModelConfig, PlanConfig, TrainingConfig, UserError
from llama_ft.config.presets import preset
from llama_ft.config.techniques import TECHNIQUES, OptimConfig
from llama_ft.planning.predict import predict as _predict
from llama_ft.records.plan import PlanRow


def predict(
    model: str = "llama2_7b",
    gpu: str = "a100_40gb",
    *,
    techniques: Sequence[str] = (),
    lengths: Sequence[int] = (512,),
    micro_batch_size: int = 1,
    packing: int | None = None,
    epochs: int = 1,
) -> PlanRow:
    """Predict the memory that fine-tuning needs on a card, and its shortest possible time, without the card.

    Args:
        model, gpu: names in `conf/model` and `conf/gpu`.
        techniques: those that are on, such as `("mp", "lora")`, with their default settings.
        lengths: tokens of each sample, 2 or more.
        packing: the most tokens of a packed row.

    Raises:
        UserError: if a name or length is not allowed, or the card cannot run the combination.
    """
    names = {techniques} if isinstance(techniques, str) else set(techniques)
    if model == FROM_CHECKPOINT or gpu in ("all", "auto"):
        raise UserError(f"{model} on {gpu}: name one model and one card")
    if unknown := names - {technique.name for technique in TECHNIQUES}:
        raise UserError(f"technique {min(unknown)} must be one of {', '.join(each.name for each in TECHNIQUES)}")
    config = PlanConfig(
        model=preset("model", model, ModelConfig),
        optim=OptimConfig(**dict.fromkeys(names, True)),
        training=TrainingConfig(micro_batch_size=micro_batch_size, packing=packing, epochs=epochs),
        data=DataConfig("sample"),
        gpu=preset("gpu", gpu, GpuConfig),
    )
    if not lengths or not all(2 <= length <= config.model.max_seq_len for length in lengths):
        raise UserError(f"lengths must be of one or more samples, each of 2 to {config.model.max_seq_len} tokens")
    (row,) = _predict([config], [config.gpu], [(length, 1) for length in lengths])
    if row.error is not None:
        raise UserError(row.error)
    return row
