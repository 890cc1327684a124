"""The decoder against transformers, closed forms and higher precision."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.models import CPU, reference, relative, small_config, small_model

from benchmarks.decode import to_hf
from llama_ft.config import ModelConfig, UserError
from llama_ft.files import WEIGHTS_FILE
from llama_ft.model.transformer import RMSNorm, rotary_frequencies, rotary_table, rotate
from llama_ft.model.weights import load_model, save_tensors


def rotary_config(context: int, head_dim: int) -> ModelConfig:
    return ModelConfig("small", max_seq_len=context, head_size=head_dim)


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_logits_equal_transformers(n_kv_heads):
    model = small_model(n_kv_heads)
    tokens = torch.randint(0, 101, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert relative(model(tokens), reference(model)(tokens).logits) <= 1e-5


@pytest.mark.parametrize("feature", ["qkv_bias", "qk_norm"])
def test_gradients_equal_transformers(feature):
    model = small_model(2, **{feature: True})
    hf = reference(model)
    tokens = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(2))
    model(tokens).logsumexp(-1).sum().backward()
    hf(tokens).logits.logsumexp(-1).sum().backward()
    ours = to_hf({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model.config)
    for name, parameter in hf.named_parameters():
        assert relative(ours[name], parameter.grad) <= 1e-4, name


def test_left_padding_with_positions_and_mask_changes_nothing():
    model = small_model(2)
    tokens = torch.randint(0, 101, (1, 12), generator=torch.Generator().manual_seed(3))
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), tokens), dim=1)
    positions = torch.cat((torch.zeros(5, dtype=torch.long), torch.arange(12)))[None]
    mask = torch.ones(17, 17, dtype=torch.bool).tril()[None, None]
    mask[..., 5:, :5] = False
    with torch.no_grad():
        assert relative(model(padded, positions=positions, mask=mask)[:, 5:], model(tokens)) <= 1e-5


def test_a_token_does_not_see_those_after_it():
    model = small_model()
    tokens = torch.randint(0, 101, (1, 16), generator=torch.Generator().manual_seed(4))
    changed = tokens.clone()
    changed[0, 10:] += 1
    with torch.no_grad():
        before, after = model(tokens % 101), model(changed % 101)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


def test_logits_at_are_those_rows_of_all_logits():
    model = small_model()
    tokens = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(5))
    at = torch.tensor([0, 8, 9, 17])
    with torch.no_grad():
        assert relative(model(tokens, logits_at=at), model(tokens).flatten(0, 1)[at]) <= 1e-6


def test_rotary_angles_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(6)
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    turns = torch.view_as_complex(rotary_table(rotary_config(64, 16)).double()).unsqueeze(-2)
    score = [(rotate(q, turns[i : i + 1]) * rotate(k, turns[j : j + 1])).sum().item() for i, j in ((7, 2), (45, 40))]
    assert score[0] == pytest.approx(score[1], rel=1e-5)


def test_rotary_turns_adjacent_pairs_by_a_rotation_matrix():
    x = torch.randn(1, 10, 2, 8, generator=torch.Generator().manual_seed(7))
    angles = torch.outer(torch.arange(10.0), 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    cos, sin = angles.cos(), angles.sin()
    matrices = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))  # [S, E / 2, 2, 2]
    turned = (matrices[None, :, None] @ x.unflatten(-1, (-1, 2)).unsqueeze(-1)).flatten(-3)
    turns = torch.view_as_complex(rotary_table(rotary_config(10, 8))).unsqueeze(-2)
    assert relative(rotate(x, turns), turned) <= 1e-6


def test_llama_3_1_slows_what_turns_seldom():
    """As the paper's text has it, frequency by frequency: by the wavelength beside the original context."""
    sizes = {"rope_theta": 500000.0, "rope_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
    config = ModelConfig("scaled", head_size=128, rope_original_context=8192, **sizes)
    plain = rotary_frequencies(replace(config, rope_factor=1.0))
    kinds = set()
    for exponent, frequency in enumerate(rotary_frequencies(config).tolist()):
        unscaled = 500000.0 ** (-2 * exponent / 128)
        wavelength = 2 * math.pi / unscaled
        if wavelength > 8192 / 1:
            kind, expected = "slowed", unscaled / 8
        elif wavelength < 8192 / 4:
            kind, expected = "as it is", unscaled
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            kind, expected = "between", (1 - smooth) * unscaled / 8 + smooth * unscaled
        assert frequency == pytest.approx(expected, rel=1e-5)
        assert plain[exponent].item() == pytest.approx(unscaled, rel=1e-5)
        kinds.add(kind)
    assert kinds == {"slowed", "as it is", "between"}
    assert torch.equal(rotary_frequencies(replace(config, rope_original_context=0)), plain / 8)


def test_tied_embeddings_are_one_weight(tmp_path):
    config = replace(small_config(2), tie_word_embeddings=True)
    model = load_model(config, "random", CPU, torch.float32, seed=3)
    untied = load_model(replace(config, tie_word_embeddings=False), "random", CPU, torch.float32)
    untied.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(9))
    assert torch.equal(model(tokens), untied(tokens))
    assert len(list(model.parameters())) == len(list(untied.parameters())) - 1
    for each in (model, untied):
        each(tokens).logsumexp(-1).sum().backward()
    both = untied.tok_embeddings.weight.grad + untied.output.weight.grad
    assert relative(model.output.weight.grad, both) <= 1e-6
    save_tensors(dict(model.named_parameters()), tmp_path / WEIGHTS_FILE, config)
    assert [file.name for file in tmp_path.iterdir()] == [WEIGHTS_FILE]
    again = load_model(config, str(tmp_path), CPU, torch.bfloat16)
    assert again.output.weight is again.tok_embeddings.weight
    assert torch.equal(again.output.weight, model.output.weight.bfloat16())
    with pytest.raises(UserError, match="tie_word_embeddings is False but the file has True"):
        load_model(replace(config, tie_word_embeddings=False), str(tmp_path), CPU, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rmsnorm_computes_in_fp32(dtype):
    norm = RMSNorm(256, 1e-5)
    x = (100 * torch.randn(4, 256, generator=torch.Generator().manual_seed(8))).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert relative(norm(x).double(), exact) <= torch.finfo(dtype).eps


def test_more_tokens_than_the_context_are_refused():
    with pytest.raises(ValueError, match="65 tokens exceed the model's context of 64"):
        small_model()(torch.zeros(1, 65, dtype=torch.long))


def test_random_weights_depend_on_the_seed_alone():
    first, second, other = (load_model(small_config(), "random", CPU, torch.float32, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.output.weight, other.output.weight)
    assert first.output.weight.std().item() == pytest.approx(0.02, rel=0.05)
    config = replace(small_config(), qkv_bias=True, qk_norm=True)
    attention = load_model(config, "random", CPU, torch.float32).layers[0].attention
    assert (attention.wk.bias == 0).all()
    assert (attention.k_norm.weight == 1).all()


def test_tiny_fits_8_mb_with_its_tokenizer_in_16_bit(tiny_config):
    parameters = sum(p.numel() for p in load_model(tiny_config.model, "builtin", CPU, torch.float32).parameters())
    assert 2 * parameters + tiny_config.tokenizer_file.stat().st_size <= 8e6
