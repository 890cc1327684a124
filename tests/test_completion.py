"""Tab in a real bash, after `eval "$(python -m llama_ft.train -sc install=bash)"`."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKOUT, environment, run

from llama_ft.config import TrainingConfig

BASH = shutil.which("bash")
DEFAULT_BREAKS = " \t\n\"'><=;|&(:"  # where bash parts words unless told otherwise
# Calls what serves `python` as bash does at Tab, and prints what it offers.
AT_TAB = """
    eval "$("$PYTHON" -m llama_ft.train -sc install=bash)"
    set -- $(complete -p python)
    while [ "$1" != -F ]; do shift; done
    COMP_LINE=$TYPED COMP_POINT=${#TYPED} COMP_WORDBREAKS=$BREAKS
    "$2" python
    for offered in "${COMPREPLY[@]}"; do echo "$offered"; done
"""
pytestmark = pytest.mark.skipif(BASH is None, reason="no bash")


def offered(cwd: Path, arguments: str, breaks: str = " ") -> list[str]:
    """What Tab offers after `python` and the arguments; `python` is the interpreter of the tests."""
    typed = f"{shlex.quote(sys.executable)} {arguments}"
    variables = environment({"PYTHON": sys.executable, "TYPED": typed, "BREAKS": breaks})
    command = [str(BASH), "--norc", "-c", AT_TAB]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CHECKOUT / "conf" / group).glob("*.yaml"))


def test_the_choices_of_a_group(tmp_path):
    assert offered(tmp_path, "-m llama_ft.train optim=") == [f"optim={name}" for name in choices("optim")]


def test_where_bash_parts_words_at_equals_what_follows_it_is_offered(tmp_path):
    line = "-m llama_ft.train -m data.path=x.json optim=ga_m"
    assert offered(tmp_path, line, DEFAULT_BREAKS) == ["ga_mp", "ga_mp_lora"]


def test_the_keys_of_a_section(tmp_path):
    fields = TrainingConfig.__dataclass_fields__
    assert offered(tmp_path, "-m llama_ft.train training.") == sorted(f"training.{name}=" for name in fields)


def test_what_a_key_may_be(tmp_path):
    assert offered(tmp_path, "-m llama_ft.train optim=mp mp.dtype=") == [
        f"mp.dtype={name}" for name in ("auto", "bf16", "fp16")
    ]


def test_keys_of_a_command_that_takes_folders(tmp_path):
    assert offered(tmp_path, "-m llama_ft.report outputs/table2 tr") == ["tracker.", "tracker="]


def test_files_with_any_names(tmp_path):
    (tmp_path / "a b.json").touch()
    (tmp_path / "$(touch hacked).json").touch()
    names = offered(tmp_path, "-m llama_ft.train data.path=./")
    assert sorted(names) == ["data.path=./$(touch hacked).json", "data.path=./a b.json"]
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "arguments", ["", "train.py ", "-m pytest ", "-c llama_ft.train opt", "-m llama_ft_other.x op"]
)
def test_nothing_else_is_run(tmp_path, arguments):
    (tmp_path / "train.py").write_text("open('was_run', 'w')")
    assert offered(tmp_path, arguments) == []
    assert not (tmp_path / "was_run").exists()


def test_it_can_be_taken_back(tmp_path):
    script = 'eval "$("$PYTHON" -m llama_ft.train -sc install=bash)"; complete -p python'
    undone = script + '; eval "$("$PYTHON" -m llama_ft.train -sc uninstall=bash)"; ! complete -p python 2>&1'
    variables = environment({"PYTHON": sys.executable})
    done = subprocess.run([str(BASH), "-c", undone], cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [f"{BASH}: line 1: complete: python: no completion specification"]


@pytest.mark.parametrize("arguments", [["-sc", "install=fish"], ["-sc"], ["optim=ga", "-sc", "install=bash"]])
def test_what_there_is_not_is_refused(tmp_path, arguments):
    done = run("llama_ft.train", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("-sc must come first, and install=bash or uninstall=bash after it\n")
    assert done.stderr.count("\n") == 1
