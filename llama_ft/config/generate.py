"""The settings of `python -m llama_ft.generate`."""

import math
from dataclasses import dataclass, field

from llama_ft.config.checks import UserError, check, check_settings, setting
from llama_ft.config.source import TrainedSource

MAX_ROWS = 1024  # beams of a search, answers to a prompt


@dataclass
class DecodingConfig:
    """Choice of the next token, and end of a text."""

    sample: bool = setting(False, "draw the next token at random; false takes the most probable one")
    temperature: float = setting(1.0, "sampling: below 1 sharpens the distribution, above 1 flattens it")
    top_k: int = setting(0, "sampling: only the k most probable tokens; 0 is all", at_least=0)
    top_p: float = setting(1.0, "sampling: only the smallest set of tokens that reaches this probability; 1 is all")
    repetition_penalty: float = setting(1.0, "above 1 makes tokens that have occurred less probable")
    n_beams: int = setting(1, "beams of a beam search; 1 is none")
    length_penalty: float = setting(1.0, "beam search: scores are divided by the length to this power")
    early_stopping: bool = setting(False, "beam search: end as soon as n_beams texts are finished")
    max_new_tokens: int = setting(128, "maximum number of new tokens", at_least=1)
    num_return_sequences: int = setting(1, "answers to a prompt")
    stop: list[str] = setting([], "strings that end a text, in addition to EOS")
    seed: int = setting(0, "seed of the random numbers", needs="decoding.sample=true")

    def __post_init__(self) -> None:
        check_settings(self, "decoding.")
        # The bounds keep logits and scores within the range of fp32.
        allowed = "at least 1e-6 and finite (decoding=greedy takes the most probable token)"
        check(1e-6 <= self.temperature < math.inf, "decoding.temperature", self.temperature, allowed)
        check(0 < self.top_p <= 1, "decoding.top_p", self.top_p, "above 0 and at most 1")
        penalty = self.repetition_penalty
        check(0.01 <= penalty <= 100, "decoding.repetition_penalty", penalty, "between 0.01 and 100")
        length = self.length_penalty
        check(-10 <= length <= 10, "decoding.length_penalty", length, "between -10 and 10")
        for key in ("n_beams", "num_return_sequences"):
            number = getattr(self, key)
            check(1 <= number <= MAX_ROWS, f"decoding.{key}", number, f"between 1 and {MAX_ROWS}")
        check(0 <= self.seed < 2**63, "decoding.seed", self.seed, "at least 0 and below 2**63")
        check(all(self.stop), "decoding.stop", self.stop, "strings that are not empty")
        for key, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)):
            if not self.sample and getattr(self, key) != default:
                raise UserError(f"decoding.{key} is for sampling: give decoding=top_p, or decoding.sample=true too")
        for key, default in (("length_penalty", 1.0), ("early_stopping", False)):
            if self.n_beams == 1 and getattr(self, key) != default:
                raise UserError(f"decoding.{key} is for a beam search: give decoding=beam, or decoding.n_beams too")
        if self.n_beams > 1 and (self.sample or penalty != 1):
            raise UserError("decoding.n_beams above 1 excludes decoding.sample and decoding.repetition_penalty")
        most = self.n_beams if not self.sample else math.inf
        answers, allowed = self.num_return_sequences, "at most decoding.n_beams unless decoding.sample=true"
        check(answers <= most, "decoding.num_return_sequences", answers, allowed)


@dataclass
class GenerateConfig(TrainedSource):
    """All settings of `generate`."""

    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    prompt: str | None = setting(None, "a text to continue")
    instruction: str | None = setting(None, "instead of a prompt: an instruction, which the template formats")
    input: str | None = setting(None, "input that the instruction refers to, if any")
    system: str | None = setting(None, "a system message before instructions, for a chat template")
    template: str = setting(
        "auto", "chat, alpaca, plain or a FILE in Jinja; auto is that of the training, if known", needs="prompt=null"
    )
    prompts: str | None = setting(None, "a file of many records, each with a prompt, an instruction or messages")
    output: str | None = setting(None, "JSONL file of the answers to prompts, resumed if it exists; null is stdout")
    batch_size: int = setting(8, "prompts of a file answered at once", at_least=1, needs="prompts=FILE")
    interactive: bool = setting(False, "keep the model loaded and answer line by line; /help lists the commands")
    compare: bool = setting(False, "also show the answers without the adapter, or of the weights in base")

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = (self.prompt, self.instruction, self.prompts, self.interactive or None)
        if sum(value is not None for value in asked) != 1:
            one_of = 'prompt="…", instruction="…", prompts=FILE and interactive=true'
            raise UserError(f"give one of {one_of}; --help says more")
        if self.instruction is not None and not self.instruction.strip():
            raise UserError("instruction is empty: say what to do, or give a prompt")
        if self.input and self.instruction is None:
            raise UserError("input belongs to an instruction: give instruction too")
        if self.system is not None and self.prompt is not None:
            raise UserError("system belongs to an instruction, and prompt is used unchanged: leave one of them out")
        if self.output is not None and self.prompts is None:
            raise UserError("output is for the answers to prompts=FILE; a single answer goes to standard output")
        if self.compare and self.adapter is None and self.base is None:
            raise UserError("compare=true needs two models: give adapter=DIR, or base=DIR besides the checkpoint")
        if self.base is not None and not self.compare:
            raise UserError("base is only for comparisons: give compare=true too, or leave it out")
