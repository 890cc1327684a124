"""Imported once, in the process that the planning processes are forked from, so that each of them starts at once."""

import os

from torch._subclasses.fake_tensor import FakeTensorMode

from llama_ft.planning import fake_run, run_costs

# Planning needs no GPU, and where one is seen PyTorch's optimizers make a context there, of hundreds of MiB.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
FakeTensorMode()  # imports, when first made, what takes longer than all of torch
__all__ = ["fake_run", "run_costs"]
