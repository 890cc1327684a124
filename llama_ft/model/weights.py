"""Making, naming, saving and loading a model's weights.

Names and layout are Meta's. The one difference in layout to Hugging Face's is owned here: Meta rotates adjacent pairs
of a head's features, Hugging Face rotates its two halves, so the rows of wq and wk are permuted between the two.
"""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llama_ft.config import ModelConfig, UserError
from llama_ft.model.transformer import Transformer, rotary_table

INIT_STD = 0.02  # as transformers' initializer_range
BUILTIN_SEED = 0
WEIGHTS_FILE = "model.safetensors"

_HF_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def empty_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A model whose weights are allocated once, on their device and in their dtype, and hold no values yet."""
    with torch.device("meta"):
        model = Transformer(config).to(dtype)
    model.to_empty(device=device)
    model.rotary = rotary_table(config.context, config.head_dim, config.rope_theta, device)
    return model


def load_model(
    config: ModelConfig, checkpoint: str, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> Transformer:
    """A model with the weights of `checkpoint`: `random` (seeded), `builtin`, or a folder of safetensors.

    Raises:
        UserError: if the folder has no weights for this model.
    """
    model = empty_model(config, device, dtype)
    if checkpoint == "random":
        initialize(model, seed)
    elif checkpoint == "builtin":
        initialize(model, BUILTIN_SEED)
    else:
        load_weights(model, Path(checkpoint).expanduser())
    return model


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Normal(0, 0.02) for matrices and 1 for norms, from the seed alone; drawn on the device the weights are on."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, INIT_STD, generator=generator)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write safetensors under a temporary name, then rename: the file is whole or absent."""
    temporary = file.with_name(file.name + ".tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(file)


def load_weights(model: Transformer, folder: Path) -> None:
    """Copy `model.safetensors` of a folder into the model, name by name.

    Raises:
        UserError: if the file is missing or damaged, or its names or shapes are not the model's.
    """
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise UserError(f"checkpoint={folder}: there is no {WEIGHTS_FILE} in it")
    targets = dict(model.named_parameters())
    try:
        with safe_open(file, framework="pt") as source, torch.no_grad():
            shapes = {name: list(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
            check_shapes(shapes, model, file)
            for name in shapes:
                targets[name].copy_(source.get_tensor(name))
    except SafetensorError as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def check_shapes(shapes: dict[str, list[int]], model: Transformer, file: Path) -> None:
    """Compare a file's tensors with the model's before any is read.

    Raises:
        UserError: naming the first tensor that is missing, unknown or of another shape.
    """
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            found, wanted = (str(side.get(name, "absent")) for side in (shapes, expected))
            raise UserError(f"{file} does not fit model={model.config.name}: {name} is {found}, should be {wanted}")


def permute_rotary(weight: Tensor, n_heads: int, to_hf: bool) -> Tensor:
    """Reorder the rows of wq or wk [heads * E, D] between Meta's adjacent pairs and Hugging Face's halves."""
    pairs = (-1, 2) if to_hf else (2, -1)
    heads: Tensor = weight.unflatten(0, (n_heads, -1))
    permuted: Tensor = heads.unflatten(1, pairs).transpose(1, 2).reshape(weight.shape)
    return permuted


def to_hf(state_dict: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The same weights under the names and in the rotary layout of transformers' LlamaForCausalLM."""
    heads = {"attention.wq": config.n_heads, "attention.wk": config.n_kv_heads}
    converted = {}
    for name, tensor in state_dict.items():
        match = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name)
        if match is None or match[2] not in _HF_NAMES:
            raise UserError(f"{name} is not a weight of a LLaMA decoder")
        if match[2] in heads:
            tensor = permute_rotary(tensor, heads[match[2]], to_hf=True)
        prefix = f"model.{match[1]}" if match[1] else ""
        converted[f"{prefix}{_HF_NAMES[match[2]]}.weight"] = tensor
    return converted
