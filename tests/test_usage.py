"""What the commands say of themselves: `--help`, `--version`, and which commands there are."""

import functools
import importlib
import io
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import CHECKOUT, run
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from omegaconf import OmegaConf
from rich.console import Console

from llama_ft import cli, plan
from llama_ft.cli.usage import Usage, chosen, keys, presets, print_commands, print_help, table
from llama_ft.config import config_dir

# By their place in the package, not by what the package says of itself.
COMMANDS = [
    name
    for name in ("train", "report", "plan", "generate", "evaluate", "convert")
    if (CHECKOUT / "llama_ft" / f"{name}.py").exists()
]
WIDE = 1000


def usage_of(command: str) -> Usage:
    usage = importlib.import_module(f"llama_ft.{command}").USAGE
    assert isinstance(usage, Usage)
    return usage


@functools.cache
def help_of(command: str, width: int = WIDE) -> str:
    written = io.StringIO()
    print_help(usage_of(command), Console(file=written, width=width))
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


def composed(command: str, *overrides: str) -> Any:
    """Hydra's config of the command."""
    cli.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return compose(config_name=command, overrides=list(overrides))


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
    defaults = plain(composed(command))
    assert documented.keys() == defaults.keys()
    assert all(meaning for _, meaning in documented.values())
    # Typed as it stands there, each default is what it is without.
    given = {key: text for key, (text, _) in documented.items() if text != "required"}
    assert plain(composed(command, *(typed(*setting) for setting in given.items()))) == defaults
    assert {key for key, value in defaults.items() if value == "???"} == documented.keys() - given.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_every_choice_of_every_group_the_default_first(command):
    documented = documented_choices(command)
    cli.register()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        runtime = compose(config_name=command, return_hydra_config=True).hydra.runtime
        loader = GlobalHydra.instance().config_loader()
        defaults = {group: choice for group, choice in runtime.choices.items() if not group.startswith("hydra/")}
        assert documented.keys() == defaults.keys()
        for group, default in defaults.items():
            options = set(loader.get_group_options(group, ObjectType.CONFIG))
            assert documented[group][0] == (default or "null")
            assert sorted(documented[group]) == sorted(options | {default or "null"})


@pytest.mark.parametrize(
    "choices", [{"model": "llama2_7b_1layer"}, {"gpu": "a100_40gb"}, {"optim": "ga_mp_lora", "training": "course"}]
)
def test_defaults_are_those_of_the_choices(choices):
    """Of choices that build on others, or have sections of their own, too."""
    usage = usage_of("train")
    shown = {key: text for key, text, _ in keys(usage.schema, presets(usage, chosen(usage) | choices))}
    config = composed("train", *(f"{group}={choice}" for group, choice in choices.items()))
    assert plain(composed("train", *(typed(*setting) for setting in shown.items()))) == plain(config)
    assert plain(config) != plain(composed("train"))


def test_enums_are_listed_with_what_they_allow():
    assert documented_keys("train")["mp.dtype"][1].endswith("one of auto, bf16, fp16")
    assert documented_keys("train")["tracker.mode"][1].endswith("one of auto, online, offline, disabled")


def one_of(argument: str) -> str:
    """The argument, or of one that sweeps the first value."""
    override = OverridesParser.create().parse_override(argument)
    if isinstance(override.value(), Glob):
        return f"{override.key_or_group}={min((config_dir() / override.key_or_group).glob('*.yaml')).stem}"
    if override.is_sweep_override():
        return f"{override.key_or_group}={next(iter(override.sweep_string_iterator()))}"
    return argument


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_can_be_copied(command):
    for width in (40, 80, WIDE):
        lines = help_of(command, width).splitlines()
        for example in usage_of(command).examples:
            assert f"  python -m llama_ft.{command} {example}" in lines
    for example in usage_of(command).examples:
        overrides = [argument for argument in shlex.split(example) if "=" in argument]
        overrides = plan.overrides(overrides) if command == "plan" else overrides
        composed(command, *map(one_of, overrides))


@pytest.mark.parametrize("width", [40, 80, 140])
@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_fits_the_terminal_and_loses_no_word(command, width):
    if command:
        wide, text = help_of(command), help_of(command, width)
    else:
        written = {columns: io.StringIO() for columns in (WIDE, width)}
        for columns, file in written.items():
            print_commands(Console(file=file, width=columns))
        wide, text = (file.getvalue() for file in written.values())
    assert text.split() == wide.split()
    lines = text.splitlines()
    assert [line for line in lines if line != line.rstrip() or "…" in line] == []
    too_long = [line for line in lines if len(line) > width and "python -m" not in line]  # what is to be copied
    assert too_long == [] or width == 40  # a text column of 30 beside long keys


def test_the_text_beside_long_words_keeps_its_place():
    rows = [("a", "one two three four five six seven eight"), ("a_long_key", "one\ntwo"), ("b", "")]
    assert list(table(rows, 30)) == [
        "  a           one two three four five six",
        "              seven eight",
        "  a_long_key  one",
        "              two",
        "  b",
    ]


def test_output_of_train_and_its_place_are_explained():
    """The options' texts name the folders that the config has."""
    cli.register()
    options = {row[0]: " ".join(row[1:]) for row in section(help_of("train"), "Options")}
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        hydra = OmegaConf.to_container(compose("train", return_hydra_config=True), resolve=False)["hydra"]  # type: ignore
    for key, value in (("run", hydra["run"]["dir"]), ("sweep", hydra["sweep"]["dir"])):
        folder = value.partition("/$")[0]
        assert options[f"hydra.{key}.dir=DIR"].endswith(f" {folder}")


def test_styles_only_where_they_can_be_shown(tmp_path):
    piped = run("llama_ft.report", "--help", cwd=tmp_path)
    assert (piped.returncode, piped.stderr) == (0, "")
    assert "\x1b" not in piped.stdout
    styled = run("llama_ft.report", "--help", cwd=tmp_path, env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert set(re.findall(r"\x1b\[([\d;]*)m", styled.stdout)) == {"0", "1"}  # bold is no colour
    assert re.sub(r"\x1b\[[\d;]*m", "", styled.stdout) == piped.stdout


# python -m llama_ft


def test_the_commands_are_listed(tmp_path):
    for arguments in ([], ["--help"], ["-h"]):
        done = run("llama_ft", *arguments, cwd=tmp_path, env={"COLUMNS": "200"})
        assert (done.returncode, done.stderr) == (0, "")
        listed = re.findall(r"^  python -m llama_ft\.(\w+)  +(\w.*)$", done.stdout, re.MULTILINE)
        assert [name for name, _ in listed] == COMMANDS
        assert all(len(purpose.split()) > 3 for _, purpose in listed)


@pytest.mark.parametrize("module", ["llama_ft", *(f"llama_ft.{name}" for name in COMMANDS)])
def test_version(tmp_path, module):
    (version,) = re.findall(r'^__version__ = "(.+)"$', (CHECKOUT / "llama_ft/__init__.py").read_text(), re.MULTILINE)
    done = run(module, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"llama_ft {version}\n", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["foo"], ["--foo"], ["--version", "--help"]], ids=" ".join)
def test_what_is_no_command_is_told_what_to_type(tmp_path, arguments):
    done = run("llama_ft", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {arguments[0]} ")
    assert line.endswith(f"type python -m llama_ft.NAME, where NAME is one of {', '.join(COMMANDS)}")


def test_a_command_after_a_space_is_told_where_the_dot_belongs(tmp_path):
    done = run("llama_ft", "train", "optim=lora", "data.path='my file'", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    typed = line.partition(": type ")[2]
    assert shlex.split(typed) == ["python", "-m", "llama_ft.train", "optim=lora", "data.path='my file'"]
