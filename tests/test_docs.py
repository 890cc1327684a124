"""README and docs: every command in them composes, every message they quote is said, every link leads somewhere."""

import ast
import csv
import functools
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import MISSING
from pathlib import Path

import pytest
from conftest import CHECKOUT
from helpers.commands import single_runs
from helpers.models import trained_adapter
from omegaconf import OmegaConf

from llama_ft import cli, hub, plan
from llama_ft.config import SCHEMAS, GenerateConfig, ModelConfig, TrainConfig
from llama_ft.config.presets import preset
from llama_ft.model.sizes import hf_config
from llama_ft.reporting.table import amount

SETTINGS, FIRST_STEPS = CHECKOUT / "docs" / "settings.md", CHECKOUT / "docs" / "first_steps.md"
PAGES = [*sorted(CHECKOUT.glob("*.md")), *sorted(CHECKOUT.glob("docs/*.md")), CHECKOUT / "benchmarks" / "README.md"]
# Lines of other tools.
OTHER_LINES = (
    r"python3 -m venv \.venv",
    r"\.venv/bin/python -m pip install (--constraint requirements\.lock --editable \.|torch==\S+ --index-url \S+)",
    r'eval "\$\(llama-ft -sc install=bash\)"',  # tests/test_usage.py
    r"pip install (lm_eval|\.)",  # tests/test_install.py installs the wheel
    r"source \.venv/bin/activate",
    r"lm_eval --model hf --model_args pretrained=[\w,./=-]+ --tasks arc_easy,hellaswag --batch_size 8",
    r"pip install '\.\[(tensorboard|tune|joblib,slurm|dashboard)\]'",
    r"tensorboard --logdir outputs/\S+",
    r"wandb sync outputs/\S+/wandb/offline-run-\* outputs/\S+/wandb/offline-run-\*",
)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_lines(page: Path) -> list[str]:
    """The lines of the shell's code blocks, continued lines joined, comments cut off."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [line.partition("   #")[0].strip() for line in lines if line.strip()]


LINES = [(page.name, line) for page in PAGES for line in code_lines(page)]


def command(line: str) -> tuple[str, ...]:
    """`("train", "optim=ga")` for a line in any of the forms of a command; empty for other lines."""
    match = re.match(r"(?:srun (?:--\S+ )+)?(?:python -m llama_ft[. ]|llama-ft )(\w+)(?: |$)(.*)", line)
    return (match[1], *shlex.split(match[2])) if match else ()


def commands(name: str) -> list[tuple[str, ...]]:
    """The arguments of each `python -m llama_ft.NAME` in the docs' blocks and inline code."""
    inline = [code for page in PAGES for code in re.findall(r"`((?:python -m|llama-ft) [^`\n]+)`", text(page))]
    found = [command(line) for line in [*(line for _, line in LINES), *inline]]
    return list(dict.fromkeys(words[1:] for words in found if words[:1] == (name,)))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize(("page", "line"), LINES)
def test_every_line_is_of_a_tool_that_is_tested(page: str, line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= make_targets()
    elif command(line):
        assert command(line)[0] in SCHEMAS
    elif words[:2] == ["python", "-m"]:
        assert words[2].startswith(("benchmarks.", "experiments"))
    elif words[0].endswith("python") and words[1] == "-c":
        ast.parse(words[2])
    elif words[0] == "python":
        assert (CHECKOUT / words[1]).is_file(), line
    else:
        assert any(re.fullmatch(pattern, line) for pattern in OTHER_LINES), line


def test_readme_makes_and_trains() -> None:
    lines = {line for page, line in LINES if page == "README.md"}
    assert {"make sweep", "make test", "python -m llama_ft.train optim=ga_mp_lora"} <= lines


MakeCheckpoints = Callable[[tuple[str, ...]], None]


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeCheckpoints:
    """Makes the folders that a command names, so far as they are looked into before anything begins."""
    monkeypatch.chdir(tmp_path)
    for fetch in ("fetch", "fetch_weights"):
        monkeypatch.setattr(hub, fetch, lambda key, name: Path(name.removeprefix("hub:")))

    def make(arguments: tuple[str, ...]) -> None:
        names = [argument.partition("=")[2].removeprefix("hub:") for argument in arguments if "checkpoint=" in argument]
        is_chosen = any(argument.startswith("model=") for argument in arguments)  # else it is the default
        sizes = ModelConfig("any") if is_chosen else preset("model", "tiny", ModelConfig)
        for folder in (Path(name) for name in names if name not in ("random", "builtin")):
            folder.mkdir(parents=True)
            (folder / "config.json").write_text(json.dumps(hf_config(sizes, "float16", 1, 2)))
            (folder / "tokenizer.model").touch()

    return make


@pytest.mark.parametrize("arguments", commands("train"), ids=" ".join)
def test_train_commands_compose(checkpoints: MakeCheckpoints, arguments: tuple[str, ...]) -> None:
    if {"--help", "--config-dir"} & set(arguments) or "…" in arguments:
        return  # tests/test_usage.py; the folder is the reader's
    overrides = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    runs = list(single_runs(overrides))
    checkpoints(arguments)
    for adapter in (argument.removeprefix("adapter=") for argument in arguments if argument.startswith("adapter=")):
        Path(adapter).parent.mkdir()
        trained_adapter(Path(adapter), preset("model", "tiny", ModelConfig))
    assert runs
    is_sweep = {"-m", "--multirun"} & set(arguments) or any(each.startswith("experiment=") for each in arguments)
    assert len(runs) == 1 or is_sweep
    for single in runs:
        cli.composed_config("train", single, TrainConfig)


def test_no_folder_is_used_for_two_configurations() -> None:
    """What is given twice for a folder differs at most in going on."""
    used: dict[str, set[tuple[str, ...]]] = {}
    for arguments in commands("train"):
        folder = next((argument for argument in arguments if argument.startswith("hydra.run.dir=")), None)
        if folder:
            used.setdefault(folder, set()).add(tuple(a for a in arguments if a != "training.resume=true"))
    assert used
    assert [folder for folder, configs in used.items() if len(configs) > 1] == []


@pytest.mark.parametrize(
    ("name", "arguments"), [(name, arguments) for name in SCHEMAS if name != "train" for arguments in commands(name)]
)
def test_other_commands_compose(checkpoints: MakeCheckpoints, name: str, arguments: tuple[str, ...]) -> None:
    checkpoints(arguments)
    if name == "plan":
        assert plan.planned_runs(list(arguments))
        return
    overrides = [argument for argument in arguments if "=" in argument]
    assert len(arguments) - len(overrides) in ((1, 2) if name == "report" else (0,))  # folders
    cli.composed_config(name, overrides, SCHEMAS[name])


def test_the_docs_show_every_command() -> None:
    assert all(commands(name) for name in SCHEMAS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pictures_and_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", text(page))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_keys_in_the_text_exist(page: Path) -> None:
    """Every `section.key` that is written as code, with or without a value."""
    sections = TrainConfig.__dataclass_fields__
    no_keys = {"model.safetensors", "tracker.upload", "optim.neft"}  # a file, report's, CONTRIBUTING's example
    no_keys |= {f"plan.{ending}" for ending in ("json", "md", "csv", "png", "html")} | {"data.json", "data.md"}
    for section, key in re.findall(r"`(\w+)\.(\w+)\b", text(page)):
        factory = sections[section].default_factory if section in sections else MISSING
        if factory is not MISSING and f"{section}.{key}" not in no_keys:
            assert hasattr(factory(), key), f"{section}.{key}"


# Settings


def listed_settings() -> list[tuple[str, str]]:
    """(key, choices or default) of the rows of the table of settings."""
    rows = [line.split("|")[1:3] for line in text(SETTINGS).splitlines() if re.match(r"\| `\w", line)]
    return [(key, values.strip()) for keys, values in rows for key in re.findall(r"`([\w.]+)`", keys)]


@pytest.mark.parametrize("key", [key for key, _ in listed_settings()])
def test_listed_settings_exist(key: str) -> None:
    schema = OmegaConf.structured(GenerateConfig if key == "decoding" else TrainConfig)
    for part in key.split("."):
        assert part in schema
        schema = schema._get_node(part)


@pytest.mark.parametrize("group", [folder.name for folder in (CHECKOUT / "conf").iterdir() if folder.is_dir()])
def test_every_choice_of_a_group_is_listed(group: str) -> None:
    options = {file.stem for file in (CHECKOUT / "conf" / group).glob("*.yaml")}
    listed = {key: values for key, values in listed_settings() if "." not in key}
    if group in listed:
        assert set(re.findall(r"`(\w+)`", listed[group])) == options
    else:
        assert all(option in text(CHECKOUT / "docs" / "sweeps.md") for option in options)


# Messages


@functools.cache
def constants() -> str:
    """All text in the code, what is filled in cut out."""
    files = (CHECKOUT / "llama_ft").rglob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    return "\0".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def quoted() -> list[str]:
    headings = re.findall(r"^\*\*(.*)\*\*$", text(CHECKOUT / "docs" / "troubleshooting.md"), re.MULTILINE)
    return [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]


def test_troubleshooting_has_ten_errors() -> None:
    assert len(re.findall(r"^\*\*`", text(CHECKOUT / "docs" / "troubleshooting.md"), re.MULTILINE)) == 10


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_that_is_said(message: str) -> None:
    """Its longest part without a name or number stands in the code."""
    parts = [part.strip() for part in re.split(r"\.\.\.|\S*[\d=/]\S*|records\.jsonl", message)]
    assert max(parts, key=len) in constants()
    assert len(max(parts, key=len).split()) >= 3


BUILTIN = CHECKOUT / "benchmarks" / "builtin-cpu"


@pytest.mark.parametrize("page", ["docs/first_steps.md", "llama_ft/model/tiny/README.md"])
def test_what_the_builtin_model_can_be_taught_is_what_was_measured(page: str) -> None:
    found = {
        name: json.loads((BUILTIN / name / "evaluate.json").read_text(encoding="utf-8")) for name in ("lora", "full")
    }
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    base, lora = (f"{100 * model['exact_match']['accuracy']:.1f}" for model in found["lora"]["models"])
    full = f"{100 * found['full']['models'][1]['exact_match']['accuracy']:.1f}"
    majority = f"{100 * found['lora']['majority']['accuracy']:.1f}"
    rows = {"base": base, "LoRA": lora, "full fine-tuning": full, "the commonest answer of each task": majority}
    for name, share in rows.items():
        assert re.search(rf"^\| {name}[^|]*\| {share} ?%", text, re.MULTILINE), name
    # What the issue of a base in the box asks of it.
    assert (float(base) < 10, float(lora) >= 70, float(full) >= 80) == (True, True, True)


def test_the_five_prompts_of_the_first_steps_have_the_answers_that_were_given() -> None:
    lines = (BUILTIN / "lora" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    text = FIRST_STEPS.read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| (.+?)(?: \*(.+?)\*)? \| (.+?) \| (.+?) \| (.+?) \|$", text.partition("*input* | base")[2], re.MULTILINE
    )
    shown = [row for row in rows if any(answer["instruction"] == row[0] for answer in answers)]
    assert len(shown) == 5
    for instruction, given, _, lora, _ in shown:
        (answer,) = [a for a in answers if (a["instruction"], a["input"]) == (instruction, given)]
        assert answer["fine_tuned_answer"].strip() == lora


def cells(page: Path, title: str) -> list[list[str]]:
    """The cells of each row of a page's tables with this title."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text(page).splitlines() if "|" in line]
    return [row[1:] for row in rows if row[0] == title]


def test_table_2_of_readme_and_phase_3_is_the_one_that_was_measured() -> None:
    folder, readme, phase3 = (
        CHECKOUT / part for part in ("benchmarks/smollm2-cpu/table2", "README.md", "docs/phase3.md")
    )
    measured, planned = folder / "table2.md", folder / "comparison.md"
    for title, ours in (("Peak memory, MiB", "Peak Mem, MiB"), ("Runtime, s", "Runtime, s")):
        (row,) = cells(measured, title)
        assert cells(readme, f"{title}: measured") == [row]
        assert cells(phase3, ours)[0] == row
    assert cells(readme, "of baseline") == cells(measured, "of baseline")
    assert cells(readme, "planned") == cells(planned, "predicted")[:1]


def test_the_table_of_one_layer_is_the_one_that_was_measured() -> None:
    folder = CHECKOUT / "benchmarks" / "llama2_7b_1layer-cpu"
    section = text(CHECKOUT / "benchmarks" / "README.md").partition("## llama2_7b_1layer, CPU")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    measured = [line for line in text(folder / "table2.md").splitlines() if line.startswith("|")]
    assert [row for row in rows if not row.startswith("| planned")] == measured
    (planned,) = (row for row in rows if row.startswith("| planned"))
    assert [cell.strip() for cell in planned.strip("|").split("|")][1:] == cells(folder / "comparison.md", "predicted")[
        0
    ]
    for title in ("Peak Mem, MiB", "Runtime, s"):
        assert cells(CHECKOUT / "docs" / "phase3.md", title)[2] == cells(folder / "course.md", title)[0]


def test_the_planned_table_of_phase_3_is_the_one_in_benchmarks() -> None:
    phase3, plan = CHECKOUT / "docs" / "phase3.md", CHECKOUT / "benchmarks" / "plan-llama2_7b" / "plan.md"
    for title, ours in (("Peak memory, MiB", "Peak Mem, MiB"), ("Runtime, at best", "Runtime, s")):
        assert [cell.removesuffix(" ×") for cell in cells(phase3, ours)[1]] == cells(plan, title)[0][:8]
    marks = ["×" if cell.endswith("×") else "yes" for cell in cells(phase3, "Peak Mem, MiB")[1]]
    assert marks == cells(plan, "Fits")[0][:8]


def test_the_readmes_plan_is_the_one_in_benchmarks() -> None:
    folder = CHECKOUT / "benchmarks" / "plan-llama2_7b"
    with (folder / "plan.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[:8]
    block = text(CHECKOUT / "README.md").partition("## Will it fit?")[2].split("```")[3].splitlines()
    printed = {line[:16].strip(): line[16:].split() for line in block}
    for title, key in (("Peak memory, MiB", "peak_memory_mib"), ("Needed, MiB", "required_mib")):
        assert printed[title] == [f"{float(row[key]):,.0f}" for row in rows]
    assert printed["Fits"] == ["yes" if row["fits"] == "True" else "×" for row in rows]
    assert printed["Runtime, at best"] == [amount(float(row["runtime_s"])) for row in rows]


def test_the_guides_plans_are_those_in_benchmarks() -> None:
    """The rows of its table, by the combination at their beginning; and what it says of longer samples."""
    page = re.sub(r"[ \n]+", " ", text(CHECKOUT / "docs" / "guide.md"))
    plans = []
    for folder in ("plan-rtx4090_24gb", "plan-rtx4090_24gb-512"):
        with (CHECKOUT / "benchmarks" / folder / "plan.csv").open(encoding="utf-8") as file:
            plans.append({row["combination"]: row for row in csv.DictReader(file)})
    rows = re.findall(r"\| `(\w+)`: [^|]* \| ([\d,]+) \| (×|yes) \| ([\d.]+) \|", page)
    assert len(rows) == 7
    for combination, needed, fits, seconds in rows:
        row = plans[0][combination]
        assert needed == f"{float(row['required_mib']):,.0f}"
        assert fits == {"True": "yes", "False": "×"}[row["fits"]]
        assert seconds == amount(float(row["runtime_s"]))
    for combination, spare in (("ga_mp_lora", ", which leaves 2,519"), ("ga_mp_lora_gc", "")):
        row = plans[1][combination]
        assert row["fits"] == "True"
        assert f"{float(row['required_mib']):,.0f} MiB" in page
        assert not spare or (spare in page and float(row["margin_mib"]) == 2519)
    advice = text(CHECKOUT / "benchmarks" / "plan-rtx4090_24gb" / "plan.md").partition("### goal=fit")[2]
    assert "optim=ga_mp_lora (" in advice
    assert "training.micro_batch_size=6" in advice
    longest = re.search(r"data\.max_length=(\d+)", advice)
    assert longest
    assert f"{int(longest[1]):,} tokens" in page
