"""Held-out data: what it is, that it is measured right and costs nothing; the best weights, patience, going on."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import injected, run
from helpers.planning import ON_CPU, ON_CUDA, small_config
from helpers.training import COMBINATIONS, make_step, name, ragged_samples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_process import CHILD, read_json

from llama_ft.config import DataConfig, OnBadRecord, OptimConfig, TrainingConfig, TrainOn, UserError
from llama_ft.data.dataset import drawn_lines, load_dataset, read_records
from llama_ft.data.records import Sample
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.measure.memory import EVALUATION
from llama_ft.measure.worst_case import measure_worst_case
from llama_ft.planning.fake_run import fake_run, windows_of
from llama_ft.records.metrics import EvalMetrics, evaluations_of, read_metrics, steps_of
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.held_out import best_of, is_due, is_time_to_stop
from llama_ft.training.loop import Windows
from llama_ft.training.setup import set_up
from llama_ft.training.step import evaluate

TOKENIZER = Tokenizer(Path("llama_ft/model/tiny/tokenizer.model").resolve())
SMALL = (
    "checkpoint=random",
    *(f"model.{size}" for size in ("dim=64", "ffn_dim=96", "n_layers=2", "n_heads=4", "n_kv_heads=4")),
    "training.micro_batch_size=2",
    "tracker=disabled",
)


def records(file: Path, numbers: range) -> Path:
    lines = [json.dumps({"instruction": f"What is {n}?", "output": f"It is {n * n}."}) for n in numbers]
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def texts(samples: list[Sample]) -> list[str]:
    return [TOKENIZER.decode(list(sample.tokens)) for sample in samples]


# What is held out


@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 2**40))
def test_a_draw_takes_each_sample_once_and_the_same_ones_for_the_same_seed(n: int, share: float, seed: int) -> None:
    from llama_ft.data.validation import ReadSample, draw

    samples = [ReadSample(str(i), i, Sample([i], ())) for i in range(n)]
    n_drawn = max(1, round(share * n))
    if n_drawn == n:
        with pytest.raises(UserError, match="leaves none"):
            draw(samples, share, seed)
        return
    for amount in (share, n_drawn):
        trained, held_out = draw(samples, amount, seed)
        assert len(held_out) == n_drawn
        assert sorted((*trained, *held_out), key=lambda each: each.identity) == samples
        assert [each.identity for each in held_out] == sorted(each.identity for each in held_out)
        assert (trained, held_out) == draw(samples, n_drawn, seed)


def test_other_seeds_hold_out_others_and_all_alike_often(tmp_path: Path) -> None:
    config = DataConfig("mine", path=str(records(tmp_path / "a.jsonl", range(20))), validation="5")
    counts = dict.fromkeys(range(20), 0)
    for seed in range(200):
        for text in texts(list(load_dataset(config, TOKENIZER, 512, None, seed=seed).held_out)):
            counts[int(text.partition("What is ")[2].partition("?")[0])] += 1
    # 50 of 200 in the mean; the standard deviation of a binomial of 1/4 is 6.1.
    assert all(abs(count - 50) < 4.5 * 6.2 for count in counts.values())


@pytest.mark.parametrize("given_", ["0", "-1", "0.0", "1.0", "1.5", "nan", "inf", " ", "10%", "0,1", "1e2", "split:"])
def test_numbers_that_say_nothing_are_refused(given_: str) -> None:
    with pytest.raises(UserError, match=r"data.validation=.*a share such as 0.1, a number of records such as 40"):
        DataConfig("sample", validation=given_)


def test_a_file_is_held_out_whole_and_what_is_in_both_is_named(tmp_path: Path) -> None:
    trained, other = records(tmp_path / "a.jsonl", range(20)), records(tmp_path / "b.jsonl", range(18, 24))
    said: list[str] = []
    config = DataConfig("mine", path=str(trained), validation=str(other), first=19)
    data = load_dataset(config, TOKENIZER, 512, None, said.append)
    assert (len(data.samples), len(data.held_out)) == (19, 6)
    assert said == [
        "data.validation: 1 of the 6 held-out records are trained on too: record 0 (line 1) as record 18 (line 19)"
    ]
    assert "; 6 samples, " in data.describe()


def test_drawn_records_are_written_down_and_read_as_the_same(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    user, tools = {"role": "user", "content": "Hi"}, [{"type": "function", "function": {"name": "f"}}]
    chats = [
        {
            "messages": [
                user,
                {"role": "assistant", "content": f"Hello {n}"},
                user,
                {"role": "assistant", "content": "é"},
            ]
        }
        | ({"tools": tools, "task": "greet"} if n % 2 else {})
        for n in range(8)
    ]
    file.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    config = DataConfig("mine", path=str(file), validation="0.5", template="chat", train_on=TrainOn.all)
    places = {f"record {n} (line {n + 1})" for n in (1, 4, 6)}
    (tmp_path / "drawn.jsonl").write_text(drawn_lines(config, places))
    before, _ = read_records(file, OnBadRecord.error)
    after, _ = read_records(tmp_path / "drawn.jsonl", OnBadRecord.error)
    assert after == [before[n] for n in (1, 4, 6)]


def test_a_split_of_a_folder_is_held_out(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    records(tmp_path / "train.jsonl", range(8))
    records(tmp_path / "test.jsonl", range(10, 13))
    data = load_dataset(DataConfig("mine", path=str(tmp_path), validation="split:test"), TOKENIZER, 512, None)
    assert [text.partition("What is ")[2][:2] for text in texts(list(data.held_out))] == ["10", "11", "12"]
    assert len(data.samples) == 8


def test_what_becomes_of_held_out_records_is_said(tmp_path: Path) -> None:
    held_out = records(tmp_path / "b.jsonl", range(30, 34))
    with held_out.open("a") as file:
        file.write('{"output": "no instruction"}\n' + json.dumps({"instruction": "Long?", "output": "so " * 60}) + "\n")
    trained = str(records(tmp_path / "a.jsonl", range(4)))
    config = DataConfig("mine", path=trained, validation=str(held_out), on_bad_record=OnBadRecord.skip)
    said: list[str] = []
    data = load_dataset(config, TOKENIZER, 90, None, said.append)
    assert said == ["data.validation: 1 bad records skipped; 1 truncated"]
    assert (len(data.held_out), data.n_skipped, data.n_truncated) == (5, 0, 0)


def test_a_held_out_file_that_is_missing_is_refused_by_the_key(tmp_path: Path) -> None:
    config = DataConfig("mine", path=str(records(tmp_path / "a.jsonl", range(4))), validation="none.jsonl")
    with pytest.raises(UserError, match=r"data.validation=none.jsonl: .*none.jsonl"):
        load_dataset(config, TOKENIZER, 512, None)


# What is measured


@pytest.mark.parametrize("packing", [None, 50])
def test_the_loss_and_accuracy_are_those_of_all_target_tokens(tiny_config: Any, packing: int | None) -> None:
    step = make_step(replace(tiny_config, training=TrainingConfig(packing=packing)), OptimConfig(lora=True))
    samples = ragged_samples()
    data = Windows(samples, micro_batch_size=3, accumulation_steps=2, packing=packing, held_out=samples)
    step.model.double().eval()
    losses, correct = [], []
    for sample in samples:  # each by itself, as in the definition
        tokens = torch.tensor([list(sample.tokens)])
        logits = step.model(tokens[:, :-1])[0]
        losses.append(F.cross_entropy(logits, tokens[0, 1:], reduction="none")[-sample.n_targets :])
        correct.append((logits.argmax(-1) == tokens[0, 1:])[-sample.n_targets :])
    step.model.train()
    state = torch.get_rng_state()
    loss, accuracy = evaluate(step, data.held_out_batches())
    assert loss == pytest.approx(torch.cat(losses).mean().item(), rel=1e-9)
    assert accuracy == torch.cat(correct).double().mean().item()
    assert torch.equal(torch.get_rng_state(), state)
    assert step.model.training


def test_it_is_due_at_both_ends_and_every_so_often() -> None:
    assert [step for step in range(11) if is_due(step, 10, 4, None)] == [0, 4, 8, 10]
    assert [step for step in range(11) if is_due(step, 10, 4, 3)] == [0, 3, 6, 9, 10]


@pytest.mark.parametrize(
    ("losses", "patience", "stops"),
    [([3, 2, 1], 1, False), ([3, 2, 2], 1, True), ([3, 1, 2, 0.5], 2, False), ([1, 2, 3], 2, True), ([], 1, False)],
)
def test_patience_counts_losses_since_the_least(losses: list[float], patience: int, stops: bool) -> None:
    measured = [EvalMetrics(step, loss, math.exp(loss), 0.5, 0.1) for step, loss in enumerate(losses)]
    assert is_time_to_stop(measured, TrainingConfig(patience=patience)) is stops
    assert not is_time_to_stop(measured, TrainingConfig())


# What it costs


@given(st.lists(st.integers(2, 40), min_size=1), st.lists(st.integers(2, 60)), st.integers(1, 4))
def test_held_out_batches_are_no_larger_than_those_of_training(trained: list[int], held_out: list[int], n: int) -> None:
    samples, others = ([Sample.after([1] * length, 1) for length in part] for part in (trained, held_out))
    batches = list(Windows(samples, micro_batch_size=n, held_out=others).held_out_batches())
    assert sum(batch.n_targets for batch in batches) == sum(length - 1 for length in held_out)
    largest = n * max(trained)
    assert all(len(batch.tokens) == 1 or batch.tokens.numel() <= largest for batch in batches)


@pytest.mark.parametrize("packing", [None, 60])
@pytest.mark.parametrize("optim", COMBINATIONS, ids=name)
def test_held_out_samples_of_usual_length_cost_no_memory(optim: OptimConfig, packing: int | None) -> None:
    config = replace(small_config(), optim=optim, training=TrainingConfig(micro_batch_size=2, packing=packing))
    config.ga.steps = 3
    samples = ragged_samples()
    for traits in (ON_CPU, ON_CUDA):
        without, with_ = (fake_run(config, samples, traits, held_out) for held_out in ((), samples))
        assert replace(with_.use, max_mib={}) == replace(without.use, max_mib={})  # their tokens are in the maxima


@pytest.mark.parametrize("optim", COMBINATIONS, ids=name)
def test_the_plan_knows_what_longer_held_out_samples_cost(optim: OptimConfig) -> None:
    config, samples = replace(small_config(), optim=optim), ragged_samples()
    held_out = [Sample.after([1] * 120, 10), Sample.after([1] * 90, 1)]
    step = set_up(config, Precision.of(config, "cpu", has_bf16=True), torch.device("cpu"))
    measured = measure_worst_case(step, windows_of(config, samples[:2], ON_CPU, held_out))
    assert fake_run(config, samples[:2], ON_CPU, held_out).use == measured


def test_where_evaluating_needs_the_most_its_phase_is_said(tiny_config: Any) -> None:
    step = make_step(tiny_config, OptimConfig(lora=True, gc=True))
    held_out = [Sample.after([1] * 200, 1)]
    use = measure_worst_case(step, Windows([Sample.after([1, 2], 1)], held_out=held_out))
    assert use.phase == EVALUATION


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same run with held-out losses and without; evaluating takes a second longer, and so does saving the best."""
    cwd, folders = tmp_path_factory.mktemp("runs"), {}
    data = f"data.path={records(cwd / 'train.jsonl', range(40))}"
    held_out = records(cwd / "held_out.jsonl", range(50, 60))
    slow = (
        "import time, llama_ft.training.held_out as h\nf = h.evaluate\nh.evaluate = lambda *a: time.sleep(1) or f(*a)\n"
    )
    slow += "import llama_ft.launch.timed_loop\n"
    env = injected(cwd / "inject", into=CHILD, code=slow)
    common = ("llama_ft.train", *SMALL, data, "optim=ga_lora", "ga.steps=2", "training.lr=0.02", "training.epochs=2")
    for title, more in (("without", ()), ("with", (f"data.validation={held_out}", "training.eval_every=4"))):
        folders[title] = cwd / title
        done = run(*common, *more, f"hydra.run.dir={cwd / title}", cwd=cwd, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        folders[f"{title} output"] = cwd / f"{title}.txt"
        folders[f"{title} output"].write_text(done.stdout)
    return folders


def adapter(folder: Path) -> dict[str, bytes]:
    return {key: value.numpy().tobytes() for key, value in load_file(folder / "adapter_model.safetensors").items()}


@pytest.mark.process
def test_a_run_with_held_out_losses_is_the_run_without(runs: dict[str, Path]) -> None:
    assert adapter(runs["with"]) == adapter(runs["without"])
    steps = [
        [(each.loss, each.grad_norm, each.lr) for each in steps_of(read_metrics(runs[title]))]
        for title in ("with", "without")
    ]
    assert steps[0] == steps[1]
    results = [read_json(runs[title] / "result.json") for title in ("with", "without")]
    for key in ("peak_memory_mib", "memory_mib", "tokens", "samples", "train_loss_before", "train_loss_after"):
        assert results[0][key] == results[1][key], key


@pytest.mark.process
def test_held_out_losses_are_in_the_result_and_cost_no_runtime(runs: dict[str, Path]) -> None:
    result, losses = read_json(runs["with"] / "result.json"), evaluations_of(read_metrics(runs["with"]))
    assert [each.step for each in losses] == [0, 4, 8, 12, 16, 20]
    assert result["eval_runtime_s"] > 6 > result["runtime_s"] > 0
    assert result["eval_loss_before"] == losses[0].eval_loss
    assert result["eval_loss"] == result["last_eval_loss"] == losses[-1].eval_loss
    assert result["last_eval_step"] == 20
    assert (result["best_eval_loss"], result["best_eval_step"]) == min((each.eval_loss, each.step) for each in losses)
    assert result["eval_perplexity"] == pytest.approx(math.exp(losses[-1].eval_loss))
    assert result["eval_samples"] == 10
    assert result["stopped_early_at_step"] is None
    output = runs["with output"].read_text()
    assert f"after step 8: held-out loss {losses[2].eval_loss:.4f}, perplexity" in output
    assert "held-out loss" not in runs["without output"].read_text()


@pytest.mark.process
def test_evaluate_finds_the_same_numbers(runs: dict[str, Path]) -> None:
    folder = runs["with"]
    done = run(
        "llama_ft.evaluate",
        *SMALL[:-2],
        f"adapter={folder}",
        f"data.path={folder.parent / 'held_out.jsonl'}",
        "exact_match=false",
        f"output={folder.parent / 'evaluation'}",
        cwd=folder.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    fine_tuned = read_json(folder.parent / "evaluation" / "evaluate.json")["models"][-1]
    result = read_json(folder / "result.json")
    assert fine_tuned["role"] == "fine_tuned"
    assert fine_tuned["responses"]["nll"] == pytest.approx(result["eval_loss"], rel=1e-5)
    assert fine_tuned["responses"]["perplexity"] == pytest.approx(result["eval_perplexity"], rel=1e-5)


@pytest.mark.process
def test_wandb_tensorboard_and_the_page_hold_the_same_held_out_numbers(runs: dict[str, Path], tmp_path: Path) -> None:
    from helpers.tracked import assert_history_is, read_wandb
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, losses = runs["with"], evaluations_of(read_metrics(runs["with"]))
    for kind in ("wandb", "tensorboard"):
        upload = (f"tracker={kind}", "tracker.upload=true", *(["tracker.mode=offline"] if kind == "wandb" else []))
        done = run("llama_ft.report", str(folder), *upload, cwd=tmp_path, env={"HOME": str(tmp_path)})
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
    kept = read_wandb(folder)
    assert_history_is(kept.history, folder / "metrics.jsonl")
    assert [row["eval_loss"] for row in kept.history if "eval_loss" in row] == [each.eval_loss for each in losses]
    assert kept.summary["best_eval_loss"] == best_of(losses).eval_loss
    events = EventAccumulator(str(folder)).Reload()
    for key in ("eval_loss", "eval_perplexity", "eval_token_accuracy"):
        assert [(event.step, event.value) for event in events.Scalars(key)] == [
            (each.step, pytest.approx(getattr(each, key), rel=1e-6)) for each in losses
        ]
    page = (folder / "report.html").read_text()
    for each in losses:
        assert f"{each.eval_loss:.4f}" in page
    ends = f"{losses[0].eval_loss:.4g} at step 0, {losses[-1].eval_loss:.4g} at step 20"
    assert f"; {ends}" in page  # of the curve, read aloud


@pytest.mark.process
def test_what_was_drawn_can_be_evaluated(tmp_path: Path) -> None:
    done = epochs(tmp_path, 1, "data.validation=3", f"hydra.run.dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stdout + done.stderr
    mine = (*SMALL[:-2], f"adapter={tmp_path / 'run'}", "exact_match=false", f"output={tmp_path / 'evaluation'}")
    refused = run("llama_ft.evaluate", *mine, "data.validation=3", cwd=tmp_path)
    assert refused.returncode == 2
    assert "give evaluate data.path=FILE, such as held_out.jsonl" in refused.stderr
    done = run("llama_ft.evaluate", *mine, f"data.path={tmp_path / 'run' / 'held_out.jsonl'}", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    responses = read_json(tmp_path / "evaluation" / "evaluate.json")["models"][-1]["responses"]
    assert responses["nll"] == pytest.approx(read_json(tmp_path / "run" / "result.json")["eval_loss"], rel=1e-5)


# The best weights, and an early end


def run_best(folder: Path, *more: str) -> Any:
    """Over-fit at once, to the records beside a run's folder."""
    cwd = folder.parent
    data = (f"data.path={cwd / 'train.jsonl'}", f"data.validation={cwd / 'held_out.jsonl'}", "training.eval_every=2")
    keeps = ("training.keep_best=true", "training.lr=0.01", f"hydra.run.dir={folder}")
    return run("llama_ft.train", *SMALL, *data, *keeps, *more, cwd=cwd)


@pytest.fixture(scope="module")
def best(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that over-fits, keeps its best weights, and stops early."""
    cwd = tmp_path_factory.mktemp("best")
    records(cwd / "train.jsonl", range(12))
    records(cwd / "held_out.jsonl", range(50, 60))
    done = run_best(cwd / "run", "training.epochs=30", "training.patience=3")
    assert done.returncode == 0, done.stdout + done.stderr
    (cwd / "output.txt").write_text(done.stdout)
    return cwd / "run"


@pytest.mark.process
def test_the_best_weights_are_the_result_and_the_last_are_a_checkpoint(best: Path, tiny_config: Any) -> None:
    result, losses = read_json(best / "result.json"), evaluations_of(read_metrics(best))
    least, last = best_of(losses), losses[-1]
    assert least.step < last.step == result["stopped_early_at_step"] < 180
    assert last.step == least.step + 2 * 3
    assert result["eval_loss"] == result["best_eval_loss"] == least.eval_loss
    assert result["last_eval_loss"] == last.eval_loss > least.eval_loss
    folders = sorted(folder.name for folder in (best / "checkpoints").iterdir())
    assert folders == [f"best_{least.step:08}", f"step_{last.step:08}"]
    kept, of_best, of_last = (
        load_file(folder / "model.safetensors") for folder in (best, *sorted((best / "checkpoints").iterdir()))
    )
    assert all(torch.equal(kept[key], of_best[key]) for key in kept)
    assert not all(torch.equal(kept[key], of_last[key]) for key in kept)
    output = (best.parent / "output.txt").read_text()
    assert f"stopped early, after optimizer step {last.step} of 180" in output
    assert f"after step {least.step}, and none of the 3 since was lower" in output


@pytest.mark.process
def test_more_patience_goes_on_where_the_run_has_ended(best: Path, tmp_path: Path) -> None:
    shutil.copytree(best.parent, tmp_path / "copy")
    folder = tmp_path / "copy" / "run"
    config = (folder / "config.yaml").read_text()
    refused = run_best(folder, "training.epochs=30", "training.patience=5")
    assert refused.returncode == 2
    assert "training.patience (3 there, 5 here)" in refused.stderr
    assert (folder / "config.yaml").read_text() == config
    done = run_best(folder, "training.epochs=30", "training.patience=5", "training.resume=true")
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = (evaluations_of(read_metrics(each)) for each in (best, folder))
    assert [each.eval_loss for each in after[: len(before)]] == [each.eval_loss for each in before]
    assert len(after) == len(before) + 2
    assert read_json(folder / "result.json")["best_eval_step"] == best_of(before).step
    kept = [load_file(each / "model.safetensors") for each in (best, folder)]
    assert all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


@pytest.mark.process
def test_more_epochs_alone_do_not_go_on_where_patience_has_run_out(best: Path) -> None:
    done = run_best(best, "training.epochs=40", "training.patience=3", "training.resume=true")
    assert done.returncode == 0, done.stderr
    assert "stopped early, after optimizer step" in done.stdout
    assert "to continue it give a larger training.patience, or null" in done.stdout


@pytest.mark.process
def test_a_held_out_loss_that_was_not_written_down_is_measured_again(best: Path, tmp_path: Path) -> None:
    """As where Ctrl-C came while it was measured, and a kill before its line had reached the disk."""
    cwd = tmp_path / "copy"
    shutil.copytree(best.parent, cwd)
    folder, step = cwd / "run", best_of(evaluations_of(read_metrics(best))).step
    (folder / "result.json").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < step or "loss" in json.loads(line)]
    (folder / "metrics.jsonl").write_text("".join(line for line in kept if json.loads(line)["step"] <= step))
    last = sorted((folder / "checkpoints").glob("step_*"))[-1]
    at_best = last.with_name(f"step_{step:08}")
    shutil.move(last, at_best)
    shutil.copy(folder / "checkpoints" / f"best_{step:08}" / "model.safetensors", at_best / "model.safetensors")
    state = json.loads((at_best / "state.json").read_text())
    state["position"]["step"] = step
    (at_best / "state.json").write_text(json.dumps(state))
    done = run_best(folder, "training.epochs=30", "training.patience=3", "training.resume=true")
    assert done.returncode == 0, done.stdout + done.stderr
    again = evaluations_of(read_metrics(folder))
    assert best_of(again[: step // 2 + 1]).step == step
    assert f"resuming after optimizer step {step}" in done.stdout
    assert "after step 0: held-out loss" not in done.stdout  # it has been said before


@pytest.mark.process
def test_where_training_diverges_the_best_weights_are_named(tmp_path: Path) -> None:
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    failed = epochs(tmp_path, 4, folder, "data.validation=3", "training.keep_best=true", "training.lr=1e30")
    assert failed.returncode == 1
    result = read_json(tmp_path / "run" / "result.json")
    assert result["has_diverged"] is True
    best_folder = tmp_path / "run" / "checkpoints" / "best_00000000"
    assert f"lower training.lr. The best weights are in {best_folder}" in result["error"]
    assert (best_folder / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("training.keep_best=true", "training.keep_best=true needs a held-out loss, and nothing is held out"),
        ("training.patience=2", "training.patience=2 needs a held-out loss, and nothing is held out"),
        ("data.validation=4 training.keep_best=true training.save=false", "training.save=false none: leave one"),
    ],
)
@pytest.mark.process
def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, typed: str, said: str) -> None:
    done = run("llama_ft.train", *typed.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Going on


def epochs(cwd: Path, n: int, *more: str) -> Any:
    data = records(cwd / "train.jsonl", range(10))
    typed = (*SMALL, f"data.path={data}", "training.warmup_ratio=0", "optim=lora", f"training.epochs={n}", *more)
    return run("llama_ft.train", *typed, cwd=cwd)


@pytest.mark.process
def test_more_epochs_go_on_and_say_what_becomes_of_the_schedule(tmp_path: Path) -> None:
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    assert epochs(tmp_path, 1, folder, "training.save_every=100").returncode == 0
    done = epochs(tmp_path, 2, folder, "training.save_every=100", "training.resume=true")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resuming after optimizer step 5" in done.stdout
    # Half of a cosine over 10 steps is half of the peak, 2.5e-4.
    assert (
        "training longer: 10 optimizer steps instead of 5. The cosine schedule now covers all of them: the learning"
        " rate continues at 1.25e-04, after 2.39e-05" in done.stdout
    )
    steps = steps_of(read_metrics(tmp_path / "run"))
    assert [each.step for each in steps] == list(range(1, 11))
    assert steps[5].lr == pytest.approx(2.5e-4 * 0.5)
    assert read_json(tmp_path / "run" / "result.json")["samples"] == 20

    again = epochs(tmp_path, 2, folder, "training.save_every=100", "training.resume=true")
    assert "done before (ok)" in again.stdout
    fewer = epochs(tmp_path, 1, folder, "training.save_every=100", "training.resume=true")
    assert fewer.returncode == 2
    assert "training.epochs=1: the run in " in fewer.stderr
    assert "has 2; give 2 or more" in fewer.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()


@pytest.mark.process
def test_under_a_constant_rate_two_parts_are_the_whole(tmp_path: Path) -> None:
    constant = ("training.schedule=constant", "data.validation=2", "training.eval_every=2", "training.keep_best=true")
    parts, whole = (f"hydra.run.dir={tmp_path / name}" for name in ("parts", "whole"))
    assert epochs(tmp_path, 1, parts, *constant).returncode == 0
    assert epochs(tmp_path, 3, parts, *constant, "training.resume=true").returncode == 0
    assert epochs(tmp_path, 3, whole, *constant).returncode == 0
    assert adapter(tmp_path / "parts") == adapter(tmp_path / "whole")
    losses = [
        {each.step: each.eval_loss for each in evaluations_of(read_metrics(tmp_path / name))}
        for name in ("parts", "whole")
    ]
    assert losses[0] == losses[1]


@pytest.mark.process
def test_a_run_without_a_checkpoint_of_its_end_says_how_to_go_on(tmp_path: Path) -> None:
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    assert epochs(tmp_path, 1, folder).returncode == 0
    refused = epochs(tmp_path, 2, folder, "training.resume=true")
    assert refused.returncode == 2
    assert "has no checkpoint of its end" in refused.stderr
    assert f"adapter={tmp_path / 'run'} with another hydra.run.dir" in refused.stderr
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    new = f"hydra.run.dir={tmp_path / 'further'}"
    further = epochs(tmp_path, 1, new, f"adapter={tmp_path / 'run'}")
    assert further.returncode == 0, further.stderr
    before, after = (read_json(tmp_path / name / "result.json") for name in ("run", "further"))
    assert after["train_loss_before"] == pytest.approx(before["train_loss_after"], rel=1e-6)
