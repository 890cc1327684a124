"""Frozen weights in 4 bits: against the format's definition, and against transformers, PEFT and bitsandbytes."""

import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import create_normal_map
from conftest import run
from helpers.models import CPU, random_tokens, relative, small_config
from helpers.planning import ON_CPU
from helpers.planning import small_config as small_run
from helpers.training import ragged_samples
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from test_planning import measured
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BitsAndBytesConfig, LlamaForCausalLM
from transformers import LlamaConfig as HfConfig

import llama_ft as lf
from llama_ft.config import Dtype, ModelConfig, UserError
from llama_ft.data.collate import collate
from llama_ft.data.records import Sample
from llama_ft.model.folder import sizes_of
from llama_ft.model.formats import permute_rotary
from llama_ft.model.four_bit import BLOCK, FourBit, FourBitLinear, count_parameters
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import build, load_model
from llama_ft.planning.fake_run import fake_run
from llama_ft.system import MIB
from llama_ft.techniques.lora import add_lora, lora_layers
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.optimizers import AdamW
from llama_ft.training.step import TrainStep

# A group of 256 scales, 32 rows, is less than a head.
HF = HfConfig(
    hidden_size=512,
    intermediate_size=768,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=300,
    max_position_embeddings=128,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' checkpoint, in fp32, with weights far from uniform."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(HF)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() == 2 else 1)
    model.save_pretrained(place := tmp_path_factory.mktemp("models") / "hf")
    return place


def ours(folder: Path, double: bool = True, dtype: torch.dtype = torch.float32, levels: str = "nf4") -> Transformer:
    return load_model(ModelConfig(**sizes_of(folder)), str(folder), CPU, FourBit(dtype, levels, double))


def theirs(folder: Path, double: bool, levels: str = "nf4") -> LlamaForCausalLM:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=levels,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )
    # In training mode: else weights are laid out anew for a kernel that computes in bf16.
    settings = {"quantization_config": settings, "dtype": torch.float32, "device_map": "cpu"}
    return LlamaForCausalLM.from_pretrained(folder, **settings).train()


def dequantized(layer: FourBitLinear) -> Tensor:
    """By the format's definition: a nibble is a level, the higher one first, times its block's scale."""
    levels = torch.tensor(sorted({float(level) for level in create_normal_map()}))
    nibbles = torch.stack((layer.weight >> 4, layer.weight & 15), dim=-1).flatten().int()
    scales = layer.scales.float()
    if layer.scales.dtype == torch.uint8:
        groups = layer.scale_scales.repeat_interleave(256)[: len(scales)]
        scales = layer.scale_levels[layer.scales.int()] * groups + layer.mean_scale
        if layer.n_heads:
            scales = permute_rotary(scales.view(layer.out_features, -1), layer.n_heads, to_hf=False).flatten()
    return (levels[nibbles] * scales.repeat_interleave(BLOCK)).view(layer.out_features, layer.in_features)


def test_the_levels_are_quantiles_of_a_normal_distribution() -> None:
    """The paper's section 3: 8 evenly spaced above 0, 7 below, and 0; the largest is 1."""
    offset = 0.9677083
    above, below = (torch.special.ndtri(torch.linspace(offset, 0.5, n)[:-1]) for n in (9, 8))
    expected = torch.cat((above, torch.zeros(1), -below)).sort().values / above.max()
    levels = torch.tensor(sorted({float(level) for level in create_normal_map()}))
    assert torch.allclose(levels, expected.float(), atol=1e-6)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_dequantized_weight(folder: Path, double: bool, dtype) -> None:
    """Of all layers, wq and wk with their scales in another order too."""
    model = ours(folder, double, dtype)
    torch.manual_seed(1)
    for name in ("wq", "wk", "wv"):
        layer = getattr(model.layers[0].attention, name)
        weight, x = dequantized(layer), torch.randn(3, 30, 512).to(dtype).requires_grad_()
        layer(x).backward(g := torch.randn(3, 30, layer.out_features).to(dtype))
        bound = 1e-5 if dtype == torch.float32 else 2**-7  # two roundings of the operands, and one of the result
        assert relative(layer(x).float(), x.float() @ weight.T) <= bound
        assert relative(x.grad.float(), g.float() @ weight) <= bound
        with torch.no_grad():
            assert relative(layer(x[0, :1]).float(), (x[0, :1].float() @ weight.T)) <= bound  # as when generating


@pytest.mark.parametrize("double", [True, False])
def test_logits_and_losses_equal_transformers_with_peft_and_bitsandbytes(folder: Path, double: bool) -> None:
    """Ten steps of LoRA on the same quantized weights, from the same adapter."""
    model, peft = ours(folder, double), theirs(folder, double)
    tokens = random_tokens(2, 60)
    assert relative(model(tokens), peft(tokens).logits) <= 1e-5
    add_lora(model, 8, 16.0, 0.0, ["wq", "wv"])
    peft = get_peft_model(peft, PeftConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            their = peft.get_submodule(f"base_model.model.model.{name}".replace("attention.w", "self_attn.") + "_proj")
            their.lora_A["default"].weight.copy_(layer.lora_A)
    steps, optimizers = [], []
    for each in (model, peft):
        optimizers.append(AdamW([p for p in each.parameters() if p.requires_grad], 1e-3, weight_decay=0.0))
    step = TrainStep(model, optimizers[0], Precision("cpu"), float("inf"))
    for _ in range(10):
        texts = [[1, *random_tokens(1, 40, seed=n)[0].tolist()] for n in range(2)]
        loss, _ = step([collate([Sample.after(text, 1) for text in texts])])
        labels = torch.tensor(texts)
        expected = peft(input_ids=labels, labels=labels).loss
        expected.backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        steps.append((loss.item(), expected.item()))
    assert steps[-1][1] < steps[0][1] - 0.01  # they learn
    assert max(abs(a - b) / b for a, b in steps) <= 1e-4


def test_fp4_is_bitsandbytes_own(folder: Path) -> None:
    tokens = random_tokens(1, 30)
    assert relative(ours(folder, levels="fp4")(tokens), theirs(folder, True, "fp4")(tokens).logits) <= 1e-5


@pytest.mark.parametrize(
    ("on", "settings"),
    [
        ("mp lora", {}),
        ("mp lora", {"double_quantization": False}),
        ("mp lora gc", {"frozen_weights": Dtype.fp4}),
        ("ga mp lora gc", {}),
        ("mp lora", {"dtype": Dtype.fp16}),
        ("mp lora neft", {}),
    ],
)
@pytest.mark.parametrize("features", [{}, {"qkv_bias": True, "tie_word_embeddings": True, "n_kv_heads": 2}])
def test_a_fake_run_needs_what_the_real_one_needs(on: str, settings: dict[str, Any], features: dict[str, Any]) -> None:
    config = small_run(**dict.fromkeys(on.split(), True))
    config.model = replace(config.model, **features)
    config.mp = replace(config.mp, **{"frozen_weights": Dtype.nf4} | settings)
    config.ga.steps, config.lora.targets = 3, ["wq", "w2", "output"]
    planned, real = fake_run(config, ragged_samples(), ON_CPU), measured(config, ragged_samples())
    tolerance = 1024 / MIB if settings.get("dtype") is Dtype.fp16 else 0  # the scaler's scalars
    assert planned.use.peak_mib == pytest.approx(real.peak_mib, abs=tolerance)
    assert tolerance or planned.use == real
    assert sum(real.at_peak_mib.values()) == pytest.approx(real.peak_mib)
    linear = sum(p.numel() for name, p in build(config.model).named_parameters() if re.search(r"\.w\w\.weight", name))
    found = {item.dtype: item.mib for item in real.breakdown if item.category == "parameter"}
    scales = linear // BLOCK if config.mp.double_quantization else 0
    assert found["uint8"] == pytest.approx((linear / 2 + scales) / MIB)
    adapters = sum(a.numel() + b.numel() for a, b in adapter_shapes(config))
    expected = sum(p.numel() for p in build(config.model).parameters())
    assert (planned.trainable_params, planned.total_params) == (adapters, expected + adapters)


def adapter_shapes(config: Any) -> list[tuple[Tensor, Tensor]]:
    model = build(config.model)
    add_lora(model, config.lora.rank, targets=config.lora.targets)
    return [(layer.lora_A, layer.lora_B) for layer in lora_layers(model).values()]


def test_merging_rounds_once(folder: Path) -> None:
    model, tokens = ours(folder, dtype=torch.bfloat16), random_tokens(1, 20)
    add_lora(model, 4, 8.0, 0.0, ["wq"])
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    expected = {name: dequantized(layer) + layer._update() for name, layer in lora_layers(model).items()}
    for layer in lora_layers(model).values():
        layer.merge()
    for name, layer in lora_layers(model).items():
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight, expected[name].bfloat16())
    assert model(tokens).isfinite().all()


class LivePeak(TorchDispatchMode):
    """The most bytes of storages that operators made, at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.alive:
                    size = storage.nbytes()
                    self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._freed(key, size))
                    self.now += size
                    self.peak = max(self.peak, self.now)
        return out

    def _freed(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size


def test_loading_needs_the_quantized_model_and_no_more_than_one_layer(folder: Path) -> None:
    with LivePeak() as tracker:
        model = ours(folder, dtype=torch.bfloat16)
    held = sum(p.nbytes for p in model.parameters()) + model.rotary.nbytes
    linear = [layer for layer in model.layers[0].modules() if isinstance(layer, FourBitLinear)]
    one_layer = 2 * sum(layer.in_features * layer.out_features for layer in linear)
    assert tracker.peak <= held + one_layer


def test_an_adapter_trained_over_4_bits_serves_16_bits_and_peft(folder: Path, tmp_path: Path) -> None:
    model = ours(folder)
    add_lora(model, 4, 8.0, 0.0, ["wq", "w2"])
    samples = [Sample.after(random_tokens(1, 20, seed=n)[0].tolist(), 5) for n in range(4)]
    list(lf.finetune(model, samples, lr=1e-2, epochs=2))
    lf.save(model, tmp_path / "adapter")
    plain, config = load_model(ModelConfig(**sizes_of(folder)), str(folder), CPU, torch.float32), tmp_path / "adapter"
    lf.load_adapter(plain, config)
    tokens = random_tokens(1, 20)
    peft = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), config).eval()
    assert relative(plain(tokens), peft(tokens).logits) <= 1e-5
    merged = ours(folder)
    lf.load_adapter(merged, config, merge=True)
    assert relative(merged.eval()(tokens), model.eval()(tokens)) <= 1e-5
    with pytest.raises(UserError, match="4-bit weights cannot be saved: convert merges"):
        lf.save(ours(folder), tmp_path / "whole")


def test_random_weights_are_those_of_other_storages_rounded() -> None:
    """Drawn in the dtype of what is not quantized."""
    quantized = load_model(small_config(), "random", CPU, FourBit(torch.float32))
    plain = load_model(small_config(), "random", CPU, torch.float32)
    assert torch.equal(quantized.output.weight, plain.output.weight)
    error = quantized.layers[0].attention.wq.dense_weight(torch.float32) - plain.layers[0].attention.wq.weight
    assert 0.05 < error.norm() / plain.layers[0].attention.wq.weight.norm() < 0.15
    assert count_parameters(quantized)[1] == sum(p.numel() for p in plain.parameters())


def test_another_dtype_leaves_weight_and_scales_as_they_are(folder: Path) -> None:
    model, tokens = ours(folder), random_tokens(1, 20)
    expected = {name: dequantized(layer) for name, layer in four_bit_layers(model).items()}
    model.to(torch.bfloat16)
    assert all(torch.equal(dequantized(layer), expected[name]) for name, layer in four_bit_layers(model).items())
    assert model(tokens).dtype == torch.bfloat16
    assert {layer.dtype for layer in four_bit_layers(model).values()} == {torch.bfloat16}


def four_bit_layers(model: Transformer) -> dict[str, FourBitLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FourBitLinear)}


def test_weights_in_4_bits_alone_are_not_trained(folder: Path) -> None:
    with pytest.raises(UserError, match=r"weights are in 4 bits, which cannot be trained: call lf\.add_lora"):
        next(lf.finetune(ours(folder), [Sample.after([1, 2, 3, 4], 2)]))
    with pytest.raises(UserError, match=r"dtype=int4 is not allowed: .*fp32, bf16, fp16, nf4, fp4"):
        lf.load("tiny", dtype="int4")


@pytest.mark.process
def test_generate_and_evaluate_in_4_bits(tmp_path: Path) -> None:
    """With the adapter beside them, in the precision that they say."""
    settings = "optim=mp_lora mp.frozen_weights=nf4 training.max_samples=8 tracker=disabled hydra.run.dir=run"
    trained = run("llama_ft.train", *settings.split(), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    asked = "adapter=run dtype=nf4 compare=true decoding.max_new_tokens=4 prompt=The"
    said = run("llama_ft.generate", *asked.split(), cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    found = run(*"llama_ft.evaluate adapter=run dtype=nf4 exact_match=false output=out".split(), cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    result = json.loads((tmp_path / "out/evaluate.json").read_text())
    assert result["dtype"] == "nf4"


@pytest.mark.process
@pytest.mark.parametrize(
    "arguments",
    [
        "llama_ft.train optim=mp_lora mp.frozen_weights=nf4 tracker=disabled",
        "llama_ft.generate dtype=nf4 prompt=The",
    ],
)
def test_without_bitsandbytes_a_line_says_what_to_install(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise ModuleNotFoundError('no bitsandbytes')")
    result = run(*arguments.split(), cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode != 0
    assert "Traceback" not in result.stdout + result.stderr
    expected = "storing weights in 4 bits (nf4) needs the package bitsandbytes: pip install 'llama_ft[quant]'"
    assert expected in " ".join((result.stdout + result.stderr).split())
