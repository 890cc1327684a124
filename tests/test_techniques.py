"""Each technique against what it claims: equal results where it changes none, dtypes and counts where it does."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import relative, small_model
from helpers.training import make_step, ragged_samples
from omegaconf import OmegaConf
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.neftune import neftune_post_forward_hook

from benchmarks.decode import reference
from llama_ft.config import Dtype, MixedPrecisionConfig, ModelConfig, OptimConfig, UserError, config_dir
from llama_ft.data.collate import Batch, Padding, collate
from llama_ft.model.attention import Segments, attend
from llama_ft.model.formats import permute_rotary
from llama_ft.model.transformer import Transformer
from llama_ft.techniques.gradient_accumulation import windows
from llama_ft.techniques.gradient_checkpointing import checkpoint_layers
from llama_ft.techniques.lora import LoRALinear, add_lora
from llama_ft.techniques.mixed_precision import Precision, mixed_precision
from llama_ft.techniques.neftune import add_noise, noise_like
from llama_ft.training.step import TrainStep, summed_loss


class Recorder(torch.optim.SGD):
    """Keeps the gradients it is handed, and updates nothing."""

    def step(self, closure=None) -> None:
        self.gradients = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def window_gradients(model: Transformer, window: list[Batch]) -> list[Tensor]:
    recorder = Recorder(model.parameters(), lr=0.0)
    TrainStep(model, recorder, Precision("cpu"), float("inf"))(window)
    return recorder.gradients


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    return max(relative(x, y) for x, y in zip(a, b, strict=True))


class TestGradientAccumulation:
    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-12)])
    @pytest.mark.parametrize("micro_batch", [1, 2, 4, 3])
    def test_equals_one_batch(self, dtype: torch.dtype, tolerance: float, micro_batch: int) -> None:
        model, samples = small_model().to(dtype), ragged_samples()
        whole = window_gradients(model, [collate(samples)])
        parts = [collate(samples[start : start + micro_batch]) for start in range(0, len(samples), micro_batch)]
        assert worst(window_gradients(model, parts), whole) <= tolerance

    def test_a_mean_of_means_would_fail(self) -> None:
        model, samples = small_model().to(torch.float64), ragged_samples()
        whole, parts = window_gradients(model, [collate(samples)]), [collate([sample]) for sample in samples]
        model.zero_grad()
        for batch in parts:
            (summed_loss(model, batch) / batch.n_targets / len(parts)).backward()
        assert worst([p.grad for p in model.parameters()], whole) > 1e-2

    def test_loss_is_the_mean_over_all_target_tokens(self) -> None:
        model, samples = small_model().to(torch.float64), ragged_samples()
        window = [collate([sample]) for sample in samples]
        step = TrainStep(model, Recorder(model.parameters(), lr=0.0), Precision("cpu"), float("inf"))
        loss, _ = step(window)
        expected = []
        for sample in samples:
            logits = reference(small_model())(torch.tensor([sample.tokens])).logits[0].double()
            expected.append(
                nn.functional.cross_entropy(
                    logits[sample.n_prompt - 1 : -1], torch.tensor(sample.tokens[sample.n_prompt :]), reduction="none"
                )
            )
        assert loss.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)

    @pytest.mark.parametrize(("n", "steps", "sizes"), [(10, 4, [4, 4, 2]), (8, 8, [8]), (3, 8, [3]), (3, 1, [1, 1, 1])])
    def test_windows_lose_nothing(self, n: int, steps: int, sizes: list[int]) -> None:
        cut = list(windows(range(n), steps))
        assert [len(window) for window in cut] == sizes
        assert [item for window in cut for item in window] == list(range(n))


class TestGradientCheckpointing:
    @pytest.mark.parametrize(
        ("every", "selective", "offload"),
        [(1, False, False), (2, False, False), (3, False, True), (5, False, False), (1, True, False), (2, True, True)],
    )
    @pytest.mark.parametrize("lora", ["", "wq wv", "wq wk wv wo w1 w2 w3"])
    def test_loss_and_gradients_are_equal_to_the_bit(
        self, every: int, selective: bool, offload: bool, lora: str
    ) -> None:
        plain = small_model(2, qkv_bias=True)
        if lora:
            torch.manual_seed(0)
            add_lora(plain, 4, 8.0, 0.1, lora.split())
        checkpointed = copy.deepcopy(plain)
        checkpoint_layers(checkpointed, every, selective, offload)
        losses = []
        for model in (plain, checkpointed):
            torch.manual_seed(1)  # dropout
            loss = summed_loss(model, collate(ragged_samples()))
            loss.backward()
            losses.append(loss)
        assert torch.equal(*losses)
        for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
            assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name

    @pytest.mark.parametrize("every", [1, 2, 3])
    def test_backward_computes_the_forward_of_the_layers_again(self, every: int) -> None:
        batch = collate(ragged_samples())
        plain, checkpointed = small_model(), small_model()
        checkpoint_layers(checkpointed, every)
        layers = flops(lambda: plain(batch.tokens)) - flops(lambda: plain.output(torch.zeros(8, 39, 64)))
        # Recomputation stops at the last tensor that backward needs, so each group's last w2 is left out.
        groups, w2 = -(-3 // every), 2 * batch.tokens.numel() * 96 * 64
        assert total_flops(checkpointed, batch) - total_flops(plain, batch) == layers - groups * w2

    @pytest.mark.parametrize(("bias", "lora"), [(False, ""), (True, ""), (False, "wq w2")])
    def test_selective_computes_attention_and_sums_over_the_rank_again(self, bias: bool, lora: str) -> None:
        batch, rank = collate(ragged_samples()), 4
        plain, checkpointed = (small_model(qkv_bias=bias) for _ in range(2))
        for model in (plain, checkpointed):
            if lora:
                add_lora(model, rank, targets=lora.split())
        checkpoint_layers(checkpointed, selective=True)
        n_tokens, q = batch.tokens.numel(), torch.zeros(*batch.tokens.shape[:1], 4, batch.tokens.shape[1], 16)
        again = flops(lambda: attend(q, q, q, None)) + bool(lora) * 2 * n_tokens * rank * 64  # wq's; w2's comes last
        assert total_flops(checkpointed, batch) - total_flops(plain, batch) == 3 * again

    def test_parameter_names_stay(self) -> None:
        model = small_model()
        names = list(model.state_dict())
        checkpoint_layers(model, 2)
        assert list(model.state_dict()) == names


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def total_flops(model: Transformer, batch: Batch) -> int:
    return flops(lambda: summed_loss(model, batch).backward())


class TestLora:
    def test_a_new_adapter_changes_no_bit(self) -> None:
        model, tokens = small_model(2), torch.arange(30)[None]
        before = model(tokens)
        add_lora(model, 4, 8.0, 0.0, ["wq", "wv"])
        assert torch.equal(model(tokens), before)

    @pytest.mark.parametrize("feature", ["qkv_bias", "qk_norm"])
    def test_logits_and_gradients_equal_peft(self, feature: str) -> None:
        model = small_model(2, **{feature: True})
        config = PeftConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
        peft = get_peft_model(reference(model), config)
        add_lora(model, 4, 8.0, 0.0, ["wq", "wv"])
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for i, layer in enumerate(model.layers):
                theirs = peft.base_model.model.model.layers[i].self_attn
                for ours, their, heads in (
                    (layer.attention.wq, theirs.q_proj, 4),
                    (layer.attention.wv, theirs.v_proj, None),
                ):
                    ours.lora_B.normal_(generator=generator)
                    their.lora_A["default"].weight.copy_(ours.lora_A)
                    b = ours.lora_B if heads is None else permute_rotary(ours.lora_B, heads, to_hf=True)
                    their.lora_B["default"].weight.copy_(b)
        tokens = torch.randint(0, 101, (2, 20), generator=generator)
        ours, theirs = model(tokens), peft(tokens).logits
        assert relative(ours, theirs) <= 1e-5
        ours.logsumexp(-1).sum().backward()
        theirs.logsumexp(-1).sum().backward()
        peft_a = peft.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.grad
        assert relative(model.layers[0].attention.wq.lora_A.grad, peft_a) <= 1e-4
        counted = (
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(p.numel() for p in model.parameters()),
        )
        assert counted == peft.get_nb_trainable_parameters()

    def test_base_is_frozen_and_shared_not_copied(self) -> None:
        model = small_model()
        weight = model.layers[0].attention.wq.weight
        add_lora(model, 4, 8.0, 0.0, ["wq"])
        replaced = model.layers[0].attention.wq
        assert isinstance(replaced, LoRALinear)
        assert replaced.weight is weight
        assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}

    def test_merge_and_unmerge(self) -> None:
        model, tokens = small_model(), torch.arange(30)[None]
        add_lora(model, 4, 8.0, 0.3, ["wq", "wv", "w2"])
        layers = [module for module in model.modules() if isinstance(module, LoRALinear)]
        for layer in layers:
            nn.init.normal_(layer.lora_B)
        model.eval()
        weights, unmerged = [layer.weight.clone() for layer in layers], model(tokens)
        for layer in layers:
            layer.merge()
            layer.merge()  # a second time changes nothing
        assert relative(model(tokens), unmerged) <= 1e-5
        for layer in layers:
            layer.unmerge()
            layer.unmerge()
        assert worst([layer.weight for layer in layers], weights) <= 1e-6

    def test_a_target_that_matches_nothing_is_an_error(self) -> None:
        with pytest.raises(UserError, match=r"no linear layer is named q_proj; the model has .*'wq'"):
            add_lora(small_model(), 4, 8.0, 0.0, ["wq", "q_proj"])

    def test_any_linear_layer_can_be_adapted(self) -> None:
        class Doubling(nn.Linear):
            """Keeps half of its weight."""

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(2 * x)

        base = Doubling(5, 3)
        layer, x = LoRALinear(base, 2, 4.0), torch.randn(7, 5)
        assert isinstance(layer, Doubling)
        assert layer.weight is base.weight
        assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]
        assert torch.equal(layer(x), base(x))
        nn.init.ones_(layer.lora_B)
        expected = base(x) + x @ layer.lora_A.T @ torch.ones(2, 3) * 2.0
        assert torch.allclose(layer(x), expected)
        assert list(base.state_dict()) == ["weight", "bias"]

    def test_counts_for_7b(self) -> None:
        config = ModelConfig(**OmegaConf.load(Path(config_dir()) / "model/llama2_7b.yaml"))
        with torch.device("meta"):
            model = Transformer(config)
            add_lora(model, 16, 32.0, 0.05, ["wq", "wv"])
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == 8_388_608
        assert round(100 * trainable / sum(p.numel() for p in model.parameters()), 3) == 0.124


class TestMixedPrecision:
    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("frozen", [Dtype.compute, Dtype.fp32])
    def test_dtypes_of_weights_gradients_and_moments(self, small_config, lora: bool, frozen: Dtype) -> None:
        config = small_config
        config.mp.frozen_weights = frozen
        step = make_step(config, OptimConfig(mp=True, lora=lora))
        model, optimizer = step.model, step.optimizer
        gradients = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradients.append(gradient.dtype))
        step([collate(ragged_samples(), Padding(step.precision.pad_multiple))])
        trainable = {p.dtype for p in model.parameters() if p.requires_grad}
        kept = {p.dtype for p in model.parameters() if not p.requires_grad}
        moments = {t.dtype for state in optimizer.state.values() for t in state.values()}
        assert trainable == moments == set(gradients) == {torch.float32}
        stored = torch.bfloat16 if frozen is Dtype.compute else torch.float32
        assert kept == ({stored} if lora else set())

    def test_off_is_no_autocast_no_scaling_no_padding(self) -> None:
        model, precision = small_model(), Precision("cpu")
        tokens = torch.arange(5)[None]
        with precision.autocast():
            inside = model(tokens)
        assert torch.equal(inside, model(tokens))
        assert not precision.scaler().is_enabled()
        assert precision.pad_multiple == 1

    @pytest.mark.parametrize("features", [{}, {"qkv_bias": True, "qk_norm": True}])
    def test_matrix_products_run_in_16_bit_and_the_loss_is_close_to_fp32(self, features: dict[str, bool]) -> None:
        model, precision = small_model(2, **features), mixed_precision(MixedPrecisionConfig(), "cpu", True)
        batch, attention = collate(ragged_samples()), model.layers[0].attention

        def in_16_bit(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
            assert {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
            return attend(q, k, v, *others)

        attention.attend = in_16_bit
        with precision.autocast():
            assert model(torch.arange(5)[None]).dtype == torch.bfloat16
            rough = summed_loss(model, batch)
        attention.attend = attend
        assert rough.item() == pytest.approx(summed_loss(model, batch).item(), rel=2e-2)
        assert rough.dtype == torch.float32

    def test_padding_to_a_multiple_changes_no_loss(self) -> None:
        model, samples = small_model(), ragged_samples()
        with torch.no_grad():
            losses = [summed_loss(model, collate(samples, Padding(multiple))).item() for multiple in (1, 32)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)

    def test_auto_is_bf16_where_the_card_has_it(self) -> None:
        config = MixedPrecisionConfig()
        assert mixed_precision(config, "cuda", True).compute == torch.bfloat16
        assert mixed_precision(config, "cuda", False).compute == torch.float16
        with pytest.raises(UserError, match="not supported by this GPU"):
            mixed_precision(MixedPrecisionConfig(dtype=Dtype.bf16), "cuda", False)
        with pytest.raises(UserError, match="needs bf16"):
            mixed_precision(MixedPrecisionConfig(trainable_weights=Dtype.compute), "cuda", False)
        assert mixed_precision(config, "cpu", False).scaler().is_enabled()


class TestNeftune:
    def test_noise_is_transformers_own_to_the_bit(self) -> None:
        """alpha / sqrt(16 x 64) is exact in fp32, in which transformers has it."""
        model, theirs = small_model(), copy.deepcopy(small_model().tok_embeddings)
        theirs.neftune_noise_alpha = 5.0
        theirs.register_forward_hook(neftune_post_forward_hook)
        add_noise(model, 5.0)
        tokens = torch.arange(48).view(3, 16)
        drawn = []
        for embed in (theirs, lambda tokens: model.embed(model.tok_embeddings, tokens, None)):
            torch.manual_seed(1)
            drawn.append(embed(tokens))
        assert torch.equal(*drawn)
        assert not torch.equal(drawn[0], small_model().tok_embeddings(tokens))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("lengths", [None, (5, 300, 95)])
    def test_noise_is_uniform_within_the_formulas_bounds(self, lengths: tuple[int, ...] | None, dtype) -> None:
        """And as long, over a sequence, as alpha / sqrt(3): the paper's section 3."""
        torch.manual_seed(0)
        mask = None if lengths is None else Segments.of(lengths)
        noise = noise_like(torch.empty(1, 400, 64, dtype=dtype), mask, 5.0)
        assert noise.dtype == dtype
        for part in noise.float().split(lengths or (400,), dim=1):
            bound = 5.0 / (part.shape[1] * 64) ** 0.5
            assert 0.95 * bound < part.abs().max() <= bound * (1 + 2**-8)  # rounded to bf16
            assert part.norm().item() == pytest.approx(5.0 / 3**0.5, rel=0.1)
            counts = torch.histc(part / bound, 4, -1, 1) / part.numel()
            assert counts.tolist() == pytest.approx([0.25] * 4, abs=0.06)

    def test_none_is_added_when_the_model_is_asked(self) -> None:
        model, batch = small_model(), collate(ragged_samples())
        plain = model(batch.tokens)
        add_noise(model)
        assert not torch.equal(model(batch.tokens), plain)
        assert torch.equal(model.eval()(batch.tokens), plain)

    @pytest.mark.parametrize("optim", [OptimConfig(), OptimConfig(mp=True, lora=True, gc=True)])
    def test_off_is_bit_equal_to_not_there_and_on_draws_once_a_micro_batch(self, small_config, optim) -> None:
        """With checkpointing too, which computes layers twice."""
        batch = collate(ragged_samples(), Padding(32))
        losses, drawn = {}, []
        for neft in (False, True):
            step = make_step(small_config, replace(optim, neft=neft))
            embed = step.model.embed
            step.model.embed = lambda *args, embed=embed: drawn.append(embed(*args)) or drawn[-1]
            torch.manual_seed(0)
            losses[neft] = [step([batch])[0].item() for _ in range(2)]
        assert len(drawn) == 4
        small_config.neft.alpha = 100.0
        step = make_step(small_config, optim)
        torch.manual_seed(0)
        assert losses[False] == [step([batch])[0].item() for _ in range(2)]
        assert losses[True] != losses[False]
        assert losses[True] == pytest.approx(losses[False], rel=0.05)

    def test_in_whatever_order_techniques_are_added(self) -> None:
        losses = []
        for order in ((checkpoint_layers, add_noise), (add_noise, checkpoint_layers), (add_noise,)):
            model = small_model()
            for change in order:
                change(model)
            torch.manual_seed(0)
            losses.append(summed_loss(copy.deepcopy(model), collate(ragged_samples())).item())
        assert losses[0] == losses[1] == losses[2]
