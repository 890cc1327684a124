"""What users write reaches the model, the files and the terminal as they wrote it; what has no effect is said."""

import errno
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.reports import undrawn, write
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from test_config import leaf_hints

from llama_ft import cli
from llama_ft import report as report_command
from llama_ft.cli.compose import composed, composed_config
from llama_ft.cli.explain import TEXTS
from llama_ft.cli.texts import as_typed
from llama_ft.config import SCHEMAS, DataConfig, EvaluateConfig, GenerateConfig, PlanConfig, TrainConfig, UserError
from llama_ft.config.presets import preset
from llama_ft.config.train import read_config
from llama_ft.decoding.prompt_file import print_line
from llama_ft.launch import process
from llama_ft.launch.machines import Place
from llama_ft.records.metrics import METRICS_FILE, MetricsFile
from llama_ft.records.result import CONFIG_FILE, new_result

NASTY = [
    "${HOME}",
    "${3 \\over 4}$",
    "${",
    "\\${x}",
    "[###]",
    "###",
    "a, b",
    "{a: 1}",
    "it's",
    '"a" or "b"',
    "1e3",
    "true",
]
NASTY += [
    "~/x (1).json",
    " two  spaces ",
    "$\\nabla$",
    "ends in \\",
    "a=b",
    "1_000",
    "<s>, </s>",
    "\n\t",
    "choice(1,2)",
]
pieces = st.sampled_from([*"${}[]()\\\"',:=#~ \n\té", "ab", "${"])
texts = st.lists(pieces, min_size=1, max_size=12).map("".join)


def read(argument: str) -> Any:
    """What Hydra and OmegaConf make of an argument of `generate` once it has been through `as_typed`."""
    override = OverridesParser.create().parse_override(*as_typed([argument], GenerateConfig))
    return OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)["value"]


# Texts as they are typed


@given(texts)
def test_a_text_in_quotes_is_what_is_between_them(text: str) -> None:
    halved = text.replace("\\", "/")  # backslashes before a quote are doubled, as in any shell
    for quote in "\"'":
        escaped = halved.replace(quote, f"\\{quote}")
        assert read(f"prompt={quote}{escaped}{quote}") == halved
        assert read(f"decoding.stop=[{quote}{escaped}{quote}, x]") == [halved, "x"]


@given(texts.filter(lambda text: text[0] not in "\"' \n\t" and text[-1] not in "\"' \n\t"))
def test_a_text_without_quotes_is_all_that_is_typed(text: str) -> None:
    assert read(f"prompt={text}") == text
    item = text.replace(",", ";")
    assert read(f"decoding.stop=[{item},x]") == [item, "x"]


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_that_takes_texts_takes_any(command: str) -> None:
    hints = dict(leaf_hints(SCHEMAS[command]))
    keys = [key for key, hint in hints.items() if hint in TEXTS and key != "recipe"]  # which is a choice of a group
    lists = [key for key, hint in hints.items() if hint == list[str]]
    assert keys or lists
    for text in NASTY:
        item = f'"{text}"' if "," in text or text != text.strip() else text
        typed = [f"{key}={text}" for key in keys] + [f"{key}=[{item}]" for key in lists]
        config = composed(command, as_typed(typed, SCHEMAS[command]))
        assert {key: OmegaConf.select(config, key) for key in keys} == dict.fromkeys(keys, text)
        assert {key: list(OmegaConf.select(config, key)) for key in lists} == {key: [text] for key in lists}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("prompt=null", None),
        ('prompt="null"', "null"),
        ("decoding.stop=###", ["###"]),
        ("decoding.stop=[]", []),
        ("decoding.stop=[null]", ["null"]),
        ("decoding.stop=[[INST],</s>]", ["[INST]", "</s>"]),
        ("decoding.stop=[don't,can't]", ["don't", "can't"]),
        ("decoding.stop=\n", ["\n"]),
        ("decoding.stop=[\n]", ["\n"]),
        ("decoding.stop=[ ###, \nUser:,\n\n]", ["###", "\nUser:", "\n\n"]),
        ('decoding.stop="a, b"', ["a, b"]),
    ],
)
def test_null_and_lists(argument: str, value: Any) -> None:
    assert read(argument) == value


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("decoding.stop=null", "must be a list"),
        ("prompt=???", "marks a missing value"),
        ("decoding.stop=[a,???]", "???"),
    ],
)
def test_what_cannot_be_a_text_is_refused(argument: str, reason: str) -> None:
    with pytest.raises((UserError, HydraException)) as refused:
        composed_config("generate", ["prompt=x", argument], GenerateConfig)
    explained = cli.explain(refused.value, GenerateConfig)
    assert explained.startswith(f"{argument.partition('=')[0]}=")
    assert reason in explained


def test_texts_in_a_sweep_are_separated_by_commas() -> None:
    for typed, values in {
        "${x}.json,b c.json": ["${x}.json", "b c.json"],
        '"a,b.json", ~/c.json': ["a,b.json", "~/c.json"],
        "1e3,null": ["1e3", None],
    }.items():
        (argument,) = as_typed([f"data.path={typed}"], TrainConfig, sweeps=True)
        override = OverridesParser.create().parse_override(argument)
        runs = [f"data.path={value}" for value in override.sweep_string_iterator()]
        paths = [OmegaConf.select(composed("train", [run]), "data.path") for run in runs]
        assert paths == values
    plain = ["data.path=a.json,b.json", "data.path=glob(*)", "lora.targets=[wq],[wq,wv]", "-m", "training.lr=1,2"]
    assert as_typed(plain, TrainConfig, sweeps=True) == plain  # so that runs keep their names


@pytest.mark.parametrize("text", NASTY)
def test_config_yaml_holds_texts_as_they_are(tmp_path: Path, text: str) -> None:
    config = preset_config(tracker={"notes": text, "tags": [text]}, checkpoint=text, data={"name": "x", "path": text})
    (tmp_path / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    assert read_config(tmp_path / CONFIG_FILE) == config
    assert preset("data", "alpaca", DataConfig, path=text).path == text


def preset_config(**changes: Any) -> TrainConfig:
    """The default run with some sections changed, made without OmegaConf."""
    config = cli.composed_config("train", [], TrainConfig)
    for key, value in changes.items():
        for name, part in value.items() if isinstance(value, dict) else []:
            setattr(getattr(config, key), name, part)
        if not isinstance(value, dict):
            setattr(config, key, value)
    return config


# What has no effect, or another one than was meant


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("train", "lora.rank=8 lora.alpha=16", "lora.rank, lora.alpha: no effect without optim.lora=true"),
        ("train", "ga.steps=4", "ga.steps: no effect without optim.ga=true"),
        ("train", "++mp.dtype=bf16 optim=lora", "mp.dtype: no effect without optim.mp=true"),
        ("train", "gc.every=2", "gc.every: no effect without optim.gc=true"),
        ("train", "neft.alpha=2", "neft.alpha: no effect without optim.neft=true"),
        ("train", "lora.rank=8 optim=lora gc.every=2 optim.gc=true", None),
        ("plan", "lora.rank=8 gc.every=2 both=[gc]", None),
        ("plan", "gc.every=2", "gc.every: no effect without optim.gc=true"),
        ("plan", "lora.rank=8 optim=ga combinations=one", "lora.rank: no effect without optim.lora=true"),
        (
            "train",
            "mp.frozen_weights=fp32 optim=mp",
            "mp.frozen_weights: no effect without optim.mp=true and optim.lora",
        ),
        ("train", "mp.frozen_weights=fp32 optim=mp_lora", None),
        ("plan", "mp.frozen_weights=fp32 gc.every=2 both=[gc]", None),
        ("train", "training.momentum=0.5", "training.momentum: no effect without training.optimizer=sgd"),
        ("train", "training.momentum=0.5 training.optimizer=adamw", "training.momentum: no effect without"),
        ("train", "training.momentum=0.5 training.optimizer=sgd", None),
        ("train", "training.eval_every=5", "training.eval_every: no effect without data.validation"),
        ("train", "training.eval_every=5 data.validation=0.1", None),
        ("train", "data.url=http://a/b data.path=c", "data.url: no effect without data.path=null"),
        ("train", "data.git_blob_id=a", "data.git_blob_id: no effect without data.url and data.path=null"),
        ("train", "data=alpaca data.cache_dir=a", None),
        (
            "train",
            "gpu=cpu gpu.index=0 plan.enforce=false",
            "gpu.index, plan.enforce: no effect without gpu.device=auto|",
        ),
        ("train", "gpu.index=0 plan.enforce=false", None),
        ("train", "tracker=disabled tracker.tags=[a]", "tracker.tags: no effect without tracker.kind=wandb"),
        ("train", "tracker=tensorboard tracker.group=a tracker.mode=online", "tracker.group, tracker.mode: no effect"),
        ("train", "tracker.project=a tracker.notes=b", None),
        ("plan", "model.rope_original_context=64", "model.rope_original_context: no effect without model.rope_factor"),
        ("plan", "model=llama3_2_1b model.rope_original_context=64", None),
        ("train", "experiment=table2 lora.rank=4 optim=lora", None),
        ("generate", "prompt=a template=plain", "template: no effect without prompt=null"),
        ("generate", "instruction=a template=plain", None),
        ("generate", "prompt=a decoding.seed=1", "decoding.seed: no effect without decoding.sample=true"),
        ("generate", "prompt=a decoding.seed=1 decoding=top_p", None),
        ("generate", "prompt=a batch_size=2", "batch_size: no effect without prompts=FILE"),
        ("evaluate", "exact_match=false max_new_tokens=2", "max_new_tokens: no effect without exact_match=true"),
        (
            "generate",
            r"instruction=a input=a\nb",
            "input: a backslash stays a backslash; for a line break type, in bash, $",
        ),
        ("generate", r"prompt=a decoding.stop=[\n]", "decoding.stop: a backslash stays a backslash"),
        ("generate", "prompt=a\n decoding.stop=[\n]", None),
    ],
)
def test_what_would_surprise_is_said(
    capsys: pytest.CaptureFixture[str], command: str, arguments: str, said: str | None
) -> None:
    schemas = {"train": TrainConfig, "plan": PlanConfig, "generate": GenerateConfig, "evaluate": EvaluateConfig}
    cli.composed_config(command, arguments.split(" "), schemas[command])  # type: ignore[type-var]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (said is not None)
    assert said is None or lines[0].startswith(said)


def test_a_report_that_sends_nothing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "lora")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["report", "~", "tracker.project=mine"])
    with undrawn():
        assert report_command.main() == 0
    assert (
        capsys.readouterr().err
        == "tracker.project=mine: no effect without tracker.upload=true or tracker.dashboard=true\n"
    )


# What a file of the user's is called


@pytest.mark.parametrize(
    ("arguments", "name"), [((), "sample"), (("data.path=~/my.json",), "my.json"), (("data=alpaca",), "alpaca")]
)
def test_data_is_called_by_its_file_where_no_name_is_given(arguments: tuple[str, ...], name: str) -> None:
    config = cli.composed_config("train", list(arguments), TrainConfig)
    assert new_result(config, "").data == config.data.title == name
    assert config.data.name == ("sample" if "data=alpaca" not in arguments else "alpaca")


# Terminals


def printed(monkeypatch: pytest.MonkeyPatch, encoding: str, function: Callable[[], Any]) -> bytes:
    """What a command prints on a terminal of this encoding."""
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
        patch.setattr(sys, "argv", ["generate"])
        patch.setattr(cli.signal, "signal", lambda *_: None)
        patch.setenv("HYDRA_FULL_ERROR", "0")
        with pytest.raises(SystemExit) as ended:
            cli.run_command(lambda: function() or 0, cli.Usage("generate", "", "", GenerateConfig, ()))
        sys.stdout.flush()
        content = raw.getvalue()
    assert ended.value.code == 0
    return content


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_no_answer_is_lost_to_a_terminals_encoding(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    record = {"answer": "“ναί” caf\u00e9 \U0001f98a\ud83d"[:-1]}
    line = json.dumps(record, ensure_ascii=False) + "\n"
    assert json.loads(printed(monkeypatch, encoding, lambda: print_line(line)).decode(encoding)) == record
    answer = printed(monkeypatch, encoding, lambda: print(record["answer"])).decode(encoding)
    assert answer.encode("ascii", "backslashreplace") == record["answer"].encode("ascii", "backslashreplace") + b"\n"


def test_a_run_talks_to_its_parent_in_utf_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert process.child_environment(on_cpu=True)["PYTHONIOENCODING"].startswith("utf-8")


# Messages


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_saving_is_said_only_where_something_is_saved(
    tmp_path: Path, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch, resumed: bool, trains: bool
) -> None:
    """An interrupt in the dry run saves nothing, also where an earlier run left its metrics."""
    if resumed:
        (tmp_path / METRICS_FILE).touch()

    def interrupted(*_: Any) -> None:
        if trains:
            MetricsFile(tmp_path / METRICS_FILE)
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "start", lambda *_: type("Child", (), {"returncode": 1}))
    monkeypatch.setattr(process, "watch", interrupted)
    monkeypatch.setattr(process, "stop", lambda *_: None)
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        process.run_in_child(tiny_config, Place(tmp_path, tmp_path, 0), "", False, lines.append, lambda _: None)
    assert any("saving it" in line for line in lines) == trains


def test_a_cause_is_quoted_once() -> None:
    cause = OSError(errno.ENOENT, "No such file or directory", "x.json")
    error = UserError("data file x.json cannot be read: No such file or directory")
    error.__cause__ = cause
    assert cli.explain(error) == str(error)
    outer = ValueError("Error in call")
    outer.__cause__ = error
    assert cli.explain(outer) == f"Error in call: {error}"
