"""`python -m llama_ft.launch.child RUN_DIR FOLDER COMMAND [check-fit]`: do a run, or one of its ranks, in this process.

`llama_ft.launch.process` starts a process for each run, so that memory peaks, allocator pools and crashes concern that
run only. For a split run, `llama_ft.launch.agent` starts one for each rank, and only rank 0 reports and writes the
result. FOLDER contains config.yaml: it is RUN_DIR on the first machine.
"""

import errno
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

from llama_ft.config import TrainConfig, UserError, read_config
from llama_ft.config.checks import Diverged
from llama_ft.config.groups import HELD_OUT_FILE
from llama_ft.data.dataset import Dataset, drawn_lines, load_data
from llama_ft.files import write_text
from llama_ft.launch import CHECK_FIT
from llama_ft.launch.endings import Cause, Ending
from llama_ft.launch.interrupts import Interrupts, interrupts_held_back
from llama_ft.records.result import CONFIG_FILE, LOG_FILE, Status, new_result, write_result
from llama_ft.system import MIB, Log, silent

SECONDS_TO_STOP, SECONDS_TO_SAVE = 10, 600
MOST_CHARACTERS = 300  # of an unexpected error
HINTS = {
    "No working C++ compiler": "training.compile=true needs one, such as g++",
    "CUDA driver error": "PYTORCH_ALLOC_CONF=expandable_segments:False may help",
    "CUDA error": "CUDA_LAUNCH_BLOCKING=1 makes the traceback show where",
}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def stop_with_parent(patience: int, held: int, end: Callable[[], object]) -> None:
    """Interrupt this process when its parent, which holds the other end of the pipe `held`, is gone.

    If it still runs after `patience` seconds, call `end`.
    """

    def wait() -> None:
        os.read(held, 1)  # returns when the pipe closes; nothing is ever written to it
        for _ in range(patience):  # an interrupt that comes within a destructor is lost
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        end()

    threading.Thread(target=wait, daemon=True).start()


def seconds_to_stop(config: TrainConfig) -> int:
    """Seconds that an interrupted run may take to stop."""
    return SECONDS_TO_SAVE if config.training.saves_when_interrupted else SECONDS_TO_STOP


def cause_of(error: BaseException, status: Status) -> Cause:
    """Tell whether this rank itself failed, or lost another one."""
    if status == "interrupted":
        return "interrupted"
    if isinstance(error, UserError):
        return "input"
    from torch.distributed import DistError

    is_lost = status != "oom" and (isinstance(error, DistError) or "gloo" in str(error))  # NCCL's are DistBackendError
    return "others" if is_lost else "own"


def failure(error: BaseException, stage: str) -> tuple[Status, str]:
    """Status and error text for an exception."""
    if isinstance(error, KeyboardInterrupt | BrokenPipeError):  # the latter if our reader, the parent, is gone
        return "interrupted", f"interrupted during {stage}"
    if isinstance(error, UserError):
        return "error", str(error)
    from llama_ft.device import is_out_of_memory

    if is_out_of_memory(error):
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if wanted := re.search(r"tried to allocate (\d+) bytes", reason):
            reason = f"could not allocate another {int(wanted[1]) / MIB:,.1f} MiB"
        return "oom", f"out of memory during {stage}: {reason}"
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        file = error.filename or "a file in the run's folder"
        return "error", f"{file} cannot be written during {stage}: {error.strerror}"
    with suppress(OSError):  # the disk may be full, and the result still fit
        traceback.print_exception(error)  # into train.log: it is a bug
    # CUDA's other lines are advice for authors of kernels.
    text = next(iter(str(error).strip().splitlines()), "")[:MOST_CHARACTERS]
    hint = next((f"; {hint}" for said, hint in HINTS.items() if said in text), "")
    return "error", f"{type(error).__name__} during {stage}: {text}{hint} (traceback in {LOG_FILE})"


def refuse_what_does_not_fit(config: TrainConfig, dataset: Dataset, log: Log) -> None:
    """Raise a UserError if the run would not fit on the GPU here: planning takes seconds, loading weights minutes."""
    from llama_ft.planning.fit import objection_here
    from llama_ft.planning.lengths import lengths_of

    try:
        reason = objection_here(config, lengths_of(dataset.samples), lengths_of(dataset.held_out))
    except Exception as error:  # the run may still fit
        why = (str(error) or type(error).__name__).splitlines()[0]
        log(f"could not check whether the run fits ({why}); it starts anyway")
        return
    if reason:
        raise UserError(reason)


def leave_rank(ending: Ending | None) -> NoReturn:
    """Tell the agent how this rank ends, and end it at once: libraries may wait for other ranks when Python exits."""
    if ending is not None:
        write_text(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), json.dumps(asdict(ending)))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if ending is None else 1)


def main() -> None:
    """Do the run, and write its result."""
    run_dir, folder, command, check_fit = *map(Path, sys.argv[1:3]), sys.argv[3], sys.argv[4:] == [CHECK_FIT]
    config = read_config(folder / CONFIG_FILE)
    rank = int(os.environ["RANK"]) if config.parallel.is_split else 0
    result = new_result(config, command)
    run, stage, ending, interrupts = None, "start-up", None, Interrupts()
    log: Log = partial(print, flush=True)  # to our parent, which reads our standard output
    if rank > 0:
        log = silent  # other output goes to standard error; the pipe stays open, by which the parent sees us
        os.dup(sys.stdout.fileno())
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        stop_with_parent(seconds_to_stop(config), sys.stdin.fileno(), partial(os._exit, 130))
        interrupts.install()
        stage = "reading the data"
        dataset = load_data(config, log)  # first, since it needs no torch: its errors come at once
        if dataset.drawn and rank == 0:
            write_text(run_dir / HELD_OUT_FILE, drawn_lines(config.data, dataset.drawn))
        with interrupts_held_back():  # an interrupted import of torch cannot be recovered from
            from llama_ft.launch.run import MeasuredRun
        stage = "choosing the device"
        run = MeasuredRun(config, dataset, run_dir, result, log, interrupts)
        log(f"data: {dataset.describe()}")
        if check_fit and rank == 0 and run.device.type == "cuda":
            run.stage = "planning"
            refuse_what_does_not_fit(config, dataset, log)
        run.execute()
        result.status = "ok"
    except BaseException as error:
        interrupts.ignore()
        result.status, result.error = failure(error, run.stage if run else stage)
        result.has_diverged = isinstance(error, Diverged)
        result.stopped_by = interrupts.queue_signal if result.status == "interrupted" else None
        ending = Ending(rank, result.status, result.error, cause_of(error, result.status))
    if rank == 0:
        write_result(run_dir, result)
    if config.parallel.is_split:
        leave_rank(ending)


if __name__ == "__main__":
    main()
