"""Imported once, in the process from which the planning processes are forked, so that each starts quickly."""

import os

from torch._subclasses.fake_tensor import FakeTensorMode

from llama_ft.planning import fake_run, run_costs

# Planning needs no GPU; if PyTorch's optimizers see one, they create a context of hundreds of MiB on it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
FakeTensorMode()  # on first use it imports more than all of torch
__all__ = ["fake_run", "run_costs"]
