"""The API for notebooks and scripts, after `import llama_ft as lf`.

Plain functions over PyTorch modules, built from the same parts as the commands.
"""

from llama_ft.api.models import complete, load, load_adapter, save
from llama_ft.api.planning import predict
from llama_ft.api.training import encode, finetune, measure_memory, perplexity, read_records
from llama_ft.config import UserError
from llama_ft.data.records import Record, Sample
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.measure.memory import MemoryUse
from llama_ft.model.transformer import Transformer
from llama_ft.records.evaluation import Perplexity
from llama_ft.records.metrics import StepMetrics
from llama_ft.records.plan import PlanRow
from llama_ft.techniques.gradient_checkpointing import checkpoint_layers
from llama_ft.techniques.lora import add_lora
from llama_ft.techniques.neftune import add_noise
from llama_ft.training.compilation import compile_layers

__all__ = [
    "MemoryUse",
    "Perplexity",
    "PlanRow",
    "Record",
    "Sample",
    "StepMetrics",
    "Tokenizer",
    "Transformer",
    "UserError",
    "add_lora",
    "add_noise",
    "checkpoint_layers",
    "compile_layers",
    "complete",
    "encode",
    "finetune",
    "load",
    "load_adapter",
    "measure_memory",
    "perplexity",
    "predict",
    "read_records",
    "save",
]
