"""Commands in this process."""

import sys
from collections.abc import Callable

import pytest

from llama_ft import convert

Converted = Callable[..., str]  # of arguments to what is printed


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Converted:
    """`python -m llama_ft.convert ARGUMENTS`; what it printed."""

    def call(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        assert convert.main() == 0
        return "".join(capsys.readouterr())

    return call
