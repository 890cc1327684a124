"""`python -m llama_ft.planning.check RUN_DIR`: whether the run of a folder's config.yaml would fit on the GPU here.

`train` asks this in a process of its own before it starts a run: it takes seconds where loading weights takes minutes.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llama_ft.config import DeviceChoice, OptimConfig, TrainConfig, UserError
from llama_ft.data.dataset import records_file
from llama_ft.files import write_text
from llama_ft.launch.process import child_environment
from llama_ft.records.result import CONFIG_FILE
from llama_ft.system import MIB, may_have_gpu

if TYPE_CHECKING:  # what needs torch is imported in the process of its own alone: `train` starts without
    from llama_ft.planning.gpu_traits import Traits

SECONDS = 60  # after which the run is started without an answer
COMMAND = (sys.executable, "-m", "llama_ft.planning.check")


@dataclass(frozen=True)
class Capacity:
    """The memory that a run may use."""

    mib: float
    context_mib: float  # what of it is taken before the first tensor
    about: str  # what has it, with a verb

    @property
    def usable_mib(self) -> float:
        """What PyTorch's allocator can have."""
        return self.mib - self.context_mib


def would_not_fit(config: TrainConfig, config_yaml: str, run_dir: Path, log: Callable[[str], None]) -> str | None:
    """Before a run starts: why it would not fit on the GPU here, and what would; None if there is nothing against it.

    Nothing is asked where there is no GPU, or where the answer is not to be enforced.

    Args:
        config_yaml: the resolved config, for the run's folder.
        say: called with a line for people if there is no answer; the run may start all the same.
    """
    if not config.plan.enforce or config.gpu.device is DeviceChoice.cpu or not may_have_gpu():
        return None
    write_text(run_dir / CONFIG_FILE, config_yaml)
    try:
        records_file(config.data, log)  # a download takes its own time, and is to be seen
    except UserError:  # the run meets the same, and says so
        return None
    try:
        reason: str | None = json.loads(_output([*COMMAND, str(run_dir)]))["objection"]
    except (OSError, ValueError, TypeError, KeyError, subprocess.SubprocessError) as error:
        why = f"no answer in {SECONDS} s" if isinstance(error, subprocess.TimeoutExpired) else f"{error}"
        log(f"whether the run fits could not be found out ({why}); it starts all the same")
        return None
    return reason


def _output(command: Sequence[str]) -> str:
    """What a command prints; it and the processes that it started end with us, or when its time is up.

    Raises:
        subprocess.SubprocessError: if it fails or takes too long.
    """
    ours, theirs = os.pipe()[::-1]  # their standard input, which ends when we do
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=child_environment(),
    ) as process:
        try:
            output, errors = process.communicate(timeout=SECONDS)
        finally:
            os.close(ours)
            os.close(theirs)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        last = (errors.strip() or "no message").splitlines()[-1]
        raise subprocess.SubprocessError(f"exit status {process.returncode}: {last}")
    return output


def capacity_of(config: TrainConfig, free_mib: float, device: str) -> Capacity:
    """What a run may use: what is free on the real card; less if its profile's card or a limit says so.

    Args:
        free_mib: MiB free on the real card, when the context is there.
        device: the real card's name.
    """
    gpu, limit = config.gpu, config.measure.memory_limit_mib
    found = Capacity(free_mib, 0, f"this {device} has {free_mib:,.0f} free")
    if gpu.memory_mib is not None and gpu.memory_mib - gpu.context_mib <= free_mib:
        found = Capacity(gpu.memory_mib, gpu.context_mib, f"{gpu.name} has {gpu.memory_mib:,}")
    if limit is not None and limit < found.usable_mib:
        return Capacity(limit, 0, f"measure.memory_limit_mib allows {limit:,}")
    return found


def objection(
    config: TrainConfig, lengths: Sequence[tuple[int, int]], capacity: Capacity, traits: "Traits", workspace: int
) -> str | None:
    """Why a run would not fit, and what would; None if it fits.

    Args:
        lengths: of each sample its tokens, and those of them that are the prompt's.
        workspace: bytes of cuBLAS workspaces.

    Raises:
        UserError: if the run cannot begin at all.
    """
    from llama_ft.planning.advice import typed
    from llama_ft.planning.allocator import reserved_bytes
    from llama_ft.planning.fake_run import fake_run
    from llama_ft.planning.predict import blank_samples
    from llama_ft.planning.search import try_run

    run = fake_run(config, blank_samples(lengths), traits)
    needs = {config.optim.combination: reserved_bytes(run.events, workspace) / MIB + capacity.context_mib}
    missing = needs[config.optim.combination] - capacity.mib
    if missing <= 0:
        return None
    others = alternatives(config.optim, run.use.at_peak_mib["activation"] > missing)
    for other in others:  # one after the other, since the first mostly does, and processes take seconds to start
        with suppress(UserError):
            found = try_run(replace(config, optim=other), lengths, traits, workspace)
            needs[other.combination] = found.reserved_mib + capacity.context_mib
            if needs[other.combination] <= capacity.mib:
                break
    tried = [(typed(other), needs[other.combination]) for other in others if other.combination in needs]
    return _message(config, needs[config.optim.combination], capacity, tried)


def alternatives(optim: OptimConfig, activations_suffice: bool) -> list[OptimConfig]:
    """Other combinations to try, the smallest change first, the smallest need last.

    Args:
        activations_suffice: whether there are more of them than memory is missing, so that checkpointing may do.
    """
    first = replace(optim, gc=True) if activations_suffice else replace(optim, mp=True, lora=True)
    found: list[OptimConfig] = []
    for other in (first, replace(optim, mp=True, lora=True, gc=True)):
        if other != optim and other not in found:
            found.append(other)
    return found


def _message(config: TrainConfig, need: float, capacity: Capacity, tried: list[tuple[str, float]]) -> str:
    fitting = [(name, mib) for name, mib in tried if mib <= capacity.mib]
    if fitting:
        hint = f"{fitting[0][0]} would need {fitting[0][1]:,.0f}"
    else:
        hint = "".join(f"even {name} would need {mib:,.0f}; " for name, mib in tried[-1:])
        hint += f"python -m llama_ft.plan model={config.model.name} goal=cheapest_gpu names a card that is large enough"
    return (
        f"{config.optim.combination} on {config.model.name} needs {need:,.0f} MiB at its peak, and {capacity.about}:"
        f" {hint}; plan.enforce=false goes on"
    )


def _objection_here(config: TrainConfig) -> str | None:
    """Ask of the GPU that is here, if there is one."""
    import torch

    from llama_ft.data.dataset import load_data
    from llama_ft.planning.gpu_traits import profile_here, traits_of, workspace_bytes

    if not torch.cuda.is_available():
        return None
    lengths = [(len(sample), sample.n_prompt) for sample in load_data(config).samples]
    free, _ = torch.cuda.mem_get_info()
    real = profile_here(config.gpu)
    played = replace(real, compute_capability=config.gpu.compute_capability or real.compute_capability)
    return objection(
        config, lengths, capacity_of(config, free / MIB, real.name), traits_of(played), workspace_bytes(real)
    )


def _end_with_parent() -> None:
    """End when the parent is gone, whatever killed it, and with us the processes that we have started."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)  # returns when the pipe closes; nothing is ever written to it
        os.killpg(0, signal.SIGKILL)

    if os.getsid(0) == os.getpid():  # else a person has started us, by hand
        threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Print the answer as JSON."""
    from llama_ft.launch.child import read_config

    _end_with_parent()
    try:
        found = _objection_here(read_config(Path(sys.argv[1])))
    except UserError:  # the run meets the same, and says so
        found = None
    print(json.dumps({"objection": found}))


if __name__ == "__main__":
    main()
