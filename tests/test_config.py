"""The configuration: every YAML file, what is refused and how, defaults, hashes and the names of runs."""

import enum
import itertools
import json
import re
import shlex
import signal
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import CHECKOUT, run
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from llama_ft import cli
from llama_ft import train as train_module
from llama_ft.cli.compose import composed
from llama_ft.cli.explain import RENAMED, setting_of
from llama_ft.cli.job import Job
from llama_ft.config import (
    SCHEMAS,
    Dtype,
    GenerateConfig,
    MixedPrecisionConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    TrainConfig,
    UserError,
)
from llama_ft.config.content import content_hash
from llama_ft.config.train import read_config
from llama_ft.launch.interrupts import QUEUE_SIGNALS
from llama_ft.model.transformer import Transformer
from llama_ft.records.result import CONFIG_FILE, Result, new_result

CONF = CHECKOUT / "conf"
YAML_FILES = sorted(file.relative_to(CONF).with_suffix("").as_posix() for file in CONF.rglob("*.yaml"))
OPTIONS = [name for name in YAML_FILES if "/" in name]  # the choices of groups
GLOBAL = ("experiment", "recipe")  # groups whose choices set keys of any section
# Models and data that are not built in must be told these.
TOLD = ["checkpoint=random", "tokenizer=tokenizer.model", "data.path=records.json"]
PRESETS = {"_".join(names) or "baseline" for n in range(4) for names in itertools.combinations(("ga", "mp", "lora"), n)}


def checked(*overrides: str) -> TrainConfig:
    """What `train` makes of the command line."""
    return cli.composed_config("train", list(overrides), TrainConfig)


def leaf_hints(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every value in the schema, however deep."""
    hints = get_type_hints(schema)
    for entry in fields(schema):
        hint = hints[entry.name]
        if is_dataclass(hint):
            yield from leaf_hints(hint, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name, hint


LEAVES = dict(leaf_hints(TrainConfig))

# Every file


def test_every_yaml_file_is_in_a_known_place():
    assert not list(CONF.rglob("*.yml"))
    groups = {option.rpartition("/")[0] for option in OPTIONS}
    assert groups == {
        "model",
        "optim",
        "training",
        "data",
        "gpu",
        "parallel",
        "tracker",
        "recipe",
        "experiment",
        "decoding",
    }


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_command_has_a_config(command):
    needed = {"generate": ["prompt=Hello"], "convert": ["model=tiny", "to=hf", "output=there"]}.get(command, [])
    assert isinstance(cli.composed_config(command, needed, SCHEMAS[command]), SCHEMAS[command])


def test_train_runs_anywhere_by_default():
    config = checked()
    assert (config.model.name, config.optim.combination, config.data.name) == ("tiny", "baseline", "sample")
    assert config.checkpoint == "builtin"
    assert config.tokenizer_file.is_file()
    assert config.max_length == config.model.max_seq_len


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_and_its_values_arrive(option):
    group, _, name = option.rpartition("/")
    command = {"decoding": "generate", "gpu": "plan"}.get(group, "train")
    config = composed(command, [f"{group}={name}", *(["prompt=Hello"] if command == "generate" else TOLD)])
    assert isinstance(OmegaConf.to_object(config), SCHEMAS[command])
    values = OmegaConf.load(CONF / f"{option}.yaml") or {}
    section = OmegaConf.to_container(config, enum_to_str=True) if group in GLOBAL else config[group]
    for key in set(values) - {"defaults", "hydra"}:
        if group in GLOBAL and key != "recipe":
            assert values[key].items() <= section[key].items()
        else:
            assert section[key] == values[key] or getattr(section[key], "name", None) == values[key]
    if group in ("model", "data", "gpu"):
        assert section.name == name


@pytest.mark.parametrize("option", [name for name in OPTIONS if name.split("/")[0] not in ("model", "optim")])
def test_no_yaml_file_repeats_a_default(option):
    group = option.rpartition("/")[0]
    schema = OmegaConf.structured(GenerateConfig if group == "decoding" else TrainConfig)
    defaults = OmegaConf.to_container(schema if group in GLOBAL else schema[group], enum_to_str=True)
    values = OmegaConf.to_container(OmegaConf.load(CONF / f"{option}.yaml")) or {}
    repeated = [key for key in values if key not in ("defaults", "hydra") and values[key] == defaults[key]]
    # The course's run stays the course's, whatever the defaults become.
    assert repeated == ([] if option != "training/course" else ["lr", "epochs", "micro_batch_size"])


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_is_what_its_name_says(preset):
    assert (CONF / "optim" / f"{preset}.yaml").is_file()
    optim = checked(f"optim={preset}").optim
    assert optim == OptimConfig(**{name: name in preset.split("_") for name in ("ga", "mp", "lora", "gc")})
    assert optim.combination == preset


# The models


PUBLISHED_PARAMETERS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_8b": 8_030_261_248,
    "mistral_7b": 7_248_023_552,
    "qwen2_5_7b": 7_615_616_512,
    "qwen3_8b": 8_190_735_360,
    "tinyllama_1b": 1_100_048_384,
    "llama2_7b_1layer": 2 * 32000 * 4096 + 4 * 4096**2 + 3 * 4096 * 11008 + 3 * 4096,
}


def parameter_count(name: str) -> int:
    with torch.device("meta"):
        model = Transformer(checked(f"model={name}", *TOLD).model)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", [o.removeprefix("model/") for o in OPTIONS if re.match("model/(?!tiny$|from_)", o)])
def test_parameter_count_is_the_published_one(name):
    assert parameter_count(name) == PUBLISHED_PARAMETERS[name]


@pytest.mark.parametrize(("name", "context"), [("tiny", 1024), ("llama2_7b", 4096), ("tinyllama_1b", 2048)])
def test_published_context_and_constants(name, context):
    model = checked(f"model={name}", *TOLD).model
    assert (model.max_seq_len, model.norm_eps, model.rope_theta) == (context, 1e-5, 10000.0)


# Checkpoint, tokenizer and lengths


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ([], "checkpoint=DIR"),
        (["tokenizer=t.model"], "checkpoint=random"),
        (["checkpoint=random"], "tokenizer=FILE"),
        (["checkpoint=builtin", "tokenizer=t.model"], "checkpoint=DIR"),
    ],
)
def test_models_that_are_not_built_in_must_be_told(given, wanted):
    with pytest.raises(UserError, match=wanted) as error:
        checked("model=llama2_7b", *given)
    assert "model=llama2_7b" in str(error.value)


def test_other_models_take_what_they_are_told():
    config = checked("model=llama2_7b", "checkpoint=weights", "tokenizer=some/tokenizer.model")
    assert config.checkpoint == "weights"
    assert config.tokenizer_file == Path("some/tokenizer.model")


def test_course_data_and_training():
    config = checked("data=alpaca_200", "data.path=alpaca_data.json", "training=course")
    assert (config.data.first, config.training.max_samples, config.training.epochs) == (200, 200, 1)
    assert (config.training.lr, config.training.micro_batch_size) == (1e-5, 1)


# What is refused, through the command itself


@dataclass
class Outcome:
    """How a command ended, and which runs it would have trained."""

    status: int
    output: str = ""
    error: str = ""
    folders: list[str] = field(default_factory=list)
    configs: list[TrainConfig] = field(default_factory=list)

    @property
    def last_line(self) -> str:
        return self.error.strip().splitlines()[-1]


@pytest.fixture
def train(tmp_path, monkeypatch, capsys) -> Iterator[Callable[..., Outcome]]:
    """The real command in this process and in an empty folder, except that runs are noted instead of trained."""
    handlers = {number: signal.getsignal(number) for number in QUEUE_SIGNALS}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_module, "report_sweep", lambda *_: [])
    monkeypatch.setattr(train_module, "records", lambda _: ([], []))
    monkeypatch.setattr(train_module, "track_sweep", lambda *_: None)

    def command(*arguments: str) -> Outcome:
        outcome = Outcome(status=-1)

        def note(job: Job, config: TrainConfig, _: Any) -> Result:
            outcome.folders.append(job.run_dir.name)
            outcome.configs.append(config)
            result = new_result(config, "")
            result.status = "ok"
            return result

        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command itself sets it
        monkeypatch.setattr(Job, "run", note)
        monkeypatch.setattr(sys, "argv", ["llama_ft.train", "tracker=disabled", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.run_command(train_module.main, train_module.USAGE)
        outcome.status, (outcome.output, outcome.error) = ended.value.code, capsys.readouterr()
        return outcome

    yield command
    for number, handler in handlers.items():
        signal.signal(number, handler)


WHOLE, NUMBER, SWITCH = "int|whole", "float|number", "true & false"
# (command line, the key, the value, what is allowed: regular expressions joined by " & ")
WRONG_KEY = [
    ("training.learning_rate=1", "training.learning_rate", "", r"training has lr, epochs, micro_batch_size"),
    ("optim.GA=true", "optim.GA", "", r"\bga\b & \bmp\b & \blora\b & \bgc\b"),
    ("promt=x", "promt", "", "model & optim & training & checkpoint"),
    ("training.epoch=2", "training.epoch is not a key", "", r"did you mean training\.epochs\?"),
    ("+training.lrr=1", "training.lrr is not a key", "", r"did you mean training\.lr\?"),
    ("+promt=x", "promt", "", "not a key"),
    ("trainng.lr=1", "trainng.lr is not a key", "", r"did you mean training\.lr\? the config has"),
    ("+trainng.lr=1", "trainng.lr is not a key", "", r"did you mean training\.lr\?"),
    ("lora.rnk=4", "lora.rnk is not a key", "", r"did you mean lora\.rank\?"),
    ("training.lr.x=1", "training.lr.x is not a key", "", "none"),
    ("promt=a!(b)", "promt is not a key", "", "the config has"),
    ("hydra.launcher.n_jobs=2", "hydra.launcher.n_jobs is not a key", "", "--cfg hydra"),
]
WRONG_CHOICE = [
    ("optim=all", "optim", "all", "baseline & ga_mp_lora"),
    ("model=llama3", "model", "llama3", "one of from_checkpoint, llama2_13b & tiny"),
    ("gpu=a1000", "gpu", "a1000", "auto & cpu"),
    ("experiment=table9", "experiment", "table9", "table2"),
    ("mp.dtype=int8", "mp.dtype", "int8", "one of auto, bf16, fp16$"),
    ("mp.dtype=fp32", "mp.dtype", "fp32", "one of auto, bf16, fp16$"),
    ("mp.frozen_weights=16", "mp.frozen_weights", "16", "one of compute, fp32, nf4, fp4$"),
    ("data.on_bad_record=ignore", "data.on_bad_record", "ignore", "error & skip"),
    ("gpu.device=tpu", "gpu.device", "tpu", "auto & cpu & cuda"),
    ("tracker.mode=on", "tracker.mode", "on", "auto & online & offline"),
    ("optim=[ga,mp]", "optim", "ga,", "baseline & ga_mp_lora"),
    ("data=mydata.json", "data", "mydata.json", "alpaca & for a file give data.path=mydata.json$"),
    ("data=~/my.json", "data", "~/my.json", "for a file give data.path=~/my.json$"),
    ("model=/models/llama", "model", "/models/llama", "hub:ORG/NAME, for a folder checkpoint=/models/llama$"),
    ("hydra/launcher=ray", "hydra/launcher", "ray", "one of basic, joblib, submitit_local, submitit_slurm, & plugin"),
    ("hydra/sweeper=ax", "hydra/sweeper", "ax", "it must be one of basic, optuna, & plugin"),
    ("sweep.objective=loss", "sweep.objective", "loss", "eval_loss, peak_memory_mib, runtime_s & a list"),
    ("sweep.objective=[runtime_s,runtime_s]", "sweep.objective", "runtime_s,runtime_s", "eval_loss"),
    ("sweep.objective=[runtime_s,eval_loss]", "sweep.objective", "eval_loss", "data.validation"),
]
WRONG_TYPE = [
    ("training.lr=fast", "training.lr", "fast", NUMBER),
    ("training.epochs=1.5", "training.epochs", "1.5", WHOLE),
    ("training.epochs=true", "training.epochs", "true", WHOLE),
    ("training.micro_batch_size=null", "training.micro_batch_size", "null", WHOLE),
    ("lora.targets=[wq", "lora.targets=[wq", "", r"a list, such as \[a,b\]"),
    ("data.path=", "data.path= is not allowed", "", "a text"),  # "data.path=$FILE" where FILE is not set
    ("ga=4", "ga", "4", r"ga\.steps|steps"),
    ("optim.ga=1", "optim.ga", "1", SWITCH),
    ("optim.mp=yes", "optim.mp", "yes", SWITCH),
    ("optim.lora=maybe", "optim.lora", "maybe", SWITCH),
    ("++optim.ga=1", "optim.ga", "1", SWITCH),
    ("optim={ga:1}", "optim", "1", r"true|ga_mp_lora|optim\.ga"),
]
TOO_SMALL = [
    (f"{key}={value}", key, str(value), "at least|positive|0 or more")
    for keys, value in {
        "ga.steps gc.every lora.rank training.epochs training.micro_batch_size training.max_samples data.first": 0,
        "model.dim model.n_layers model.n_heads model.n_kv_heads model.ffn_dim model.vocab_size model.max_seq_len": 0,
        "measure.memory_limit_mib": 0,
        "training.seed training.weight_decay training.lr lora.alpha training.max_grad_norm lora.dropout": -1,
        "data.max_length": 1,
    }.items()
    for key in keys.split()
]
OUT_OF_RANGE = [
    ("training.warmup_ratio=1.5", "training.warmup_ratio", "1.5", "between 0 and 1"),
    ("training.lr=inf", "training.lr", "inf", "finite|below"),
    ("lora.dropout=1", "lora.dropout", "1", "below 1"),
    ("lora.targets=[]", "lora.targets", "[]", "one name or more"),
    ("data.max_length=1025", "data.max_length", "1025", "at most model.max_seq_len=1024"),
    ("model.dim=100", "model.dim", "100", "multiple of model.n_heads=6"),
    ("model.n_kv_heads=4", "model.n_kv_heads", "4", "divisor of 6"),
    ("model.n_heads=192", "model.dim", "192", "even"),
    ("mp.dtype=fp16 mp.trainable_weights=compute", "mp.trainable_weights", "compute", "fp32 with mp.dtype=fp16"),
    ("optim.gc=true gc.policy=selective training.compile=true", "gc.policy", "selective", "leave one of them out"),
    ("model=llama2_7b", "model", "llama2_7b", "checkpoint=DIR & checkpoint=random"),
    ("data=alpaca_200 data.url=null", "data", "alpaca_200", "data.path=FILE"),
]
NAN = [
    (f"{key}=nan", key, "nan", "positive|between|at least|0 or more") for key, hint in LEAVES.items() if hint is float
]
GONE = [(old if "=" in old else f"{old}=4", old, "", "no longer exists: use ") for old in RENAMED if "." in old]
REFUSED = WRONG_KEY + WRONG_CHOICE + WRONG_TYPE + TOO_SMALL + OUT_OF_RANGE + NAN + GONE


@pytest.mark.parametrize(("arguments", "key", "value", "allowed"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused(arguments, key, value, allowed):
    with pytest.raises((UserError, HydraException, OmegaConfBaseException)) as error:
        checked(*arguments.split())
    line = cli.explain(error.value)
    assert "\n" not in line
    assert key in line
    assert value.lower() in line.lower()
    assert all(re.search(part, line, re.IGNORECASE) for part in allowed.split(" & "))


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("training.epoch=1", "error: training.epoch is not a key; did you mean training.epochs? training has lr, "),
        ("optim.ga=1", "error: optim.ga=1 is not allowed: it must be true or false"),
        ("training.lr=nan", "error: training.lr=nan is not allowed: it must be positive and finite"),
        ("optim=lora,mp", "error: optim=lora,mp: several values need -m "),
    ],
)
def test_refused_by_the_command(train, tmp_path, argument, line):
    outcome = train(argument, "hydra.run.dir=out")
    assert (outcome.status, outcome.folders, outcome.error.count("\n")) == (2, [], 1)
    assert outcome.last_line.startswith(line)
    assert_nothing_but_a_result(tmp_path, outcome.last_line)


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (("data.path=~/x.json",), ["~/x.json"]),
        (("data.path=it's ${x}.json",), ["it's ${x}.json"]),
        (("data.path=a,lora.rank=4",), ["a,lora.rank=4"]),
        (("-m", "data.path=a${,'b,c'", "training.lr=1,2"), ["a${", "a${", "b,c", "b,c"]),
    ],
)
def test_the_command_takes_texts_as_they_are_typed(train, typed, read):
    assert [config.data.path for config in train(*typed).configs] == read


def test_special_characters_of_hydras_keys_need_the_quotes_that_the_error_gives(train):
    refused = train("hydra.run.dir=out (1)")
    assert (refused.status, refused.folders) == (2, [])
    (advice,) = shlex.split(refused.last_line.partition("special characters need quotes, such as ")[2])
    assert train(advice).folders == ["out (1)"]


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ("lora.rank=4", 1),
        ("-m lora.rank=4,8", 1),
        ("-m optim=ga,lora lora.rank=4", 0),
        ("-m optim.ga=true,false lora.rank=4", 1),
        ("-m optim.lora=true,false lora.rank=4", 0),
        ("-m optim=baseline,ga lora.rank=4", 1),
        ("-m optim=glob(*) lora.rank=4", 0),
        ("-m optim=glob(*,exclude=*lora) lora.rank=4", 1),
        ("-m optim=ga optim.lora=true,false lora.rank=4", 0),
        ("experiment=table2 lora.rank=4", 0),
        ("experiment=table2 optim=ga,mp lora.rank=4", 1),
        ("-m training.lr=1e-3,1e-4 training.seed=range(3) lora.rank=4", 1),
    ],
)
def test_numbers_of_a_technique_that_no_run_uses_are_named_once(train, arguments, count):
    assert train(*arguments.split()).output.count("lora.rank: no effect without optim.lora=true") == count


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            "-m optim=mp,lora mp.frozen_weights=fp32",
            "mp.frozen_weights: no effect without optim.mp=true and optim.lora",
        ),
        ("-m optim=ga,mp_lora mp.frozen_weights=fp32", ""),
        ("experiment=table2 mp.frozen_weights=fp32", ""),
        ("-m training.lr=1e-3,1e-4 training.momentum=0", "training.momentum: no effect without training.optimizer=sgd"),
        ("-m training.optimizer=adamw,sgd training.momentum=0", ""),
        ("-m tracker=tensorboard,wandb tracker.notes=a", ""),
        ("-m optim=ga,mp plan.enforce=false", "plan.enforce: no effect in a sweep"),
        ("sweep.objective=runtime_s", "sweep.objective: no effect without -m"),
        ("-m sweep.objective=runtime_s", ""),
    ],
)
def test_keys_without_effect_in_all_runs_are_said_once(train, arguments, said):
    lines = [line for line in train(*arguments.split()).output.splitlines() if "no effect" in line]
    assert len(lines) == bool(said)
    assert all(line.startswith(said) for line in lines)


def test_the_folder_of_a_sweep_is_no_run_s_folder(train):
    said = "hydra.run.dir: no effect, the folder of a sweep is set by hydra.sweep.dir=DIR"
    assert train("-m", "optim=ga,lora", "hydra.run.dir=out").output.count(said) == 1
    said = "hydra.sweep.dir: no effect, the folder of a run is set by hydra.run.dir=DIR"
    assert train("optim=ga", "hydra.sweep.dir=out").output.count(said) == 1
    assert "no effect" not in train("optim=ga", "hydra.run.dir=out").output


def test_keys_that_are_gone_have_keys_in_their_place():
    for instead in RENAMED.values():
        key = instead.removeprefix("use ").partition("=")[0]
        assert instead == "leave it out" or setting_of(PlanConfig, key)[1]


def assert_nothing_but_a_result(cwd: Path, last_line: str) -> None:
    """What Hydra could not compose has no folder; what it could, and is not allowed, has a result that says so."""
    if files := [path for path in cwd.rglob("*") if path.is_file()]:
        assert files == [cwd / "out" / "result.json"]
        result = json.loads(files[0].read_text())
        assert result["status"] == "error"
        assert last_line == f"error: {result['error']}"


@pytest.mark.process
def test_the_traceback_is_there_for_those_who_ask(tmp_path):
    plain = run("llama_ft.train", "training.lr=nan", "hydra.run.dir=out", cwd=tmp_path)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr == "error: training.lr=nan is not allowed: it must be positive and finite\n"
    ended = run("llama_ft.train", "training.lr=nan", cwd=tmp_path, env={"HYDRA_FULL_ERROR": "1"})
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr


def test_the_message_about_clipping_gives_a_spelling_that_works():
    with pytest.raises(UserError, match=r"\(inf never clips\)"):
        checked("training.max_grad_norm=0")
    assert checked("training.max_grad_norm=inf").training.max_grad_norm == float("inf")


@pytest.mark.parametrize(
    "arguments",
    [
        "lora.dropout=0 lora.rank=1 lora.alpha=0.5 lora.targets=[w1,w2,w3] data.max_length=2 optim.ga=True",
        "training.warmup_ratio=0 training.weight_decay=0 training.max_grad_norm=inf training.max_samples=null",
        "training.warmup_ratio=1 training.seed=9223372036854775807 training.epochs=1 training.lr=1 optim.gc=FALSE",
        "mp.dtype=bf16 mp.trainable_weights=compute data.max_length=1024 measure.memory_limit_mib=1",
        "mp.dtype=fp16 mp.frozen_weights=fp32",
    ],
)
def test_the_edges_of_what_is_allowed(arguments):
    assert checked(*arguments.split())


# The hash


def another(value: Any, hint: Any) -> Any:
    """A value of the same type that is not the same."""
    if get_origin(hint) in (types.UnionType, Union):
        hint = next(kind for kind in get_args(hint) if kind is not types.NoneType)
    if isinstance(value, bool):
        return not value
    if isinstance(value, enum.Enum):
        return next(choice for choice in type(value) if choice is not value)
    if isinstance(value, list):
        return [*value, "wo"]
    if hint is str:
        return f"{value}_other"
    if issubclass(hint, enum.Enum):
        return next(iter(hint))
    return {int: 7, float: 0.123}[hint]


@pytest.fixture
def config() -> TrainConfig:
    return checked()


def changed(config: TrainConfig, leaf: str) -> TrainConfig:
    *sections, key = leaf.split(".")
    section: Any = config
    for name in sections:
        section = getattr(section, name)
    before = getattr(section, key)
    setattr(section, key, another(before, LEAVES[leaf]))
    assert getattr(section, key) != before
    return config


# How a run is followed, kept and its data fetched changes nothing in what is measured.
NOT_MEASURED = {leaf for leaf in LEAVES if leaf.startswith(("tracker.", "plan.", "sweep."))} | {
    "model.given",
    "training.save_every",
    "training.resume",
    "data.cache_dir",
    "gpu.index",
    "gpu.shared",
    "parallel.rendezvous",
    "parallel.timeout_s",
    "recipe",
}
MEASURED = [leaf for leaf in LEAVES if leaf not in NOT_MEASURED]


def test_the_hash_changes_with_every_field_that_is_measured(config):
    hashes = {config.hash()}
    for leaf in MEASURED:
        digest = changed(config, leaf).hash()
        assert digest not in hashes, leaf
        hashes.add(digest)


def test_the_hash_knows_nothing_of_what_is_not_measured(config):
    before = config.hash()
    for leaf in sorted(NOT_MEASURED):
        assert changed(config, leaf).hash() == before, leaf


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_the_hash_changes_with_what_says_where_texts_end(tmp_path, name):
    before = content_hash(str(tmp_path))
    (tmp_path / name).write_text('{"eos_token_id": [2, 5]}')
    assert content_hash(str(tmp_path)) != before


def test_hash_is_the_same_for_the_same_run():
    assert checked().hash() == checked("checkpoint=builtin", "optim.ga=false").hash()
    assert checked("optim=ga_mp").hash() == checked("optim=mp", "optim.ga=true").hash()
    assert checked("training.lr=1e-3").hash() == checked("training.lr=0.001").hash()


def test_a_run_without_noise_has_the_hash_that_it_had():
    without, using = checked(), checked("optim.neft=true")
    assert "neft" not in without.measured() | without.measured()["optim"]
    assert using.hash() != without.hash()
    assert using.hash(("optim",)) == without.hash(("optim",))  # rows of one table


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("optim=ga_mp_lora", "lora.targets=[wq,wk]", "mp.dtype=bf16", "tracker.mode=offline"),
        ("training.lr=0.1", "training.max_grad_norm=inf", "training.warmup_ratio=0.3333333333333333"),
        ("model=llama2_7b", "checkpoint='off: yes'", "tokenizer='{a}, # b'", "data.path='1e-3'"),
    ],
)
def test_the_run_folders_config_is_the_same_run(tmp_path, overrides):
    config = checked(*overrides)
    (tmp_path / CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    read = read_config(tmp_path / CONFIG_FILE)
    assert read == config
    assert read.hash() == config.hash()


# The names of runs


@pytest.mark.parametrize("arguments", [("-m", "optim=glob(*)"), ("experiment=table2",)])
def test_the_sweep_of_table_2(train, tmp_path, arguments):
    outcome = train(*arguments)
    assert (outcome.status, sorted(outcome.folders)) == (0, sorted(PRESETS))
    assert (tmp_path / "outputs" / "table2").is_dir() == ("experiment=table2" in arguments)


def test_a_sweep_by_switches(train):
    outcome = train("-m", "optim.gc=false,true", "optim.ga=false,true")
    assert outcome.folders == ["baseline", "ga", "gc", "ga_gc"]
    assert outcome.folders == [config.optim.combination for config in outcome.configs]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("optim=mp training.lr=0.1", {"mp"}),
        (
            "optim=ga model=tiny,tinyllama_1b checkpoint=random tokenizer=t.model",
            {"ga,model=tiny", "ga,model=tinyllama_1b"},
        ),
        ("optim=mp data=sample,alpaca_200 data.path=a.json", {"mp,data=sample", "mp,data=alpaca_200"}),
        ("optim=lora lora.rank=4,8", {"lora,lora.rank=4", "lora,lora.rank=8"}),
        ("optim=lora lora.rank=choice(4,8)", {"lora,lora.rank=4", "lora,lora.rank=8"}),
        ("training.seed=range(2)", {"baseline,training.seed=0", "baseline,training.seed=1"}),
        ("model=glob(tiny)", {"baseline,model=tiny"}),
        ("experiment=table2 optim=ga lora.rank=4,8", {"ga,lora.rank=4", "ga,lora.rank=8"}),
    ],
)
def test_run_names_tell_what_the_sweep_varies(train, arguments, names):
    outcome = train("-m", *arguments.split())
    assert (outcome.status, sorted(outcome.folders)) == (0, sorted(names))


@pytest.mark.parametrize(
    "targets", ["[wq],[wq,wv],[wq,wk,wv,wo]", "[wq,wv],[wv,wq]", "[w1],[w1,w2]"], ids=lambda value: value
)
def test_run_names_of_lists_differ_and_are_plain(train, targets):
    outcome = train("-m", "optim=lora", f"lora.targets={targets}")
    assert outcome.status == 0
    assert len(set(outcome.folders)) == len(outcome.folders) == targets.count("[")
    for folder, config in zip(outcome.folders, outcome.configs, strict=True):
        assert re.fullmatch(r"[\w.,=+-]+", folder)
        assert folder.startswith("lora,lora.targets=")
        assert "_".join(config.lora.targets) in folder


def test_run_names_do_not_depend_on_the_order_of_arguments(train):
    sweeps = ["lora.rank=4,8", "training.seed=1,2"]
    first = train("-m", "optim=lora", *sweeps, "hydra.sweep.dir=first")
    second = train("-m", *reversed(sweeps), "optim=lora", "hydra.sweep.dir=second")
    assert len(set(first.folders)) == 4
    assert set(first.folders) == set(second.folders)


def test_long_run_names_are_cut_and_tell_what_differs(train, tmp_path):
    deep = "/".join(["ein_langer_näme"] * 20)
    sweep = ("-m", f"data.path='{deep}/one.jsonl','{deep}/two.jsonl','{deep}s/two.jsonl'", "training.seed=1,2")
    first = train(*sweep, "hydra.sweep.dir=first")
    assert first.status == 0
    assert len(set(first.folders)) == 6
    assert all(len(name.encode()) < 143 for name in first.folders)  # what an encrypted file system takes
    assert sum("one.jsonl" in name for name in first.folders) == 2
    assert train(*sweep, "hydra.sweep.dir=second").folders == first.folders


@pytest.mark.parametrize("folder", ["", "null", "'~/x'"])
@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"])
def test_an_output_folder_without_a_name_is_refused_before_anything_is_made(train, tmp_path, key, folder):
    outcome = train(*(["-m", "optim=lora,ga"] if "sweep" in key else []), f"{key}={folder}")
    assert (outcome.status, outcome.folders, list(tmp_path.iterdir())) == (2, [], [])
    assert outcome.last_line.startswith(f"error: {key}=")


def test_an_output_folder_of_an_unset_variable_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", "")
    outcome = train("hydra.run.dir=${oc.env:OUT}")
    assert (outcome.status, outcome.folders, list(tmp_path.iterdir())) == (2, [], [])


def test_paths_mean_the_same_where_hydra_changes_the_folder(train, tmp_path):
    outcome = train("-m", "optim=lora,ga", "hydra.job.chdir=true", "hydra.sweep.dir=out")
    assert (outcome.status, outcome.folders) == (0, ["lora", "ga"])
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert Path.cwd() == tmp_path


def test_runs_and_sweeps_of_the_same_second_have_folders_of_their_own(train, tmp_path, monkeypatch):
    frozen = type("Frozen", (), {"now": lambda: datetime(2026, 1, 1)})
    monkeypatch.setattr("hydra.core.utils.datetime", frozen)
    for arguments in ((), (), ("-m", "optim=lora,ga"), ("-m", "optim=lora,ga")):
        assert train(*arguments).status == 0
    folders, time = {path.name for path in (tmp_path / "outputs").glob("*/*")}, "2026-01-01_00-00-00"
    assert folders == {f"{time}_baseline", f"{time}_baseline_2", time, f"{time}_2"}
    assert {path.name for path in (tmp_path / "outputs" / "sweeps").glob("*/*/")} >= {"lora", "ga"}


def test_a_sweep_does_not_overwrite_the_reports_of_others(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("mine")
    outcome = train("-m", "optim=lora,ga", "hydra.sweep.dir=out")
    assert (outcome.status, outcome.folders) == (2, [])
    assert "holds report.html, which llama_ft did not write" in outcome.last_line


def test_paths_in_run_names_make_no_folders(train, tmp_path):
    outcome = train("-m", "data.path=a/b.json,c/d.json", "hydra.sweep.dir=out")
    assert len(set(outcome.folders)) == 2
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == set(outcome.folders)


def test_checks_run_without_hydra_too():
    with pytest.raises(UserError, match="n_heads"):
        ModelConfig(name="odd", dim=100, n_heads=6)
    with pytest.raises(UserError, match=r"mp\.frozen_weights=bf16 is not allowed: it must be one of compute, fp32"):
        MixedPrecisionConfig(frozen_weights=Dtype.bf16)
