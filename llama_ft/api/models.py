"""Models: loading, querying and saving them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from llama_ft import hub
from llama_ft.config import FROM_CHECKPOINT, DecodingConfig, Dtype, GpuConfig, ModelConfig, ModelSource, UserError
from llama_ft.config.checks import Settings, check
from llama_ft.config.presets import config_dir, preset
from llama_ft.config.source import path_of
from llama_ft.data.template import choose_template
from llama_ft.data.tokenizer import Tokenizer, load_tokenizer
from llama_ft.decoding.generate import generate
from llama_ft.decoding.load import storage_of
from llama_ft.decoding.prompts import prompt_of
from llama_ft.device import why_no_gpu
from llama_ft.files import explained
from llama_ft.kernels import use_kernels_of
from llama_ft.model.folder import sizes_of
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import load_model
from llama_ft.techniques.adapter import load_adapter as _load_adapter
from llama_ft.techniques.lora import lora_layers
from llama_ft.training.saver import save_trained

DtypeName = Literal["fp32", "bf16", "fp16"]
StorageName = Literal["fp32", "bf16", "fp16", "nf4", "fp4"]


def load(
    model: str | Path = "tiny",
    checkpoint: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    dtype: StorageName = "fp32",
    device: str | torch.device | None = None,
    seed: int = 0,
) -> tuple[Transformer, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        model: a name of `conf/model`, such as `tiny` or `llama2_7b`; or a folder in Meta's, Hugging Face's or our
            format, a GGUF file, or `hub:ORG/NAME[@REVISION]` on the Hugging Face hub, whose sizes and weights are used.
        checkpoint: the weights: `builtin` (of tiny), `random`, a folder, a GGUF file, or a name on the hub. None is
            the one given as `model`, or builtin.
        tokenizer: a `tokenizer.model` or `tokenizer.json`; None is the one in the checkpoint, or the built-in one.
        dtype: of the weights; nf4 and fp4 store linear layers in 4 bits, the rest in a GPU's 16-bit format or in fp32.
        device: None is the GPU if there is one, else the CPU.
        seed: of random weights.

    Raises:
        UserError: if a name is unknown, the weights are not this model's, or there is no tokenizer or no such device.
    """
    check(dtype in get_args(StorageName), "dtype", dtype, f"one of {', '.join(get_args(StorageName))}")
    model, checkpoint = hub.local("model", model), hub.local("checkpoint", checkpoint)
    folder, is_name = path_of(model), (config_dir() / "model" / f"{model}.yaml").is_file()
    if folder.exists() and not is_name:
        sizes, checkpoint = ModelConfig(**cast(Settings, sizes_of(folder))), checkpoint or folder
    elif str(model) == FROM_CHECKPOINT:
        raise UserError("give the checkpoint's folder as the model: load(FOLDER)")
    else:
        sizes = preset("model", str(model), ModelConfig)
    source = ModelSource(sizes, str(checkpoint) if checkpoint else None, str(tokenizer) if tokenizer else None)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device}: {why_no_gpu()}")
    use_kernels_of(place)
    stored = storage_of(Dtype[dtype], place, GpuConfig())
    return load_model(sizes, str(source.checkpoint), place, stored, seed), load_tokenizer(source)


def complete(
    model: Transformer,
    tokenizer: Tokenizer,
    instruction: str | None = None,
    *,
    input: str = "",
    prompt: str | None = None,
    messages: Sequence[Mapping[str, object]] | None = None,
    template: str = "auto",
    max_new_tokens: int = 128,
    temperature: float | None = None,
    top_p: float = 1.0,
    stop: str | Sequence[str] = (),
    seed: int = 0,
) -> str:
    """The model's answer to an instruction or to a conversation, or its continuation of a prompt.

    Args:
        messages: a conversation of role and content, the last of which is the user's.
        template: formats the instruction or messages, as in `encode`.
        temperature: None takes the most probable token each time; a number samples.
        top_p: when sampling, the share of probability to sample from.
        stop: a text, or several, before which the answer ends.

    Raises:
        UserError: unless one of instruction, prompt and messages is given, or if they do not fit the model's context.
    """
    if temperature is None and top_p != 1:
        raise UserError("top_p belongs to sampling: give temperature too")
    if [instruction, prompt, messages].count(None) != 2:
        raise UserError("give one of an instruction, a prompt, and messages")
    asked = {"instruction": instruction, "input": input, "prompt": prompt, "messages": messages and [*messages]}
    text = prompt_of(asked, choose_template(template, tokenizer))
    stops = [stop] if isinstance(stop, str) else list(stop)
    config = DecodingConfig(max_new_tokens=max_new_tokens, stop=stops, seed=seed)
    if temperature is not None:
        config = replace(config, sample=True, temperature=temperature, top_p=top_p)
    return generate(model, tokenizer, [text], config)[0][0].text


def save(model: Transformer, folder: str | Path) -> None:
    """Save what was trained in a folder: the LoRA adapter in PEFT's files, or else all weights.

    `load_adapter(model, folder)` reads an adapter, `load(folder, tokenizer=FILE)` or `load("tiny", folder)` weights.

    Raises:
        UserError: if it cannot be written.
    """
    place = path_of(folder)
    with explained(f"{place}: the folder cannot be created"):
        place.mkdir(parents=True, exist_ok=True)
    save_trained(model, place)


def load_adapter(model: Transformer, folder: str | Path, *, merge: bool = False) -> None:
    """Load the LoRA adapter in a folder: merged into the model's weights, or separate, as all that is trainable.

    Args:
        folder: the one with the adapter's two files, or `hub:ORG/NAME`.

    Raises:
        UserError: if there is no adapter, or it is damaged, or another model's.
    """
    _load_adapter(model, path_of(hub.local("adapter", folder)), merge)
    if not merge:
        model.requires_grad_(False)
        for layer in lora_layers(model).values():
            layer.lora_A.requires_grad_()
            layer.lora_B.requires_grad_()
