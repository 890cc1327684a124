"""Functions with a backward pass of their own: against PyTorch's, in fp64, and what they keep for it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.models import relative
from torch import Tensor

from llama_ft.model.autograd import SummedCrossEntropy, rms_norm, swiglu

EPS = 1e-5


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm(x, weight, EPS)


def normed_by_pytorch(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def gated_by_pytorch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


FUNCTIONS = [
    pytest.param(normed, normed_by_pytorch, (6,), id="rms_norm"),
    pytest.param(swiglu, gated_by_pytorch, (2, 5, 6), id="swiglu"),
]


def inputs(second: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = (2, 5, 6), second
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(function: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    out = function(*tensors)
    generator = torch.Generator().manual_seed(7)
    return [out, *torch.autograd.grad(out, tensors, torch.randn(out.shape, generator=generator).to(out.dtype))]


@pytest.mark.parametrize(("ours", "reference", "second"), FUNCTIONS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)]
)
def test_results_and_gradients_are_those_of_pytorch(ours, reference, second, dtype, tolerance) -> None:
    tensors = inputs(second, dtype)
    found = with_gradients(ours, tensors)
    expected = with_gradients(reference, [each.detach().double().requires_grad_() for each in tensors])
    assert [each.dtype for each in found] == [dtype] * 3
    assert max(map(relative, found, expected)) <= tolerance


@pytest.mark.parametrize(("ours", "reference", "second"), FUNCTIONS)
def test_a_gradient_is_made_for_what_wants_one_alone(ours, reference, second) -> None:
    for wanted in (0, 1):
        tensors = inputs(second, torch.float64)
        tensors[1 - wanted].requires_grad_(False)
        found, expected = (torch.autograd.grad(f(*tensors).square().sum(), tensors[wanted]) for f in (ours, reference))
        assert relative(*found, *expected) <= 1e-13


@pytest.mark.parametrize(("ours", "reference", "second"), FUNCTIONS)
def test_without_gradients_the_result_is_the_same_to_the_bit(ours, reference, second) -> None:
    tensors = inputs(second, torch.bfloat16)
    with torch.no_grad():
        plain = ours(*tensors)
    assert torch.equal(plain, ours(*tensors))


@pytest.mark.parametrize(("ours", "reference", "second"), FUNCTIONS)
def test_inputs_are_kept_and_a_number_for_each_row_at_most(ours, reference, second) -> None:
    tensors, kept = inputs(second, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda each: each):
        ours(*tensors)
    new = [each for each in kept if each.data_ptr() not in {tensor.data_ptr() for tensor in tensors}]
    assert sum(each.numel() for each in new) <= 10  # rows


def test_summed_cross_entropy_is_that_of_pytorch_and_keeps_one_matrix() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(7, 11, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (7,), generator=generator)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = SummedCrossEntropy.apply(ours, targets)
    expected = torch.nn.functional.cross_entropy(theirs, targets, reduction="sum")
    (3 * loss).backward(retain_graph=True)
    (3 * expected).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-13, atol=1e-15)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # rather than a wrong gradient
        loss.backward()
