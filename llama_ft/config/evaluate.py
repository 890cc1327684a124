"""The settings of `python -m llama_ft.evaluate`."""

from dataclasses import dataclass

from llama_ft.config.checks import UserError, check, setting
from llama_ft.config.source import RecordsSource, TrainedSource

MAX_WINDOW = 4096  # of the default: the logits of Llama 3.1's whole context of 131,072 would need 67 GB


@dataclass
class EvaluateConfig(TrainedSource, RecordsSource):
    """All settings of `evaluate`."""

    max_samples: int | None = setting(None, "evaluate on the first n records only; null is all", at_least=1)
    batch_size: int = setting(16, "records evaluated at once", at_least=1)
    exact_match: bool = setting(True, "let the model answer each record, and compare; false measures only perplexity")
    max_new_tokens: int = setting(64, "maximum length of an answer in tokens", at_least=1, needs="exact_match=true")
    text: str | None = setting(None, "a UTF-8 text file whose perplexity is measured as well")
    window: int | None = setting(None, "tokens of the text per forward pass; null is the model's context, 4096 at most")
    stride: int | None = setting(None, "tokens from the start of one window to the next; null is half a window")
    output: str | None = setting(None, "folder of the results; null is a new one in outputs/evaluations")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.data.check_not_held_out("evaluate")
        most = self.model.max_seq_len
        if self.window is not None:
            check(2 <= self.window <= most, "window", self.window, f"between 2 and model.max_seq_len={most}, or null")
        if self.stride is not None:
            widest = self.window_tokens
            check(1 <= self.stride <= widest, "stride", self.stride, f"between 1 and the window of {widest}, or null")
        if self.text is None and (self.window is not None or self.stride is not None):
            raise UserError("window and stride need text=FILE")

    @property
    def window_tokens(self) -> int:
        """Tokens in a window."""
        return self.window or min(self.model.max_seq_len, MAX_WINDOW)

    @property
    def stride_tokens(self) -> int:
        """Tokens from the start of one window to the next."""
        return self.stride or max(1, self.window_tokens // 2)
