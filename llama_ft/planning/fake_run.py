"""Runs a run's hardest optimizer steps on fake tensors, which have shapes and dtypes but no data.

The real model, techniques, optimizer and step run, without computing anything. The tensors are fake *CPU* tensors under
CPU autocast; everything that depends on the device (the 16-bit format, padding, the kernels of attention and dropout,
rounding, workspaces) is the planned card's.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama_ft.config import Strategy, TrainConfig
from llama_ft.data.collate import Batch, Padding, blank_row
from llama_ft.data.records import Samples
from llama_ft.measure.memory import Allocation, Event, MemoryTracker, MemoryUse
from llama_ft.measure.worst_case import hardest_evaluations, hardest_windows
from llama_ft.model.four_bit import count_parameters
from llama_ft.model.transformer import Attention, Transformer
from llama_ft.planning.fake_host import FakeHost
from llama_ft.planning.fake_ranks import Buckets, fake_processes, first_rank
from llama_ft.planning.gpu_traits import Traits
from llama_ft.planning.shape_cache import ShapeCache
from llama_ft.techniques.gradient_checkpointing import CheckpointedLayers
from llama_ft.training.loop import Windows
from llama_ft.training.setup import allocate, make_step, shape_model
from llama_ft.training.step import TrainStep, evaluate_batch

VARLEN_BACKWARD = "_varlen_attn_backward.default"  # in the namespace `torch_attn`, once imported
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ROW_BLOCK, HEAD_BLOCK = 128, 32  # FlashAttention rounds lengths and head sizes up to multiples of these


@dataclass(frozen=True)
class FakeRun:
    """The results of a tracked fake run."""

    use: MemoryUse
    events: list[Event]
    last_step: int  # index of the first event of the last optimizer step
    managed_bytes: int  # in addition to the tracked tensors
    host_bytes: int  # the most host memory that offloaded tensors use
    trainable_params: int
    total_params: int


@contextmanager
def fake_step(config: TrainConfig, traits: Traits) -> Iterator[TrainStep]:
    """The real training step of a run, over fake tensors; call it inside the block.

    A UserError if a LoRA target matches nothing, or the card lacks the configured 16-bit format.
    """
    precision = traits.precision(config)
    on_cpu = replace(precision, device_type="cpu")
    is_16bit = precision.compute != torch.float32
    with fake_processes(config.parallel) as ranks:
        model = shape_model(config, on_cpu, ranks)
        with FakeTensorMode() as fake, ShapeCache(fake):
            allocate(model, torch.device("cpu"))
            _as_on_card(model, traits, is_16bit)
            step = make_step(model, config.training, on_cpu, ranks)
            if config.parallel.strategy is Strategy.ddp:
                step.forward = Buckets(model)
            yield step


def _as_on_card(model: Transformer, traits: Traits, is_16bit: bool) -> None:
    """Make a model behave, and keep tensors, as on the planned card."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.repeats_keys = lambda q, mask: traits.repeats_keys(is_16bit)
            module.takes_segments = lambda q: traits.takes_segments(is_16bit, q.shape[-1])
        if traits.on_cuda and isinstance(module, nn.Dropout) and module.p > 0:
            # CUDA's kernel keeps a mask of one byte per value; on the CPU the mask has the values' dtype.
            module.forward = lambda x, p=module.p: torch.native_dropout(x, p, True)[0]  # type: ignore[method-assign, misc]
    if traits.on_cuda and isinstance(model.run_layers, CheckpointedLayers):
        model.run_layers.copy_of = FakeHost()
    model.train()


def windows_of(config: TrainConfig, samples: Samples, traits: Traits, held_out: Samples = ()) -> Windows:
    """The optimizer steps of a run on a card, and its held-out samples."""
    training, padding = config.training, Padding(traits.precision(config).pad_multiple, config.model.max_seq_len)
    size, steps, ranks = training.micro_batch_size, config.accumulation_steps, first_rank(config.parallel)
    return Windows(samples, size, steps, training.seed, padding, training.packing, held_out=held_out, ranks=ranks)


def give_gradients(step: TrainStep, known: Mapping[Tensor, Tensor] | None = None) -> list[Tensor]:
    """Give every trainable parameter a gradient, as after the backward pass of any micro-batch."""
    parameters = step.optimizer.param_groups[0]["params"]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter) if known is None else known[parameter]
    return [parameter.grad for parameter in parameters]


def update(step: TrainStep) -> None:
    """Do the part of a step after its last backward pass, with the existing gradients."""
    step.scaler.scale(torch.zeros(()))  # creates the scaler's state
    step([])


def fake_run(config: TrainConfig, samples: Samples, traits: Traits, held_out: Samples = ()) -> FakeRun:
    """Track memory over time in the dry run with which a run of this config begins.

    Only the last, hardest micro-batch of a window is run; earlier ones would leave nothing but gradients. A step
    without a micro-batch creates the optimizer's state, and is replaced in the log by a step like the last one. If
    updates are part of the backward pass, a whole step of the hardest window creates the state.
    """
    data = windows_of(config, samples, traits, held_out)
    hardest, evaluated = hardest_windows(data), hardest_evaluations(data)
    in_backward = config.training.optimizer_in_backward
    with fake_step(config, traits) as step:
        fakes = {id(batch): as_fake(batch) for window in hardest for batch in window}  # windows share batches
        windows = [[fakes[id(batch)] for batch in window] for window in hardest]
        evaluated, tensors = list(map(as_fake, evaluated)), [each for batch in fakes.values() for each in batch.tensors]
        kernel = FlashAttentionMemory() if traits.on_cuda and traits.has_bf16 and config.optim.mp else nullcontext()
        with MemoryTracker(step.model, step.optimizer, tensors, traits.rounding) as tracker, kernel:
            tracker.claim_gradients(getattr(step.forward, "buckets", ()))  # DDP's
            first_step = len(tracker.events)
            if in_backward:
                step(windows[0])
            else:
                make_state(step, tracker)
            second_step = len(tracker.events)
            for window in reversed(windows):  # the longest last: that step is returned as the last one
                last_step = len(tracker.events)
                if len(window) > 1:
                    tracker.claim_gradients(give_gradients(step))
                step(window[-1:])
            end = len(tracker.events)
            for batch in evaluated:
                tracker.watch(batch.tensors)
                evaluate_batch(step, batch)
        events = tracker.events
        if not in_backward:
            events = with_state_made_last(events[:end], first_step, second_step, last_step) + events[end:]
    last_step += len(events) - len(tracker.events)
    n_bytes = managed_bytes(step), host_bytes(step)
    return FakeRun(tracker.result(), events, last_step, *n_bytes, *count_parameters(step.model))


def make_state(step: TrainStep, tracker: MemoryTracker) -> None:
    """Make the optimizer create its state, in a step without a micro-batch."""
    views = step.forward.views if isinstance(step.forward, Buckets) else None
    tracker.claim_gradients(give_gradients(step, views))
    step.optimizer.step()
    step.optimizer.zero_grad(set_to_none=True)


def managed_bytes(step: TrainStep) -> int:
    """Bytes of optimizer state that CUDA's driver can move to the host when the card is full."""
    tensors = (tensor for state in step.optimizer.state.values() for tensor in state.values())
    return sum(tensor.nbytes for tensor in tensors if getattr(tensor, "is_paged", False))


def host_bytes(step: TrainStep) -> int:
    """The most host memory that offloaded tensors used."""
    host = getattr(step.model.run_layers, "copy_of", None)
    return host.most if isinstance(host, FakeHost) else 0


def with_state_made_last(events: list[Event], first: int, second: int, last: int) -> list[Event]:
    """The events of a real run, whose first step creates the optimizer's state after its backward pass.

    That step is assumed to be like the last one. `first`, `second` and `last` are the indices of the first event of the
    step without a micro-batch, which created the state, of the step after it, and of the last step.
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


def micro_batch(width: int, n_targets: int, micro_batch_size: int, sequence: int | None = None) -> Batch:
    """A fake micro-batch of `micro_batch_size` rows of `width` tokens, with `n_targets` targets in each.

    `sequence` makes it a single packed row of sequences of this length, of which `width` is a multiple.
    """
    if sequence is not None:
        return blank_row([sequence] * (width // sequence), n_targets)
    tokens, n = torch.empty(micro_batch_size, width, dtype=torch.int64), micro_batch_size * n_targets
    return Batch(tokens, torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64), micro_batch_size * width)


def as_fake(batch: Batch) -> Batch:
    """A fake micro-batch with the same shapes."""
    return batch.map(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))


class FlashAttentionMemory(TorchDispatchMode):
    """Allocates the temporary memory of FlashAttention's backward pass; enter it after the tracker that should see it.

    Following mha_bwd and mha_varlen_bwd (aten/src/ATen/native/transformers/cuda/flash_attn/flash_api.cpp): fp32 sums of
    the queries' gradients and of each row, and the gradients of grouped keys and values for each query head.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the operator, and hold its temporary memory until it has returned."""
        taken: list[Tensor] = []
        if func is FLASH_BACKWARD:  # queries [B, heads, S, head_dim], keys [B, kv heads, S, head_dim]
            q, k = args[1:3]
            taken = _taken(q, q.shape[0] * _blocks(q.shape[2], ROW_BLOCK), q.shape[1], k.shape[1])
        elif func.__name__ == VARLEN_BACKWARD:  # [S, heads, head_dim], [S, kv heads, head_dim], n + 1 offsets
            q, k, offsets = args[1], args[2], args[6]
            taken = _taken(q, len(q) + ROW_BLOCK * (len(offsets) - 1), q.shape[1], k.shape[1])
        out = func(*args, **(kwargs or {}))
        del taken
        return out


def _taken(q: Tensor, n_rows: int, heads: int, kv_heads: int) -> list[Tensor]:
    """The temporary tensors of FlashAttention's backward pass."""
    size = _blocks(q.shape[-1], HEAD_BLOCK if q.shape[-1] <= 128 else 2 * HEAD_BLOCK)
    sums = [torch.empty(heads, n_rows), torch.empty(heads, n_rows, size)]
    return sums if kv_heads == heads else [*sums, torch.empty_like(q), torch.empty_like(q)]


def _blocks(n: int, block: int) -> int:
    """The smallest multiple of the block that is at least n."""
    return -(-n // block) * block
