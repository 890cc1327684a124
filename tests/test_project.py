"""The project around the code: dependencies, layering, imports, README, tests and continuous integration."""

import ast
import functools
import importlib.metadata
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import CHECKOUT, run
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PACKAGE = CHECKOUT / "llama_ft"
MODULE_FILES = sorted(PACKAGE.rglob("*.py"))
STUDY_FILES = sorted((CHECKOUT / "experiments").rglob("*.py"))
MAX_LINES = 300
SECONDS_FOR_HELP = 1.5


def read(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


# Dependencies: pyproject, the lock, environment.yml and the Makefile


@functools.cache
def project() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))["project"]


def runtime_requirements() -> list[Requirement]:
    return [Requirement(line) for line in project()["dependencies"]]


def direct_requirements() -> list[Requirement]:
    extras = project()["optional-dependencies"].values()
    return runtime_requirements() + [Requirement(line) for extra in extras for line in extra]


@functools.cache
def locked() -> dict[str, Version]:
    """Name to version; the lock holds nothing but exact versions."""
    pins = [Requirement(line) for line in read("requirements.lock").splitlines() if line.strip()]
    assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) and not pin.url for pin in pins)
    assert not [name for name, count in Counter(canonicalize_name(pin.name) for pin in pins).items() if count > 1]
    return {canonicalize_name(pin.name): Version(str(pin.specifier).removeprefix("==")) for pin in pins}


@pytest.mark.parametrize("requirement", direct_requirements(), ids=lambda requirement: requirement.name)
def test_direct_dependency_is_locked_at_an_allowed_version(requirement):
    version = locked()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version, prereleases=True)


def test_torch_is_locked():
    assert locked()["torch"] == Version("2.13.0")


# Of PyTorch for CUDA: parts that it requires at exact versions itself.
CUDA_PACKAGES = ("cuda-", "nvidia-", "triton")


def needed_by(requirement: Requirement) -> Iterator[str]:
    """The packages that a package brings along, as those that are installed say."""
    environments = [{"extra": extra} for extra in ("", *requirement.extras)]
    for line in importlib.metadata.requires(requirement.name) or []:
        needed = Requirement(line)
        marker = needed.marker
        if not needed.name.startswith(CUDA_PACKAGES) and (marker is None or any(map(marker.evaluate, environments))):
            yield str(needed).partition(";")[0]


def test_lock_is_complete_and_has_nothing_else():
    """What `pip install .[dev,llama3]` brings along is all pinned: no machine and no day gives another set."""
    missing = [requirement.name for requirement in direct_requirements() if not is_installed(requirement.name)]
    assert missing == [], "make test installs them"
    found: dict[str, set[str]] = {}  # the extras that were followed, by package
    following = direct_requirements()
    while following:
        requirement = following.pop()
        name = canonicalize_name(requirement.name)
        if name not in found or requirement.extras - found[name]:
            found[name] = found.get(name, set()) | requirement.extras
            following += map(Requirement, needed_by(requirement))
    assert found.keys() == locked().keys()


def is_installed(name: str) -> bool:
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def environment() -> dict[str, Any]:
    loaded = yaml.safe_load(read("environment.yml"))
    assert isinstance(loaded, dict)
    return loaded


def test_environment_installs_what_make_installs():
    (pip,) = [entry["pip"] for entry in environment()["dependencies"] if isinstance(entry, dict)]
    in_environment = shlex.split(" ".join(pip))
    commands = [shlex.split(line) for line in read("Makefile").splitlines() if " pip install " in line]
    (in_make,) = [command for command in commands if ".[dev,llama3]" in command and "--constraint" in command]
    options = in_make[in_make.index("install") + 1 :]
    assert [option for option in options if option not in ("--quiet", "--disable-pip-version-check")] == in_environment
    assert in_environment == ["--constraint", "requirements.lock", "--editable", ".[dev,llama3]"]


def test_environments_python_is_allowed():
    assert environment()["name"] == project()["name"]
    python, *others = environment()["dependencies"]
    assert re.fullmatch(r"python=+[\d.]+", python)
    assert others == ["pip", {"pip": others[1]["pip"]}]  # every other package comes by pip, from the lock
    allowed = SpecifierSet(project()["requires-python"])
    assert allowed.contains(python.removeprefix("python=").lstrip("="))
    assert allowed.contains(".".join(map(str, sys.version_info[:3])))


def test_makefile_checks_the_python_that_pyproject_requires():
    oldest = project()["requires-python"].removeprefix(">=")
    assert f"sys.version_info < ({oldest.replace('.', ', ')})" in read("Makefile")
    assert f"Python {oldest}" in read("README.md")


# Imports


class Import(NamedTuple):
    """An import statement in a module of the package."""

    module: str  # who imports
    target: str  # what, as far as it is a module
    at_top: bool  # whether importing the one imports the other


def module_name(file: Path) -> str:
    parts = file.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in MODULE_FILES}


def targets_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports within the package are absolute"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in MODULES else str(node.module)


def imports_of(module: str, file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside_functions = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(function)
    }
    for node in ast.walk(tree):
        for target in targets_of(node):
            yield Import(module, target, id(node) not in inside_functions)


IMPORTS = [found for module, file in MODULES.items() for found in imports_of(module, file)]
OWN_IMPORTS = [found for found in IMPORTS if found.target.split(".")[0] == "llama_ft"]

COMMANDS = ("train", "generate", "evaluate", "plan", "report", "convert")
# From the bottom up. An import points to a lower level, or stays within its part.
LEVELS = [
    ("",),  # llama_ft itself: the version
    ("config",),
    ("files",),
    ("model", "data"),
    ("techniques",),
    ("training", "decoding", "exporting"),
    ("reporting", "measure", "tracking", "evaluation"),
    ("planning",),
    ("cli",),
    (*COMMANDS, "__main__"),
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
# The format of result.json is shared by those who write and those who read it.
ALLOWED_SIDEWAYS = {("reporting", "llama_ft.records.result"), ("tracking", "llama_ft.records.result")}


def part_of(module: str) -> str:
    """`model` for `llama_ft.model.weights`; empty for `llama_ft` itself."""
    return module.removeprefix("llama_ft").lstrip(".").partition(".")[0]


def test_every_module_has_a_place_in_the_layering():
    assert {part_of(module) for module in MODULES} <= LEVEL.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    wrong = [
        found.target
        for found in OWN_IMPORTS
        if found.module == module
        and part_of(found.target) != part_of(module)
        and LEVEL[part_of(found.target)] >= LEVEL[part_of(module)]
        and (part_of(module), found.target) not in ALLOWED_SIDEWAYS
    ]
    assert wrong == []


def test_the_layering_test_sees_the_arrows_it_judges():
    arrows = {(part_of(found.module), part_of(found.target)) for found in OWN_IMPORTS}
    assert {("train", "cli"), ("train", "reporting"), ("measure", "training"), ("measure", "techniques")} <= arrows
    assert {("training", "data"), ("techniques", "model"), ("model", "config"), ("data", "config")} <= arrows


def test_no_import_cycles():
    remaining = defaultdict(set)
    for found in OWN_IMPORTS:
        if found.target != found.module:
            remaining[found.module].add(found.target)
    while leaves := set(MODULES) - remaining.keys():
        before = len(remaining)
        for module, targets in list(remaining.items()):
            targets -= leaves
            if not targets:
                del remaining[module]
        if len(remaining) == before:
            break
    assert dict(remaining) == {}


def importers(distribution: str) -> set[str]:
    return {found.module for found in IMPORTS if found.target.split(".")[0] == distribution}


def test_model_has_never_heard_of_techniques():
    assert not [found for found in OWN_IMPORTS if part_of(found.module) == "model" and "techniques" in found.target]


def test_hydra_stays_in_the_commands():
    shared = {"llama_ft.cli", "llama_ft.cli.compose", "llama_ft.cli.completion"}
    assert importers("hydra") <= {f"llama_ft.{name}" for name in COMMANDS} | shared
    assert "llama_ft.train" in importers("hydra")


def test_wandb_stays_in_tracking():
    assert {part_of(module) for module in importers("wandb")} == {"tracking"}


def test_the_package_knows_no_study():
    assert importers("experiments") == set()


def test_config_is_plain_python():
    targets = {found.target.split(".")[0] for found in IMPORTS if found.module.startswith("llama_ft.config")}
    assert targets - {"llama_ft"} <= sys.stdlib_module_names  # that it imports itself alone, the layers' test sees


def test_dependencies_are_those_that_are_imported():
    providers = importlib.metadata.packages_distributions()
    imported = set()
    for found in IMPORTS:
        name = found.target.split(".")[0]
        if name != "llama_ft" and name not in sys.stdlib_module_names:
            imported |= {canonicalize_name(distribution) for distribution in providers[name]}
    declared = [*runtime_requirements(), *map(Requirement, project()["optional-dependencies"]["llama3"])]
    assert imported == {canonicalize_name(requirement.name) for requirement in declared}


def quick_modules() -> list[str]:
    """What a command imports before it knows what to do."""
    parts = (*COMMANDS, "__main__", "cli", "config", "reporting", "tracking")
    chosen = [module for module in MODULES if part_of(module) in parts]
    return [*chosen, "llama_ft.launch.process", "llama_ft.records.result"]


@pytest.mark.parametrize("module", quick_modules())
def test_no_torch_at_the_top(module):
    at_top = {found.target.split(".")[0] for found in IMPORTS if found.module == module and found.at_top}
    assert "torch" not in at_top


def test_importing_the_commands_is_quick():
    # Imported when they are needed.
    later = {f"llama_ft.{name}" for name in ("tracking.wandb_run", "tracking.wandb_sweep", "reporting.figure")}
    later |= {f"llama_ft.reporting.{name}" for name in ("curves", "page", "plan_figure", "plan_page")}
    code = "\n".join(f"import {module}" for module in quick_modules() if module not in later)
    code += "\nimport sys; print(sorted({'torch', 'wandb', 'matplotlib', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def processor_seconds() -> float:
    """Time that processes started here took, whatever else the machine did meanwhile."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("command", [name for name in COMMANDS if f"llama_ft.{name}" in MODULES])
def test_help_is_there_and_quick(tmp_path, command):
    seconds = []
    while len(seconds) < 3 and min(seconds, default=60) > SECONDS_FOR_HELP:  # again where the machine was busy
        began = processor_seconds()
        done = run(f"llama_ft.{command}", "--help", cwd=tmp_path)
        seconds.append(processor_seconds() - began)
        assert (done.returncode, done.stderr) == (0, "")
    assert min(seconds) <= SECONDS_FOR_HELP
    assert done.stdout.strip()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file", MODULE_FILES + STUDY_FILES, ids=lambda file: file.relative_to(CHECKOUT).as_posix())
def test_modules_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


# Tests and continuous integration


def test_every_file_in_tests_is_collected():
    files = sorted((CHECKOUT / "tests").rglob("*.py"))
    helpers = {"conftest.py", *(file.name for file in files if file.parent.name == "helpers")}
    not_collected = [file.name for file in files if file.name not in helpers and not file.name.startswith("test_")]
    assert not_collected == []
    assert not [name for name, count in Counter(file.name for file in files).items() if count > 1]
    for file in files:
        names = [node.name for node in ast.parse(file.read_text(encoding="utf-8")).body if hasattr(node, "name")]
        tests = [name for name in names if name.lower().startswith("test")]
        assert tests or file.name in helpers, f"{file.name} has no test"
        assert not [name for name, count in Counter(tests).items() if count > 1], f"{file.name}: a name twice"


def test_pytest_runs_all_of_them():
    options = tomllib.loads(read("pyproject.toml"))["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests"]
    assert not re.search(r"--ignore|--deselect|-k |-m ", options.get("addopts", ""))
    (command,) = re.findall(r"^test:.*\n\t(.*)$", read("Makefile"), re.MULTILINE)
    assert command == "$(BIN)/python -m pytest"


def test_ci_runs_the_readmes_test_command_and_then_the_linters():
    script = [line.strip() for line in read(".ci/run").splitlines() if line.strip() and not line.startswith("#")]
    assert script[:2] == ["set -euo pipefail", 'cd "$(dirname "$0")/.."']
    assert script[2:] == ["make test", "make lint"]
    assert re.search(r"^make test\b", read("README.md"), re.MULTILINE)
    assert (CHECKOUT / ".ci" / "run").stat().st_mode & 0o111


def test_before_a_commit_the_linters_run(tmp_path):
    """pre-commit itself, with no network, on the real configuration; what `make lint` runs is the Makefile's matter."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    recipe = re.findall(r"^lint:.*\n((?:\t.*\n)+)", read("Makefile"), re.MULTILINE)[0].split("\n\t")
    assert [line.strip() for line in recipe] == ["$(BIN)/ruff check .", "$(BIN)/ruff format --check .", "$(BIN)/mypy"]
    for name in (".pre-commit-config.yaml", "pyproject.toml"):
        shutil.copy(CHECKOUT / name, tmp_path)
    (tmp_path / "Makefile").write_text("lint:\n\ttouch was_run\n\ttest ! -e wrong.py\n")
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    variables |= {"PRE_COMMIT_HOME": str(tmp_path / ".git" / "pre-commit"), "https_proxy": "http://127.0.0.1:9"}

    def check() -> int:
        run_there = functools.partial(subprocess.run, cwd=tmp_path, env=variables, capture_output=True, timeout=60)
        run_there(["git", "add", "--all", "."], check=True)
        return run_there([sys.executable, "-m", "pre_commit", "run"]).returncode

    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, env=variables, check=True)
    assert check() == 0
    assert (tmp_path / "was_run").exists()
    (tmp_path / "wrong.py").touch()
    assert check() == 1


def tracked_files() -> list[Path]:
    """The files of the repository: tracked, or about to be."""
    git = shutil.which("git")
    if git is None or not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "-c", f"safe.directory={CHECKOUT}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    return [CHECKOUT / name for name in listed.split("\0") if name and (CHECKOUT / name).is_file()]


def test_no_paths_of_a_machine_in_the_repository():
    path = re.compile(rb"(?<![\w.~$}/-])/(?:home|root|Users|work|workspace|mnt|tmp|scratch)/[\w.]")
    found = []
    for file in tracked_files():
        content = file.read_bytes()
        if b"\0" not in content:  # text
            found += [f"{file.relative_to(CHECKOUT)}: {match.group()!r}" for match in path.finditer(content)]
    assert found == []


def test_nothing_large_or_generated_is_tracked():
    files = set(tracked_files()) - {PACKAGE / "model" / "tiny" / "model.safetensors"}  # the model in the box
    assert not [file for file in files if file.stat().st_size > 2**20]
    assert not [file for file in files if file.suffix in (".pyc", ".safetensors", ".wandb") or "outputs" in file.parts]
