"""Which of gradient accumulation, mixed precision, LoRA and gradient checkpointing to use for LLaMA on one GPU."""

__version__ = "0.1.0"
