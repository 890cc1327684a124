"""`import llama_ft as lf`: the library as a notebook uses it, and the notebook itself."""

import math
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import CHECKOUT, environment
from nbclient import NotebookClient
from safetensors.torch import load_file

import llama_ft as lf
from llama_ft import api
from llama_ft.config import PACKAGE_DIR
from llama_ft.records import CATEGORIES

NOTEBOOK = CHECKOUT / "examples" / "quickstart.ipynb"
RECORDS = [{"instruction": f"Repeat the word {word}.", "output": word} for word in ("fox", "pond", "tree", "owl")]


@pytest.mark.process
def test_importing_it_imports_no_torch_and_offers_what_api_lists() -> None:
    code = "import sys, llama_ft; print('torch' in sys.modules, sorted(dir(llama_ft)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.startswith("False")
    assert set(api.__all__) <= set(dir(lf))
    assert all(getattr(lf, name).__doc__ for name in api.__all__)
    with pytest.raises(AttributeError, match="llama_ft has no nonsense"):
        _ = lf.nonsense


EAGER = """
import sys, llama_ft as lf
model, tokenizer = lf.load("tiny")
lf.add_lora(model)
samples = lf.encode(lf.read_records()[:2], tokenizer)
lf.measure_memory(model, samples)
n_steps = sum(len(list(lf.finetune(model, samples, optimizer=name))) for name in ("adamw", "sgd"))
print(n_steps, {"torch._dynamo", "sympy"} & sys.modules.keys())
"""


def test_finetune_follows_the_schedule_and_the_optimizer_that_it_is_given() -> None:
    model, tokenizer = lf.load("tiny")
    lf.add_noise(model)
    samples = lf.encode(RECORDS, tokenizer)
    options = {"lr": 0.04, "epochs": 4, "micro_batch_size": 4, "warmup_ratio": 0.0, "optimizer": "sgd", "momentum": 0.0}
    for schedule, shares in (("linear", (1, 0.75, 0.5, 0.25)), ("constant", (1, 1, 1, 1))):
        steps = list(lf.finetune(model, samples, schedule=schedule, **options))
        assert [metrics.lr for metrics in steps] == pytest.approx([0.04 * share for share in shares])
        assert steps[-1].loss < steps[0].loss
    use, adamw = (lf.measure_memory(model, samples, optimizer=name, momentum=0) for name in ("sgd", "adamw"))
    assert use.max_mib["optimizer_state"] == 0 < adamw.max_mib["optimizer_state"]


@pytest.mark.process
def test_training_does_not_wait_for_pytorchs_compiler_to_be_imported() -> None:
    done = subprocess.run([sys.executable, "-c", EAGER], capture_output=True, text=True, env=environment())
    assert (done.stdout, done.stderr) == ("4 set()\n", "")


def test_finetune_teaches_records_by_heart_and_an_adapter_can_be_kept(tmp_path: Path) -> None:
    model, tokenizer = lf.load("tiny")
    base = lf.complete(model, tokenizer, RECORDS[0]["instruction"], max_new_tokens=8)
    torch.manual_seed(0)  # of the adapter
    lf.add_lora(model, rank=8, alpha=16, targets=["wq", "wv", "w1", "w2", "w3"])
    lf.checkpoint_layers(model)
    samples = lf.encode(RECORDS, tokenizer)
    steps = list(lf.finetune(model, samples, lr=1e-2, epochs=12, accumulation_steps=2))
    assert [metrics.step for metrics in steps] == list(range(1, 25))
    assert steps[-1].loss < 0.1 < steps[0].loss
    answers = [lf.complete(model, tokenizer, record["instruction"], max_new_tokens=8) for record in RECORDS]
    assert answers == [record["output"] for record in RECORDS]
    lf.save(model, tmp_path / "adapter")
    again, _ = lf.load("tiny")
    assert lf.complete(again, tokenizer, RECORDS[0]["instruction"], max_new_tokens=8) == base != answers[0]
    lf.load_adapter(again, tmp_path / "adapter")
    assert [lf.complete(again, tokenizer, record["instruction"], max_new_tokens=8) for record in RECORDS] == answers
    base_weights = {name: weight.clone() for name, weight in again.state_dict().items() if "lora_" not in name}
    assert list(lf.finetune(again, samples, lr=1e-3))[-1].loss < 0.1  # it goes on, and only the adapter changes
    assert all(torch.equal(again.state_dict()[name], weight) for name, weight in base_weights.items())
    lf.save(again, tmp_path / "further")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "further"))
    assert not any(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_adapter_on_16_bit_weights_is_trained_and_asked(precision: str) -> None:
    model, tokenizer = lf.load("tiny", dtype="bf16")
    lf.add_lora(model)
    before = lf.complete(model, tokenizer, "Say fox.", max_new_tokens=4)
    steps = list(lf.finetune(model, lf.encode(RECORDS, tokenizer), lr=1e-2, epochs=4, precision=precision))
    assert steps[-1].loss < steps[0].loss
    assert lf.complete(model, tokenizer, "Say fox.", max_new_tokens=4) != before


def test_perplexity_between_steps_changes_nothing_of_the_training() -> None:
    losses, found = [], []
    for looks in (True, False):
        model, tokenizer = lf.load("tiny")
        torch.manual_seed(0)
        lf.add_lora(model, dropout=0.3)
        samples = lf.encode(lf.read_records()[:8], tokenizer)
        steps = []
        for step in lf.finetune(model, samples[:6], lr=1e-2, epochs=3, micro_batch_size=2):
            steps.append(step.loss)
            found += [lf.perplexity(model, samples[6:])] if looks else []
        losses.append(steps)
    assert losses[0] == losses[1]
    assert found[-1].perplexity == pytest.approx(math.exp(found[-1].nll))
    assert found[-1].nll < found[0].nll
    with pytest.raises(lf.UserError, match="no samples"):
        lf.perplexity(model, [])


def test_packing_trains_as_without_it_in_less_memory(tmp_path: Path) -> None:
    losses, peaks = [], []
    for packing in (None, 300):
        model, tokenizer = lf.load("tiny")
        samples, size = lf.encode(lf.read_records()[:8], tokenizer), {"micro_batch_size": 8, "packing": packing}
        peaks.append(lf.measure_memory(model, samples, **size).peak_mib)
        losses.append([step.loss for step in lf.finetune(model, samples, lr=1e-3, epochs=3, **size)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert peaks[1] < peaks[0]
    planned = lf.predict("tiny", "cpu", lengths=[len(sample) for sample in samples] * 8, packing=300, techniques=["ga"])
    assert planned.steps == 8


def test_memory_is_measured_without_a_trace_and_equals_the_plan(tmp_path: Path) -> None:
    model, tokenizer = lf.load("tiny")
    samples = lf.encode(lf.read_records()[:6], tokenizer)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    use = lf.measure_memory(model, samples)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert tuple(use.at_peak_mib) == CATEGORIES
    assert sum(use.at_peak_mib.values()) == pytest.approx(use.peak_mib)
    planned = api.predict("tiny", "cpu", lengths=[len(sample) for sample in samples])
    assert planned.memory_max_mib is not None
    assert planned.memory_max_mib["optimizer_state"] == pytest.approx(use.max_mib["optimizer_state"])
    lf.add_lora(model)
    assert lf.measure_memory(model, samples).peak_mib < use.peak_mib


def test_a_plan_needs_no_card() -> None:
    full, adapted = (lf.predict("llama2_7b", "a100_40gb", techniques=on) for on in ((), ("mp", "lora")))
    assert (full.fits, adapted.fits) == (False, True)
    assert adapted.peak_memory_mib < full.peak_memory_mib / 5


def test_weights_in_a_folder_are_a_model(tmp_path: Path) -> None:
    model, tokenizer = lf.load("tiny", "random", seed=1)
    lf.save(model, tmp_path)
    again, _ = lf.load(tmp_path, tokenizer=PACKAGE_DIR / "model" / "tiny" / "tokenizer.model")
    tokens = torch.tensor([tokenizer.encode("the fox", bos=True)])
    assert torch.equal(again(tokens), model(tokens))


def test_a_folder_with_a_models_name_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lf.load("tiny")[0].config.name == "tiny"


def test_mistakes_are_sentences(tmp_path: Path) -> None:
    model, tokenizer = lf.load("tiny")
    samples, adapted = lf.encode(RECORDS, tokenizer), lf.load("tiny")[0]
    lf.add_lora(adapted)
    (tmp_path / "file").touch()
    for call, words in {
        lambda: lf.load("llama9"): "model=llama9 is not allowed: it must be one of .*tiny",
        lambda: lf.load("llama2_7b"): "no built-in weights: give checkpoint=DIR",
        lambda: lf.complete(model, tokenizer): "give one of an instruction, a prompt, and messages",
        lambda: lf.add_lora(model, targets=["q_proj"]): "no linear layer is named q_proj",
        lambda: lf.predict("tiny", "abacus"): "gpu=abacus is not allowed",
        lambda: lf.predict("tiny", techniques=["laura"]): "technique laura must be one of ga, mp",
        lambda: lf.encode([{"instruction": "Go."}], tokenizer): "record 1: output is missing",
        lambda: lf.load(
            "tiny", dtype="bfloat16"
        ): "dtype=bfloat16 is not allowed: it must be one of fp32, bf16, fp16, nf4, fp4",
        lambda: lf.complete(model, tokenizer, "Go.", top_p=0.9): "top_p belongs to sampling",
        lambda: lf.add_lora(model, rank=0): "lora.rank=0 is not allowed",
        lambda: lf.add_lora(adapted): "the model has LoRA layers already",
        lambda: lf.checkpoint_layers(model, 0): "gc.every=0 is not allowed",
        lambda: list(lf.finetune(model, samples, micro_batch_size=0)): "training.micro_batch_size=0 is not allowed",
        lambda: list(lf.finetune(model, samples, accumulation_steps=0)): "ga.steps=0 is not allowed",
        lambda: list(lf.finetune(model, [])): "there are no samples",
        lambda: list(
            lf.finetune(model, samples, schedule="step")
        ): "schedule=step is not allowed: it must be one of cos",
        lambda: list(lf.finetune(model, samples, optimizer="adam")): "optimizer=adam is not allowed: .* adamw, sgd",
        lambda: list(lf.finetune(model, samples, momentum=1.0)): "training.momentum=1.0 is not allowed",
        lambda: lf.add_noise(model, 0): "neft.alpha=0 is not allowed",
        lambda: lf.measure_memory(model, [lf.Sample.after([1] * 4000, 1)]): "a sample has 4000 tokens",
        lambda: lf.predict("tiny", "all"): "name one model and one card",
        lambda: lf.predict("tiny", "cpu", lengths=[1]): "lengths must be",
        lambda: lf.save(model, tmp_path / "file"): "the folder cannot be created",
    }.items():
        with pytest.raises(lf.UserError, match=words):
            call()


def test_the_readme_needs_twelve_lines() -> None:
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    (snippet,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "as lf" in code]
    assert len(snippet.strip().splitlines()) <= 12
    shown: list[str] = []
    exec(compile(snippet, "README.md", "exec"), {"print": lambda *values: shown.append(" ".join(map(str, values)))})
    assert any("parameter" in line for line in shown)


@pytest.mark.process
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs are not kept in the repository"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)  # the memory picture
