"""A run's hardest optimizer steps on fake tensors, which have shapes and dtypes and no data.

The real model, techniques, optimizer and step run; nothing is computed. The tensors are fake *CPU* tensors under CPU
autocast; what depends on the device (the 16-bit format, padding, the kernels of attention and dropout, rounding,
workspaces) is the planned card's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama_ft.config import TrainConfig
from llama_ft.data.collate import Batch, Padding
from llama_ft.data.dataset import Sample
from llama_ft.measure.memory import Allocation, Event, MemoryTracker, MemoryUse
from llama_ft.measure.worst_case import hardest_windows
from llama_ft.model.transformer import Attention
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.shape_cache import ShapeCache
from llama_ft.training.setup import allocate, make_step, shape_model
from llama_ft.training.step import TrainStep

FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ROW_BLOCK, HEAD_BLOCK = 128, 32  # to whose multiples FlashAttention rounds lengths and head sizes


@dataclass(frozen=True)
class FakeRun:
    """What a tracked fake run showed."""

    use: MemoryUse
    events: list[Event]
    last_step: int  # index of the first event of the last optimizer step
    trainable_params: int
    total_params: int


@contextmanager
def fake_step(config: TrainConfig, traits: Traits) -> Iterator[TrainStep]:
    """The real training step of a run, over fake tensors; to be called inside the block.

    Raises:
        UserError: if a LoRA target matches nothing, or the card has not the 16-bit format asked for.
    """
    precision = traits.precision(config)
    on_cpu = replace(precision, device_type="cpu")
    is_16bit = precision.compute != torch.float32
    model = shape_model(config, on_cpu)
    with FakeTensorMode() as fake, ShapeCache(fake):
        allocate(model, torch.device("cpu"))
        for module in model.modules():
            if isinstance(module, Attention):
                module.repeats_keys = lambda q, mask: traits.repeats_keys(is_16bit)
        if traits.on_cuda:
            use_fused_dropout(model)
        model.train()
        yield make_step(model, config, on_cpu)


def padding_of(config: TrainConfig, traits: Traits) -> Padding:
    """How far a run there pads its micro-batches."""
    return Padding(traits.precision(config).pad_multiple, config.model.max_seq_len)


def give_gradients(step: TrainStep) -> list[Tensor]:
    """Let every trainable parameter have a gradient, as after the backward pass of any micro-batch."""
    parameters = step.optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    return [parameter.grad for parameter in parameters]


def update(step: TrainStep) -> None:
    """What a step does after its last backward pass, with the gradients that are there."""
    step.scaler.scale(torch.zeros(()))  # makes what the scaler keeps
    step([])


def fake_run(config: TrainConfig, samples: Sequence[Sample], traits: Traits) -> FakeRun:
    """What is alive when, in the dry run that a run of this config begins with.

    Of a window the hardest micro-batch alone is run, the last one; of those before it nothing is left but gradients.
    The optimizer's state is made by a step without a micro-batch; in the log it is a step like the last.
    """
    padding = padding_of(config, traits)
    hardest = hardest_windows(list(samples), config.training.micro_batch_size, config.accumulation_steps, padding)
    with fake_step(config, traits) as step:
        windows = [[as_fake(batch) for batch in window] for window in hardest]
        tensors = [tensor for window in windows for batch in window for tensor in batch.tensors]
        kernel = FlashAttentionMemory() if traits.on_cuda and traits.has_flash and config.optim.mp else nullcontext()
        with MemoryTracker(step.model, step.optimizer, tensors, traits.rounding) as tracker, kernel:
            first_step = len(tracker.events)
            tracker.claim_gradients(give_gradients(step))
            step.optimizer.step()
            step.optimizer.zero_grad(set_to_none=True)
            second_step = len(tracker.events)
            for window in reversed(windows):  # the longest last: it is the step to look at
                last_step = len(tracker.events)
                if len(window) > 1:
                    tracker.claim_gradients(give_gradients(step))
                step(window[-1:])
        events = with_state_made_last(tracker.events, first_step, second_step, last_step)
        parameters = list(step.model.parameters())
    last_step += len(events) - len(tracker.events)
    n_trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return FakeRun(tracker.result(), events, last_step, n_trainable, sum(each.numel() for each in parameters))


def with_state_made_last(events: list[Event], first: int, second: int, last: int) -> list[Event]:
    """The events of a real run, whose first step makes the optimizer's state after its backward pass.

    That step is taken to be like the last one. `first`, `second` and `last` are indices of the first event of a step
    without a micro-batch, that made the state; of the step after it; of the last one.
    """
    copies: dict[int, Allocation] = {}
    step: list[Event] = []
    for allocation, sign, phase in events[last:]:
        if sign > 0:
            copies[id(allocation)] = replace(allocation)
        if (copy := copies.get(id(allocation))) is not None:
            step.append((copy, sign, phase))
    state = [event for event in events[first:second] if event[0].category != "gradient"]
    update = 1 + max(index for index, (_, _, phase) in enumerate(step) if phase == "backward")
    return [*events[:first], *step[:update], *state, *step[update:], *events[second:]]


def micro_batch(width: int, n_targets: int, micro_batch_size: int) -> Batch:
    """A fake micro-batch of `micro_batch_size` rows of `width` tokens, with so many targets in each."""
    tokens, n = torch.empty(micro_batch_size, width, dtype=torch.int64), micro_batch_size * n_targets
    return Batch(tokens, torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64), micro_batch_size * width)


def as_fake(batch: Batch) -> Batch:
    """A fake micro-batch of the same shapes."""
    tokens, positions, targets = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in batch.tensors)
    return Batch(tokens, positions, targets, batch.n_tokens)


# What kernels on CUDA keep or take that those of fake CPU tensors do not.


def use_fused_dropout(model: nn.Module) -> None:
    """Keep a mask of one byte a value, as the kernel on CUDA does; on the CPU the mask has the values' dtype."""
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module.p > 0:
            module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0]  # type: ignore[method-assign, misc]


class FlashAttentionMemory(TorchDispatchMode):
    """What FlashAttention's backward pass takes while it runs, to be entered after the tracker that is to see it.

    After mha_bwd (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp): fp32 sums of the queries' gradients
    and of each row, and the gradients of grouped keys and values once for each query head.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator, and hold that memory until it has returned."""
        taken = _taken(*args[1:3]) if func is FLASH_BACKWARD else []
        out = func(*args, **(kwargs or {}))
        del taken
        return out


def _taken(q: Tensor, k: Tensor) -> list[Tensor]:
    """Tensors of that size. Queries are [B, heads, S, head_dim], keys [B, kv heads, S, head_dim]."""
    n_rows, heads, length, size = q.shape
    head_block = HEAD_BLOCK if size <= 128 else 2 * HEAD_BLOCK
    length, size = -(-length // ROW_BLOCK) * ROW_BLOCK, -(-size // head_block) * head_block
    sums = [torch.empty(n_rows, heads, length), torch.empty(n_rows, heads, length, size)]
    return sums if k.shape[1] == heads else [*sums, torch.empty_like(q), torch.empty_like(q)]
