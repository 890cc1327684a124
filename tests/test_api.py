"""`import llama_ft as lf`: the library as a notebook uses it, and the notebook itself."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import CHECKOUT, environment
from nbclient import NotebookClient

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


def test_mistakes_are_sentences() -> None:
    model, tokenizer = lf.load("tiny")
    for call, words in {
        lambda: lf.load("llama9"): "model=llama9 is not allowed: it must be one of .*tiny",
        lambda: lf.load("llama2_7b"): "no built-in weights: give checkpoint=DIR",
        lambda: lf.complete(model, tokenizer): "give either an instruction or a prompt",
        lambda: lf.add_lora(model, targets=["q_proj"]): "no linear layer is named q_proj",
        lambda: lf.predict("tiny", "abacus"): "gpu=abacus is not allowed",
        lambda: lf.predict("tiny", techniques=["laura"]): "laura is no technique: there are ga, mp, lora, gc",
        lambda: lf.encode([{"instruction": "Go."}], tokenizer): "record 1: output is missing",
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
