"""One run, measured: set-up, the dry run, the timed training, what is left behind."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llama_ft.config import TrainConfig
from llama_ft.data.collate import Batch, collate
from llama_ft.data.dataset import Dataset
from llama_ft.device import about_device, choose_device, device_name, has_bf16, peak_rss_mib, use_device, versions
from llama_ft.exporting.sidecar import save_tokenizer
from llama_ft.files import CHAT_TEMPLATE, write_text
from llama_ft.launch.interrupts import Interrupts
from llama_ft.measure.card import Card
from llama_ft.measure.memory import MemoryUse
from llama_ft.measure.stopwatch import Stopwatch
from llama_ft.measure.worst_case import measure_worst_case, warm_up
from llama_ft.records.metrics import METRICS_FILE, MetricsFile
from llama_ft.records.result import MemoryItem, Result
from llama_ft.system import MIB
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.compilation import compile_layers
from llama_ft.training.loop import Windows, train
from llama_ft.training.metrics import StepMeter, check_losses
from llama_ft.training.position import Position
from llama_ft.training.saver import Saver, save_trained
from llama_ft.training.setup import make_schedule, set_up
from llama_ft.training.step import TrainStep, evaluate_loss

N_FIXED_SAMPLES = 8  # the training samples whose loss is compared before and after


@dataclass
class MeasuredRun:
    """A run. What is known of it so far is in `result`, so that a run that ends early leaves that behind."""

    config: TrainConfig
    dataset: Dataset
    run_dir: Path
    result: Result
    log: Callable[[str], None]
    interrupts: Interrupts
    stage: str = "choosing the device"

    def __post_init__(self) -> None:
        """Choose the device, and say which it is; a UserError if it cannot be had."""
        gpu = self.config.gpu
        self.device = choose_device(gpu)
        self.card = Card(self.device) if self.device.type == "cuda" else None  # while we have nothing there ourselves
        use_device(self.device, gpu, self.config.memory_limit_mib)
        self.result.device, self.result.versions = device_name(self.device), versions()
        self.result.card = self.card.facts if self.card else None
        self.result.template, self.result.ends = self.dataset.template, self.dataset.ends
        self.log(about_device(self.device, gpu))

    def execute(self) -> None:
        """Do all of it, noting results in `self.result` and the stage in `self.stage`.

        Raises:
            UserError: for whatever the user can put right.
            KeyboardInterrupt: once the run is saved, if it was to be saved.
        """
        config, device = self.config, self.device
        torch.manual_seed(config.training.seed)
        precision = Precision.of(config, device.type, has_bf16(device, config.gpu))
        self.result.compute_dtype = str(precision.compute).removeprefix("torch.")
        if self.card:
            self.card.note_kernels(config.model, precision.compute)
        self.stage = "loading the weights"
        step = set_up(config, precision, device, self.log)
        total = sum(each.numel() for each in step.model.parameters())
        trainable = sum(each.numel() for each in step.model.parameters() if each.requires_grad)
        self.result.total_params, self.result.trainable_params = total, trainable
        self.result.trainable_percent = percent = 100 * trainable / total
        self.log(f"model: {config.model.name}, {trainable:,} of {total:,} parameters trainable ({percent:.3f} %)")
        samples, training = self.dataset.samples, config.training
        size, steps = training.micro_batch_size, config.accumulation_steps
        self._train(step, Windows.over(samples, step, size, steps, training.seed, training.packing))
        self.stage = "saving"
        if config.training.save:
            save_trained(step.model, self.run_dir, config.checkpoint)
            if not config.optim.lora:
                save_tokenizer(config, self.run_dir, self.log)
            if self.dataset.template_file is not None:
                write_text(self.run_dir / CHAT_TEMPLATE, self.dataset.template_file)

    def _train(self, step: TrainStep, data: Windows) -> None:
        """Dry-run, train and evaluate; note memory, time and losses."""
        training, samples = self.config.training, self.dataset.samples
        self.stage = "the first optimizer step"
        use = measure_worst_case(step, data, self.log)
        if training.compile:
            self.log("compiling the layers ...")
            compile_layers(step.model, is_packed=data.packing is not None)
        if training.compile or step.device.type == "cuda":
            warm_up(step, data)
        fixed = [collate([sample], data.padding) for sample in samples[:N_FIXED_SAMPLES]]
        with MetricsFile(self.run_dir / METRICS_FILE) as file:
            watch = self._loop(step, data, file, fixed)
            steps, seconds = file.steps, watch.seconds
        self._note_memory(use, step.device)
        if self.card:
            self.card.note_end(watch.mean_power_w)
        result, tokens = self.result, sum(len(sample) for sample in samples) * training.epochs
        result.runtime_s, result.samples, result.tokens = seconds, len(samples) * training.epochs, tokens
        result.tokens_per_s = tokens / seconds
        result.joules_per_token = watch.mean_power_w and watch.mean_power_w / result.tokens_per_s
        result.loss_first, result.loss_last = steps[0].loss, steps[-1].loss
        result.skipped_steps = sum(metrics.grad_norm is None for metrics in steps)
        after = evaluate_loss(step, fixed)
        if result.train_loss_before is not None:
            check_losses(result.train_loss_before, after, step.model.config.vocab_size)
        result.train_loss_after, result.loss_samples = after, len(fixed)

    def _loop(self, step: TrainStep, data: Windows, file: MetricsFile, fixed: list[Batch]) -> Stopwatch:
        """Train, from the start or from a checkpoint, to the end or to an interrupt; returns the time it took."""
        training = self.config.training
        watch = Stopwatch(step.device, self.card.nvml.joules if self.card else lambda: None)
        self.interrupts.held = training.saves_when_interrupted  # from here on the optimizer step ends first
        total_steps = data.steps_per_epoch * training.epochs
        saver = Saver(self.run_dir, self.config.hash(), step)
        position = self._restore(saver) or Position(train_loss_before=evaluate_loss(step, fixed))
        position.epoch, position.window = divmod(position.step, data.steps_per_epoch)
        warmup, kind = training.warmup_ratio, training.schedule
        schedule = make_schedule(step.optimizer, total_steps, warmup, position.step, kind)
        self.result.train_loss_before, watch.seconds = position.train_loss_before, position.seconds
        self.stage = "training"
        last = file.steps[-1] if file.steps else None
        meter = StepMeter(total_steps, step.device, step.scaler.is_enabled(), last)
        watch.start()
        for output in train(step, schedule, data, training.epochs, position):
            file.write(meter.record(output))
            stop, every = self.interrupts.requested, training.save_every
            if stop or (every is not None and position.step % every == 0):
                watch.stop()
                file.write(meter.flush())
                file.sync()
                position.seconds = watch.seconds
                saver.save(position)
                if stop:
                    resume = "training.resume=true goes on from there"
                    self.stage += f", saved after optimizer step {position.step}: {resume}"
                    raise KeyboardInterrupt
                watch.start()
                meter.restart_clock()
        watch.stop()
        file.write(meter.flush())
        return watch

    def _restore(self, saver: Saver) -> Position | None:
        """Go on from a checkpoint, if that is wanted and there is one."""
        position = saver.restore() if self.config.training.resume else None
        if position is not None:
            self.log(f"resuming after optimizer step {position.step}")
            self.result.resumed_at_step = position.step
        elif self.config.training.resume:
            self.log(f"nothing to resume in {self.run_dir}: training begins at the first step")
        return position

    def _note_memory(self, use: MemoryUse, device: torch.device) -> None:
        """The peak is the allocator's over dry run and training on CUDA, the tracker's over the dry run on the CPU."""
        result = self.result
        result.peak_memory_mib, result.peak_phase, result.peak_rss_mib = use.peak_mib, use.phase, peak_rss_mib()
        result.memory_mib, result.memory_max_mib = dict(use.at_peak_mib), use.max_mib
        result.breakdown = list(use.breakdown)
        if device.type == "cuda":
            result.peak_memory_mib = torch.cuda.max_memory_allocated(device) / MIB
            result.peak_memory_reserved_mib = torch.cuda.max_memory_reserved(device) / MIB
            unseen = max(0.0, result.peak_memory_mib - use.peak_mib)  # compiled layers may need less than was tracked
            result.memory_mib["other"] += unseen
            result.breakdown.append(MemoryItem("other", "-", unseen, "workspaces and rounding"))
