"""16-bit products through fp32, against fp64 of the same 16-bit inputs, and what may not change with them."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import small_model
from helpers.training import make_step, ragged_samples
from torch import Tensor

from llama_ft import kernels
from llama_ft.config import OptimConfig
from llama_ft.data.collate import Padding, collate
from llama_ft.decoding.state import GenerationState
from llama_ft.measure.memory import MemoryTracker
from llama_ft.techniques.mixed_precision import Precision

FORMATS = [torch.bfloat16, torch.float16]


@pytest.fixture
def through_fp32(monkeypatch) -> None:
    """A CPU without any 16-bit kernels."""
    monkeypatch.setattr(kernels, "has_16bit_products", lambda dtype: False)
    kernels.attend_in_fp32()
    kernels.multiply_in_fp32()  # for the rest of the process; it asks the same question


def is_rounded_once(value: Tensor, exact: Tensor) -> bool:
    """Whether no element is further from fp64 than rounding to 16 bit, and fp32's own error, put it."""
    unit = torch.finfo(value.dtype).eps / 2
    error = (value.double() - exact).abs()
    return bool((error <= 1.01 * unit * exact.abs() + 1e-5 * exact.abs().max()).all())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(5, 32, 48), (7, 64, 9000), (2, 9000, 64), (1, 16, 8)])
def test_products_are_rounded_once(through_fp32, monkeypatch, dtype, rows: int, n_in: int, n_out: int) -> None:
    monkeypatch.setattr(kernels, "BLOCK_BYTES", 2**18)  # so that the large ones are cut
    x, w, grad = (torch.randn(shape).to(dtype) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
    x, w = x.requires_grad_(), w.requires_grad_()
    y = F.linear(x, w)
    y.backward(grad)
    assert y.dtype == dtype
    assert is_rounded_once(y, x.double() @ w.double().T)
    assert x.grad is not None
    assert is_rounded_once(x.grad, grad.double() @ w.double())
    assert w.grad is not None
    assert is_rounded_once(w.grad, grad.double().T @ x.double())


@pytest.mark.parametrize("dtype", FORMATS)
def test_other_products_are_rounded_once(through_fp32, dtype) -> None:
    a, b, bias = (torch.randn(3, 8, 8).to(dtype) for _ in range(3))
    assert is_rounded_once(a @ b, a.double() @ b.double())
    assert is_rounded_once(torch.baddbmm(bias, a, b), bias.double() + a.double() @ b.double())
    assert is_rounded_once(F.linear(a[0], b[0], bias[0, 0]), a[0].double() @ b[0].double().T + bias[0, 0].double())


@pytest.mark.parametrize("dtype", [*FORMATS, torch.float32])
def test_products_into_a_tensor_are_the_same(through_fp32, monkeypatch, dtype) -> None:
    """As PyTorch's compiler asks for them."""
    monkeypatch.setattr(kernels, "MIN_ONEDNN_PRODUCT", 1)
    a, b, bias = (torch.randn(3, 8, 8).to(dtype) for _ in range(3))
    for product, *of in ((torch.mm, a[0], b[0]), (torch.bmm, a, b), (torch.baddbmm, bias, a, b)):
        for out in (torch.empty(0, dtype=dtype), torch.empty_like(product(*of))):
            product(*of, out=out)
            assert torch.equal(out, product(*of))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_rounded_once(through_fp32, dtype, masked: bool) -> None:
    q, k, v, grad = (torch.randn(2, 4, 9, 16).to(dtype) for _ in range(4))
    mask = torch.ones(9, 9, dtype=torch.bool).tril(2) if masked else None

    def attend(*inputs: Tensor) -> list[Tensor]:
        inputs = tuple(each.detach().requires_grad_() for each in inputs)
        out = F.scaled_dot_product_attention(*inputs, mask, is_causal=mask is None)
        out.backward(grad.to(out.dtype))
        return [out.detach(), *(each.grad for each in inputs if each.grad is not None)]

    exact = attend(q.double(), k.double(), v.double())
    for value, expected in zip(attend(q, k, v), exact, strict=True):
        assert value.dtype == dtype
        # The backward pass begins with the rounded output, in every kernel.
        assert (value.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("lora", [False, True])
def test_memory_is_that_of_16_bit(monkeypatch, tiny_config, lora: bool, request) -> None:
    def use():
        step = make_step(tiny_config, OptimConfig(mp=True, lora=lora))
        with MemoryTracker(step.model, step.optimizer) as tracker:
            loss, _ = step([collate(ragged_samples(), Padding(32))])
        return loss.item(), tracker.result()

    loss, native = use()
    request.getfixturevalue("through_fp32")
    loss_through_fp32, other = use()
    assert other == native
    assert loss_through_fp32 == pytest.approx(loss, rel=2e-3)


def test_nothing_is_padded_where_there_are_no_kernels_to_build(monkeypatch) -> None:
    for has, multiple in ((True, 32), (False, 1)):
        monkeypatch.setattr("llama_ft.techniques.mixed_precision.has_16bit_products", lambda dtype, has=has: has)
        assert Precision("cpu", torch.bfloat16).pad_multiple == multiple


def test_decoding_a_token_at_a_time_is_that_of_the_whole(through_fp32) -> None:
    model = small_model().to(torch.bfloat16).eval()
    with torch.inference_mode():
        state = GenerationState(model, [[1, 5, 7], [4, 2]], 4, kv_cache=True)
        whole = GenerationState(model, [[1, 5, 7], [4, 2]], 4, kv_cache=False)
        for _ in range(4):
            logits, expected = state.next_logits(), whole.next_logits()
            assert torch.allclose(logits.float(), expected.float(), atol=0.05)
            for each in (state, whole):
                each.append(expected.argmax(-1))


def test_fp32_products_are_as_before(through_fp32) -> None:
    a, b = torch.randn(6, 5), torch.randn(5, 7)
    assert torch.equal(a @ b, torch.mm(a, b, out=torch.empty(6, 7)))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")
@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(37, 64, 48), (92, 33, 70), (64, 512, 32), (5, 8, 8), (1, 64, 64)])
def test_fp32_products_of_onednn_are_those_of_fp64(monkeypatch, rows: int, n_in: int, n_out: int) -> None:
    monkeypatch.setattr(kernels, "MIN_ONEDNN_PRODUCT", 2**10)
    kernels.multiply_by_onednn()  # for the rest of the process
    x, w, grad = (torch.randn(shape) for shape in ((2, rows, n_in), (n_out, n_in), (2, rows, n_out)))
    x, w = x.requires_grad_(), w.requires_grad_()
    y = F.linear(x, w)
    y.backward(grad)
    assert y.is_contiguous()
    for value, exact in (
        (y, x.double() @ w.double().T),
        (x.grad, grad.double() @ w.double()),
        (w.grad, grad.double().flatten(0, 1).T @ x.double().flatten(0, 1)),
    ):
        assert value.untyped_storage().nbytes() == value.nbytes  # no padding is kept
        assert (value.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
