"""What a run does to the folder that it is given: it removes its own files, and refuses all that might be others'."""

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from llama_ft.config import PACKAGE_DIR, OnBadRecord, TrainConfig, UserError
from llama_ft.data.dataset import read_records
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.evaluate import JSON_FILE
from llama_ft.evaluation.perplexity import read_text
from llama_ft.files import check_replaceable, new_folder, output_folder, read_json, write_json
from llama_ft.launch.folder import check_inputs, clear
from llama_ft.model.mapped import read_pth, read_safetensors
from llama_ft.records import read_record
from llama_ft.records.metrics import StepMetrics, line_of
from llama_ft.records.result import Result
from llama_ft.training.position import Position, SavedState, checkpoints, read_state, remove_older

WRITTEN = ("config.yaml", "metrics.jsonl", "model.safetensors", "train.log")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def config(tiny_config: TrainConfig) -> TrainConfig:
    tiny_config.gpu.name = "auto"
    return tiny_config


def save(run_dir: Path, step: int, config: TrainConfig) -> Path:
    """A checkpoint, as far as others than the run look at it."""
    folder = run_dir / "checkpoints" / f"step_{step:08}"
    folder.mkdir(parents=True)
    write_json(folder / "state.json", asdict(SavedState(config.hash(), Position(step=step))))
    (folder / "model.safetensors").write_text("weights")
    return folder


def fill(run_dir: Path, config: TrainConfig, n_steps: int = 3) -> None:
    """What a run leaves."""
    run_dir.mkdir(exist_ok=True)
    for name in WRITTEN:
        (run_dir / name).write_text("something")
    (run_dir / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    lines = [line_of(StepMetrics(step, 9, 1.0, 1.0, 0.1, 5, 5.0, 1.0, 1.0)) for step in range(1, n_steps + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(lines))


def contents(folder: Path) -> dict[str, str]:
    """What lies in a folder and below, links not followed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        is_text = path.is_file() and not path.is_symlink()
        found[str(path.relative_to(folder))] = path.read_text() if is_text else str(path.lstat().st_mode)
    return found


def somebodys(run_dir: Path, config: TrainConfig) -> None:
    fill(run_dir, config)
    (run_dir / "config.yaml").write_text("model: {name: resnet}\nlr: 0.1\n")


def in_part_ours(run_dir: Path, config: TrainConfig) -> None:
    fill(run_dir, config)
    (run_dir / "config.yaml").write_text("model: {name: tiny}\ndata: {name: sample}\ngpu: {name: auto}\n")


def without_weights(run_dir: Path, config: TrainConfig) -> None:
    fill(run_dir, replace(config, training=replace(config.training, save=False)))


def with_other_weights(run_dir: Path, config: TrainConfig) -> None:
    fill(run_dir, replace(config, optim=replace(config.optim, lora=True)))


def with_a_link(run_dir: Path, config: TrainConfig, name: str) -> None:
    fill(run_dir, config)
    (run_dir.parent / "theirs").mkdir()
    target = run_dir.parent / "theirs" / Path(name).name
    (run_dir / name).parent.mkdir(exist_ok=True)
    if (run_dir / name).exists():
        (run_dir / name).rename(target)
    else:
        save(run_dir.parent / "theirs", 3, config)
        target = run_dir.parent / "theirs" / "checkpoints" / name.removeprefix("checkpoints").removeprefix("/")
    (run_dir / name).symlink_to(target)


def with_a_checkpoint_of(state: str, more: str = "state.json") -> Callable[[Path, TrainConfig], None]:
    def make(run_dir: Path, config: TrainConfig) -> None:
        fill(run_dir, config)
        save(run_dir, 2, config)
        (save(run_dir, 3, config) / more).write_text(state)

    return make


def of_another_program(run_dir: Path, config: TrainConfig) -> None:
    (run_dir / "checkpoints" / "step_00000003").mkdir(parents=True)


def with_a_pipe(run_dir: Path, config: TrainConfig) -> None:
    fill(run_dir, config)
    (run_dir / "train.log").unlink()
    os.mkfifo(run_dir / "train.log")


def with_a_file_for_checkpoints(run_dir: Path, config: TrainConfig) -> None:  # as one that cannot be read
    fill(run_dir, config)
    (run_dir / "checkpoints").write_text("")


FOREIGN: dict[str, tuple[Callable[[Path, TrainConfig], None], str]] = {
    "a config of another program": (somebodys, "holds config.yaml, which no run wrote"),
    "a config with some of our keys": (in_part_ours, "holds config.yaml, which no run wrote"),
    "no config": (lambda run_dir, _: (run_dir / "metrics.jsonl").touch(), "holds metrics.jsonl, which no run wrote"),
    "weights, and a run that saved none": (without_weights, "holds model.safetensors, which no run wrote"),
    "weights, and a run that saved an adapter": (with_other_weights, "holds model.safetensors, which no run wrote"),
    "a link": (lambda *here: with_a_link(*here, "metrics.jsonl"), "holds metrics.jsonl, which no run wrote"),
    "a link to checkpoints": (lambda *here: with_a_link(*here, "checkpoints"), "checkpoints is a link"),
    "a link to a checkpoint": (lambda *here: with_a_link(*here, "checkpoints/step_00000003"), "not one of the run's"),
    "a checkpoint of another program": (of_another_program, "holds step_00000003, which no run wrote"),
    "a state of another program": (with_a_checkpoint_of('{"step": 3}'), "state.json is damaged: config_hash"),
    "a file among a checkpoint's": (with_a_checkpoint_of("mine", "notes.txt"), "is not one of the run's checkpoints"),
    "a pipe": (with_a_pipe, "holds train.log, which no run wrote"),
    "checkpoints that cannot be listed": (with_a_file_for_checkpoints, "checkpoints cannot be read: Not a directory"),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("case", FOREIGN)
def test_what_no_run_wrote_is_refused_and_all_stays(
    run_dir: Path, config: TrainConfig, case: str, resume: bool
) -> None:
    make, message = FOREIGN[case]
    make(run_dir, config)
    before = contents(run_dir.parent)
    config.training.resume = resume
    with pytest.raises(UserError, match=message):
        clear(run_dir, config)
    assert contents(run_dir.parent) == before


def test_a_run_s_own_files_go_and_others_stay(run_dir: Path, config: TrainConfig) -> None:
    fill(run_dir, config)
    save(run_dir, 2, config)
    (run_dir / ".result.json.123.tmp").touch()
    (run_dir / "notes.txt").write_text("mine")
    (run_dir / "checkpoints" / "other").mkdir()
    clear(run_dir, config)
    assert contents(run_dir).keys() == {"config.yaml", "notes.txt", "checkpoints", "checkpoints/other"}


def test_a_resumed_run_keeps_the_lines_before_its_checkpoint(run_dir: Path, config: TrainConfig) -> None:
    fill(run_dir, config)
    save(run_dir, 2, config)
    config.training.resume = True
    clear(run_dir, config)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 2
    assert [folder.name for folder in checkpoints(run_dir)] == ["step_00000002"]
    assert not (run_dir / "model.safetensors").exists()


def test_a_checkpoint_of_other_settings_is_refused_by_their_names(run_dir: Path, config: TrainConfig) -> None:
    fill(run_dir, config)
    for step in (1, 2, 3):  # of which no more than two are kept, were it resumed
        save(run_dir, step, config)
    before = contents(run_dir)
    changed = replace(config.training, resume=True, epochs=2, lr=0.5, save_every=7)
    with pytest.raises(UserError) as caught:
        clear(run_dir, replace(config, training=changed))
    expected = "another configuration: training.lr (1e-05 there, 0.5 here), training.epochs (1 there, 2 here)"
    assert str(caught.value).endswith(expected)
    assert contents(run_dir) == before


@pytest.mark.parametrize("key", ["checkpoint", "tokenizer", "data.path"])
@pytest.mark.parametrize("way", ["itself", "within", "by a link"])
def test_inputs_in_the_run_s_own_folder_are_refused(run_dir: Path, config: TrainConfig, key: str, way: str) -> None:
    (run_dir.parent / "link").symlink_to(run_dir)
    folder = run_dir.parent / "link" if way == "by a link" else run_dir
    value = str(folder if way == "itself" else folder / "metrics.jsonl")
    if key == "data.path":
        config.data.path = value
    else:
        setattr(config, key, value)
    with pytest.raises(UserError, match=f"{key}={value} is in the run's own folder"):
        check_inputs(run_dir, config)
    check_inputs(run_dir.parent / "another", config)


def test_a_link_among_older_checkpoints_stays_and_hinders_nothing(run_dir: Path, config: TrainConfig) -> None:
    with_a_link(run_dir, config, "checkpoints/step_00000001")
    for step in (2, 3, 4):
        save(run_dir, step, config)
    for _ in range(2):
        remove_older(run_dir)
    assert [path.name for path in checkpoints(run_dir)] == ["step_00000001", "step_00000003", "step_00000004"]


@pytest.mark.parametrize(
    "change",
    [
        {"position": None},
        {"position": {"step": "many"}},
        {"position": {"step": 7}},  # not that of the folder
        {"config_hash": 5},
        {"rng": ["cpu"]},
        {"scaler": "none"},
    ],
    ids=str,
)
def test_a_damaged_state_is_named(run_dir: Path, config: TrainConfig, change: dict[str, object]) -> None:
    folder = save(run_dir, 2, config)
    write_json(folder / "state.json", read_json(folder / "state.json", "") | change)
    with pytest.raises(UserError, match=str(folder)):
        read_state(folder)


# ----------------------------------------------------------------------------------------------- files and their names


def test_a_folder_that_is_there_already_gets_a_number(tmp_path: Path) -> None:
    names = [new_folder(str(tmp_path / "runs" / "now")).name for _ in range(3)]
    assert names == ["now", "now_2", "now_3"]
    with (
        output_folder(None, str(tmp_path), "x", [JSON_FILE]) as first,
        output_folder(None, str(tmp_path), "x", []) as b,
    ):
        assert first != b


@pytest.mark.parametrize(
    ("files", "is_ours"),
    [
        ({}, True),
        ({"plan.md": "my plan"}, False),
        ({"plan.json": '{"format_version": "1.2"}'}, False),
        ({"plan.json": '{"schema_version": 2}', "plan.md": "ours"}, True),
    ],
)
def test_files_that_no_command_wrote_are_not_overwritten(tmp_path: Path, files: dict[str, str], is_ours: bool) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    if is_ours:
        check_replaceable(tmp_path, ("plan.json", "plan.md"))
    else:
        with pytest.raises(UserError, match=f"holds {next(iter(files))}, which llama_ft did not write"):
            check_replaceable(tmp_path, ("plan.json", "plan.md"))


READERS: dict[str, Callable[[Path], object]] = {
    "data": lambda file: read_records(file, OnBadRecord.error),
    "text": lambda file: read_text(file, Tokenizer(PACKAGE_DIR / "model" / "tiny" / "tokenizer.model")),
    "json": lambda file: read_json(file, "sizes"),
    "safetensors": read_safetensors,
    "pth": read_pth,
    "record": lambda file: read_record(Result, file),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["pipe", "zero"])
def test_what_reading_might_never_end_of_is_refused(tmp_path: Path, reader: str, kind: str) -> None:
    file = tmp_path / "pipe" if kind == "pipe" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(file)
    with pytest.raises(UserError, match="it is a pipe or a device"):
        READERS[reader](file)
