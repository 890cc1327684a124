"""Compare llama_ft with transformers and PEFT on a published model: tokens, logits, perplexity, texts, LoRA.

    python -m benchmarks.published SmolLM2-135M-Instruct.Q4_1.gguf alpaca_data_200.json --output benchmarks/smollm2-cpu

The arguments: a GGUF file, which each side reads with its own code, and a JSON array of Alpaca's records. All in fp32.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import llama_ft as lf
from llama_ft.config import DecodingConfig
from llama_ft.data.collate import epoch_groups
from llama_ft.data.template import choose_template, encode_prompt
from llama_ft.decoding.generate import generate
from llama_ft.device import device_name, versions
from llama_ft.evaluation.perplexity import perplexity

N_HELD_OUT, N_LOGITS, N_PROMPTS, N_STEPS = 40, 8, 8, 20
RANK, ALPHA, LR = 8, 16.0, 1e-3
WAYS = {"greedy": {"num_beams": 1}, "beam search, 4 beams": {"num_beams": 4, "early_stopping": True}}

Models = tuple[Any, Any]  # ours and theirs


def their_loss(model: Any, sample: lf.Sample) -> Tensor:
    """The mean loss of a sample's targets in transformers' model."""
    tokens = torch.tensor([list(sample.tokens)])
    labels = torch.full_like(tokens, -100)
    for first, end in sample.spans:
        labels[0, first:end] = tokens[0, first:end]
    logits = model(tokens[:, :-1]).logits.float()
    return F.cross_entropy(logits[0], labels[0, 1:], ignore_index=-100)


@torch.no_grad()
def logits_apart(models: Models, samples: Sequence[lf.Sample]) -> float:
    """The largest of max |difference| / max |theirs| over the samples."""
    found = 0.0
    for sample in samples:
        tokens = torch.tensor([list(sample.tokens)])
        ours, theirs = models[0](tokens), models[1](tokens).logits
        found = max(found, ((ours - theirs).abs().max() / theirs.abs().max()).item())
    return found


@torch.no_grad()
def perplexities(models: Models, samples: Sequence[lf.Sample]) -> tuple[float, float]:
    """Perplexity over all target tokens of the samples, ours and theirs."""
    total = sum(their_loss(models[1], sample).item() * sample.n_targets for sample in samples)
    theirs = math.exp(total / sum(sample.n_targets for sample in samples))
    return perplexity(models[0], samples, batch_size=8).perplexity, theirs


def texts(models: Models, tokenizer: lf.Tokenizer, prompts: Sequence[str], way: str) -> tuple[list[str], list[str]]:
    """Continuations of up to 48 tokens, ours and theirs."""
    config = DecodingConfig(max_new_tokens=48, n_beams=WAYS[way]["num_beams"], early_stopping=way != "greedy")
    ours = [answers[0].text for prompt in prompts for answers in generate(models[0], tokenizer, [prompt], config)]
    theirs = []
    for prompt in prompts:
        tokens = torch.tensor([encode_prompt(prompt, tokenizer)])
        settings = WAYS[way] | {"eos_token_id": sorted(tokenizer.end_ids), "pad_token_id": tokenizer.eos_id}
        out = models[1].generate(tokens, max_new_tokens=48, do_sample=False, use_cache=True, **settings)
        theirs.append(tokenizer.decode(out[0, tokens.shape[1] :].tolist()))
    return ours, theirs


def lora_losses(models: Models, samples: Sequence[lf.Sample], folder: Path) -> tuple[list[float], list[float]]:
    """Losses of optimizer steps on one sample each, ours and those of a plain loop with PEFT's model."""
    model, base = models
    torch.manual_seed(0)
    lf.add_lora(model, rank=RANK, alpha=ALPHA, dropout=0.0, targets=("wq", "wk", "wv", "wo", "w1", "w2", "w3"))
    lf.save(model, folder)
    theirs = PeftModel.from_pretrained(base, folder, is_trainable=True)
    trainable = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.0)
    steps = list(lf.finetune(model, samples, lr=LR, seed=0))
    losses = []
    for metrics, (index,) in zip(steps, epoch_groups(len(samples), 1, 0, 0), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = metrics.lr
        loss = their_loss(theirs, samples[index])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return [metrics.loss for metrics in steps], losses


def compare(file: Path, records: list[dict[str, str]]) -> dict[str, Any]:
    """All comparisons, by name."""
    model, tokenizer = lf.load(file)
    their_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    base = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    template, samples = choose_template("chat", tokenizer), lf.encode(records, tokenizer)
    rendered = [template.prompt(lf.Record(r["instruction"], r["input"], r["output"])) for r in records]
    ids = [encode_prompt(text, tokenizer) for text in rendered]
    differ = sum(mine != their_tokenizer(str(text))["input_ids"] for mine, text in zip(ids, rendered, strict=True))
    models = model, base
    ours, theirs = perplexities(models, samples[-N_HELD_OUT:])
    found: dict[str, Any] = {
        "records tokenized": len(records),
        "of them tokenized otherwise": differ,
        "logits apart": logits_apart(models, samples[:N_LOGITS]),
        "perplexity, ours": ours,
        "perplexity, theirs": theirs,
    }
    for way in WAYS:
        pairs = zip(*texts(models, tokenizer, rendered[:N_PROMPTS], way), strict=True)
        found[f"{way}: equal texts of {N_PROMPTS}"] = sum(mine == their for mine, their in pairs)
    with tempfile.TemporaryDirectory() as folder:
        mine, their = lora_losses(models, samples[:N_STEPS], Path(folder))
    apart = max(abs(one - other) for one, other in zip(mine, their, strict=True))
    return found | {"LoRA, losses apart": apart, "LoRA, losses": mine, "LoRA, losses of PEFT": their}


def main() -> None:
    """Compare, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("records", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found = compare(args.file, json.loads(args.records.read_text(encoding="utf-8")))
    about = {"date": date.today().isoformat(), "model": args.file.name, "device": device_name(torch.device("cpu"))}
    command = ["python", "-m", "benchmarks.published", args.file.name, args.records.name, *sys.argv[3:]]
    text = json.dumps(about | found | {"versions": versions(), "command": " ".join(command)}, indent=2)
    print(text)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "parity.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
