"""The two Alpaca prompt templates: one for records with an input, one for records without.

They are copied exactly from the Stanford Alpaca repository (train.py, `PROMPT_DICT`), so that models tuned here and
elsewhere can be compared.
"""

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def prompt_text(instruction: str, input: str = "") -> str:
    """The prompt through `### Response:`. The answer follows directly, without a space or line break."""
    template = _WITH_INPUT if input else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)
