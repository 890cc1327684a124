"""What the commands share: help, composing and checking the config, errors of a few lines instead of tracebacks."""

import io
import os
import signal
import sys
from collections.abc import Callable

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from llama_ft import __version__
from llama_ft.cli.compose import checked_config, command_line, composed_config, register, typed_overrides
from llama_ft.cli.effects import remarks
from llama_ft.cli.explain import explain
from llama_ft.cli.sweeps import composed_runs, is_sweep
from llama_ft.cli.texts import as_typed
from llama_ft.cli.usage import Usage, print_help
from llama_ft.config import UserError

FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130  # exit statuses


class Stop(BaseException):
    """Ends a whole sweep with a message. Hydra catches what derives from Exception and would go on to the next run."""


EXPECTED = (Stop, UserError, HydraException, OmegaConfBaseException, OSError, ValueError)  # none is a bug of ours


def _output_fails() -> bool:
    """Whether standard output takes nothing more, as on a full disk: its errors name no file, and others' may not."""
    try:
        print(end="", flush=True)
    except OSError:
        return True
    return False


def _close_output() -> None:
    """Drop what cannot be written to standard output, which Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(function: Callable[[], int], usage: Usage) -> None:
    """Run a command to the exit status that it returns; errors become text unless HYDRA_FULL_ERROR=1 is set."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error has it
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):  # the latter are a queue's, before a time limit
        signal.signal(number, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # a closed terminal; under nohup it is ignored
        signal.signal(signal.SIGHUP, signal.default_int_handler)
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes errors on to us
    try:
        status = 0
        if {"--help", "-h"} & set(sys.argv[1:]):
            print_help(usage, Console())
        elif "--version" in sys.argv[1:]:
            print(f"llama_ft {__version__}")
        else:
            status = function()
        sys.stdout.flush()
        sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # whoever read our output, such as head, has read enough
        _close_output()
        sys.exit(FAILED)
    except (Stop, Exception) as error:
        if wants_traceback:
            raise
        if isinstance(error, OSError) and not error.filename and _output_fails():
            _close_output()
            print(f"error: standard output cannot be written: {error.strerror}", file=sys.stderr)
            sys.exit(FAILED)
        print(f"error: {error if isinstance(error, Stop) else explain(error, usage.schema)}", file=sys.stderr)
        if not isinstance(error, EXPECTED):
            print("this looks like a bug of ours; HYDRA_FULL_ERROR=1 shows where", file=sys.stderr)
        sys.exit(USAGE_ERROR)
