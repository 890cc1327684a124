"""Sweeps that Optuna chooses the runs of, by what the earlier ones measured."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import Sweep, injected, run, run_sweep
from test_sweep import CHILD, FAST

pytestmark = pytest.mark.process  # real commands

OPTUNA = ("-m", "hydra/sweeper=optuna", "optim=lora", *FAST)
SPACE = ("training.lr=tag(log, interval(1e-4,1e-2))", "lora.rank=choice(4,8,16)")
KEPT = ("hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=lr", "hydra.sweeper.sampler.seed=1")


def study(sweep: Sweep) -> Any:
    return optuna.load_study(study_name="lr", storage=f"sqlite:///{sweep.folder.parent / 'study.db'}")


def folder_of(trial: Any) -> str:
    return f"lora,lora.rank={trial.params['lora.rank']},training.lr={trial.params['training.lr']}"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Six trials."""
    cwd = tmp_path_factory.mktemp("tuned")
    sweep = (*OPTUNA, *SPACE, "hydra.sweeper.n_trials=6", f"hydra.sweep.dir={cwd / 'tune'}", *KEPT)
    return run_sweep(cwd, *sweep, folder=cwd / "tune")


def test_six_trials_are_told_what_their_runs_measured(tuned: Sweep) -> None:
    assert tuned.process.returncode == 0, tuned.process.stdout + tuned.process.stderr
    results, trials = tuned.results(), study(tuned).trials
    assert len(trials) == 6
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    assert {folder_of(trial): trial.value for trial in trials} == {
        name: result["train_loss_after"] for name, result in results.items()
    }
    assert len(results) == 6  # six learning rates: no folder is that of two trials


def test_the_best_run_is_the_last_line_and_the_one_that_optuna_names(tuned: Sweep) -> None:
    best = min(tuned.results().items(), key=lambda item: item[1]["train_loss_after"])
    named = yaml.safe_load((tuned.folder / "optimization_results.yaml").read_text())
    assert named["best_value"] == best[1]["train_loss_after"]
    assert folder_of(study(tuned).best_trial) == best[0]
    last = tuned.process.stdout.splitlines()[-1]
    assert last == f"best: train_loss_after {best[1]['train_loss_after']:.6g}: {tuned.folder / best[0]}"


def test_a_study_that_is_kept_goes_on_and_values_drawn_again_are_not_run_again(tuned: Sweep) -> None:
    n_runs, before = len(tuned.results()), [trial.value for trial in study(tuned).trials]
    again = ("hydra.sweeper.n_trials=2", *KEPT, f"hydra.sweep.dir={tuned.folder}")  # the seed draws the same ones again
    done = run("llama_ft.train", *OPTUNA, *SPACE, *again, cwd=tuned.folder.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("done before (ok)") == 2
    assert [trial.value for trial in study(tuned).trials] == [*before, *before[:2]]
    assert len(tuned.results()) == n_runs


def test_failed_trials_leave_the_others_going_and_several_objectives_a_front(tmp_path: Path) -> None:
    """Rank 8 is killed as soon as its process starts."""
    env = injected(tmp_path / "inject", into=CHILD, code="if 'rank=8' in ' '.join(sys.orig_argv): os._exit(7)")
    file = tmp_path / "inject" / "sitecustomize.py"
    file.write_text(f"import os\n{file.read_text()}")
    drawn = ("lora.rank=choice(4,8)", "hydra.sweeper.n_trials=4")
    several = ("sweep.objective=[peak_memory_mib,runtime_s]", "hydra.sweeper.direction=[minimize,minimize]")
    sweep = run_sweep(
        tmp_path, *OPTUNA, *drawn, *several, "hydra.sweep.dir=tune", *KEPT, folder=tmp_path / "tune", env=env
    )
    printed = sweep.process.stdout + sweep.process.stderr
    assert sweep.process.returncode == 1
    assert "Traceback" not in printed
    assert "1 of 2 runs failed: lora,lora.rank=8 (error)" in printed
    result = sweep.results()["lora,lora.rank=4"]
    mib, seconds = result["peak_memory_mib"], result["runtime_s"]
    told = [(trial.params["lora.rank"], trial.state.name, trial.values) for trial in study(sweep).trials]
    assert len(told) == 4
    assert {rank for rank, _, _ in told} == {4, 8}
    assert all(rest == (["COMPLETE", [mib, seconds]] if rank == 4 else ["FAIL", None]) for rank, *rest in told)
    assert f"  peak_memory_mib {mib:.6g}, runtime_s {seconds:.6g}: " in sweep.process.stdout


def test_where_all_trials_fail_the_report_is_made_and_says_so(tmp_path: Path) -> None:
    env = injected(tmp_path / "inject", into=CHILD, code="import os; os._exit(7)")
    arguments = (*OPTUNA, "lora.rank=choice(4,8)", "hydra.sweeper.n_trials=2", "hydra.sweep.dir=tune")
    sweep = run_sweep(tmp_path, *arguments, folder=tmp_path / "tune", env=env)
    assert sweep.process.returncode == 1
    assert "runs failed" in sweep.process.stderr.splitlines()[-1]
    assert "Traceback" not in sweep.process.stderr
    assert (sweep.folder / "table2.md").is_file()
    assert {json.loads(file.read_text())["status"] for file in sweep.folder.glob("*/result.json")} == {"error"}


NO_PLUGIN = "sys.modules['hydra_plugins'] = None"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (
            (*OPTUNA, "hydra.sweeper.n_trials=2"),
            NO_PLUGIN,
            "hydra/sweeper=optuna needs the package hydra-optuna-sweeper",
        ),
        *(
            (
                ("-m", f"hydra/launcher={name}", *FAST),
                NO_PLUGIN,
                f"hydra/launcher={name} needs the package {package}: pip",
            )
            for name, package in (
                ("joblib", "hydra-joblib-launcher"),
                ("submitit_local", "hydra-submitit-launcher"),
                ("submitit_slurm", "hydra-submitit-launcher"),
            )
        ),
        (("-m", *FAST, "training.lr=interval(1,2)"), "", "interval(...) needs hydra/sweeper=optuna"),
        ((*OPTUNA, "hydra.sweeper.direction=maximize"), "", "hydra.sweeper.direction=maximize is not allowed"),
        (
            (*OPTUNA, "lora.rank=choice(4,8)", "sweep.objective=[peak_memory_mib,runtime_s]"),
            "",
            "hydra.sweeper.direction=minimize is not allowed: it must be [minimize,minimize] with sweep.objective=",
        ),
        ((*OPTUNA, "sweep.objective=eval_loss"), "", "sweep.objective=eval_loss needs held-out records: give data.val"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_a_line(
    tmp_path: Path, arguments: tuple[str, ...], code: str, said: str
) -> None:
    env = injected(tmp_path / "inject", into="llama_ft.train", code=code or "pass")
    done = run("llama_ft.train", *arguments, "hydra.sweep.dir=tune", cwd=tmp_path, env=env)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {said}")
    assert "Traceback" not in done.stderr
