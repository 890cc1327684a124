"""Decoding speed with random weights: ours with and without the KV cache, and transformers' generate, in turns.

    python -m benchmarks.decode llama2_7b 128 128 --dtype bf16 --output benchmarks/decode-h200
    python -m benchmarks.decode llama2_7b_1layer 64 32 --rounds 3

The arguments: model, tokens of the prompt, new tokens. Each measurement is a new process. Time does not depend on the
weights; all sides have the same, so the texts are compared too. transformers' generate uses its cache, its own loop and
PyTorch's own kernels.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from llama_ft.config import ModelConfig, config_dir
from llama_ft.config.presets import preset
from llama_ft.decoding.state import GenerationState
from llama_ft.device import device_name, versions
from llama_ft.kernels import use_kernels_of, use_products_of
from llama_ft.model.formats import hf_name, is_rotated, permute_rotary
from llama_ft.model.sizes import hf_config
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model
from llama_ft.system import MIB

TRANSFORMERS = "transformers"
SIDES = ("cached", "uncached", TRANSFORMERS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def to_hf(state_dict: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same weights under the names and in the rotary layout of transformers' LlamaForCausalLM."""
    return {
        hf_name(name): permute_rotary(tensor, len(tensor) // config.head_dim, to_hf=True)
        if is_rotated(name)
        else tensor
        for name, tensor in state_dict.items()
    }


def reference(model: Transformer) -> LlamaForCausalLM:
    """transformers' model with the same weights, shared except for queries and keys, whose rotary layout differs."""
    c = model.config
    config = AutoConfig.for_model(**hf_config(c, "float32", 1, 2))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config)
    theirs.load_state_dict(to_hf(model.state_dict(), c), assign=True)
    theirs.tie_weights()
    device = model.output.weight.device
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(device)  # its table is not a weight
    return theirs.eval()


@torch.inference_mode()
def ours(model: Transformer, prompt: list[int], n_new: int, *, kv_cache: bool) -> Tensor:
    """int64 [1, n_new]: the most probable continuation, without stopping at EOS."""
    state = GenerationState(model, [prompt], n_new, kv_cache)
    for _ in range(n_new):
        state.append(state.next_logits().argmax(-1))
    return state.tokens[:, len(prompt) :]


@torch.inference_mode()
def transformers_generate(model: LlamaForCausalLM, prompt: list[int], n_new: int) -> Tensor:
    """As `ours`, by transformers' generate."""
    tokens = torch.tensor([prompt], device=model.device)
    settings: dict[str, Any] = {"min_new_tokens": n_new, "max_new_tokens": n_new, "do_sample": False}
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, eos_token_id=None, **settings
    )
    return output[:, len(prompt) :]  # type: ignore[no-any-return]


def timed(side: str, config: ModelConfig, n_prompt: int, n_new: int, dtype: torch.dtype) -> dict[str, Any]:
    """One side's seconds, tokens and peak memory, in this process; transformers uses PyTorch's own kernels."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if side != TRANSFORMERS:
        use_kernels_of(device)
        use_products_of(device, dtype)
    model = load_model(config, "random", device, torch.float32).to(dtype).eval()
    prompt = torch.randint(3, config.vocab_size, (n_prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    act: Callable[[int], Tensor] = partial(ours, model, prompt, kv_cache=side == "cached")
    if side == TRANSFORMERS:
        act = partial(transformers_generate, reference(model), prompt)
    act(2)  # warm-up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    tokens = act(n_new).flatten().tolist()
    taken = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated(device) / MIB if device.type == "cuda" else None
    return {"seconds": taken, "tokens": tokens, "peak_memory_mib": peak, "device": device_name(device)}


def measure(arguments: list[str], rounds: int) -> dict[str, Any]:
    """Seconds, tokens per second and peak memory of all sides, in new processes, and how far their texts agree."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(rounds):
        for side in SIDES[:: 1 if number % 2 else -1]:  # neither always comes first
            command = [sys.executable, "-m", "benchmarks.decode", *arguments, "--side", side]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs[side].append(json.loads(output.splitlines()[-1]))
            taken, n_new = runs[side][-1]["seconds"], len(runs[side][-1]["tokens"])
            print(f"round {number + 1}, {side}: {taken:.2f} s, {n_new / taken:.1f} tokens/s", flush=True)
    texts = {side: of_side[0]["tokens"] for side, of_side in runs.items()}
    return {
        "device": runs[TRANSFORMERS][0]["device"],
        "seconds": {side: [run["seconds"] for run in of_side] for side, of_side in runs.items()},
        "tokens_per_s": {s: len(texts[s]) / median(run["seconds"] for run in runs[s]) for s in SIDES},
        "peak_memory_mib": {side: of_side[0]["peak_memory_mib"] for side, of_side in runs.items()},  # on a GPU
        "same_tokens_as_transformers": {
            side: sum(map(int.__eq__, texts[side], texts[TRANSFORMERS])) for side in SIDES if side != TRANSFORMERS
        },
    }


def main() -> None:
    """Measure, print and write `decode.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = sorted(file.stem for file in (config_dir() / "model").glob("*.yaml"))
    parser.add_argument("model", choices=models)
    parser.add_argument("prompt_tokens", type=int)
    parser.add_argument("new_tokens", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder to write decode.json into")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # the side that this process times
    arguments = parser.parse_args()
    config = preset("model", arguments.model, ModelConfig)
    n_prompt, n_new = arguments.prompt_tokens, arguments.new_tokens
    if n_prompt < 1 or n_new < 1 or arguments.rounds < 1 or n_prompt + n_new > config.max_seq_len:
        parser.error(f"prompt and new tokens must be at least 1, and together at most {config.max_seq_len}; rounds too")
    if arguments.side:
        print(json.dumps(timed(arguments.side, config, n_prompt, n_new, DTYPES[arguments.dtype])))
        return
    result = measure(sys.argv[1:], arguments.rounds)
    about = {
        "date": date.today().isoformat(),
        "command": f"python -m benchmarks.decode {' '.join(sys.argv[1:])}",
        "versions": versions() | {"transformers": transformers.__version__},
    }
    text = json.dumps(about | result, indent=2) + "\n"
    print(text, end="")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "decode.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
