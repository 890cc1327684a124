"""Loads a model, and the adapter trained on it, for generation or evaluation."""

import gc
from collections.abc import Callable, Sequence

import torch

from llama_ft.config import Dtype, GenerateConfig, GpuConfig, TrainedSource, UserError, path_of
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.decoding.generate import GenerateFn, generate
from llama_ft.device import about_device, choose_device, compute_dtype, out_of_memory_explained, use_device
from llama_ft.model.checkpoint import open_checkpoint
from llama_ft.model.four_bit import FourBit
from llama_ft.model.storage import Storage
from llama_ft.model.transformer import Transformer
from llama_ft.model.weights import build, load_model
from llama_ft.records.answers import Answer
from llama_ft.system import Log
from llama_ft.techniques.adapter import Adapters, check_base_of, load_adapter
from llama_ft.techniques.peft import read_adapter

NEEDS_LESS = "a smaller batch_size or decoding.max_new_tokens, fewer answers or beams, and dtype=bf16 need less"


def check_sources(source: TrainedSource) -> None:
    """Raise a UserError if weights or adapter are not this model's, before anything slow begins."""
    for key, weights in (("checkpoint", source.checkpoint), ("base", source.base)):
        if weights not in (None, "builtin", "random"):
            try:
                open_checkpoint(path_of(str(weights)), build(source.model))
            except UserError as error:
                raise UserError(str(error).replace("checkpoint=", f"{key}=", 1)) from error
    if source.adapter is not None:
        check_base_of(read_adapter(path_of(source.adapter), source.model), str(source.checkpoint))


def storage_of(dtype: Dtype, device: torch.device, gpu: GpuConfig) -> Storage:
    """The storage of weights for a dtype; with 4-bit weights, everything else has the dtype of `auto`."""
    if dtype in (Dtype.nf4, Dtype.fp4):
        return FourBit(compute_dtype(Dtype.auto, device, gpu), dtype.name)
    return Storage(compute_dtype(dtype, device, gpu))


def load_trained(source: TrainedSource, device: torch.device, storage: Storage, log: Log) -> Transformer:
    """Load a source's model in evaluation mode; a UserError if weights or adapter are not this model's."""
    model = load_model(source.model, str(source.checkpoint), device, storage, log=log).eval()
    if source.adapter is not None:
        merge = source.merge and not isinstance(storage, FourBit)  # merging would make them 16 bit
        load_adapter(model, path_of(source.adapter), merge)
    return model


def load_base(source: TrainedSource, device: torch.device, storage: Storage, log: Log) -> Transformer:
    """Load the model to compare with: `source.base`, else the checkpoint without its adapter."""
    return load_model(source.model, source.base or str(source.checkpoint), device, storage, log=log).eval()


class Models:
    """The model to use, and the base model that it is compared with, loaded when needed."""

    def __init__(self, config: GenerateConfig, tokenizer: Tokenizer, log: Log) -> None:
        """Raise a UserError if the device does not exist, or if weights or adapter are not this model's."""
        self._config, self._tokenizer, self._log = config, tokenizer, log
        self._device = use_device(choose_device(config.gpu), config.gpu)
        self._storage = storage_of(config.dtype, self._device, config.gpu)
        self.dtype_name = self._storage.name
        check_sources(config)
        log(about_device(self._device, config.gpu))

    def load(self, is_base: bool) -> GenerateFn:
        """Load the base model, or the model to use; a UserError if memory runs out, now or while it generates."""
        gc.collect()  # frees the rest of a previous model, held in cycles
        load = load_base if is_base else load_trained
        with out_of_memory_explained(NEEDS_LESS):
            return self._generate_fn(load(self._config, self._device, self._storage, self._log))

    def load_with_adapters(self) -> tuple[Adapters, GenerateFn]:
        """Load the model to use, with its adapter, if any, not merged, so that it can be changed."""
        with out_of_memory_explained(NEEDS_LESS):
            checkpoint = str(self._config.checkpoint)
            model = load_model(self._config.model, checkpoint, self._device, self._storage, log=self._log)
            adapters = Adapters(model)
            self.use(adapters, self._config.adapter)
        return adapters, self._generate_fn(model)

    def use(self, adapters: Adapters, folder: str | None) -> None:
        """Use the adapter in a folder, loading it if it is new; None uses no adapter."""
        if folder is not None and folder not in adapters:
            path = path_of(folder)
            check_base_of(read_adapter(path, self._config.model), str(self._config.checkpoint))
            adapters.add(folder, path)
        adapters.use(folder)

    def _generate_fn(self, model: Transformer) -> GenerateFn:
        def answer(prompts: Sequence[str], on_text: Callable[[str], None]) -> list[list[Answer]]:
            with out_of_memory_explained(NEEDS_LESS):
                return generate(model, self._tokenizer, prompts, self._config.decoding, self._config.kv_cache, on_text)

        return answer
