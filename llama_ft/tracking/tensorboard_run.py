"""TensorBoard: an event file in the folder of what is tracked. Only this module imports tensorboard, an extra."""

import json
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from llama_ft.config.checks import Settings, flat
from llama_ft.tracking.base import Table, Tracker

SECONDS_TO_FLUSH = 5  # TensorBoard lags behind a run by at most this


class TensorBoardRun(Tracker):
    """An event file, in place of an earlier one."""

    def _start(self) -> None:
        folder, settings, self._n_steps = self._subject.folder, self._subject.settings, 0
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._writer = EventFileWriter(str(folder), flush_secs=SECONDS_TO_FLUSH)
        self.place = f"`tensorboard --logdir {folder}` shows it"
        if settings:
            known = {key: value for key, value in flat(settings).items() if value is not None}
            self._add(hparams_pb({k: v if isinstance(v, int | float) else str(v) for k, v in known.items()}))
            self._add(text_pb("config", f"```json\n{json.dumps(settings, indent=2)}\n```"))

    def _step(self, step: int, values: Settings) -> None:
        self._n_steps = step
        self._add_scalars(values)

    def _finish(self, figures: Settings, files: dict[str, Path], table: Table | None, ok: bool) -> None:
        self._add_scalars({f"result/{key}": value for key, value in flat(figures).items()})
        if "status" in figures:
            self._add(text_pb("status", f"{figures['status']} {figures['error'] or ''}"))
        for name, file in files.items():
            if file.suffix == ".png":
                image = Summary.Image(encoded_image_string=file.read_bytes())
                self._add(Summary(value=[Summary.Value(tag=name, image=image)]))
            elif file.suffix == ".md":
                self._add(text_pb(name, file.read_text(encoding="utf-8")))
        self._writer.close()

    def _add_scalars(self, values: Settings) -> None:
        numbers = {tag: value for tag, value in values.items() if type(value) in (int, float)}
        self._add(Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in numbers.items()]))

    def _add(self, summary: Summary) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=self._n_steps, summary=summary))
