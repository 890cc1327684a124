"""Table 1 against arithmetic done by hand: bytes of each weight and FLOPs of each matrix product."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from helpers.planning import CPU_PROFILE, card
from helpers.training import COMBINATIONS

from llama_ft.config import (
    Combinations,
    DataConfig,
    Dtype,
    GpuConfig,
    LoraConfig,
    MixedPrecisionConfig,
    ModelConfig,
    OptimConfig,
    PlanConfig,
    TrainingConfig,
)
from llama_ft.model.transformer import Transformer
from llama_ft.planning import plan, table1
from llama_ft.planning.gpu_traits import traits_of
from llama_ft.planning.lengths import Lengths
from llama_ft.planning.predict import predict
from llama_ft.records.plan import PlannedData, PlanRow, Table1, Table1Cell

MODEL = ModelConfig("small", dim=64, n_layers=3, n_heads=4, n_kv_heads=4, ffn_dim=160, vocab_size=512, max_seq_len=128)
CARD = card(memory_mib=40_000)
CONFIG = PlanConfig(model=MODEL, data=DataConfig(name="sample"), gpu=CARD)
WIDTH, STEPS = 64, 8  # positions of a sample, all of them targets, and samples of an effective batch
EQUAL = [(WIDTH + 1, 1)] * STEPS
RAGGED = [(30, 5), (65, 60), (12, 2), (50, 3), (40, 20), (21, 19), (8, 3), (17, 4), (33, 9), (25, 23)]
RANK = CONFIG.lora.rank
FIRST = ("layers.0.attention.wq", "layers.0.attention.wk", "layers.0.attention.wv")  # their input needs no gradient


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    """Small models take less time than the start of a process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_ft.planning.processes.MAX_PROCESSES", 1)
        yield


def table_of(config: PlanConfig = CONFIG, lengths: Lengths = EQUAL, gpu: GpuConfig = CARD) -> Table1:
    return table1.table1(config, gpu, lengths, [])


@pytest.fixture(scope="module")
def table(in_this_process: None) -> Table1:
    return table_of()


def cells(table: Table1, technique: str, words: str = "") -> dict[str, Table1Cell]:
    [row] = [row for row in table.rows if row.technique == technique and words in row.choice]
    return row.cells


def sizes() -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in Transformer(MODEL).named_parameters()}


def linears(within: str = "") -> dict[str, int]:
    """Numbers of weights of the linear layers, without the ending of their names."""
    found = {name.removesuffix(".weight"): shape.numel() for name, shape in sizes().items() if len(shape) == 2}
    return {name: n for name, n in found.items() if within in name and name != "tok_embeddings"}


def mib(counts: Iterable[int], itemsize: int) -> float:
    """Of tensors with so many elements, on a card, whose allocator gives multiples of 512 bytes."""
    return sum(-(-count * itemsize // 512) * 512 for count in counts) / 2**20


def counts() -> list[int]:
    return [shape.numel() for shape in sizes().values()]


def adapters() -> list[int]:
    """A and B of wq and wv, which are square."""
    return [RANK * MODEL.dim] * (2 * 2 * MODEL.n_layers)


def adam_mib(parameters: list[int]) -> float:
    """Two fp32 moments a parameter, and a count of steps for each tensor."""
    return 2 * mib(parameters, 4) + mib([1] * len(parameters), 4)


def before_after(cell: Table1Cell) -> tuple[float, float]:
    return cell.before, cell.after


def test_the_baseline_is_said_and_every_cell_is_there(table: Table1) -> None:
    for words in ("small on card", "fp32", "micro-batches of 1,", "8 samples of 65 tokens", "64 are trained on"):
        assert words in table.baseline
    further = ["MP", "GC", "GC", "Optimizer", "Optimizer", "Optimizer"]
    assert [row.name for row in table.rows] == ["GA", "GA", "GC", "MP", "MP", "MP", "LoRA", *further]
    for row in table.rows:
        assert list(row.cells) == ["parameter", "activation", "gradient", "optimizer_state", "computation"]
        for name, cell in row.cells.items():
            assert cell.unit == ("TFLOP" if name == "computation" else "MiB")
            share = cell.after / cell.before - 1
            assert cell.arrow == ("↑" if share > 0.01 else "↓" if share < -0.01 else "–")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(100, 101, "–"), (100, 101.1, "↑"), (100, 99, "–"), (100, 98.9, "↓"), (0, 0, "–"), (0, 1, "↑")],
)
def test_an_arrow_is_of_more_than_one_percent(before: float, after: float, expected: str) -> None:
    assert table1.arrow(before, after) == expected


def test_full_fine_tuning_keeps_a_gradient_and_two_moments_of_each_weight(table: Table1) -> None:
    found = {name: cell.before for name, cell in cells(table, "gc", "the input of").items()}
    assert found["parameter"] == found["gradient"] == mib(counts(), 4)
    assert found["optimizer_state"] == adam_mib(counts())


def test_accumulation_at_a_fixed_effective_batch_divides_activations(table: Table1) -> None:
    found = cells(table, "ga", "effective batch of 8 held")
    assert found["activation"].before == pytest.approx(STEPS * found["activation"].after, rel=0.02)
    assert found["parameter"].arrow == found["optimizer_state"].arrow == found["computation"].arrow == "–"
    # Of the gradients that accumulate, one at a time has its micro-batch's beside it; the embedding's is the largest.
    assert before_after(found["gradient"]) == (mib(counts(), 4), mib(counts(), 4) + mib([max(counts())], 4))
    assert "optimizer steps" not in found["computation"].note


def test_accumulation_as_in_table_2_makes_updates_rarer(table: Table1) -> None:
    found = cells(table, "ga", "as in Table 2")
    assert {name: cell.arrow for name, cell in found.items() if name != "gradient"} == dict.fromkeys(
        ("parameter", "activation", "optimizer_state", "computation"), "–"
    )
    assert found["computation"].note.startswith("optimizer steps 8 → 1; GB moved")


def attention_flops(products: int) -> float:
    """Of so many products of S (S + 1) / 2 causal scores with all heads' features, in all layers."""
    return products * WIDTH * (WIDTH + 1) * MODEL.dim * MODEL.n_layers


def test_flops_of_full_fine_tuning_and_of_recomputation(table: Table1) -> None:
    found = cells(table, "gc", "the input of")
    products = sum(linears().values())
    # Forward, the input's gradient, the weight's; attention is 2 products forward, 5 backward.
    full = STEPS * (6 * WIDTH * products + attention_flops(2 + 5))
    # Recomputing ends with the last tensor that backward needs, so each block's w2 is not multiplied again.
    again = STEPS * (2 * WIDTH * sum(n for name, n in linears("layers").items() if "w2" not in name))
    again += STEPS * attention_flops(2)
    assert before_after(found["computation"]) == (
        pytest.approx(full / 1e12, rel=1e-9),
        pytest.approx((full + again) / 1e12, rel=1e-9),
    )


def test_checkpointing_keeps_the_blocks_inputs(table: Table1) -> None:
    before, after = before_after(cells(table, "gc", "the input of")["activation"])
    assert mib([WIDTH * MODEL.dim] * MODEL.n_layers, 4) < after < 0.7 * before
    for name in ("parameter", "gradient", "optimizer_state"):
        assert cells(table, "gc", "the input of")[name].arrow == "–"


def test_lora_has_gradients_and_moments_of_its_factors_alone(table: Table1) -> None:
    found = cells(table, "lora")
    assert found["parameter"].after == mib(counts() + adapters(), 4)
    assert found["gradient"].after == mib(adapters(), 4)
    assert found["optimizer_state"].after == adam_mib(adapters())
    # Forward, and the input's gradient, which the first products need not find; of the factors the weight's too.
    base = 2 * sum(linears().values()) - sum(linears()[name] for name in FIRST)
    factors = 3 * sum(adapters()) - 2 * RANK * MODEL.dim
    flops = STEPS * (2 * WIDTH * (base + factors) + attention_flops(2 + 5))
    assert found["computation"].after == pytest.approx(flops / 1e12, rel=1e-9)
    assert {found[name].arrow for name in ("gradient", "optimizer_state", "activation", "computation")} == {"↓"}


def test_mixed_precision_adds_16_bit_copies_of_masters(table: Table1) -> None:
    found = cells(table, "mp", "full fine-tuning")
    assert before_after(found["parameter"]) == (mib(counts(), 4), mib(counts(), 4) + mib(linears().values(), 2))
    assert found["gradient"].arrow == found["optimizer_state"].arrow == found["computation"].arrow == "–"
    assert found["activation"].arrow == "↓"
    assert found["computation"].note.startswith("matrix products in fp32 → bf16")


def test_mixed_precision_on_lora_depends_on_how_frozen_weights_are_stored(table: Table1) -> None:
    of_factors = mib(adapters(), 4) + mib(adapters(), 2)
    halved = cells(table, "mp", "frozen_weights=compute")["parameter"]
    assert before_after(halved) == (mib(counts() + adapters(), 4), mib(counts(), 2) + of_factors)
    # Of the first products' weights no copy is kept: backward goes no further.
    copies = [n for name, n in linears().items() if name not in FIRST]
    plain = cells(table, "mp", "frozen_weights=fp32")["parameter"]
    assert plain.after == mib(counts(), 4) + mib(copies, 2) + of_factors
    assert (halved.arrow, plain.arrow) == ("↓", "↑")


def case(config: PlanConfig, gpu: GpuConfig = CARD, **on: bool) -> table1.Case:
    return table1.find_case(replace(config, optim=OptimConfig(**on)), EQUAL, EQUAL, traits_of(gpu), None)


def test_arrows_come_from_numbers(table: Table1) -> None:
    """Factors of rank 1 are less than a hundredth of this model, those of rank 16 are not."""
    low = case(replace(CONFIG, lora=LoraConfig(rank=1)), lora=True)
    assert low.memory["parameter"] == mib(counts() + [n // RANK for n in adapters()], 4)
    assert table1.arrow(mib(counts(), 4), low.memory["parameter"]) == "–"
    assert cells(table, "lora", "rank 16 on wq, wv")["parameter"].arrow == "↑"


def test_padding_that_comes_with_16_bit_on_the_cpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table1, "find_case", lambda *_: STAND_IN)
    assert any("pads 40 positions to 64" in note for note in table_of(lengths=[(41, 1)] * STEPS, gpu=CPU_PROFILE).notes)
    for gpu, length in ((CPU_PROFILE, WIDTH + 1), (CARD, 41)):
        assert not any("pads" in note for note in table_of(lengths=[(length, 1)] * STEPS, gpu=gpu).notes)


STAND_IN = table1.Case(dict.fromkeys(table1.MEMORY, 1.0), {"float32": 1e12}, 1e9, 1)


@pytest.mark.parametrize("size", [1, 2])
def test_memory_that_the_plan_knows_is_not_found_again(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    storage = MixedPrecisionConfig(frozen_weights=Dtype.fp32)
    config = replace(CONFIG, training=TrainingConfig(micro_batch_size=size), mp=storage)
    memories = {optim.combination: {"parameter": 1.0} for optim in COMBINATIONS}
    rows = [row_of(optim, memories[optim.combination]) for optim in COMBINATIONS]
    rows += [row_of(optim, {}, "another") for optim in COMBINATIONS]
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(table1, "find_case", lambda *arguments: asked.append(arguments) or STAND_IN)
    table1.table1(config, CARD, RAGGED, rows)
    unknown = [run for run, *_, memory in asked if memory is None]
    assert [(run.optim.combination, run.training.micro_batch_size, run.mp.frozen_weights.name) for run in unknown] == [
        ("baseline", STEPS * size, "fp32"),
        ("mp_lora", size, "compute"),
        *(("mp_lora", size, "nf4"), ("gc", size, "fp32"), ("gc", size, "fp32")),  # what saves more
        *(("baseline", size, "fp32"), ("baseline", size, "fp32"), ("mp_lora", size, "compute")),
    ]
    for run, lengths, equal, _, memory in asked:
        assert equal == [(65, 60)] * (STEPS * size)  # the longest sample, as often as an effective batch has samples
        assert set(lengths) == set(RAGGED)
        assert len(lengths) >= STEPS * size
        assert memory is None or memory is memories[run.optim.combination]


def test_micro_batches_are_those_without_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(table1, "find_case", lambda *arguments: asked.append(arguments) or STAND_IN)
    packed = replace(CONFIG, training=TrainingConfig(packing=100))
    rows = [row_of(optim, {"parameter": 1.0}) for optim in COMBINATIONS]
    assert "Without packing, unlike the plan above." in table1.table1(packed, CARD, RAGGED, rows).notes
    assert {(run.training.packing, memory) for run, *_, memory in asked} == {(None, None)}


def test_what_saves_more_saves_what_the_formats_say(table: Table1) -> None:
    """4-bit weights are half a byte, and a byte for 64; 8-bit moments two bytes, and two scales for 256."""
    in_4_bits, layers = cells(table, "mp", "nf4")["parameter"], linears("layers")
    stored = [-(-n // 2) for n in layers.values()], [n // 64 for n in layers.values()]
    tables = [4 * 256, 4] * len(layers) + [4 * -(-n // 64 // 256) for n in layers.values()]
    saved = mib(layers.values(), 2) - mib(stored[0], 1) - mib(stored[1], 1) - mib(tables, 1)
    dense = mib([max(layers.values())], 2)  # of one weight at a time, for its product
    assert saved - dense - 0.01 <= in_4_bits.before - in_4_bits.after <= saved + 0.01
    moments, large = (
        cells(table, "optimizer", "8-bit moments, full")["optimizer_state"],
        [n for n in counts() if n >= 4096],
    )
    small = [n for n in counts() if n < 4096]
    state = 2 * mib(large, 1) + 2 * mib([-(-n // 256) for n in large], 4) + 2 * mib(small, 4)
    assert moments.after == pytest.approx(state + (512 * len(counts()) + 2 * 1024) / 2**20, rel=1e-3)  # steps, two maps
    one_at_a_time = cells(table, "optimizer", "in backward")["gradient"]
    assert one_at_a_time.before == pytest.approx(mib(counts(), 4))
    assert one_at_a_time.after == pytest.approx(mib([max(counts())], 4))
    assert cells(table, "optimizer", "on LoRA")["optimizer_state"].arrow == "–"  # factors are too small for 8 bits
    offloaded, selective = (
        cells(table, "gc", words)["activation"] for words in ("gc.offload=cpu", "gc.policy=selective")
    )
    assert offloaded.after <= offloaded.before < selective.after < selective.before


def row_of(optim: OptimConfig, memory_max_mib: dict[str, float], gpu: str = "card") -> PlanRow:
    return PlanRow(asdict(optim), optim.combination, gpu, memory_max_mib=memory_max_mib)


def test_memory_found_here_is_that_of_the_plans_rows() -> None:
    [row] = predict([replace(CONFIG, optim=OptimConfig(ga=True, lora=True))], [CARD], EQUAL)
    found = case(CONFIG, ga=True, lora=True)
    assert found.memory == row.memory_max_mib | {"other": found.memory["other"]}  # type: ignore[operator]
    assert found.flops == pytest.approx(row.flops)  # the plan's samples are these very ones


def test_what_the_card_cannot_do_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table1, "find_case", lambda *_: STAND_IN)
    older = replace(CARD, compute_capability="6.0")
    table = table_of(replace(CONFIG, mp=MixedPrecisionConfig(dtype=Dtype.bf16)), gpu=older)
    further = ["GC", "GC", "Optimizer", "Optimizer"]
    assert [row.name for row in table.rows] == ["GA", "GA", "GC", "LoRA", *further]
    assert sum("mp.dtype=bf16 is not supported by this GPU" in note for note in table.notes) == 5


def test_a_plan_has_the_table_of_its_first_card(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [CARD, replace(CARD, name="other")]
    rows = [row_of(OptimConfig(), {}, gpu) for gpu in ("card", "other")]
    monkeypatch.setattr(plan, "predict", lambda *_: rows)
    monkeypatch.setattr(plan, "table1", lambda _, gpu, lengths, its_rows, progress: (gpu, lengths, its_rows))
    data = PlannedData("sample", "", False, len(RAGGED), 65, 1)
    assert plan.make_plan([CONFIG], cards, RAGGED, data, "").table1 == (CARD, RAGGED, rows)
    one = replace(CONFIG, combinations=Combinations.one)
    assert plan.make_plan([one], cards, RAGGED, data, "").table1 is None
