"""One run, measured: weights, techniques, the tracked warm-up, the timed training, what is left behind."""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from llama_ft import __version__, techniques
from llama_ft.config import TrainConfig
from llama_ft.data.collate import Batch, Padding, collate, epoch_batches
from llama_ft.data.dataset import Dataset
from llama_ft.device import (
    Stopwatch,
    choose_device,
    device_name,
    has_bf16,
    limit_memory,
    memory_in_use_mib,
    peak_rss_mib,
    use_kernels_of,
)
from llama_ft.launch.interrupts import Interrupts
from llama_ft.measure.hardest import hardest_windows
from llama_ft.measure.memory import MemoryTracker, MemoryUse
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model
from llama_ft.records.metrics import METRICS_FILE
from llama_ft.system import MIB
from llama_ft.techniques.gradient_accumulation import windows
from llama_ft.techniques.mixed_precision import Precision, mixed_precision
from llama_ft.training.loop import EpochWindows, train
from llama_ft.training.metrics import MetricsFile
from llama_ft.training.optimizer import make_optimizer, make_schedule
from llama_ft.training.position import Position
from llama_ft.training.saver import Saver, save_trained
from llama_ft.training.step import TrainStep, Window, evaluate_loss

N_EVAL_SAMPLES = 8  # the fixed set whose loss is compared before and after


class MeasuredRun:
    """A run and what is known of it so far, so that a run that ends early leaves that behind."""

    def __init__(
        self, config: TrainConfig, dataset: Dataset, run_dir: Path, log: Callable[[str], None], interrupts: Interrupts
    ) -> None:
        self.config, self.dataset, self.run_dir, self.log, self.interrupts = config, dataset, run_dir, log, interrupts
        self.stage = "start-up"
        self.result: dict[str, Any] = {}

    def execute(self) -> None:
        """Do all of it, noting results in `self.result` and the stage in `self.stage`.

        Raises:
            UserError: for whatever the user can put right.
        """
        config = self.config
        torch.manual_seed(config.training.seed)
        device = choose_device(config.gpu)
        self.result |= {"device": device_name(device), "versions": versions()}
        precision = make_precision(config, device)
        self.result["compute_dtype"] = str(precision.compute).removeprefix("torch.")
        if config.memory_limit_mib is not None:
            limit_memory(device, config.memory_limit_mib)
        use_kernels_of(config.gpu)
        self.stage = "loading the weights"
        dtype = techniques.base_dtype(config, precision)
        model = load_model(config.model, str(config.checkpoint), device, dtype, config.training.seed, self.log)
        applied = techniques.apply(model, config, precision)
        self._count_parameters(model)
        step = TrainStep(
            model, make_optimizer(model.parameters(), config.training), applied, config.training.max_grad_norm
        )
        self._train(step, applied.accumulation_steps)
        self.stage = "saving"
        if config.training.save:
            save_trained(model, self.run_dir, config.checkpoint)

    def _train(self, step: TrainStep, accumulation_steps: int) -> None:
        config, dataset, device = self.config, self.dataset, step.device
        training, padding = config.training, Padding(step.precision.pad_multiple, config.model.max_seq_len)

        def epoch_windows(epoch: int) -> list[Window]:
            batches = list(epoch_batches(dataset.samples, training.micro_batch_size, epoch, training.seed, padding))
            if device.type == "cuda":
                batches = [batch.pinned() for batch in batches]
            return list(windows(batches, accumulation_steps))

        total_steps = len(epoch_windows(0)) * training.epochs
        schedule = make_schedule(step.optimizer, total_steps, training.warmup_ratio)
        self.stage = "the first optimizer step"
        use = track_memory(
            step, hardest_windows(dataset.samples, training.micro_batch_size, accumulation_steps, padding)
        )
        fixed = [collate([sample], padding) for sample in dataset.samples[:N_EVAL_SAMPLES]]
        watch, file, may_skip = Stopwatch(device), self.run_dir / METRICS_FILE, step.scaler.is_enabled()
        with MetricsFile(file, total_steps, may_skip, lambda: memory_in_use_mib(device)) as metrics:
            self._loop(step, schedule, epoch_windows, metrics, watch, fixed)
        self.result |= memory_result(use, device)
        tokens = sum(len(sample) for sample in dataset.samples) * config.training.epochs
        self.result |= {
            "runtime_s": watch.seconds,
            "samples": len(dataset.samples) * config.training.epochs,
            "tokens": tokens,
            "tokens_per_s": tokens / watch.seconds,
            "loss_first": metrics.losses[0],
            "loss_last": metrics.losses[-1],
            "skipped_steps": metrics.skipped_steps,
            "train_loss_after": evaluate_loss(step, fixed),
        }

    def _loop(
        self,
        step: TrainStep,
        schedule: LRScheduler,
        epoch_windows: EpochWindows,
        metrics: MetricsFile,
        watch: Stopwatch,
        fixed: list[Batch],
    ) -> None:
        """Train, from the start or from a checkpoint, to the end or to an interrupt."""
        training = self.config.training

        def bring_up_to_date(position: Position) -> None:
            metrics.flush()
            position.seconds = watch.seconds

        stop, config_hash = self.interrupts.requested, self.config.hash()
        saver = Saver(self.run_dir, config_hash, step, schedule, training.save_every, stop, bring_up_to_date)
        position = self._restore(saver) or Position(train_loss_before=evaluate_loss(step, fixed))
        self.result["train_loss_before"], watch.seconds = position.train_loss_before, position.seconds
        self.stage = "training"
        if training.saves_when_interrupted:
            self.interrupts.hold()
        try:
            train(step, schedule, epoch_windows, training.epochs, position, metrics, saver, watch.part)
        except KeyboardInterrupt:
            if training.saves_when_interrupted:
                saved = f"saved after optimizer step {position.step}"
                self.stage += f", {saved}: training.resume=true goes on from there"
            raise

    def _restore(self, saver: Saver) -> Position | None:
        """Go on from a checkpoint, if that is wanted and there is one."""
        if not self.config.training.resume:
            return None
        position = saver.restore()
        if position is None:
            self.log(f"nothing to resume in {self.run_dir}: training begins at the first step")
        else:
            self.log(f"resuming after optimizer step {position.step}")
            self.result["resumed_at_step"] = position.step
        return position

    def _count_parameters(self, model: Transformer) -> None:
        total = sum(parameter.numel() for parameter in model.parameters())
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        percent = 100 * trainable / total
        self.result |= {"trainable_params": trainable, "total_params": total, "trainable_percent": percent}
        self.log(f"model: {self.config.model.name}, {trainable:,} of {total:,} parameters trainable ({percent:.3f} %)")


def make_precision(config: TrainConfig, device: torch.device) -> Precision:
    """The dtypes of a run: mixed precision's, or fp32 throughout."""
    if config.optim.mp:
        return mixed_precision(config.mp, device.type, has_bf16(device, config.gpu))
    return Precision(device.type)


def track_memory(step: TrainStep, hardest: list[Window]) -> MemoryUse:
    """Rehearse windows, tracked: the first without optimizer state, then all of them with it."""
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(step.device)
    tensors = [tensor for window in hardest for batch in window for tensor in batch.tensors]
    with MemoryTracker(step.model, step.optimizer, tensors) as tracker:
        for window in [hardest[0], *hardest]:
            step.dry_run(window)
    return tracker.result()


def memory_result(use: MemoryUse, device: torch.device) -> dict[str, Any]:
    """The memory part of `result.json`.

    The peak is the allocator's over rehearsal and run on CUDA, the tracker's over the rehearsal on the CPU.
    """
    peak, reserved = use.peak_mib, None
    at_peak, breakdown = dict(use.at_peak_mib), list(use.breakdown)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / MIB
        reserved = torch.cuda.max_memory_reserved(device) / MIB
        unseen = peak - use.peak_mib
        at_peak["other"] += unseen
        breakdown.append({"category": "other", "dtype": "-", "mb": unseen, "item": "workspaces and rounding"})
    return {
        "peak_memory_mib": peak,
        "peak_memory_reserved_mib": reserved,
        "peak_rss_mib": peak_rss_mib(),
        "memory_mib": at_peak,
        "memory_max_mib": use.max_mib,
        "peak_phase": use.phase,
        "breakdown": breakdown,
    }


def versions() -> dict[str, str | None]:
    """What the numbers depend on."""
    return {
        "llama_ft": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "sentencepiece": version("sentencepiece"),
    }
