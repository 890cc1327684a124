"""Selection of kernels: runs are measured and planned with the same ones, whatever the environment and the card."""

import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import Library, get_kernel
from torch.utils._pytree import tree_map

from llama_ft.system import cpu_info

MIN_ONEDNN_PRODUCT = 2**24  # multiply-adds of the smallest fp32 product worth building a oneDNN kernel for
ONEDNN_MULTIPLE = 16  # rows are padded to a multiple of this, so that different lengths share kernels
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")  # ATen's matrix products
BLOCK_BYTES = 4 * 2**20  # of operands converted to fp32 at a time: about the size of a core's caches


def at_least_fp32(x: Tensor) -> Tensor:
    """Convert 16-bit x to fp32; leave fp32 and fp64 unchanged."""
    return x.float() if x.dtype.itemsize == 2 else x


def use_kernels_of(device: torch.device, capability: tuple[int, int] | None = None) -> None:
    """Select the kernels of GPU runs for the whole process.

    fp32 products are true fp32, not TF32, which NVIDIA's containers turn on. Attention is FlashAttention in 16 bit and
    the memory-efficient kernel otherwise, on every card: cuDNN's, which PyTorch prefers on Hopper and Blackwell, takes
    a second to build a plan for each new length (pytorch/pytorch#155958). FlashAttention needs compute capability 8.0:
    `capability`, else the card's.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.enable_flash_sdp((capability or torch.cuda.get_device_capability(device)) >= (8, 0))


def use_products_of(device: torch.device, dtype: torch.dtype) -> None:
    """Compute a 16-bit dtype's products and attention in fp32 if oneDNN has no kernels for it on this CPU.

    PyTorch's own kernels would loop over elements, up to 30 times slower.
    """
    if device.type == "cpu" and dtype.itemsize == 2 and not has_16bit_products(dtype):
        multiply_in_fp32()
        attend_in_fp32()


def use_training_kernels(device: torch.device) -> None:
    """On a CPU, use kernels that are faster for many tokens, though each call has more overhead.

    16-bit attention is computed in fp32: PyTorch's own takes twice as long in the backward pass on any CPU. fp32
    products are oneDNN's where MKL, PyTorch's default, leaves half of the CPU unused.
    """
    if device.type == "cpu":
        attend_in_fp32()
        if mkl_is_slow():
            multiply_by_onednn()


@cache
def has_16bit_products(dtype: torch.dtype) -> bool:
    """Return True if PyTorch uses oneDNN for 16-bit matrix products on this CPU; otherwise it loops over elements."""
    if not torch.backends.mkldnn.is_available():
        return False
    supports = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return bool(getattr(torch.ops.mkldnn, supports[dtype])())


@cache
def mkl_is_slow() -> bool:
    """Return True if MKL computes fp32 products without AVX-512 on a CPU that has it: on all but Intel's."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.cpu._is_avx512_supported()
        and cpu_info("vendor_id") != "GenuineIntel"
    )


# PyTorch's CPU kernels are replaced below autograd and autocast: tensors saved for the backward pass, and those that
# the memory tracker sees, stay in 16 bit. Operands are converted to fp32, which is exact, and the result is rounded
# once, as by matrix units that accumulate in fp32.


@cache
def attend_in_fp32() -> Library:
    """Compute 16-bit attention in fp32 from now on."""
    name = "_scaled_dot_product_flash_attention_for_cpu"
    return _replace({name: _attention, f"{name}_backward": _in_fp32})


@cache
def multiply_in_fp32() -> Library:
    """Compute 16-bit products for which oneDNN has no kernels in fp32 from now on."""
    return _replace(dict.fromkeys(PRODUCTS, _slow_in_fp32) | {"mm": _product})


@cache
def multiply_by_onednn() -> Library:
    """Compute large fp32 products by oneDNN from now on."""
    return _replace({"mm": _onednn_product})


def _replace(kernels: dict[str, Callable[..., Any]]) -> Library:
    """Replace ATen's CPU kernels for the lifetime of the returned library; each new kernel is given the old one."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about replaced kernels
        for name, kernel in kernels.items():
            new = partial(kernel, get_kernel(f"aten::{name}", "CPU"))
            library.impl(name, new, "CPU", with_keyset=True, allow_override=True)
            if name in PRODUCTS:  # as PyTorch's compiler calls them
                library.impl(f"{name}.out", partial(_into, new), "CPU", with_keyset=True, allow_override=True)
    return library


def _into(kernel: Callable[..., Tensor], keys: Any, *args: Any, out: Tensor, **kwargs: Any) -> Tensor:
    result = kernel(keys, *args, **kwargs)
    return out.resize_(result.shape).copy_(result)


def _onednn_product(kernel: Any, keys: Any, a: Tensor, b: Tensor) -> Tensor:
    """[m, k] times [k, n]; small products, whose kernels take longer to find than to run, are left to MKL.

    oneDNN builds and keeps kernels for each shape. So that ragged lengths do not fill the memory, the rows and the
    dimension that is summed over are padded to a multiple.
    """
    (m, k), n = a.shape, b.shape[1]
    if a.dtype != torch.float32 or m * k * n < MIN_ONEDNN_PRODUCT:
        return kernel.call_boxed(keys, a, b)  # type: ignore[no-any-return]
    if k % ONEDNN_MULTIPLE:
        a, b = _longer(a.t(), k).t(), _longer(b, k)
    linear = torch.ops.mkldnn._linear_pointwise  # what PyTorch's compiler makes of a linear layer
    if m % ONEDNN_MULTIPLE == 0:
        return linear(a, b.t(), None, "none", [], "")  # type: ignore[no-any-return]
    return linear(_longer(a, m), b.t(), None, "none", [], "")[:m].clone()  # type: ignore[no-any-return]


def _longer(rows: Tensor, n: int) -> Tensor:
    """Append rows of zeros to the n rows, up to a multiple."""
    return F.pad(rows, (0, 0, 0, -n % ONEDNN_MULTIPLE))


def _is_slow(tensor: Tensor) -> bool:
    return tensor.dtype.itemsize == 2 and not has_16bit_products(tensor.dtype)


def _unrounded(kernel: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a kernel with fp32 in the place of 16-bit tensors."""
    if args[0].dtype.itemsize == 2:
        args = tuple(at_least_fp32(each) if isinstance(each, Tensor) else each for each in args)
        kwargs = {name: at_least_fp32(each) if isinstance(each, Tensor) else each for name, each in kwargs.items()}
    return kernel.call_boxed(keys, *args, **kwargs)


def _in_fp32(kernel: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """Like `_unrounded`, with the results rounded."""
    return tree_map(lambda each: each.to(args[0].dtype), _unrounded(kernel, keys, *args, **kwargs))


def _slow_in_fp32(kernel: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """Like `_in_fp32`, only for formats without oneDNN kernels."""
    if not _is_slow(args[0]):
        return kernel.call_boxed(keys, *args, **kwargs)
    return _in_fp32(kernel, keys, *args, **kwargs)


def _attention(kernel: Any, keys: Any, *args: Any, **kwargs: Any) -> Any:
    """Like `_in_fp32` for attention, which also returns its rows' log-sum-exp: that stays in fp32."""
    out, log_sum_exp = _unrounded(kernel, keys, *args, **kwargs)
    return out.to(args[0].dtype), log_sum_exp


def _product(kernel: Any, keys: Any, a: Tensor, b: Tensor) -> Tensor:
    """[m, k] times [k, n], with little in fp32 at a time: the larger side of the result is cut into blocks.

    A single row is left to PyTorch, whose kernel is good there: it is bound by reading the weights.
    """
    (m, k), n = a.shape, b.shape[1]
    if m == 1 or not _is_slow(a):
        return kernel.call_boxed(keys, a, b)  # type: ignore[no-any-return]
    out = a.new_empty(m, n)
    size = max(64, BLOCK_BYTES // (4 * max(k, min(m, n), 1)))
    if n >= m:
        a = a.float()
        for part, columns in zip(out.split(size, 1), b.split(size, 1), strict=True):
            part.copy_(kernel.call_boxed(keys, a, columns.float()))
    else:
        b = b.float()
        for part, rows in zip(out.split(size), a.split(size), strict=True):
            part.copy_(kernel.call_boxed(keys, rows.float(), b))
    return out
