"""LoRA adapters in PEFT's files (https://github.com/huggingface/peft), which runs also write.

`adapter_config.json` gives the update's scale, `adapter_model.safetensors` has the factors, with transformers' names
and rotary layout: the rows of lora_B of wq and wk are permuted like those of the weights.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from llama_ft.config import ModelConfig, UserError
from llama_ft.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, WEIGHTS_FILE, Json, read_json, why_no_folder, write_json
from llama_ft.model.folder import hub_repository
from llama_ft.model.formats import hf_name, is_rotated, our_name, permute_rotary
from llama_ft.model.mapped import StoredTensor, read_pth, read_safetensors
from llama_ft.model.sharded import whole
from llama_ft.model.sizes import check_sizes, own_sizes
from llama_ft.model.transformer import EMBEDDING, OUTPUT, Transformer
from llama_ft.model.weights import build, save_tensors
from llama_ft.records import parse
from llama_ft.techniques.lora import lora_layers
from llama_ft.techniques.peft_patterns import by_pattern

PREFIX = "base_model.model."
PICKLE_FILE = "adapter_model.bin"  # before PEFT 0.6
# Keys of adapter_config.json that do not affect the result here. All others that are not fields of PeftConfig must be
# off.
_IGNORED = """
    auto_mapping corda_config eva_config exclude_modules layers_pattern layers_to_transform loftq_config lora_ga_config
    megatron_config megatron_core peft_version qalora_group_size revision runtime_config
""".split()
_OFF: Json = {"bias": "none", "fan_in_fan_out": False, "modules_to_save": None}  # also written by PEFT
_INITS = (True, False, "gaussian", "eva", "orthogonal")  # the others change the base model's weights


@dataclass(frozen=True)
class PeftConfig:
    """The keys of `adapter_config.json` that we write and read."""

    r: int
    lora_alpha: float
    target_modules: list[str] | str = field(default_factory=list)
    base_model_name_or_path: str | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)  # of layers with their own rank
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    inference_mode: bool = True
    peft_type: str = "LORA"
    task_type: str = "CAUSAL_LM"


@dataclass(frozen=True)
class Factors:
    """The update of one linear layer: its place in the files, and its scale."""

    name: str  # for messages
    a: StoredTensor  # [rank, in_features]
    b: StoredTensor  # [out_features, rank], in Hugging Face's layout
    alpha: float
    rslora: bool
    n_heads: int | None  # if b's rows are permuted

    @property
    def rank(self) -> int:
        """Rows of A, columns of B."""
        return self.a.shape[0]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """A and B in our layout, in the stored dtype; a UserError if they hold NaN or infinities."""
        a, b = self.a.rows(0, self.rank), self.b.rows(0, self.b.shape[0])
        for which, factor in (("A", a), ("B", b)):
            if not factor.isfinite().all():
                raise UserError(f"{self.name}.lora_{which} has NaN or infinite numbers: its training failed")
        return a, b if self.n_heads is None else permute_rotary(b, self.n_heads, to_hf=False)


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, checked against a model."""

    folder: Path
    base: str | None  # the checkpoint that it was trained on, if known
    factors: dict[str, Factors]  # by our names of the linear layers
    copies: dict[str, StoredTensor]  # of base weights, which PEFT saves if the output layer is adapted

    @property
    def weights(self) -> dict[str, Factors]:
        """The factors by our names of the weights that they update."""
        return {f"{layer}.weight": factors for layer, factors in self.factors.items()}


def save_adapter(model: Transformer, folder: Path, base: str | None = None, *, writes: bool = True) -> None:
    """Write the model's adapter into a folder; a UserError if it has none, or the files cannot be written.

    Args:
        base: the checkpoint that it was trained on, saved for PEFT as a path or a name on the Hugging Face hub; None
            saves none.
        writes: this process writes the files; all processes that share the model must call this function.
    """
    layers = lora_layers(model)
    if not layers:
        raise UserError("the model has no LoRA adapter to be saved")
    if base not in (None, "builtin", "random"):
        base = os.path.abspath(os.path.expanduser(base))
        base = hub_repository(Path(base)) or base
    names = {name: _peft_name(name) for name in layers}
    layer = next(iter(layers.values()))
    config = PeftConfig(
        r=layer.rank,
        lora_alpha=layer.alpha,
        target_modules=sorted({name.rpartition(".")[2] for name in names.values()}),
        base_model_name_or_path=base,
        lora_dropout=layer.dropout.p,
        use_rslora=layer.rslora,
    )
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a, b = whole(layer.lora_A.detach()), whole(layer.lora_B.detach())
        if is_rotated(f"{name}.weight"):
            b = permute_rotary(b, layer.out_features // model.config.head_dim, to_hf=True)
        tensors |= {f"{names[name]}.lora_A.weight": a, f"{names[name]}.lora_B.weight": b}
    if not writes:
        return
    file = folder / ADAPTER_CONFIG_FILE
    try:
        write_json(file, asdict(config) | _OFF)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from error
    save_tensors(tensors, folder / ADAPTER_FILE, model.config)


def _peft_name(layer: str) -> str:
    return PREFIX + hf_name(f"{layer}.weight").removesuffix(".weight")


def read_adapter(folder: Path, model: ModelConfig) -> Adapter:
    """Find an adapter in a folder, reading no tensor; a UserError if it is damaged, another model's, or not LoRA."""
    try:
        tensors = _open_tensors(folder, model)
        config_file = folder / ADAPTER_CONFIG_FILE
        if not config_file.is_file():
            raise UserError(f"it has no {ADAPTER_CONFIG_FILE}, which says how the adapter is scaled")
        content = read_json(config_file, "how the adapter is scaled")
        _check_supported(content)
        known = {key: value for key, value in content.items() if value is not None}
        return _sorted_out(folder, parse(PeftConfig, known, str(config_file)), tensors, model)
    except OSError as error:
        raise UserError(f"adapter={folder} cannot be read: {error.strerror}") from error
    except UserError as error:
        text = str(error)
        raise UserError(text if f"{folder}{os.sep}" in text else f"adapter={folder}: {text}") from error


def _open_tensors(folder: Path, model: ModelConfig) -> dict[str, StoredTensor]:
    if not folder.is_dir():
        raise UserError(why_no_folder(folder))
    file = folder / ADAPTER_FILE
    if file.is_file():
        tensors, metadata = read_safetensors(file)
        check_sizes(own_sizes(metadata, file) or {}, model, file)
        return tensors
    if (folder / PICKLE_FILE).is_file():
        return read_pth(folder / PICKLE_FILE)
    hint = "give the folder of a run with LoRA, or of a PEFT adapter"
    if (folder / WEIGHTS_FILE).is_file():
        hint = f"its {WEIGHTS_FILE} is a whole model: give checkpoint={folder} and no adapter"
    raise UserError(f"it has no {ADAPTER_FILE}; {hint}")


def _check_supported(content: Json) -> None:
    """Raise a UserError if the adapter is anything but low-rank updates of linear layers."""
    kind, init = content.get("peft_type"), content.get("init_lora_weights", True)
    if kind != "LORA":
        raise UserError(f"{ADAPTER_CONFIG_FILE} says peft_type={kind}, but only LORA is supported")
    for key in content.keys() - {*PeftConfig.__dataclass_fields__, *_IGNORED}:
        if content[key] not in (None, False, "none", "", [], {}):
            raise UserError(f"{ADAPTER_CONFIG_FILE} says {key}={content[key]}, which is not supported")
    if init not in _INITS:
        reason = "such an adapter belongs to weights that differ from the checkpoint's"
        hint = "save it with PEFT's path_initial_model_for_weight_conversion"
        raise UserError(f"{ADAPTER_CONFIG_FILE} says init_lora_weights={init}: {reason}; {hint}")


def _sorted_out(folder: Path, config: PeftConfig, tensors: Mapping[str, StoredTensor], model: ModelConfig) -> Adapter:
    linears = {name: module for name, module in build(model).named_modules() if isinstance(module, nn.Linear)}
    pairs: dict[str, dict[str, StoredTensor]] = {}
    copies: dict[str, StoredTensor] = {}
    for name, stored in tensors.items():
        match = re.fullmatch(re.escape(PREFIX) + r"(.+?)(?:\.lora_([AB])(?:\.default)?|\.base_layer)?\.weight", name)
        ours = our_name(f"{match[1]}.weight") if match else None
        if match is not None and match[2]:
            layer = (ours or "").removesuffix(".weight")
            if layer not in linears:
                raise UserError(f"its {name} does not belong to a linear layer of model={model.name}")
            pairs.setdefault(layer, {})[match[2]] = stored
        elif ours in (EMBEDDING, OUTPUT):
            copies[ours] = stored
        else:
            raise UserError(f"its {name} is not part of a LoRA adapter of a linear layer: not supported")
    if not pairs:
        raise UserError("it has no lora_A or lora_B")
    factors = {layer: _factors(folder, layer, pair, linears[layer], config, model) for layer, pair in pairs.items()}
    return Adapter(folder, config.base_model_name_or_path, factors, copies)


def _factors(
    folder: Path,
    layer: str,
    pair: Mapping[str, StoredTensor],
    linear: nn.Linear,
    config: PeftConfig,
    model: ModelConfig,
) -> Factors:
    """A layer's factors; a UserError unless their shapes fit the layer."""
    theirs = _peft_name(layer)
    if missing := {"A", "B"} - pair.keys():
        raise UserError(f"its {theirs} has no lora_{missing.pop()}")
    rank = int(by_pattern(config.rank_pattern, theirs.removeprefix(PREFIX), config.r))
    for which, shape in (("A", [rank, linear.in_features]), ("B", [linear.out_features, rank])):
        if pair[which].shape != shape:
            expected = f"for model={model.name} and r={rank} should be {shape}"
            cause = "it is an adapter of another model, or damaged"
            raise UserError(f"{theirs}.lora_{which} is {pair[which].shape}, but {expected}: {cause}")
    n_heads = linear.out_features // model.head_dim if is_rotated(f"{layer}.weight") else None
    alpha = by_pattern(config.alpha_pattern, theirs.removeprefix(PREFIX), config.lora_alpha)
    return Factors(f"adapter={folder}: {theirs}", pair["A"], pair["B"], alpha, config.use_rslora, n_heads)
