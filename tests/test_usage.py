"""What the commands say of themselves: `--help`, `--version`, the list of commands, and Tab."""

import functools
import importlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, injected, run
from helpers.commands import single_runs
from omegaconf import OmegaConf
from rich.console import Console

from llama_ft import __version__, cli, plan
from llama_ft.__main__ import command_module, print_commands
from llama_ft.cli.compose import composed
from llama_ft.cli.usage import Usage, print_help, table
from llama_ft.config import config_dir

COMMANDS = ["data", "train", "report", "plan", "generate", "evaluate", "convert"]
WIDE = 1000


def usage_of(command: str) -> Usage:
    usage = command_module(command).USAGE
    assert isinstance(usage, Usage)
    return usage


@functools.cache
def help_of(command: str, width: int = WIDE) -> str:
    """The help of a command, or the list of the commands."""
    written = io.StringIO()
    console = Console(file=written, width=width)
    print_help(usage_of(command), console) if command else print_commands(console)
    return written.getvalue()


def section(text: str, title: str) -> list[list[str]]:
    """The rows of a section of a wide help, each as its cells."""
    (body,) = re.findall(rf"^{title}.*\n((?:  .*\n)+)", text, re.MULTILINE)
    return [re.split(r" {2,}", line[2:].rstrip(), maxsplit=2) for line in body.splitlines()]


def documented_keys(command: str) -> dict[str, tuple[str, str]]:
    """(default, meaning) by key."""
    return {key: (default, meaning) for key, default, meaning in section(help_of(command), "KEY=VALUE")}


def documented_choices(command: str) -> dict[str, list[str]]:
    """The choices of each group, in their order."""
    choices: dict[str, list[str]] = {}
    group = ""
    for name, choice, meaning in section(help_of(command), "GROUP=CHOICE"):
        group = name or group
        others = re.search(r"(?:^|; )or ([\w, ]+)$", meaning)
        choices.setdefault(group, []).extend([choice, *(others[1].split(", ") if others else [])])
    return choices


def leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(config: Any) -> dict[str, Any]:
    return dict(leaves(OmegaConf.to_container(config, enum_to_str=True)))  # type: ignore[arg-type]


def typed(key: str, text: str) -> str:
    """An argument; Hydra wants quotes around what begins with ~."""
    return f"{key}='{text}'" if text.startswith("~") else f"{key}={text}"


# --help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_key_with_its_default(command):
    documented = documented_keys(command)
    defaults = plain(composed(command, []))
    assert documented.keys() == defaults.keys() - {"model.given", "recipe"}  # noted, not typed; a group
    assert all(meaning for _, meaning in documented.values())
    # Typed as it stands there, each default is what it is without.
    given = {key: text for key, (text, _) in documented.items() if text != "required"}
    assert plain(composed(command, [typed(*setting) for setting in given.items()])) == defaults
    assert {key for key, value in defaults.items() if value == "???"} == documented.keys() - given.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_choice_of_every_group_the_default_first(command):
    documented = documented_choices(command)
    defaults = OmegaConf.load(config_dir() / f"{command}.yaml").defaults
    groups = {name: choice for entry in defaults if not isinstance(entry, str) for name, choice in entry.items()}
    groups = {name: choice for name, choice in groups.items() if not name.startswith("override ")}
    assert list(documented) == list(groups)
    for group, default in groups.items():
        options = {file.stem for file in (config_dir() / group).glob("*.yaml")}
        assert documented[group][0] == (default or "null")
        assert sorted(documented[group]) == sorted(options | {default or "null"})


def test_enums_are_listed_with_what_the_key_allows():
    assert documented_keys("train")["mp.dtype"][1].endswith("one of auto, bf16, fp16")
    assert documented_keys("train")["mp.frozen_weights"][1].endswith("one of compute, fp32, nf4, fp4")
    assert documented_keys("convert")["dtype"][1].endswith("one of keep, fp32, bf16, fp16, q8_0")
    assert documented_keys("evaluate")["dtype"][1].endswith("one of auto, fp32, bf16, fp16, nf4, fp4")
    assert documented_keys("train")["gpu.device"][1].endswith("one of auto, cpu, cuda")


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_copied(command):
    for width in (40, 80, WIDE):
        lines = help_of(command, width).splitlines()
        for example in usage_of(command).examples:
            assert f"  python -m llama_ft.{command} {example}" in lines
    for example in usage_of(command).examples:
        if command == "plan":
            assert plan.planned_runs([a for a in shlex.split(example) if "=FILE" not in a and "path=" not in a])
            continue
        overrides = [argument for argument in shlex.split(example) if "=" in argument]
        composed(command, next(single_runs(overrides)))


@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_fits_the_terminal_and_loses_no_word(command, width):
    text = help_of(command, width)
    assert text.split() == help_of(command).split()
    lines = text.splitlines()
    assert [line for line in lines if line != line.rstrip() or "…" in line] == []
    too_long = [line for line in lines if len(line) > width and "python -m" not in line]  # what is to be copied
    assert too_long == [] or width == 40  # a text column of 30 beside long keys


def test_the_text_beside_long_words_keeps_its_place():
    rows = [("a", "one two three four five six seven eight"), ("a_long_key", "one two"), ("b", "")]
    assert list(table(rows, 30)) == [
        "  a           one two three four five six",
        "              seven eight",
        "  a_long_key  one two",
        "  b",
    ]


def test_the_folders_of_output_that_options_name_are_those_of_the_config():
    options = {row[0]: " ".join(row[1:]) for row in section(help_of("train"), "Options")}
    hydra: Any = OmegaConf.to_container(composed("train", [], with_hydra=True), resolve=False)["hydra"]  # type: ignore
    for key in ("run", "sweep"):
        folder = hydra[key]["dir"].removeprefix("${new_folder:").partition("/$")[0]
        assert options[f"hydra.{key}.dir=DIR"].endswith(f" {folder}")


@pytest.mark.process
def test_styles_only_where_they_can_be_shown(tmp_path):
    piped = run("llama_ft.report", "--help", cwd=tmp_path)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert "\x1b" not in piped.stdout
    styled = run("llama_ft.report", "--help", cwd=tmp_path, env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert set(re.findall(r"\x1b\[([\d;]*)m", styled.stdout)) == {"0", "1"}  # bold is no color
    assert re.sub(r"\x1b\[[\d;]*m", "", styled.stdout) == piped.stdout


# The commands: python -m llama_ft.NAME, python -m llama_ft NAME, llama-ft NAME


@pytest.fixture
def script(tmp_path) -> Path:
    """The file that an installation makes of pyproject's `[project.scripts]`."""
    file = tmp_path / "bin" / "llama-ft"
    file.parent.mkdir()
    file.write_text(f"#!{sys.executable}\nimport sys\nfrom llama_ft.__main__ import main\nsys.exit(main())\n")
    file.chmod(0o755)
    return file


@pytest.mark.process
def test_the_commands_are_listed(tmp_path):
    done = run("llama_ft", cwd=tmp_path, env={"COLUMNS": "200"})
    assert (done.returncode, done.stderr) == (0, "")
    listed = re.findall(r"^  python -m llama_ft\.(\w+)  +(\w.*)$", done.stdout, re.MULTILINE)
    assert [name for name, _ in listed] == COMMANDS
    assert all(len(purpose.split()) > 3 for _, purpose in listed)


@pytest.mark.process
@pytest.mark.parametrize("module", ["llama_ft", "llama_ft.train"])
def test_version(tmp_path, module):
    done = run(module, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"llama_ft {__version__}\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("first", ["foo", "--foo", "optim=ga"])
def test_what_is_not_a_command_is_refused(monkeypatch, capsys, first):
    monkeypatch.setattr(sys, "argv", ["llama-ft", first])
    assert importlib.import_module("llama_ft.__main__").main() == 2
    assert capsys.readouterr().err == f"error: {first} is not a command: it must be one of {', '.join(COMMANDS)}\n"


@pytest.mark.process
def test_a_command_runs_in_each_form(script):
    python = [sys.executable, "-m"]
    for form in ([*python, "llama_ft.report"], [*python, "llama_ft", "report"], [script, "report"]):
        done = subprocess.run([*form, "nowhere"], cwd=script.parent, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: nowhere")


@pytest.mark.parametrize(
    ("started", "typed"),
    {
        ("/usr/bin/python3", "-m", "llama_ft.train", "optim=lora"): "python -m llama_ft.train optim=lora",
        ("python", "-m", "llama_ft", "plan", "a b=c"): "python -m llama_ft plan 'a b=c'",
        ("/env/bin/python", "-u", "-m", "llama_ft.train", "-m"): "python -u -m llama_ft.train -m",
        ("/env/bin/python", "/env/bin/llama-ft", "train", "optim=mp"): "llama-ft train optim=mp",
    }.items(),
)
def test_the_command_in_results_is_the_one_that_was_typed(monkeypatch, started, typed):
    monkeypatch.setattr(sys, "orig_argv", list(started))
    monkeypatch.setattr(sys, "argv", ["changed"])
    assert cli.command_line() == typed


# Tab: Hydra's own completion, of an installed llama-ft

AT_TAB = """
    eval "$(llama-ft -sc install=bash)"
    for line in "$@"; do
        COMP_LINE=$line; COMP_WORDS=($line); [[ $line == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
        hydra_bash_completion llama-ft
        echo "${COMPREPLY[@]}"
    done
    complete -p llama-ft
"""


@pytest.mark.process
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_tab_completes_commands_groups_choices_and_keys(script):
    presets = sorted(file.stem for file in (config_dir() / "optim").glob("*.yaml"))
    offered = {
        "llama-ft ": " ".join(COMMANDS),
        "llama-ft tr": "train",
        "llama-ft train optim=": " ".join(f"optim={name}" for name in presets),
        "llama-ft train -m optim=mp training.mi": "training.micro_batch_size=",
        "llama-ft report outputs/table2 tracker.u": "tracker.upload=",
        "llama-ft nothing o": "",
    }
    env = environment({"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"})
    command = ["bash", "--norc", "-c", AT_TAB, "bash", *offered]
    done = subprocess.run(command, cwd=script.parent, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, registered = done.stdout.splitlines()
    assert dict(zip(offered, lines, strict=True)) == offered
    assert registered == "complete -o default -o nospace -F hydra_bash_completion llama-ft"


@pytest.mark.process
def test_output_that_cannot_be_written_is_not_taken_for_the_output_folder(tmp_path: Path) -> None:
    """On a full disk, of which /dev/full is the like."""
    command = [sys.executable, "-m", "llama_ft.train", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: standard output cannot be written: No space left on device\n")


@pytest.mark.process
@pytest.mark.parametrize("module", ["hydra", "rich"])
def test_ctrl_c_while_a_command_is_imported_has_no_traceback(tmp_path: Path, module: str) -> None:
    code = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
"""
    done = run("llama_ft.train", "--help", cwd=tmp_path, env=injected(tmp_path / "inject", into="llama_ft", code=code))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "interrupted\n")
