"""The timed training of a run, and the untimed work between its optimizer steps: held-out losses, checkpoints."""

from collections.abc import Callable
from dataclasses import dataclass, field

from llama_ft.config import TrainingConfig, UserError
from llama_ft.config.checks import Diverged
from llama_ft.launch.interrupts import Interrupts
from llama_ft.measure.stopwatch import Stopwatch
from llama_ft.records.metrics import EvalMetrics, MetricsFile, evaluations_of, steps_of
from llama_ft.system import Log
from llama_ft.training.held_out import best_of, is_due, is_time_to_stop, measure_held_out
from llama_ft.training.loop import Windows, train
from llama_ft.training.metrics import StepMeter
from llama_ft.training.position import Position
from llama_ft.training.saver import Saver
from llama_ft.training.setup import make_schedule
from llama_ft.training.step import TrainStep


@dataclass
class TimedLoop:
    """Trains from a position to the end of the last epoch, or of `training.patience`."""

    config: TrainingConfig
    step: TrainStep
    data: Windows
    file: MetricsFile
    watch: Stopwatch
    saver: Saver
    interrupts: Interrupts
    log: Log
    position: Position
    saved: int = field(init=False)  # the optimizer step of the newest checkpoint
    held_out: list[EvalMetrics] = field(init=False)  # the held-out losses so far

    def __post_init__(self) -> None:
        """Continue from the position."""
        position, data = self.position, self.data
        self.saved, self.total_steps = position.step, data.steps_per_epoch * self.config.epochs
        if position.step > self.total_steps:
            done = f"{position.step} optimizer steps have been trained, and training.epochs={self.config.epochs} has"
            raise UserError(f"{done} {self.total_steps}: give as many epochs as before, or more")
        self.held_out = evaluations_of(self.file.lines)
        position.epoch, position.window = divmod(position.step, data.steps_per_epoch)
        self.watch.seconds = position.seconds
        self.schedule = make_schedule(self.step.optimizer, self.total_steps, self.config, position.step)
        last = next(iter(steps_of(self.file.lines)[-1:]), None)
        self._meter = StepMeter(self.total_steps, self.step.device, self.step.scaler.is_enabled(), last)
        if last is not None and last.total_steps != self.total_steps:
            lr, kind = self.schedule.get_last_lr()[0], self.config.schedule.name
            longer = f"training longer: {self.total_steps} optimizer steps instead of {last.total_steps}"
            rate = f"the learning rate continues at {lr:.2e}, after {last.lr:.2e}"
            self.log(f"{longer}. The {kind} schedule now covers all of them: {rate}")

    def run(self) -> None:
        """Train; a UserError if a loss is not finite, or a checkpoint cannot be written."""
        outputs = train(self.step, self.schedule, self.data, self.config.epochs, self.position)
        self.watch.start()
        try:
            while not self._ends_here():
                self.file.write(self._meter.record(next(outputs)))
        except Diverged as error:
            if not self.config.keep_best or not self.held_out:
                raise
            best = self.saver.best_folder(best_of(self.held_out).step)
            raise Diverged(f"{error}. The best weights are in {best}") from error
        self.watch.stop()
        self.file.write(self._meter.flush())

    def _ends_here(self) -> bool:
        """Do what is due between two optimizer steps; return True after the last one."""
        step, config = self.position.step, self.config
        due = is_due(step, self.total_steps, self.data.steps_per_epoch, config.eval_every)
        if self.data.held_out and due and (not self.held_out or self.held_out[-1].step < step):
            self._between(self._evaluate)
        stops = self.step.ranks.any(self.interrupts.requested)
        ends = step == self.total_steps or is_time_to_stop(self.held_out, config)
        saves = config.save_every is not None and step % config.save_every == 0
        keeps_last = config.save_every is not None or config.keep_best
        if step > self.saved and (stops or saves or (ends and keeps_last)):
            self._between(self._save)
        if stops:
            raise KeyboardInterrupt
        return ends

    def _between(self, action: Callable[[], None]) -> None:
        """Write all steps so far to the file, and do something untimed."""
        self.watch.stop()
        self.file.write(self._meter.flush())
        action()
        self.watch.start()
        self._meter.restart_clock()

    def _evaluate(self) -> None:
        step = self.position.step
        measured = measure_held_out(self.step, self.data, step, lambda: self.interrupts.requested, self.log)
        if measured is None:
            return
        self.held_out.append(measured)
        if self.config.keep_best and best_of(self.held_out) is measured:
            self.saver.save_best(step)
        self.file.write(measured)

    def _save(self) -> None:
        self.file.sync()
        self.position.seconds = self.watch.seconds
        self.saver.save(self.position)
        self.saved = self.position.step
