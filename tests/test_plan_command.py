"""`python -m llama_ft.plan` as a user meets it."""

import re
from pathlib import Path

import pytest
from conftest import run

from llama_ft import cli, plan
from llama_ft.config import (
    Combinations,
    EvaluateConfig,
    GenerateConfig,
    PlanConfig,
    TrainConfig,
    UserError,
)
from llama_ft.planning.lengths import data_lengths
from llama_ft.planning.plan import make_plan, rows_for
from llama_ft.records import read_record
from llama_ft.records.plan import Plan


def planned(*arguments: str) -> PlanConfig:
    return cli.composed_config("plan", plan.overrides(list(arguments)), PlanConfig)


@pytest.mark.process
def test_the_default_command_plans_the_eight_combinations(tmp_path: Path) -> None:
    done = run("llama_ft.plan", "output=here", "data.first=20", cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    made = read_record(Plan, tmp_path / "here" / "plan.json")
    assert [row.combination for row in made.rows] == [
        *("baseline", "lora", "mp", "mp_lora", "ga", "ga_lora", "ga_mp", "ga_mp_lora")
    ]
    assert not made.data.is_stand_in
    assert made.data.samples == 20
    written = re.search(r"^Written: (.*) in here$", done.stdout, re.MULTILINE)
    assert written
    assert set(written[1].split(", ")) == {path.name for path in (tmp_path / "here").iterdir()}


@pytest.mark.slow
def test_a_model_of_full_size_on_every_card() -> None:
    """LLaMA-2-7B at full depth, LoRA and MP: 13 GB of weights that nothing here could hold twice."""
    config = planned("model=llama2_7b", "gpu=all", "optim=mp_lora", "data.max_length=405", "training=course")
    made = make_plan([config], plan.planned_gpus(config.gpu), *data_lengths(config, print)[:2], "the command")
    rows = {row.gpu: row for row in made.rows}
    assert len(rows) == 14
    assert {row.trainable_params for row in rows.values()} == {8_388_608}
    assert {row.total_params for row in rows.values()} == {6_746_804_224}
    weights = 2 * 6_738_415_616 / 2**20  # 16 bit, without the adapter
    for row in rows.values():
        assert weights < (row.peak_memory_mib or 0) < 1.25 * weights
        assert row.fits == ((row.required_mib or 0) <= (row.total_memory_mib or 0))
    assert not rows["rtx3060_12gb"].fits
    assert rows["a100_40gb"].fits
    assert rows["t4_16gb"].breakdown != rows["a100_40gb"].breakdown  # fp16 against bf16
    assert set(made.techniques) == {"ga", "mp", "lora", "gc", "neft"}
    assert made.table1 is None


@pytest.mark.parametrize(
    ("arguments", "n_compared"), [(("goal=fit",), 16), (("goal=fit", "both=[neft]"), 32), (("neft=both",), 16), ((), 8)]
)
def test_advice_compares_what_saves_and_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], n_compared: int
) -> None:
    compared: list[str] = []

    def predict(runs: list[PlanConfig], *_: object) -> None:
        compared.extend(run.optim.combination for run in runs)
        raise UserError("that is all")

    monkeypatch.setattr("llama_ft.planning.plan.predict", predict)
    config = planned(*arguments)
    with pytest.raises(UserError, match="that is all"):
        make_plan([config], [], [(20, 5)], data_lengths(config, print)[1], "")
    assert len(compared) == n_compared
    assert any("neft" in name for name in compared) == any("neft" in argument for argument in arguments)


def test_techniques_that_are_named_leave_one_combination() -> None:
    assert len(rows_for([planned()])) == 8
    assert len(rows_for([planned("gc=both")])) == 16
    assert len(rows_for([planned("gc=both", "neft=both")])) == 32
    for one in ("optim=mp_lora", "optim.gc=true"):
        assert planned(one).combinations is Combinations.one
    (run,) = rows_for([planned("optim=mp_lora", "optim.gc=true")])
    assert run.optim.combination == "mp_lora_gc"


def test_without_a_tokenizer_the_longest_length_stands_in() -> None:
    config = planned("model=llama2_7b", "data=alpaca_200")
    lengths, data, _ = data_lengths(config, print)
    assert lengths == [(512, 1)] * 200
    assert (data.is_stand_in, data.samples, data.longest, data.tokens) == (True, 200, 512, 200 * 512)
    assert "tokenizer=FILE" in data.about
    shorter = planned("model=llama2_7b", "data.max_length=64", "training.max_samples=3")
    assert data_lengths(shorter, print)[0] == [(64, 1)] * 3


def test_a_tokenizer_that_lies_there_and_cannot_be_read_is_no_obstacle(tmp_path: Path) -> None:
    """It need not be named, so nobody asked for it; one that is named is refused."""
    file = tmp_path / "tokenizer.json"
    file.write_text('{"version": "1.0"}')
    sizes = ("model=llama2_7b", "data.max_length=64", "data.first=3")
    lengths, data, _ = data_lengths(planned(*sizes, f"checkpoint='{tmp_path}'"), print)
    assert lengths == [(64, 1)] * 3
    assert data.about.startswith(f"tokenizer={file} is not a SentencePiece model, nor a tokenizer.json: ")
    assert ": 3 samples of 64 tokens stand in for sample" in data.about
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        data_lengths(planned(*sizes, f"tokenizer='{file}'"), print)


def test_a_length_that_leaves_no_answer_is_planned_all_the_same() -> None:
    lengths, data, _ = data_lengths(planned("data.max_length=16", "data.first=3"), print)
    assert lengths == [(16, 1)] * 3
    assert "max_length=16 leaves no answer to train on: 3 samples of 16 tokens stand in for sample" in data.about


def test_a_real_tokenizer_gives_the_lengths_of_the_file(test_data: Path) -> None:
    files = [f"tokenizer={test_data}/llama2_tokenizer.model", f"data.path={test_data}/alpaca_data_200.json"]
    lengths, data, _ = data_lengths(planned("model=llama2_7b", "data=alpaca", *files), print)
    assert (len(lengths), data.longest, data.tokens) == (200, 405, 24_200)
    assert not data.is_stand_in


@pytest.mark.parametrize(
    ("arguments", "words"),
    {
        ("gc=maybe",): r"gc=maybe is not allowed",
        ("gpu=rtx5090",): r"gpu=rtx5090 is not allowed: it must be one of a100_40gb",
        ("goal=fastest",): r"goal=fastest is not allowed: it must be one of fit, cheapest_gpu, or null",
        (
            "data.max_length=5000",
            "model=llama2_7b",
        ): r"data\.max_length=5000 is not allowed: .* at most model\.max_seq_len",
        ("optim=lora", "goal=fit"): r"goal compares combinations",
        ("optim=lora", "gc=both"): r"gc=both plans combinations with and without it, and optim names one",
        ("both=[gc]", "optim=lora"): r"both=\[gc\] compares combinations, and combinations=one plans one",
        ("both=[lora]",): r"both=\['lora'\] is not allowed: it must be a list of gc, neft, such as \[gc\]",
        ("plan.enforce=false",): r"plan\.enforce=false is for train",
        ("measure.memory_limit_mib=8000",): r"measure\.memory_limit_mib is for train",
        ("gpu=all", "gpu.memory_mib=5"): r"gpu=all uses each card's profile unchanged",
        ("goal=cheapest_gpu", "gpu=a100_40gb"): r"goal=cheapest_gpu compares all cards",
        ("data.path=missing.json",): r"missing\.json cannot be read",
        ("combinations=sixteen",): r"combinations=sixteen no longer exists: use gc=both",
        ("combinations=nine",): r"combinations=nine is not allowed: it must be one of all, one",
    }.items(),
)
def test_what_is_wrong_is_said(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(cli.EXPECTED) as error:
        data_lengths(planned(*arguments), print)
    assert re.search(words, cli.explain(error.value, PlanConfig))


@pytest.mark.parametrize(
    ("command", "schema"), {"train": TrainConfig, "generate": GenerateConfig, "evaluate": EvaluateConfig}.items()
)
def test_all_cards_are_for_plan_alone(command: str, schema: type) -> None:
    told = ["gpu=all", "prompt=a"] if command == "generate" else ["gpu=all"]
    with pytest.raises(Exception, match="gpu=all is not allowed: it must be one card, auto or cpu; all is only"):
        cli.composed_config(command, told, schema)
