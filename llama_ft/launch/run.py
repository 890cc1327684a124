"""One measured run: set-up, dry run, timed training, and the files it leaves."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llama_ft import device as devices
from llama_ft.config import TrainConfig
from llama_ft.data.collate import collate
from llama_ft.data.dataset import Dataset
from llama_ft.exporting.sidecar import save_tokenizer
from llama_ft.files import CHAT_TEMPLATE, write_text
from llama_ft.launch.cards import take_card
from llama_ft.launch.interrupts import Interrupts
from llama_ft.launch.timed_loop import TimedLoop
from llama_ft.measure.card import Card
from llama_ft.measure.memory import MemoryUse
from llama_ft.measure.stopwatch import Stopwatch
from llama_ft.measure.worst_case import measure_worst_case, warm_up
from llama_ft.model.four_bit import count_parameters
from llama_ft.parallel.ranks import Ranks, joined
from llama_ft.records.metrics import METRICS_FILE, MetricsFile, steps_of
from llama_ft.records.result import MemoryItem, RankUse, Result
from llama_ft.system import MIB, Log
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.compilation import compile_layers
from llama_ft.training.held_out import best_of
from llama_ft.training.loop import Windows
from llama_ft.training.metrics import check_losses
from llama_ft.training.position import Position
from llama_ft.training.saver import Saver, save_trained
from llama_ft.training.setup import set_up
from llama_ft.training.step import TrainStep, evaluate

N_FIXED_SAMPLES = 8  # training samples whose loss is compared before and after


@dataclass
class MeasuredRun:
    """A run. `result` has what is known of it so far, so that a run that ends early leaves that behind."""

    config: TrainConfig
    dataset: Dataset
    run_dir: Path
    result: Result
    log: Log
    interrupts: Interrupts
    stage: str = "choosing the device"

    def __post_init__(self) -> None:
        """Choose the device, and log it; a UserError if it cannot be used."""
        gpu = self.config.gpu
        if self.config.parallel.is_split:  # the agent holds the cards of all of its ranks
            gpu = replace(gpu, index=None if devices.why_no_gpu() else int(os.environ["LOCAL_RANK"]), shared=True)
        self.held_card = take_card(gpu, self.log)
        self.device = devices.choose_device(gpu)
        self.card = Card(self.device) if self.device.type == "cuda" else None  # before we have anything there ourselves
        devices.use_device(self.device, gpu, self.config.memory_limit_mib)
        self.result.device, self.result.versions = devices.device_name(self.device), devices.versions()
        self.result.card = self.card.facts if self.card else None
        self.result.template, self.result.ends = self.dataset.template, self.dataset.ends
        self.log(devices.about_device(self.device, gpu))

    def execute(self) -> None:
        """Do the whole run, recording results and stage; a KeyboardInterrupt comes once the run is saved, if it is."""
        self.stage = "meeting the other processes"
        with joined(self.config.parallel, self.device) as ranks:
            self._execute(ranks)

    def _execute(self, ranks: Ranks) -> None:
        config, device = self.config, self.device
        torch.manual_seed(config.training.seed)
        precision = Precision.of(config, device.type, devices.has_bf16(device, config.gpu))
        self.result.compute_dtype = str(precision.compute).removeprefix("torch.")
        if self.card:
            self.card.note_kernels(config.model, precision.compute)
        self.stage = "loading the weights"
        step = set_up(config, precision, device, self.log, ranks)
        if not ranks.is_first:  # each draws its own dropout
            torch.manual_seed(config.training.seed + 1_000_003 * ranks.rank)
        trainable, total = count_parameters(step.model)
        self.result.total_params, self.result.trainable_params = total, trainable
        self.result.trainable_percent = percent = 100 * trainable / total
        self.log(f"model: {config.model.name}, {trainable:,} of {total:,} parameters trainable ({percent:.3f} %)")
        data, steps = self.dataset, config.accumulation_steps
        self._train(step, Windows.over(data.samples, step, config.training, steps, data.held_out))
        self.stage = "saving"
        if config.training.save:
            save_trained(step.model, self.run_dir, config.checkpoint, ranks)
        if config.training.save and ranks.is_first:
            if not config.optim.lora:
                save_tokenizer(config, self.run_dir, self.log)
            if self.dataset.template_file is not None:
                write_text(self.run_dir / CHAT_TEMPLATE, self.dataset.template_file)

    def _train(self, step: TrainStep, data: Windows) -> None:
        """Dry-run, train and evaluate; record memory, time and losses. Then the model has the weights to save."""
        training, samples = self.config.training, self.dataset.samples
        self.stage = "the first optimizer step"
        use = measure_worst_case(step, data, self.log)
        if training.compile:
            self.log("compiling the layers ...")
            compile_layers(step.model, is_packed=data.packing is not None)
        if training.compile or step.device.type == "cuda":
            warm_up(step, data)
        fixed = [collate([sample], data.padding) for sample in samples[:N_FIXED_SAMPLES]]
        saver = Saver(self.run_dir, self.config.hash(), step, self.config.run_hash)
        self.interrupts.held = training.saves_when_interrupted  # from here on an interrupt lets the optimizer step end
        position = self._restore(saver) or Position(train_loss_before=evaluate(step, fixed)[0])
        self.result.train_loss_before = position.train_loss_before
        watch = Stopwatch(step.device, self.card.nvml.joules if self.card else lambda: None)
        with MetricsFile(self.run_dir / METRICS_FILE, writes=step.ranks.is_first) as file:
            loop = TimedLoop(training, step, data, file, watch, saver, self.interrupts, self.log, position)
            self.stage = "training"
            try:
                loop.run()
            except KeyboardInterrupt:
                if loop.saved == position.step > 0:
                    resume = "training.resume=true continues it"
                    self.stage += f", saved after optimizer step {position.step}: {resume}"
                raise
        self._note_memory(use, step)
        if self.card:
            self.card.note_end(watch.mean_power_w)
        self._note_training(loop)
        self._note_held_out(loop)
        if training.keep_best and (kept := best_of(loop.held_out).step) != position.step:
            saver.read_trained(saver.best_folder(kept))
        after, _ = evaluate(step, fixed)
        if self.result.train_loss_before is not None:
            check_losses(self.result.train_loss_before, after, step.model.config.vocab_size)
        self.result.train_loss_after, self.result.loss_samples = after, len(fixed)

    def _restore(self, saver: Saver) -> Position | None:
        position = saver.restore() if self.config.training.resume else None
        if position is not None:
            self.log(f"resuming after optimizer step {position.step}")
            self.result.resumed_at_step = position.step
        elif self.config.training.resume:
            self.log(f"nothing to resume in {self.run_dir}: training begins at the first step")
        return position

    def _note_training(self, loop: TimedLoop) -> None:
        result, steps, data = self.result, steps_of(loop.file.lines), loop.data
        n_epochs, n_windows = divmod(loop.position.step, data.steps_per_epoch)
        n_last = min(n_windows * data.window_size, len(data.samples))
        result.runtime_s, result.samples = loop.watch.seconds, n_epochs * len(data.samples) + n_last
        result.tokens = steps[-1].tokens
        result.tokens_per_s = result.tokens / result.runtime_s
        powers = loop.step.ranks.gathered(loop.watch.mean_power_w)  # of all GPUs, as the tokens are
        result.joules_per_token = None if None in powers else sum(powers) / result.tokens_per_s
        result.loss_first, result.loss_last = steps[0].loss, steps[-1].loss
        result.skipped_steps = sum(metrics.grad_norm is None for metrics in steps)

    def _note_held_out(self, loop: TimedLoop) -> None:
        result, losses = self.result, loop.held_out
        if not losses:
            return
        best, last = best_of(losses), losses[-1]
        left = best if self.config.training.keep_best else last
        result.eval_samples, result.eval_loss_before = len(loop.data.held_out), losses[0].eval_loss
        result.eval_loss, result.eval_perplexity = left.eval_loss, left.eval_perplexity
        result.eval_token_accuracy = left.eval_token_accuracy
        result.best_eval_loss, result.best_eval_step = best.eval_loss, best.step
        result.last_eval_loss, result.last_eval_step = last.eval_loss, last.step
        result.eval_runtime_s = sum(each.eval_time_s for each in losses)
        if loop.position.step < loop.total_steps:
            result.stopped_early_at_step, n_since = loop.position.step, len(losses) - 1 - losses.index(best)
            lowest = f"the lowest held-out loss was {best.eval_loss:.4f} after step {best.step}"
            when = f"after optimizer step {loop.position.step} of {loop.total_steps}"
            self.log(f"stopped early, {when}: {lowest}, and none of the {n_since} since was lower")

    def _note_memory(self, use: MemoryUse, step: TrainStep) -> None:
        """On CUDA the peak is the allocator's over dry run and training, on the CPU the tracker's over the dry run."""
        own = RankUse(
            use.peak_mib, devices.peak_rss_mib(), use.phase, dict(use.at_peak_mib), use.max_mib, list(use.breakdown)
        )
        if step.device.type == "cuda":
            own.peak_memory_mib = torch.cuda.max_memory_allocated(step.device) / MIB
            own.peak_memory_reserved_mib = torch.cuda.max_memory_reserved(step.device) / MIB
            unseen = max(0.0, own.peak_memory_mib - use.peak_mib)  # compiled layers may need less than was tracked
            own.memory_mib["other"] += unseen
            own.breakdown.append(MemoryItem("other", "-", unseen, "workspaces and rounding"))
        ranks = step.ranks.gathered(own)
        largest = max(ranks, key=lambda each: each.peak_memory_mib)
        vars(self.result).update(vars(largest))
        if not step.ranks.is_alone:
            self.result.ranks = ranks
