"""Keys of `train`: the training loop, its optimizer, and the order and objective of a sweep."""

import enum
import math
from dataclasses import dataclass

from llama_ft.config.checks import UserError, check, check_settings, setting

SEED = "training.seed"  # the key in which repeats differ
# Decay of the learning rate after warm-up: half a cosine to 0, linear to 0, or none.
Schedule = enum.Enum("Schedule", ["cosine", "linear", "constant"])
Optimizer = enum.Enum("Optimizer", ["adamw", "sgd", "adamw_8bit", "paged_adamw_8bit"])
# Order of a sweep's repeats: those of a combination together, or in turns with the other combinations.
Order = enum.Enum("Order", ["grouped", "alternate"])
OBJECTIVES = ("eval_loss", "peak_memory_mib", "runtime_s")  # of a sweep: fields of a result


@dataclass
class TrainingConfig:
    """The training loop and its optimizer."""

    lr: float = setting(1e-5, "peak learning rate, after warm-up; training.schedule sets its decay")
    epochs: int = setting(1, "passes over the data", at_least=1)
    micro_batch_size: int = setting(
        1, "samples in a micro-batch; with packing, only the size of an update depends on it", at_least=1
    )
    packing: int | None = setting(
        None, "pack the samples of an update into rows of up to n tokens; null: off", at_least=1
    )
    compile: bool = setting(False, "compile the model's layers with torch.compile; memory is tracked without it")
    max_samples: int | None = setting(
        None, "read only the first n samples, from which held-out ones are drawn too; null is all", at_least=1
    )
    warmup_ratio: float = setting(0.03, "share of the optimizer steps used for warm-up")
    weight_decay: float = setting(0.0, "AdamW: decoupled weight decay; SGD: an L2 penalty")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm; inf never clips")
    seed: int = setting(0, "seeds the order of the data, held-out draws, dropout and random weights")
    save: bool = setting(True, "save the adapter, or without LoRA all weights, in the run's folder")
    save_every: int | None = setting(None, "optimizer steps between checkpoints; null: save only at Ctrl-C", at_least=1)
    resume: bool = setting(False, "continue from the newest checkpoint in the run's folder, also for more epochs")
    schedule: Schedule = setting(Schedule.cosine, "decay of the learning rate after warm-up")
    optimizer: Optimizer = setting(
        Optimizer.adamw,
        "the optimizer; sgd needs a far larger training.lr; 8bit stores moments in 8 bits, and paged lets the driver"
        " move them to host memory",
    )
    optimizer_in_backward: bool = setting(
        False, "in full fine-tuning, update each weight as soon as its gradient is computed, then free the gradient"
    )
    momentum: float = setting(
        0.9, "SGD: momentum, without dampening; 0 keeps no optimizer state", needs="training.optimizer=sgd"
    )
    eval_every: int | None = setting(
        None, "optimizer steps between held-out losses; null: once per epoch", at_least=1, needs="data.validation"
    )
    keep_best: bool = setting(False, "save the weights with the lowest held-out loss; needs data.validation")
    patience: int | None = setting(
        None, "stop after this many held-out losses in a row without improvement; null: never", at_least=1
    )

    def __post_init__(self) -> None:
        check_settings(self, "training.")
        check(0 < self.lr < math.inf, "training.lr", self.lr, "positive and finite")
        check(0 <= self.warmup_ratio <= 1, "training.warmup_ratio", self.warmup_ratio, "between 0 and 1")
        check(0 <= self.weight_decay < math.inf, "training.weight_decay", self.weight_decay, "0 or more, and finite")
        check(self.max_grad_norm > 0, "training.max_grad_norm", self.max_grad_norm, "positive (inf never clips)")
        check(0 <= self.seed < 2**63, "training.seed", self.seed, "at least 0 and below 2**63")
        check(0 <= self.momentum < 1, "training.momentum", self.momentum, "at least 0 and below 1")
        if self.optimizer_in_backward:
            clips = f"training.max_grad_norm={self.max_grad_norm:g} needs them all at once: give inf"
            self._refuse_in_backward({clips: self.max_grad_norm < math.inf})

    @property
    def saves_when_interrupted(self) -> bool:
        """True if Ctrl-C finishes the optimizer step and saves it, instead of stopping at once."""
        return self.save or self.save_every is not None

    def check_on(self, device_type: str, accumulation_steps: int, in_fp16: bool) -> None:
        """Raise a UserError if the optimizer does not work with the device, several micro-batches or loss scaling."""
        if self.optimizer is Optimizer.paged_adamw_8bit and device_type != "cuda":
            needs = "needs a CUDA GPU, whose driver moves its state to the host: on the CPU use"
            raise UserError(f"training.optimizer=paged_adamw_8bit {needs} training.optimizer=adamw_8bit")
        if self.optimizer_in_backward:
            several = self.packing is not None and self.micro_batch_size > 1
            rows = f"training.packing={self.packing} can put {self.micro_batch_size} samples into several micro-batches"
            self._refuse_in_backward(
                {
                    f"an update has {accumulation_steps} micro-batches: leave optim.ga out": accumulation_steps > 1,
                    f"{rows}: give training.micro_batch_size=1": several,
                    "in fp16 an overflow skips the whole update: use bf16, or leave optim.mp out": in_fp16,
                }
            )

    def _refuse_in_backward(self, reasons: dict[str, bool]) -> None:
        for why in (why for why, holds in reasons.items() if holds):
            raise UserError(f"training.optimizer_in_backward=true frees each gradient once used, and {why}")

    def check_for(self, validation: str | None) -> None:
        """Raise a UserError if a key needs a held-out loss or saved weights, and the run has none."""
        if self.keep_best and not self.save:
            raise UserError("training.keep_best=true saves weights, and training.save=false none: leave one out")
        for key, given in (("keep_best=true", self.keep_best), (f"patience={self.patience}", self.patience)):
            if given and validation is None:
                advice = "give data.validation, a file, a share such as 0.1 or a number of records"
                raise UserError(f"training.{key} needs a held-out loss, and nothing is held out: {advice}")


@dataclass
class SweepConfig:
    """The order and objective of a sweep."""

    order: Order = setting(
        Order.grouped, "of repeats such as training.seed=0,1,2: one combination after the other, or seed by seed"
    )
    objective: list[str] = setting(
        [],
        f"what to minimize, for the best run and with Optuna: {', '.join(OBJECTIVES)}, or several; [] is eval_loss, or"
        " without held-out records train_loss_after",
    )

    def __post_init__(self) -> None:
        known = set(self.objective) <= set(OBJECTIVES) and len(set(self.objective)) == len(self.objective)
        check(known, "sweep.objective", ",".join(self.objective), f"one of {', '.join(OBJECTIVES)}, or a list of them")

    def check_for(self, validation: str | None) -> None:
        """Raise a UserError if the objective is a held-out loss and no records are held out."""
        if "eval_loss" in self.objective and validation is None:
            raise UserError("sweep.objective=eval_loss needs held-out records: give data.validation too")
