"""`python -m benchmarks.peers`, without the peers' environments: the work, the limit, what is compared, the order."""

import json
from argparse import Namespace
from math import nan
from pathlib import Path

import pytest
from conftest import CHECKOUT, run

from benchmarks.peers import __main__ as command
from benchmarks.peers import compare, limit, others, ours, workload
from benchmarks.peers.compare import LABELS, MACHINE
from benchmarks.peers.workload import OURS, Row, Sizes
from llama_ft.data.collate import collate
from llama_ft.planning.operators import OperatorCounter, flops_of

TINY = Sizes(dim=32, n_layers=2, n_heads=2, ffn_dim=64, vocab_size=300)
PEER, OTHER = "transformers_loop", "litgpt"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (workload, ours, others):
        monkeypatch.setattr(module, "SIZES", TINY)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["baseline", "ga", "lora", "ga_mp_lora"])
def test_transformers_and_we_do_the_same_work(name: str) -> None:
    told = Namespace(row=Row(name), samples=9)
    one, other = ours.measured(told), workload.plain_loop(told, *others.transformers_loop(told.row))
    tolerance = compare.TOLERANCES["16 bit" if told.row.has("mp") else "fp32"]
    assert one["first_loss"] == pytest.approx(other["first_loss"], rel=tolerance)
    assert one["tokens"] == other["tokens"] == sum(tokens.numel() for tokens, _ in workload.samples()[:9])
    if name == "baseline":  # what clipping and dropout change is small; a wrong gradient would not be
        assert one["last_loss"] == pytest.approx(other["last_loss"], rel=1e-4)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", ["baseline", "lora"])
def test_flops_are_those_of_the_real_step(name: str) -> None:
    step, (tokens, labels) = ours.made(Row(name)), workload.samples()[0]
    sample = ours.Sample.after(tokens[0].tolist(), tokens.numel() - workload.n_targets(labels))
    with OperatorCounter() as counter:
        step([collate([sample])])
    positions, lora = len(sample) - 1, name == "lora"
    scores_again = TINY.n_layers * positions * (positions + 1) * TINY.dim  # in the kernel's backward pass
    counted = flops_of(counter.operators)["float32"] - scores_again
    assert limit.flops((positions, sample.n_targets), lora, TINY) == counted
    assert limit.n_trained(lora, TINY) == sum(each.numel() for each in workload.trained(step.model))


def test_the_limit_is_what_binds_and_the_update() -> None:
    samples, rates = [(100, 40)] * 16, {"fp32 apart full": 10.0, "fp32 packed full": 20.0, "bf16 apart full": 40.0}
    work, n_trained = 16 * limit.flops((100, 40), False, TINY), limit.n_trained(False, TINY)

    def seconds(row: str, bandwidth_gb_s: float = 1e30) -> float:
        return limit.limit(Row(row), samples, rates, bandwidth_gb_s, TINY)["seconds"]

    assert seconds("ga") == pytest.approx(work / 10e9)
    assert seconds("ga_packed") == pytest.approx(work / 20e9)
    assert seconds("ga_mp") == pytest.approx(work / 40e9)
    one_pass = 8 * limit.n_multiplied(TINY) + 4 * n_trained
    slow = {row: seconds(row, 1e-6) * 1e3 for row in ("baseline", "ga", "ga_packed")}  # bytes at 1,000 a second
    assert slow["baseline"] == pytest.approx(16 * (one_pass + 28 * n_trained))
    assert slow["ga"] == pytest.approx(16 * one_pass + 2 * 28 * n_trained)
    assert slow["ga_packed"] == pytest.approx(2 * (one_pass + 28 * n_trained))


def line(side: str, row: str, speed: float, rss: float = 1000.0, loss: float = 10.5, others_cpu: float = 0.0) -> dict:
    return {
        "side": side, "row": row, "tokens_per_s": speed, "peak_rss_mib": rss, "first_loss": loss, "last_loss": loss,
        "others_cpu": others_cpu, "versions": {},
    }  # fmt: skip


def test_ratios_are_of_medians_to_the_best_peer() -> None:
    runs = [line(OURS, "ga_packed", speed, 900) for speed in (190, 210, 500)]
    runs += [line(PEER, "ga", 100), line(OTHER, "ga", 140, 1200), line(OURS, "ga", 1)]
    rates = {"gflop_s": {"fp32 packed full": 100.0}, "bandwidth_gb_s": 10.0}
    found = compare.summary(Row("ga_packed"), [*runs, {"side": MACHINE, "row": "baseline", **rates}], [(99, 40)] * 8)
    assert (found["to_fastest_peer"], found["to_smallest_peer"]) == (1.5, 0.9)
    assert found["sides"][OURS]["share_of_limit"] == pytest.approx(210 / found["limit"]["tokens_per_s"])
    page = compare.markdown([found])
    assert "210 (190–500)" in page
    assert " 1.50 " in page
    assert "QUOTED" not in page
    busy = compare.summary(Row("ga"), [line(OURS, "ga", 1, others_cpu=0.5)], [])
    assert "NOT TO BE QUOTED: beside 1 of 1" in compare.markdown([busy])


@pytest.mark.parametrize(
    ("row", "loss", "compares"),
    [("lora", 10.50005, True), ("lora", 10.5002, False), ("mp", 10.52, True), ("mp", 10.53, False), ("mp", nan, False)],
)
@pytest.mark.parametrize("side", [OURS, PEER])
def test_rows_whose_first_losses_differ_are_not_compared(row: str, loss: float, compares: bool, side: str) -> None:
    losses = {OURS: 10.5, PEER: 10.5} | {side: loss}
    found = compare.summary(Row(row), [line(OURS, row, 2, 1, losses[OURS]), line(PEER, row, 1, 1, losses[PEER])], [])
    page = compare.markdown([found])
    assert ("to_fastest_peer" in found) is compares
    assert (" 2.00 " in page) is compares
    said = f"not compared: first losses differ: {LABELS[PEER]} {losses[PEER]:.6g}, llama_ft {losses[OURS]:.6g}"
    assert (said in page) is not compares


def test_runs_take_turns_and_are_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    done: list[command.Planned] = []

    def quiet_run(each: command.Planned, *_: object) -> dict | None:
        done.append(each)
        if each.side == MACHINE:
            rates = {f"fp32 {layout} full": 1.0 for layout in ("apart", "packed")}
            return {"side": MACHINE, "row": "baseline", "gflop_s": rates, "bandwidth_gb_s": 1.0, "versions": {}}
        return None if each.side == OTHER and each.repeat == 2 else line(each.side, each.row, 100)

    monkeypatch.setattr(command, "quiet_run", quiet_run)
    options = ["--rows", "ga", "ga_packed", "--repeats", "2", "--hf-python", "a", "--alt-python", "b"]
    monkeypatch.setattr(command.sys, "argv", ["peers", *options, "--output", str(tmp_path)])
    assert command.main() == 1
    assert len(done) == len(set(done)) == 2 * (1 + len(LABELS) + 1)
    first, second = ([each.side for each in done if (each.repeat, each.row) == (n, "ga")] for n in (1, 2))
    assert second == [*first[1:], first[0]] == [*list(LABELS)[1:], PEER]
    assert "1 runs failed" in capsys.readouterr().out
    done.clear()
    command.main()
    assert [(each.side, each.repeat) for each in done] == [(OTHER, 2)]
    record = json.loads((tmp_path / "results.json").read_text())
    assert [row["to_fastest_peer"] for row in record["rows"]] == [1.0, 1.0]
    assert (tmp_path / "results.md").read_text() in capsys.readouterr().out


def test_every_side_has_the_environment_of_a_run() -> None:
    environment = command.environment(2)
    assert {"GOMP_SPINCOUNT", "GLIBC_TUNABLES"} <= environment.keys()
    assert environment["OMP_NUM_THREADS"] == "2"
    assert "PYTHONPATH" not in environment


@pytest.mark.process
def test_it_says_what_it_can_be_told() -> None:
    done = run("benchmarks.peers", "--help", cwd=CHECKOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--alt-python" in done.stdout
    assert run("benchmarks.peers", "--rows", "gal", cwd=CHECKOUT).returncode == 2
