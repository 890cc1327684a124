"""The sizes of a model."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

from llama_ft.config.checks import Settings, check, setting

PACKAGE_DIR = Path(__file__).resolve().parent.parent
MAX_SIZE, MAX_LAYERS = 2**24, 2**12  # beyond any existing model: a larger value is a mistake
FEATURES = ("qkv_bias", "qk_norm")  # not in LLaMA, but in close relatives
FROM_CHECKPOINT = "from_checkpoint"  # the choice of `model` that reads the sizes from the checkpoint


@dataclass
class ModelConfig:
    """Sizes of a LLaMA decoder, named as in Meta's `params.json` where it has them."""

    name: str = setting("???", "name of the model")
    dim: int = setting(4096, "width of the residual stream")
    n_layers: int = setting(32, "decoder blocks")
    n_heads: int = setting(32, "attention heads")
    n_kv_heads: int = setting(32, "key and value heads; fewer than n_heads is grouped-query attention")
    ffn_dim: int = setting(11008, "width of the feed-forward layer")
    vocab_size: int = setting(32000, "tokens in the vocabulary")
    max_seq_len: int = setting(4096, "longest sequence in tokens")
    norm_eps: float = setting(1e-5, "added to the mean square in RMSNorm")
    rope_theta: float = setting(10000.0, "base of the rotary frequencies")
    rope_factor: float = setting(1.0, "Llama 3.1: slow rotary frequencies are divided by this; 1 leaves them unchanged")
    rope_low_freq_factor: float = setting(
        1.0,
        "frequencies of at most this many turns over rope_original_context are divided by rope_factor",
        needs="model.rope_factor",
    )
    rope_high_freq_factor: float = setting(
        4.0, "frequencies of at least this many turns stay; those in between are blended", needs="model.rope_factor"
    )
    rope_original_context: int = setting(
        8192, "context of the pretraining, in tokens; 0: all frequencies are slow", needs="model.rope_factor"
    )
    tie_word_embeddings: bool = setting(False, "the output layer shares its weight with the embedding")
    head_size: int | None = setting(None, "width of an attention head; null is dim / n_heads")
    qkv_bias: bool = setting(False, "wq, wk and wv have biases: Qwen 2 and 2.5")
    qk_norm: bool = setting(False, "RMSNorm of each head's queries and keys: Qwen 3")
    # Keys that were typed: they override the checkpoint's sizes.
    given: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "ffn_dim", "vocab_size", "max_seq_len"):
            value, limit = getattr(self, key), MAX_LAYERS if key == "n_layers" else MAX_SIZE
            check(1 <= value <= limit, f"model.{key}", value, f"at least 1 and at most {limit:,}")
        check(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "between 0 and 1")
        if self.head_size is None:
            check(self.dim % self.n_heads == 0, "model.dim", self.dim, f"a multiple of model.n_heads={self.n_heads}")
            check(self.head_dim % 2 == 0, "model.dim", self.dim, "such that dim / n_heads is even (rotary pairs)")
        else:
            holds = 0 < self.head_size <= MAX_SIZE and self.head_size % 2 == 0
            check(holds, "model.head_size", self.head_size, "positive and even (rotary pairs), or null")
            if self.head_size * self.n_heads == self.dim:
                self.head_size = None  # equal sizes make equal configs
        check(self.n_heads % self.n_kv_heads == 0, "model.n_kv_heads", self.n_kv_heads, f"a divisor of {self.n_heads}")
        for key in ("rope_theta", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
            check(0 < getattr(self, key) < math.inf, f"model.{key}", getattr(self, key), "positive and finite")
        low, high, original = self.rope_low_freq_factor, self.rope_high_freq_factor, self.rope_original_context
        check(low < high, "model.rope_low_freq_factor", low, f"below model.rope_high_freq_factor={high}")
        check(original >= 0, "model.rope_original_context", original, "0 or more")

    @property
    def sizes(self) -> Settings:
        """The keys that identify a model: all but `name` and `given`; features only if they are on."""
        off = {key for key in FEATURES if not getattr(self, key)}  # as in files written before these keys existed
        return {key: value for key, value in asdict(self).items() if key not in ("name", "given", *off)}

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads if self.head_size is None else self.head_size

    @property
    def builtin_dir(self) -> Path:
        """Folder of the files that ship with this model; exists only for built-in models."""
        return PACKAGE_DIR / "model" / self.name

    @property
    def is_builtin(self) -> bool:
        """True if a tokenizer for this model ships with the package."""
        return (self.builtin_dir / "tokenizer.model").is_file()
