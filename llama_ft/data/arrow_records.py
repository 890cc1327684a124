"""Rows of Parquet files, folders and data sets on the Hugging Face hub, read with the library `datasets`."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from llama_ft.config import UserError
from llama_ft.hub import is_hub_name

SAVED = ("state.json", "dataset_dict.json")  # written by `save_to_disk` for one split, and for several


def arrow_rows(name: str, subset: str | None, split: str | None) -> Iterator[tuple[str, Any]]:
    """(where, row) of each row, memory-mapped by the library.

    Args:
        name: a Parquet file, a folder, or hub:ORG/NAME[@REVISION].
        subset: one of the data set's subsets; None if it has only one.
        split: None is train.

    A UserError if the library is missing or cannot read the data, or if the subset or split does not exist.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{name} needs the package datasets: pip install 'llama_ft[data]'") from error
    with _quiet():
        loaded = _loaded(datasets, name, subset)
    if isinstance(loaded, dict):
        wanted = split or "train"
        if wanted not in loaded:
            raise UserError(f"{name} has no split {wanted}: give data.split, one of {', '.join(loaded)}")
        loaded = loaded[wanted]
    elif split is not None:
        raise UserError(f"data.split={split}: {name} has only one split; leave data.split out")
    yield from ((f"record {index}", row) for index, row in enumerate(loaded))


def _loaded(datasets: Any, name: str, subset: str | None) -> Any:
    """A Dataset, or a dictionary of Datasets by split."""
    path, _, revision = name.partition("@") if is_hub_name(name) else (str(Path(name).absolute()), "", "")
    try:
        if any((Path(name) / file).is_file() for file in SAVED):
            if subset is not None:
                raise UserError(f"data.subset={subset}: {name} has no subsets; leave data.subset out")
            return datasets.load_from_disk(path)
        if is_hub_name(name):
            path = path.replace("hub:", "hf://datasets/", 1)  # never a folder of this name
        elif Path(name).is_file():
            return datasets.load_dataset("parquet", data_files=path)
        return datasets.load_dataset(path, subset, revision=revision or None)
    except UserError:
        raise
    except Exception as error:  # of many types, also from other libraries
        raise UserError(f"{name} cannot be read: {_reason(datasets, error, path, revision, subset)}") from error


def _reason(datasets: Any, error: Exception, path: str, revision: str, subset: str | None) -> str:
    if isinstance(error, OSError) and error.filename and not str(error.filename).startswith(path):
        return f"its cache, {error.filename}: {error.strerror}; HF_HOME=DIR names another folder for it"
    if isinstance(error, ValueError) and "onfig" in str(error):
        names = datasets.get_dataset_config_names(path, revision=revision or None)
        missing = f"it has no subset {subset}; " if subset else ""
        return f"{missing}give data.subset, one of {', '.join(names)}"
    if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' progress bars, warnings and retries; a failure is reported once, by the error."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
