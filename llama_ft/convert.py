"""`python -m llama_ft.convert`: convert a checkpoint to Meta's, Hugging Face's or GGUF's format; merge an adapter."""

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from llama_ft import cli
from llama_ft.config import ConvertConfig, Format, UserError
from llama_ft.files import explained, whole_file, whole_folder
from llama_ft.reporting.progress import progress_bar
from llama_ft.system import MIB, Advance, Log

if TYPE_CHECKING:
    from llama_ft.exporting.sidecar import SidecarFiles
    from llama_ft.exporting.source import Source

USAGE = cli.Usage(
    "convert",
    "Convert a checkpoint or a run's weights to Hugging Face's format, Meta's or GGUF; merge an adapter into them,"
    " change their dtype, split them into files. The output is written piece by piece, and appears only when complete.",
    "checkpoint=DIR|FILE.gguf to=hf|meta|gguf output=DIR|FILE.gguf [adapter=DIR] [KEY=VALUE ...]",
    ConvertConfig,
    (
        "checkpoint=llama-2-7b to=hf output=llama-2-7b-hf",
        "checkpoint=llama-2-7b-hf to=meta output=llama-2-7b shards=2",
        "checkpoint=llama-2-7b-hf adapter=outputs/mine to=hf output=mine dtype=bf16",
        "model=tiny adapter=outputs/lora to=hf output=tiny-hf",
        "checkpoint=mine to=gguf output=mine.gguf dtype=q8_0",
    ),
)
FORMATS = {Format.hf: "Hugging Face", Format.meta: "Meta", Format.gguf: "GGUF"}


def main() -> int:
    """Run the command."""
    config = cli.composed_config("convert", sys.argv[1:], ConvertConfig)
    console, errors = Console(), Console(stderr=True)
    log = partial(errors.print, highlight=False, markup=False, soft_wrap=True, style="dim")
    output = Path(os.path.abspath(os.path.expanduser(str(config.output))))
    if os.path.lexists(output) and (output.is_symlink() or not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={config.output} exists already and is not overwritten: give another name")
    from llama_ft.exporting.sidecar import SidecarFiles
    from llama_ft.exporting.source import open_source

    source, sidecar = open_source(config), SidecarFiles(config, log)
    gguf = sidecar.gguf_file(source) if config.to is Format.gguf else None
    n_bytes = gguf.n_bytes if gguf else folder_bytes(source, config)
    check_room(n_bytes, config, output)
    assert config.to is not None
    log(f"{source.checkpoint.kind} to {FORMATS[config.to]}: {n_bytes / MIB:,.0f} MiB from {source.checkpoint.folder}")
    with explained(f"output={config.output} cannot be written"):
        output.parent.mkdir(parents=True, exist_ok=True)
        whole = whole_file(output) if gguf else whole_folder(output)
        with whole as place, progress_bar(errors, "MiB written", n_bytes, unit=MIB) as advance:
            gguf.write(place, advance) if gguf else write(source, sidecar, config, place, advance)
    if config.to is Format.meta:
        warn_of_context(config, log)
    files = "" if gguf else f"{', '.join(sorted(file.name for file in output.iterdir()))} in "
    console.print(f"Written: {files}{config.output}", highlight=False, markup=False, soft_wrap=True)
    return 0


def folder_bytes(source: "Source", config: ConvertConfig) -> int:
    """Bytes of the weights to write into a folder; a UserError if they cannot be split into the shards."""
    from llama_ft.model.sizes import meta_params
    from llama_ft.model.transformer import EMBEDDING

    n_bytes, n_shards = sum(weight.n_bytes for weight in source.weights.values()), config.shards or 1
    if config.to is Format.meta:
        meta_params(source.model)  # raises if Meta's format has no key for one of the sizes
        for key in ("n_heads", "n_kv_heads", "ffn_dim", "dim", "vocab_size"):  # split by Meta's parallel layers
            if (size := getattr(source.model, key)) % n_shards:
                raise UserError(f"shards={n_shards} is not allowed: it must divide model.{key}={size}")
        n_bytes += source.weights[EMBEDDING].n_bytes if source.model.tie_word_embeddings else 0  # the second copy
    elif n_shards > len(source.weights):
        n_tensors = len(source.weights)
        raise UserError(f"shards={n_shards} is not allowed: it must be at most {n_tensors}, the number of tensors")
    return n_bytes


def check_room(n_bytes: int, config: ConvertConfig, output: Path) -> None:
    """Raise a UserError if fewer bytes than these are free on the disk."""
    free = shutil.disk_usage(next(folder for folder in output.parents if folder.is_dir())).free
    if n_bytes > free:
        room = f"{n_bytes / MIB:,.0f} MiB are needed, and {free / MIB:,.0f} MiB are free there"
        raise UserError(f"output={config.output}: {room}")


def write(source: "Source", sidecar: "SidecarFiles", config: ConvertConfig, folder: Path, advance: Advance) -> None:
    """Write the weights and the files next to them; a UserError if a weight is out of the range of `dtype`."""
    from llama_ft.model.export import write_hf, write_meta

    for name, content in sidecar.files.items():
        (folder / name).write_bytes(content)
    if config.to is Format.hf:
        dtype = str(next(iter(source.weights.values())).dtype).removeprefix("torch.")
        settings = sidecar.hf_config(source.model, dtype)
        write_hf(source.weights, source.model, settings, folder, config.shards, advance)
    else:
        write_meta(source.weights, source.model, folder, config.shards or 1, advance)


def warn_of_context(config: ConvertConfig, log: Log) -> None:
    """Warn if another context will be read back, since Meta's format does not store it."""
    from llama_ft.model.folder import released_context

    model = config.model
    read_back = released_context(model.vocab_size, model.rope_theta, model.rope_factor)
    if read_back != model.max_seq_len:
        problem = f"Meta's format does not store the context of {model.max_seq_len:,}; it is read as {read_back:,}"
        log(f"{problem}: give model.max_seq_len={model.max_seq_len} when using the files")


if __name__ == "__main__":
    cli.run_command(main, USAGE)
