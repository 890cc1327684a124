"""Sweeps through the real command: Hydra's multirun, one process a run, the table at the end."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Sweep, injected, run, run_sweep
from helpers.reports import EIGHT, SIXTEEN, SWITCHES
from safetensors.numpy import load_file

pytestmark = pytest.mark.process  # real commands

CHILD = "llama_ft.launch.child"
FAST = ("training.micro_batch_size=1", "training.max_samples=4", "tracker=disabled")
SMALL = (*FAST, "training.max_samples=9")  # with GA two optimizer steps, the second of one sample
PARAMETERS = 3_443_136
LORA_PARAMETERS = 73_728
MIB = 2**20


@pytest.fixture(scope="module")
def table2(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The eight rows of Table 2, in the folder that the command chooses itself."""
    cwd = tmp_path_factory.mktemp("table2")
    return run_sweep(cwd, "experiment=table2", *SMALL, folder=cwd / "outputs" / "table2")


def again(sweep: Sweep, *args: str) -> Any:
    return run("llama_ft.train", *args, f"hydra.sweep.dir={sweep.folder}", cwd=sweep.folder.parent)


def contents(folder: Path) -> dict[Path, bytes]:
    """The files of the runs; not W&B's of the sweep, which is sent anew."""
    files = (file for file in sorted(folder.glob("*/*")) if file.is_file() and file.parent.name != "wandb")
    return {file: file.read_bytes() for file in files}


# --------------------------------------------------------------------------------------------------------- eight rows


def test_table2_measures_eight_combinations_in_folders_named_after_them(table2: Sweep) -> None:
    assert table2.process.returncode == 0, table2.process.stdout + table2.process.stderr
    assert {path.name for path in table2.folder.iterdir() if path.is_dir()} == set(EIGHT)
    results = table2.results()
    assert {result["status"] for result in results.values()} == {"ok"}
    assert {name: result["combination"] for name, result in results.items()} == {name: name for name in EIGHT}
    for name, result in results.items():
        assert {key for key, on in result["optim"].items() if on} == set(name.split("_")) - {"baseline"}


def test_the_table_is_written_and_printed(table2: Sweep) -> None:
    for name in ("table2.md", "table2.csv", "table2.png"):
        assert (table2.folder / name).stat().st_size > 0
        assert name in table2.process.stdout
    lines = table2.process.stdout.splitlines()
    assert [line.split() for line in lines if line.strip().startswith("GA ")] == [["GA"] + ["OFF"] * 4 + ["ON"] * 4]
    assert [line.split() for line in lines if line.strip().startswith("LoRA ")] == [["LoRA"] + ["OFF", "ON"] * 4]
    rows = list(csv.DictReader((table2.folder / "table2.csv").open()))
    assert [row["combination"] for row in rows] == EIGHT
    peaks = {name: result["peak_memory_mib"] for name, result in table2.results().items()}
    assert {row["combination"]: float(row["peak_memory_mib"]) for row in rows} == peaks


def test_every_row_learns(table2: Sweep) -> None:
    for name, result in table2.results().items():
        assert result["train_loss_after"] < result["train_loss_before"], name


def test_rows_differ_only_in_what_is_swept(table2: Sweep) -> None:
    results = table2.results().values()
    assert len({(result["samples"], result["tokens"], json.dumps(result["techniques"])) for result in results}) == 1
    assert len({result["config_hash"] for result in results}) == 8


def test_optimizer_steps_follow_the_accumulation(table2: Sweep) -> None:
    for name in EIGHT:
        steps = [json.loads(line)["step"] for line in (table2.folder / name / "metrics.jsonl").open()]
        assert steps == list(range(1, 3 if "ga" in name.split("_") else 10)), name


def test_categories_sum_to_the_peak_in_every_row(table2: Sweep) -> None:
    for name, result in table2.results().items():
        at_peak, peak = result["memory_mib"], result["peak_memory_mib"]
        assert sum(at_peak.values()) == pytest.approx(peak, rel=1e-9), name
        assert at_peak["other"] <= 0.05 * peak, name


def test_memory_is_what_arithmetic_says(table2: Sweep) -> None:
    most = {name: result["memory_max_mib"] for name, result in table2.results().items()}
    assert most["baseline"]["parameter"] == pytest.approx(4 * PARAMETERS / MIB)
    assert most["lora"]["parameter"] == pytest.approx(4 * (PARAMETERS + LORA_PARAMETERS) / MIB)
    assert most["mp"]["parameter"] >= 4 * PARAMETERS / MIB  # fp32 masters
    # 16-bit frozen weights, A and B in fp32; autocast's 16-bit copies of A and B come and go.
    fewest, most_bytes = 2 * PARAMETERS + 4 * LORA_PARAMETERS, 2 * PARAMETERS + 6 * LORA_PARAMETERS
    assert fewest <= table2.results()["mp_lora"]["memory_mib"]["parameter"] * MIB <= most_bytes
    for name in EIGHT:
        trainable = LORA_PARAMETERS if "lora" in name else PARAMETERS
        assert most[name]["optimizer_state"] == pytest.approx(2 * 4 * trainable / MIB, rel=0.01), name
        assert most[name]["gradient"] == pytest.approx(4 * trainable / MIB, rel=0.25), name


def test_lora_shrinks_gradients_and_optimizer_state_below_a_tenth(table2: Sweep) -> None:
    most = {name: result["memory_max_mib"] for name, result in table2.results().items()}
    for with_lora, without in [("lora", "baseline"), ("mp_lora", "mp"), ("ga_lora", "ga"), ("ga_mp_lora", "ga_mp")]:
        for category in ("gradient", "optimizer_state"):
            assert most[with_lora][category] < 0.1 * most[without][category], (with_lora, category)


def test_weights_or_adapter_are_saved(table2: Sweep) -> None:
    for name in EIGHT:
        file, size = ("adapter_model", LORA_PARAMETERS) if "lora" in name else ("model", PARAMETERS)
        tensors = load_file(table2.folder / name / f"{file}.safetensors")
        assert sum(tensor.size for tensor in tensors.values()) == size, name


# ---------------------------------------------------------------------------------------- the other forms, and resuming


FORMS = [("-m", "optim=glob(*)"), ("-m", "optim.ga=false,true", "optim.mp=false,true", "optim.lora=false,true")]


@pytest.mark.parametrize("form", FORMS, ids=" ".join)
def test_all_forms_of_the_sweep_are_the_same_eight_runs_and_finished_ones_are_skipped(
    table2: Sweep, form: tuple[str, ...]
) -> None:
    before = contents(table2.folder)
    done = again(table2, *form, *SMALL, "tracker.project=elsewhere")  # tracking does not change what is measured
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = {line.partition(":")[0] for line in done.stdout.splitlines() if "done before (ok)" in line}
    assert skipped == set(EIGHT)
    assert contents(table2.folder) == before


def test_another_configuration_in_the_same_folder_is_refused_by_name(table2: Sweep) -> None:
    before = contents(table2.folder)
    done = again(table2, "experiment=table2", *SMALL, "training.lr=2e-3")
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2
    assert str(table2.folder / "baseline") in last
    assert "hydra.sweep.dir" in last
    assert "Traceback" not in done.stderr
    assert contents(table2.folder) == before


# ------------------------------------------------------------------------------------------------------- rows that fail


def test_rows_out_of_memory_are_marked_and_the_sweep_succeeds(limited_sweep: Sweep) -> None:
    assert limited_sweep.process.returncode == 0, limited_sweep.process.stdout + limited_sweep.process.stderr
    assert {name: r["status"] for name, r in limited_sweep.results().items()} == {"baseline": "oom", "lora": "ok"}
    printed = limited_sweep.process.stdout
    peaks = next(line.split() for line in printed.splitlines() if line.strip().startswith("Peak memory"))
    assert peaks[3] == "×"
    assert float(peaks[4]) == pytest.approx(limited_sweep.results()["lora"]["peak_memory_mib"], rel=0.01)
    assert "650 MiB" in printed
    assert "| × |" in (limited_sweep.folder / "table2.md").read_text()
    assert "failed" not in printed + limited_sweep.process.stderr


def test_rows_out_of_memory_are_not_run_again(limited_sweep: Sweep) -> None:
    before = contents(limited_sweep.folder)
    arguments = (*limited_sweep.arguments, "tracker=disabled")  # the sweep itself is tracked once
    done = run("llama_ft.train", *arguments, cwd=limited_sweep.folder.parent)
    assert done.returncode == 0
    assert "baseline: done before (oom)" in done.stdout
    assert "lora: done before (ok)" in done.stdout
    assert contents(limited_sweep.folder) == before


@pytest.fixture(scope="module")
def failing_sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Three rows, of which the first is killed and the second crashes, each as soon as its process starts."""
    cwd = tmp_path_factory.mktemp("failing")
    code = (
        "import os\n"
        "if '/killed/mp_lora ' in ' '.join(sys.orig_argv): os.kill(os.getpid(), 9)\n"
        "if '/killed/mp ' in ' '.join(sys.orig_argv): os._exit(7)"
    )
    env = injected(cwd / "inject", into=CHILD, code=code)
    sweep = ("-m", "optim=mp_lora,mp,lora", f"hydra.sweep.dir={cwd / 'killed'}", *FAST)
    return run_sweep(cwd, *sweep, folder=cwd / "killed", env=env)


def test_a_sweep_goes_on_after_rows_that_fail_and_says_how_many_did(failing_sweep: Sweep) -> None:
    statuses = {name: result["status"] for name, result in failing_sweep.results().items()}
    assert statuses == {"mp_lora": "killed", "mp": "error", "lora": "ok"}
    assert failing_sweep.process.returncode == 1
    last = (failing_sweep.process.stdout + failing_sweep.process.stderr).strip().splitlines()[-1]
    assert last.startswith("2 of 3 runs failed")
    assert "mp_lora" in last
    assert "Traceback" not in failing_sweep.process.stdout + failing_sweep.process.stderr


def test_the_table_shows_rows_that_failed_with_marks_of_their_own(failing_sweep: Sweep) -> None:
    table = (failing_sweep.folder / "table2.md").read_text()
    peaks = next(line for line in table.splitlines() if line.startswith("| Peak memory"))
    lora, mp, mp_lora = (cell.strip() for cell in peaks.split("|")[2:-1])
    assert (mp, mp_lora) == ("error", "killed")
    assert float(lora) > 0
    assert "×" not in table


def test_failed_rows_run_again_and_finished_ones_do_not(failing_sweep: Sweep) -> None:
    finished = (failing_sweep.folder / "lora" / "result.json").read_bytes()
    done = again(failing_sweep, "-m", "optim=lora,mp_lora", *FAST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lora: done before (ok)" in done.stdout.splitlines()[0]
    assert done.stdout.count("done before") == 1
    assert failing_sweep.results()["mp_lora"]["status"] == "ok"
    assert (failing_sweep.folder / "lora" / "result.json").read_bytes() == finished


# ------------------------------------------------------------------------------------------------- names of the folders


@pytest.fixture
def no_training(tmp_path: Path) -> dict[str, str]:
    """Environment in which every run's process ends at once: a sweep of failures, but with all its folders."""
    return injected(tmp_path / "inject", into=CHILD, code="import os; os._exit(7)")


NAMES = {
    ("optim=lora", "lora.rank=range(2,4)"): {"lora,lora.rank=2", "lora,lora.rank=3"},
    ("optim=ga,mp", "model=tiny,llama2_7b", "checkpoint=random", "tokenizer=none.model"): {
        f"{optim},model={model}" for optim in ("ga", "mp") for model in ("tiny", "llama2_7b")
    },
    ("data=sample,alpaca_200", "training.lr=1e-3,1e-4"): {
        f"baseline,data={data},training.lr={lr}" for data in ("sample", "alpaca_200") for lr in ("0.001", "0.0001")
    },
    tuple(f"optim.{name}=false,true" for name in SWITCHES): set(SIXTEEN),
    ("lora.targets=[wq],[wq,wv]", "optim.lora=true"): {"lora,lora.targets=_wq_", "lora,lora.targets=_wq_wv_"},
}


@pytest.mark.parametrize("swept", NAMES, ids=" ".join)
def test_folders_are_named_after_the_combination_and_what_else_varies(
    swept: tuple[str, ...], tmp_path: Path, no_training: dict[str, str]
) -> None:
    done = run("llama_ft.train", "-m", *swept, *FAST, "hydra.sweep.dir=sweep", cwd=tmp_path, env=no_training)
    names = {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert len(names) == len(NAMES[swept]), f"{names}\n{done.stdout}{done.stderr}"
    assert {name.replace("1e-3", "0.001").replace("1e-4", "0.0001") for name in names} == NAMES[swept]
    assert f"{len(names)} of {len(names)} runs failed" in done.stdout + done.stderr


def test_results_go_where_the_user_says_and_nowhere_else(tmp_path: Path, no_training: dict[str, str]) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "else where"
    here.mkdir()
    sweep = ("-m", "optim=lora,mp", f"hydra.sweep.dir='{elsewhere}/sweep'")
    run("llama_ft.train", *sweep, *FAST, cwd=here, env=no_training)
    run("llama_ft.train", *FAST, f"hydra.run.dir='{elsewhere}/run'", cwd=here, env=no_training)
    assert list(here.iterdir()) == []
    assert {path.name for path in elsewhere.iterdir()} == {"sweep", "run"}
    assert {file.parent.name for file in elsewhere.glob("*/*/result.json")} == {"lora", "mp"}
    assert (elsewhere / "run" / "result.json").exists()


def test_a_wrong_value_stops_the_sweep_and_is_named(tmp_path: Path, no_training: dict[str, str]) -> None:
    sweep = ("-m", "optim=lora", "lora.rank=0,4", "hydra.sweep.dir=sweep")
    done = run("llama_ft.train", *sweep, *FAST, cwd=tmp_path, env=no_training)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == "error: lora.rank=0 is not allowed: it must be at least 1"
    (result,) = tmp_path.glob("sweep/*/result.json")  # of the row that was refused; the other never began
    assert json.loads(result.read_text())["error"] == "lora.rank=0 is not allowed: it must be at least 1"
