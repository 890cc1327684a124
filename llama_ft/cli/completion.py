"""Tab in bash: a command's keys and choices, as Hydra's completion knows them.

Hydra's own shell code gives up where a command begins with `python -m`, so completion.bash asks instead.
"""

import enum
import os
import re
import shlex
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import cast

from llama_ft.cli.compose import register
from llama_ft.cli.explain import type_of
from llama_ft.cli.usage import Usage, chosen
from llama_ft.config import UserError, config_dir


def complete(usage: Usage) -> int:
    """`-sc install=bash`: print the shell's code. It asks `-sc query=bash` what may end the command in COMP_LINE.

    Raises:
        UserError: for anything else.
    """
    asked = sys.argv[2:]
    if asked == ["install=bash"]:
        print(Path(__file__).with_name("completion.bash").read_text(encoding="utf-8"), end="")
    elif asked == ["uninstall=bash"]:
        print("complete -r python python3; unset -f _llama_ft_complete")
    elif asked == ["query=bash"]:
        words = os.environ.get("COMP_LINE", "").split(" ")
        before = [word for word in words[1:-1] if "=" in word or word in ("-m", "--multirun")]
        print("\n".join(_candidates(usage, before, words[-1])))
    else:
        raise UserError(f"{shlex.join(sys.argv[1:])}: -sc must come first, and install=bash or uninstall=bash after it")
    return 0


def _candidates(usage: Usage, before: list[str], word: str) -> list[str]:
    """What the word may become after those before it: a key's choices, or what Hydra's own completion says."""
    key, equals, _ = word.partition("=")
    kind = type_of(key)
    if equals and isinstance(kind, type) and issubclass(kind, bool | enum.Enum):
        return [f"{key}={name}" for name in (("true", "false") if kind is bool else [choice.name for choice in kind])]
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.plugins import Plugins
    from hydra.plugins.completion_plugin import CompletionPlugin

    register()
    os.environ["COMP_LINE"] = " ".join([usage.name, *before, word])
    plugins = cast(list[type[CompletionPlugin]], Plugins.instance().discover(CompletionPlugin))
    (fish,) = [plugin for plugin in plugins if plugin.provides() == "fish"]  # a line each; bash's puts spaces between
    with (
        redirect_stdout(StringIO()) as printed,
        initialize_config_dir(version_base="1.3", config_dir=str(config_dir())),
    ):
        fish(GlobalHydra.instance().config_loader()).query(usage.name)
    known = {field.name for field in fields(usage.schema)} | chosen(usage).keys() | {"hydra"}
    return [line for line in printed.getvalue().splitlines() if re.split(r"[./=]", line.lstrip("+~"))[0] in known]
