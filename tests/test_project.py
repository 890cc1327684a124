"""The project around the code: dependencies, layers, imports, sizes of files, and what is tracked."""

import ast
import functools
import importlib.metadata
import re
import resource
import shutil
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import CHECKOUT, run
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from llama_ft import __version__

FOLDERS = ("llama_ft", "experiments", "dev", "benchmarks")
MAX_LINES, MAX_FUNCTION_LINES = 250, 40
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


def test_direct_dependencies_are_locked_at_allowed_versions():
    for requirement in direct_requirements():
        version = locked().get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not locked"
        assert requirement.specifier.contains(version, prereleases=True)
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
    """What the package with its extras brings along is all pinned: no machine and no day gives another set."""
    found: dict[str, set[str]] = {}  # the extras that were followed, by package
    following = direct_requirements()
    while following:
        requirement = following.pop()
        name = canonicalize_name(requirement.name)
        if name not in found or requirement.extras - found[name]:
            found[name] = found.get(name, set()) | requirement.extras
            following += map(Requirement, needed_by(requirement))
    assert found.keys() == locked().keys()


def test_make_and_conda_install_alike():
    environment = yaml.safe_load(read("environment.yml"))
    assert environment["name"] == project()["name"]
    python, pip, packages = environment["dependencies"]  # every package comes by pip, from the lock
    assert (pip, list(packages)) == ("pip", ["pip"])
    constraint, editable = packages["pip"]
    quoted = editable.replace(" ", " '") + "'"
    assert constraint == "--constraint requirements.lock"
    assert f"{constraint} {quoted}" in read("Makefile")
    allowed = SpecifierSet(project()["requires-python"])
    assert all(
        allowed.contains(version) for version in (python.partition("=")[2], "{}.{}.{}".format(*sys.version_info))
    )


def test_the_version_is_said_alike_everywhere():
    assert yaml.safe_load(read("CITATION.cff"))["version"] == __version__
    assert re.findall(r"^## \[(\d.+?)\]", read("CHANGELOG.md"), re.MULTILINE)[0] == __version__


# Imports


class Import(NamedTuple):
    """An import statement."""

    module: str  # who imports
    target: str  # what, as far as it is a module


def module_name(file: Path) -> str:
    parts = file.relative_to(CHECKOUT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for folder in FOLDERS for file in sorted((CHECKOUT / folder).rglob("*.py"))}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}


def targets_of(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports within the package are absolute"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in MODULES else str(node.module)


def imports_of(module: str) -> Iterator[Import]:
    for node in ast.walk(TREES[module]):
        for target in targets_of(node):
            yield Import(module, target)


IMPORTS = [found for module in MODULES for found in imports_of(module)]
OWN_IMPORTS = [found for found in IMPORTS if found.target in MODULES and found.target != found.module]
LIBRARY_IMPORTS = [found for found in IMPORTS if found.module.startswith("llama_ft")]

COMMANDS = ("data", "train", "generate", "evaluate", "plan", "report", "convert")
# From the bottom up. An import points to a lower layer, or stays within its own, where parts make no cycle.
LAYERS = [
    ("config", "system"),
    ("files", "kernels", "device", "gguf_file", "bitsandbytes"),
    ("records", "hub"),
    ("model", "data"),
    ("techniques",),
    ("parallel",),
    ("measure", "training", "decoding", "evaluation", "exporting"),
    ("reporting", "planning", "launch", "tracking"),
    ("api",),
    ("cli",),
    (*COMMANDS[1:], "__main__"),  # of data, a package too, the command is its __main__
]
LAYER = {part: layer for layer, parts in enumerate(LAYERS) for part in parts} | {"": -1}  # llama_ft: the version


def part_of(module: str) -> str:
    """`model` for `llama_ft.model.weights`; empty for `llama_ft` itself; `__main__` for what runs a package."""
    if module.endswith(".__main__"):
        return "__main__"
    return module.removeprefix("llama_ft").lstrip(".").partition(".")[0]


ARROWS = {
    (part_of(found.module), part_of(found.target))
    for found in OWN_IMPORTS
    if found.module.startswith("llama_ft.") and part_of(found.module) != part_of(found.target)
}


def test_imports_point_down():
    assert {part_of(module) for module in MODULES if module.startswith("llama_ft")} <= LAYER.keys()
    assert {(part, target) for part, target in ARROWS if LAYER[target] > LAYER[part]} == set()
    # It sees the arrows that it judges.
    assert {("train", "cli"), ("measure", "training"), ("training", "data"), ("techniques", "model")} <= ARROWS


def cycles(arrows: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    """What is left of a graph when nodes without arrows are taken away, again and again."""
    remaining = defaultdict(set)
    for start, end in arrows:
        remaining[start].add(end)
    while ends := set.union(set(), *remaining.values()) - remaining.keys():
        remaining = {start: targets - ends for start, targets in remaining.items() if targets - ends}
    return dict(remaining)


def test_there_are_no_cycles():
    """Neither of parts of the library, nor of modules anywhere."""
    assert cycles([("a", "b"), ("b", "c"), ("c", "b")]) == {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert cycles(ARROWS) == {}
    assert cycles((found.module, found.target) for found in OWN_IMPORTS if found.module != "llama_ft") == {}


def importers(distribution: str) -> set[str]:
    """The parts of the library that import it."""
    return {part_of(found.module) for found in LIBRARY_IMPORTS if found.target.split(".")[0] == distribution}


def test_who_imports_what():
    assert importers("hydra") <= {*COMMANDS, "cli", "__main__"}
    assert importers("wandb") == importers("tensorboard") == {"tracking"}
    assert importers("experiments") | importers("dev") | importers("benchmarks") == set()
    assert not {"torch", "hydra"} & {f.target.split(".")[0] for f in LIBRARY_IMPORTS if part_of(f.module) == "config"}


def test_dependencies_are_those_that_are_imported():
    providers = importlib.metadata.packages_distributions()
    names = {found.target.split(".")[0] for found in LIBRARY_IMPORTS} - {"llama_ft"} - sys.stdlib_module_names
    imported = {canonicalize_name(distribution) for name in names for distribution in providers[name]}
    needed = {canonicalize_name(requirement.name) for requirement in runtime_requirements()}
    extras = [
        Requirement(line)
        for name, lines in project()["optional-dependencies"].items()
        for line in lines
        if name != "dev"
    ]
    needed -= {"safetensors"}  # torch.distributed.checkpoint imports it for us
    assert needed <= imported <= needed | {canonicalize_name(requirement.name) for requirement in extras}


@pytest.mark.process
def test_importing_the_commands_is_quick():
    modules = (*COMMANDS, "__main__", "data.__main__", "launch.process")
    code = "\n".join(f"import llama_ft.{name}" for name in modules)
    code += "\nimport sys; print(sorted({'torch', 'wandb', 'matplotlib', 'transformers'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def processor_seconds() -> float:
    """Time that processes started here took, whatever else the machine did meanwhile."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.process
@pytest.mark.parametrize("command", COMMANDS)
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


def test_files_and_functions_are_short():
    too_long = {}
    for module in [module for module in MODULES if module.startswith(("llama_ft", "experiments"))]:
        lines = len(MODULES[module].read_text(encoding="utf-8").splitlines())
        too_long |= {module: lines} if lines > MAX_LINES else {}
        for function in ast.walk(TREES[module]):
            if isinstance(function, ast.FunctionDef):
                lines = (function.end_lineno or 0) - function.lineno + 1
                too_long |= {f"{module}.{function.name}": lines} if lines > MAX_FUNCTION_LINES else {}
    assert too_long == {}


# What is tracked


def tracked_files() -> list[Path]:
    """The files of the repository: tracked, or about to be."""
    git = shutil.which("git")
    if git is None or not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "-c", f"safe.directory={CHECKOUT}", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True).stdout
    return [CHECKOUT / name for name in listed.split("\0") if name and (CHECKOUT / name).is_file()]


@pytest.mark.process
def test_no_paths_of_a_machine_in_the_repository():
    path = re.compile(rb"(?<![\w.~$}/-])/(?:home|root|Users|work|workspace|mnt|tmp|scratch)/[\w.]")
    found = []
    for file in tracked_files():
        content = file.read_bytes()
        if b"\0" not in content:  # text
            found += [f"{file.relative_to(CHECKOUT)}: {match.group()!r}" for match in path.finditer(content)]
    assert found == []


@pytest.mark.process
def test_nothing_large_or_generated_is_tracked():
    kept = {CHECKOUT / "llama_ft" / "model" / "tiny" / "model.safetensors", CHECKOUT / "outputs" / "README.md"}
    files = set(tracked_files()) - kept
    assert not [file for file in files if file.stat().st_size > 2**20]
    assert not [file for file in files if file.suffix in (".pyc", ".safetensors", ".wandb") or "outputs" in file.parts]
