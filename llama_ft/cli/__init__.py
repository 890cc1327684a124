"""What the commands share: help, composing and checking the config, errors of a few lines instead of tracebacks."""

import os
import shlex
import signal
import sys
from collections.abc import Callable
from functools import partial

from rich.console import Console

from llama_ft import __version__
from llama_ft.cli.completion import complete
from llama_ft.cli.compose import checked_config, composed_config, register
from llama_ft.cli.explain import explain, use_schema
from llama_ft.cli.usage import Usage, print_help
from llama_ft.config import UserError

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "USAGE_ERROR",
    "Stop",
    "Usage",
    "checked_config",
    "command_line",
    "composed_config",
    "explain",
    "register",
    "run_command",
]
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130


class Stop(BaseException):
    """Ends a whole sweep with a message. Hydra catches what derives from Exception and would go on to the next run."""


def command_line() -> str:
    """What the user typed, to be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec else shlex.quote(sys.argv[0])
    return shlex.join([*program.split(), *sys.argv[1:]])


def run_command(function: Callable[[], int], usage: Usage) -> None:
    """Run a command to the exit status that it returns; errors become text unless HYDRA_FULL_ERROR=1 is set."""
    use_schema(usage.schema)
    if {"--help", "-h"} & set(sys.argv[1:]):
        print_help(usage, Console())
        sys.exit(0)
    if "--version" in sys.argv[1:]:
        print(f"llama_ft {__version__}")
        sys.exit(0)
    if {"-sc", "--shell-completion"} & set(sys.argv[1:]):
        function = partial(complete, usage)
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a closed terminal; under nohup it is ignored
        signal.signal(signal.SIGHUP, _terminate)
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes errors on to us
    try:
        status = function()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = INTERRUPTED
    except BrokenPipeError:  # whoever read our output, such as head, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED
    except Stop as stop:
        if wants_traceback:
            raise
        print(f"error: {stop}", file=sys.stderr)
        status = USAGE_ERROR
    except Exception as error:
        if wants_traceback:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        if not isinstance(error, UserError | HydraException | OmegaConfBaseException | OSError | ValueError):
            print("this looks like a bug of ours; HYDRA_FULL_ERROR=1 shows where", file=sys.stderr)
        status = USAGE_ERROR
    sys.exit(status)


def _terminate(*_: object) -> None:
    raise KeyboardInterrupt
