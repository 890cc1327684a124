"""Templates turn a record into the text that a model reads, and choose the tokens to train on."""

from llama_ft.config import TrainOn, UserError, path_of
from llama_ft.data.chat_template import ChatTemplate, Rendered
from llama_ft.data.prompt import prompt_text
from llama_ft.data.records import Record, Sample
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.files import text_of
from llama_ft.records.result import template_of_run

AUTO, ALPACA, CHAT, PLAIN = "auto", "alpaca", "chat", "plain"


class TextTemplate:
    """Instruction and answer as one text, in Alpaca's template, or without any (`plain`)."""

    def __init__(self, name: str) -> None:
        self.name = self.text = name

    def answer(self, record: Record, tokenizer: Tokenizer) -> str:
        """The record's answer."""
        return record.output

    def prompt(self, record: Record) -> str:
        """The text that the answer directly follows."""
        if record.conversation:
            refused = "earlier turns, a system message or tools"
            raise ValueError(f"template {self.name} has no place for {refused}: use chat, or a FILE in Jinja")
        if self.name == ALPACA:
            return prompt_text(record.instruction, record.input)
        return "\n".join(filter(None, (record.instruction, record.input)))

    def sample(self, record: Record, tokenizer: Tokenizer, train_on: TrainOn = TrainOn.assistant) -> Sample:
        """Tokenize prompt and answer as one text, as the Alpaca repository does, and find where the answer begins.

        The prompt is the tokens that the whole text shares with the prompt encoded separately. A token that spans the
        border counts as answer, so that the whole answer is trained on.
        """
        prompt = self.prompt(record)
        tokens = tokenizer.encode(prompt + record.output, bos=True, eos=True)
        if train_on is TrainOn.all:
            return Sample.after(tokens, 1)
        prompt_ids = tokenizer.encode(prompt, bos=True)
        pairs = enumerate(zip(prompt_ids, tokens, strict=False))
        return Sample.after(tokens, next((n for n, (one, other) in pairs if one != other), len(prompt_ids)))


Template = TextTemplate | ChatTemplate  # they raise a ValueError for a record that they cannot express
ALPACA_TEMPLATE = TextTemplate(ALPACA)


def choose_template(choice: str, tokenizer: Tokenizer, trained: str | None = None) -> Template:
    """The chosen template; a UserError if it does not exist.

    Args:
        choice: `alpaca`, `plain`, `chat` (the checkpoint's own), or a file with a chat template in Jinja. `auto` is
            that of the run in the folder `trained`, if any, else the checkpoint's own, if any, else Alpaca's.
    """
    text = tokenizer.named.chat_template
    if choice == AUTO:
        choice = template_of_run(trained) or (CHAT if text else ALPACA)
    if choice in (ALPACA, PLAIN):
        return TextTemplate(choice)
    if choice != CHAT:
        file = path_of(choice)
        if not file.is_file():
            allowed = ", ".join((AUTO, ALPACA, CHAT, PLAIN))
            raise UserError(f"template {choice}: there is no such file; give a file or one of {allowed}")
        text = text_of(file, f"template {file}")
    elif not text:
        missing = f"tokenizer={tokenizer.file} has no chat template next to it"
        raise UserError(f"template chat: {missing}; use alpaca, or a FILE with a chat template in Jinja")
    return ChatTemplate(text, choice, tokenizer.special_names)


def encode_prompt(text: str, tokenizer: Tokenizer) -> list[int]:
    """The token ids of a prompt, with BOS first, which a chat template spells itself."""
    return tokenizer.encode_chat(text)[0] if isinstance(text, Rendered) else tokenizer.encode(text, bos=True)
