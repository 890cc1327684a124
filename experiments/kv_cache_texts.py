"""`python -m experiments.kv_cache_texts`: write the texts of docs/kv_cache.md anew, after a change of the model.

Each prompt is answered by the command that is shown, with the KV cache and without it.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from llama_ft.files import write_text

PAGE = Path(__file__).resolve().parent.parent / "docs" / "kv_cache.md"
BEGIN, END = "<!-- written by python -m experiments.kv_cache_texts -->\n", "<!-- end of what was written -->\n"
PROMPTS = (
    """'prompt="Once upon a time"'""",
    """'prompt="The plural of wolf is"'""",
    """'prompt="A sack of 30 kilograms and"'""",
    """'instruction="What is the plural of fox?"'""",
    """'instruction="Spell the word with a dash between the letters."' input=king""",
)
COMMAND = "python -m llama_ft.generate {prompt} gpu=cpu decoding.max_new_tokens=40 kv_cache={kv_cache}"


def standard_output(command: str) -> str:
    """What a command line that begins with `python` prints.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    words = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=PAGE.parent.parent, check=True, stdout=subprocess.PIPE, text=True).stdout


def with_texts(page: str, answer: Callable[[str], str]) -> str:
    """The page with what is between its marks written anew; `answer` gives what a command prints.

    Raises:
        ValueError: if a mark is missing.
    """
    begin, end = page.index(BEGIN) + len(BEGIN), page.index(END)
    blocks = []
    for prompt in PROMPTS:
        commands = [COMMAND.format(prompt=prompt, kv_cache=kv_cache) for kv_cache in ("true", "false")]
        blocks.append("```console\n" + "".join(f"$ {command}\n{answer(command)}" for command in commands) + "```\n")
    return page[:begin] + "\n" + "\n".join(blocks) + "\n" + page[end:]


if __name__ == "__main__":
    write_text(PAGE, with_texts(PAGE.read_text(encoding="utf-8"), standard_output))
