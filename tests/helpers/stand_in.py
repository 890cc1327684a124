"""In the place of `llama_ft.launch.run`: a rank that sums a tensor over all of them again and again.

It obeys an interrupt as a run does: all ranks stop after the same step, and save. FAIL and FAULT in the environment are
a rank and what goes wrong in it, STEPS how many there are.
"""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

RANK = int(os.environ["RANK"])


class MeasuredRun:
    stage = "choosing the device"

    def __init__(self, config: Any, dataset: Any, run_dir: Path, result: Any, log: Any, interrupts: Any) -> None:
        self.run_dir, self.interrupts = run_dir, interrupts
        self.saves = config.training.saves_when_interrupted
        self.device = torch.device("cpu")
        self.fail("start")
        dist.init_process_group("gloo", timeout=timedelta(seconds=config.parallel.timeout_s))
        print("rank", RANK, "prints this")
        log(f"{dist.get_world_size()} ranks with {torch.get_num_threads()} threads, {os.environ['LOCAL_RANK']} here")

    def fail(self, when: str) -> None:
        if os.environ.get("FAIL") == f"{RANK} {when}":
            exec(os.environ["FAULT"])

    def execute(self) -> None:
        self.stage = "training"
        self.interrupts.held = self.saves
        for step in range(1, int(os.environ.get("STEPS", "1000000")) + 1):
            total, world = torch.tensor([RANK, int(self.interrupts.requested)]), dist.get_world_size()
            dist.all_reduce(total)
            assert total[0] == world * (world - 1) // 2
            (self.run_dir / f"step_{RANK}").write_text(f"{os.getpid()} {step}")
            self.fail("training")
            if total[1]:
                time.sleep(1 if RANK == 0 else 0)  # a save that takes longer here
                (self.run_dir / f"saved_{RANK}").write_text(str(step))
                raise KeyboardInterrupt
            time.sleep(0.02)
        dist.destroy_process_group()
