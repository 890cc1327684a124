# mypy: ignore-errors
"""transformers' Trainer, set up like the plain loop. Runs in the environment of transformers and PEFT."""

import logging
import tempfile
import warnings

import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from benchmarks.peers import workload
from benchmarks.peers.others import transformers_loop


class MeteredTrainer(Trainer):
    """A Trainer that keeps the data's order and records its losses."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute Trainer's loss, divided by the targets of the whole window; record it as the sample's mean."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        targets = workload.n_targets(inputs["labels"])
        share = 1 if num_items_in_batch is None else float(num_items_in_batch) / targets
        self.meter.add(float(loss) * share, targets, inputs["input_ids"].numel())
        return loss


class Ends(TrainerCallback):
    """Starts and stops the meter with training."""

    def __init__(self, meter):
        self.meter = meter

    def on_train_begin(self, *_, **__):
        """Start the meter."""
        self.meter.start()

    def on_train_end(self, *_, **__):
        """Stop the meter."""
        self.measured = self.meter.stop()


def measured(args):
    """Train with the loop's optimizer, learning rate and order, writing nothing."""
    row, adamw = args.row, workload.ADAMW
    model, forward = transformers_loop(row)
    model.train()
    # SGD has no state: Trainer creates its own optimizer's in the timed part, as in normal use.
    workload.warm_up(row, forward, torch.optim.SGD(workload.trained(model), lr=0.0))
    ends = Ends(workload.Meter(row.window))
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=1, num_train_epochs=1, use_cpu=True, bf16=row.has("mp"),
            gradient_accumulation_steps=row.window, learning_rate=adamw["lr"], weight_decay=adamw["weight_decay"],
            lr_scheduler_type="constant", max_grad_norm=0.0, optim="adamw_torch_fused", logging_strategy="no",
            save_strategy="no", eval_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
            remove_unused_columns=False,
        )  # fmt: skip
        trainer = MeteredTrainer(
            model,
            settings,
            lambda pairs: {"input_ids": pairs[0][0], "labels": pairs[0][1]},
            workload.samples()[: args.samples],
            callbacks=[ends],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.meter = ends.meter
        trainer.train()
    return ends.measured


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    args = workload.arguments()
    workload.tell(args, measured(args), ["transformers", "peft", "accelerate"])
