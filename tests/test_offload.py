"""Offloaded inputs of checkpointed blocks: what is copied, when, and what that leaves on the device."""

import weakref

import pytest
import torch
from helpers.models import CPU, small_model
from helpers.planning import CPU_PROFILE, ON_CUDA, SHORT, card, small_config
from helpers.training import ragged_samples
from torch import Tensor

from llama_ft.config import ModelConfig, OptimConfig, TrainConfig
from llama_ft.config.checks import Offload
from llama_ft.data.collate import collate
from llama_ft.data.records import Sample
from llama_ft.model.transformer import Transformer
from llama_ft.planning.fake_run import FakeRun, fake_run
from llama_ft.planning.predict import predict
from llama_ft.system import MIB
from llama_ft.techniques.gradient_checkpointing import checkpoint_layers
from llama_ft.techniques.lora import add_lora
from llama_ft.techniques.mixed_precision import Precision
from llama_ft.training.setup import set_up
from llama_ft.training.step import summed_loss


class Device:
    """Plays a GPU: what is fetched is no number until it has been waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.on_device: list[weakref.ref] = []
        self.most = 0  # inputs that are on the device at once

    def __call__(self, x: Tensor) -> "Copied | None":
        if not x.numel():  # before PyTorch 2.13 a checkpoint saves an empty tensor too, which is on the CPU
            return None
        self.log.append("out")
        self.sees(x)
        return Copied(self, x.detach().clone())

    def sees(self, x: Tensor) -> None:
        self.on_device.append(weakref.ref(x.untyped_storage()))
        self.most = max(self.most, sum(each() is not None for each in self.on_device))


class Copied:
    def __init__(self, device: Device, x: Tensor) -> None:
        self.device, self.data, self.fetched = device, x, None

    def wait(self) -> None:
        self.device.log.append("wait")
        if self.fetched is not None:
            self.fetched().copy_(self.data)

    def fetch(self) -> Tensor:
        self.device.log.append("in")
        x = torch.full_like(self.data, float("nan"))
        self.fetched = weakref.ref(x)
        self.device.sees(x)
        return x


def offloading_model(every: int = 1) -> tuple[Transformer, Device]:
    model, device = small_model(), Device()
    checkpoint_layers(model, every, offload=True)
    model.run_layers.copy_of = device
    return model, device


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_those_without_offloading_to_the_bit(every: int, lora: bool) -> None:
    gradients = []
    for offloads in (False, True):
        model = offloading_model(every)[0] if offloads else small_model()
        torch.manual_seed(0)
        if lora:
            add_lora(model, 4, 8.0, 0.3, ["wq", "w2"])
        torch.manual_seed(1)  # dropout
        for _ in range(2):  # micro-batches
            summed_loss(model, collate(ragged_samples())).backward()
        gradients.append([each.grad for each in model.parameters() if each.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_input_at_a_time_comes_and_goes_while_a_block_is_computed() -> None:
    model, device = offloading_model()
    loss = summed_loss(model, collate(ragged_samples()))
    assert device.log == ["out", "out", "wait", "out", "wait"]  # of three blocks; the last one's input stays
    assert device.most == 3  # the embeddings among them: the model's forward pass has its hands on them
    device.log.clear()
    device.most = 0
    loss.backward()
    assert device.log == ["wait", "in", "wait", "in", "wait"]
    assert device.most == 2
    assert not any(each() is not None for each in device.on_device)


def test_a_second_backward_pass_fetches_what_it_needs() -> None:
    model, device = offloading_model()
    total, weights = model(collate(ragged_samples()).tokens).square().sum(), list(model.parameters())
    first = torch.autograd.grad(total, weights, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, weights), strict=True))
    assert device.log.count("in") == 2 + 3


def test_what_is_not_trained_through_is_not_fetched() -> None:
    model, device = offloading_model()
    model.requires_grad_(False)
    model.layers[-1].requires_grad_(True)
    summed_loss(model, collate(ragged_samples())).backward()
    assert device.log == ["out", "out", "wait", "out", "wait", "wait"]


def test_without_gradients_nothing_is_copied() -> None:
    model, device = offloading_model()
    with torch.no_grad():
        model(collate(ragged_samples()).tokens)
    assert device.log == []


def test_on_the_cpu_a_run_says_that_nothing_is_moved(tiny_config: TrainConfig) -> None:
    tiny_config.optim, tiny_config.checkpoint, tiny_config.gc.offload = OptimConfig(gc=True), "random", Offload.cpu
    said: list[str] = []
    set_up(tiny_config, Precision("cpu"), CPU, said.append)
    assert said == ["gc.offload=cpu: the blocks' inputs are already in the host's memory, so nothing is moved"]


# Plans


def planned(n_layers: int, offload: Offload | None, n_tokens: int = 512, **on: bool) -> FakeRun:
    config = small_config(gc=True, **on)
    config.model = ModelConfig("deep", 64, n_layers, 4, 4, 96, vocab_size=64, max_seq_len=1024)
    config.gc.offload = offload
    return fake_run(config, [Sample.after([1] * (n_tokens + 1), n_tokens - 5)], ON_CUDA)


@pytest.mark.parametrize(("on", "itemsize"), [("", 4), ("mp lora", 2)])
def test_on_a_card_all_inputs_but_two_are_elsewhere(on: str, itemsize: int) -> None:
    """That of the block which is computed again, and the next one, on its way."""
    techniques, n_layers, n_tokens = dict.fromkeys(on.split(), True), 6, 512
    kept, offloaded = (planned(n_layers, offload, **techniques) for offload in (None, Offload.cpu))
    one = n_tokens * 64 * itemsize
    saved = kept.use.max_mib["activation"] - offloaded.use.max_mib["activation"]
    assert saved * MIB == (n_layers - 2) * one
    assert (kept.host_bytes, offloaded.host_bytes) == (0, n_layers * one)
    assert (offloaded.use.peak_mib < kept.use.peak_mib) is ("lora" in on)  # else memory peaks when gradients are there


def test_pinned_memory_is_in_blocks_of_powers_of_two() -> None:
    assert planned(4, Offload.cpu, n_tokens=320).host_bytes == 4 * 2**17  # of 320 x 64 x 4 = 1.25 * 2**16


def test_a_row_says_what_the_host_must_have_and_offloading_computes_nothing_more() -> None:
    config = small_config(gc=True)
    (kept,) = predict([config], [card()], SHORT)
    config.gc.offload = Offload.cpu
    rows = predict([config], [card(), CPU_PROFILE], SHORT)
    assert [row.host_memory_mib for row in (kept, *rows)] == [None, 2 * 2**13 / MIB, None]  # 19 tokens x 64 x 4
    assert (rows[0].flops, rows[0].bytes_moved) == (kept.flops, kept.bytes_moved)
