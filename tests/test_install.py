"""The wheel, installed beside nothing but its dependencies and used in an empty folder: all that it needs is in it."""

import email
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import CHECKOUT, environment
from packaging.requirements import Requirement
from test_project import project, tracked_files

from llama_ft import __version__
from llama_ft.config import SCHEMAS

pytestmark = pytest.mark.process


@dataclass(frozen=True)
class Installation:
    """A wheel, where it was installed, and an empty folder to work in."""

    wheel: Path
    site: Path
    cwd: Path

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Run `llama-ft ARGS` in the empty folder, with the installed package and without the checkout."""
        variables = environment() | {"PYTHONPATH": str(self.site), "COLUMNS": "200"}
        for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX"):  # bytecode shows which modules were used
            variables.pop(name, None)
        command = [sys.executable, str(self.site / "bin" / "llama-ft"), *args]
        return subprocess.run(command, cwd=self.cwd, env=variables, capture_output=True, text=True, timeout=120)


def build(kind: str, folder: Path) -> Path:
    """What hatchling, the project's build backend, makes of the checkout; it needs no network."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(folder)]
    subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True, timeout=60)
    (built,) = folder.glob("llama_ft-*")
    return built


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    folder = tmp_path_factory.mktemp("installed")
    wheel = build("wheel", folder / "dist")
    options = ("--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (folder / "empty").mkdir()
    return Installation(wheel, folder / "site", folder / "empty")


def packaged_files() -> set[str]:
    """Where the wheel must have the files of the repository's `llama_ft` and `conf`."""
    names = [file.relative_to(CHECKOUT).as_posix() for file in tracked_files()]
    return {name for name in names if name.startswith("llama_ft/")} | {
        f"llama_ft/{name}" for name in names if name.startswith("conf/")
    }


def test_wheel_has_the_package_and_the_configs_and_nothing_else(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == packaged_files()
    assert {"llama_ft/conf/train.yaml", "llama_ft/model/tiny/tokenizer.model", "llama_ft/py.typed"} <= names


def test_wheel_says_what_pyproject_says(installed):
    with zipfile.ZipFile(installed.wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        assert [name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert (metadata["Name"], metadata["Version"]) == ("llama_ft", __version__)
    assert metadata["Requires-Python"] == project()["requires-python"]
    assert set(metadata.get_all("Provides-Extra")) == set(project()["optional-dependencies"])
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    always = {str(requirement) for requirement in needed if requirement.marker is None}
    assert always == {str(Requirement(line)) for line in project()["dependencies"]}


def test_source_distribution_has_what_the_wheel_is_made_of(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    packaged = {name.replace("llama_ft/conf/", "conf/") for name in packaged_files()}
    assert packaged | {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} == names - {".gitignore"}


def test_commands_and_their_help_are_there(installed):
    listed = installed.run()
    assert (listed.returncode, listed.stderr) == (0, "")
    assert re.findall(r"^  python -m llama_ft\.(\w+)", listed.stdout, re.MULTILINE) == list(SCHEMAS)
    assert installed.run("--version").stdout == f"llama_ft {__version__}\n"
    explained: set[str] = set()
    for name in SCHEMAS:
        done = installed.run(name, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        explained |= set(re.findall(r"\w+", done.stdout))
    assert {file.stem for file in (CHECKOUT / "conf").glob("*/*.yaml")} <= explained
    assert list(installed.cwd.iterdir()) == []


def test_it_trains_and_reports_from_an_empty_folder(installed):
    done = installed.run("train", "optim=lora", "training.max_samples=2", "tracker=disabled")
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in installed.cwd.iterdir()] == ["outputs"]
    (file,) = installed.cwd.glob("outputs/runs/*/result.json")
    result = json.loads(file.read_text())
    assert (result["status"], result["samples"], result["combination"]) == ("ok", 2, "lora")
    assert result["command"] == "llama-ft train optim=lora training.max_samples=2 tracker=disabled"
    reported = installed.run("report", str(file.parent.relative_to(installed.cwd)))
    assert (reported.returncode, reported.stderr) == (0, "")
    assert "lora" in reported.stdout
    assert {"table2.md", "table2.csv", "table2.png"} <= {path.name for path in file.parent.iterdir()}
    # The whole of it was the installed package: Python compiled its modules there, the run's process included.
    compiled = {path.name.split(".")[0] for path in installed.site.rglob("*.pyc")}
    assert {"compose", "child", "loop", "dataset", "tokenizer", "transformer", "reports"} <= compiled
