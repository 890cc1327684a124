"""What all studies share: their options, the files that they leave, their exit status; and all of them in one go."""

import importlib
import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHECKOUT, run

import experiments.__main__ as all_studies
from experiments import STUDIES
from experiments.kv_cache import STUDY, KVCacheOptions
from experiments.study import Claim, Log, Options, Study, conduct, main, read_options
from llama_ft import tracking
from llama_ft.config import DeviceChoice, UserError
from llama_ft.device import device_name


def a_study(holds: bool) -> Study:
    def measure(options: Options, log: Log) -> dict[str, Any]:
        return {"cells": (1, 2), "threads": torch.get_num_threads()}

    def claims_of(numbers: dict[str, Any]) -> list[Claim]:
        assert numbers["cells"] == [1, 2]  # as JSON has it
        return [Claim("one is less than two", True, {"one": 1, "two": 2}), Claim("it rains", holds, {"drops": 1234.5})]

    def draw(numbers: dict[str, Any], file: Path) -> None:
        file.write_bytes(b"picture")

    return Study("kv_cache", Options, measure, claims_of, lambda numbers: "| table |\n", draw)


@pytest.mark.parametrize("holds", [True, False])
def test_a_study_leaves_its_numbers_and_says_what_holds(tmp_path: Path, capsys, holds: bool) -> None:
    folder = tmp_path / "new" / "folder"
    assert conduct(a_study(holds), [f"output={folder}"]) == (0 if holds else 1)
    assert capsys.readouterr().out.splitlines() == [
        "| table |",
        "",
        "HOLDS: one is less than two (one 1, two 2)",
        f"{'HOLDS' if holds else 'FAILS'}: it rains (drops 1,234)",
        str(folder / "kv_cache.png"),
    ]
    record = json.loads((folder / "kv_cache.json").read_text())
    assert [claim["holds"] for claim in record["claims"]] == [True, holds]
    assert {"command", "date", "quick", "cells"} <= record.keys()
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["device"] == device_name(torch.device("cpu"))
    assert record["threads"] == 1
    assert (folder / "kv_cache.png").read_bytes() == b"picture"
    assert {file.name for file in folder.iterdir()} == {"kv_cache.json", "kv_cache.md", "kv_cache.png"}


def test_a_study_whose_picture_cannot_be_written_leaves_no_numbers(tmp_path: Path) -> None:
    picture = tmp_path / "kv_cache.png"
    picture.mkdir()
    with pytest.raises(IsADirectoryError):
        conduct(a_study(True), [f"output={tmp_path}"])
    assert list(tmp_path.iterdir()) == [picture]


def test_a_study_is_tracked_like_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tracked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(tracking, "track_study", lambda *arguments: tracked.append(arguments))
    conduct(a_study(False), [f"output={tmp_path}", "tracker=wandb", "tracker.project=studies"])
    ((config, name, numbers, files, _),) = tracked
    assert (config.project, name) == ("studies", "kv_cache")
    figures = {"claim_1/one": 1, "claim_1/two": 2, "claim_2/drops": 1234.5}
    assert numbers == {"claims": 2, "claims_held": 1} | figures
    assert files == [tmp_path / f"kv_cache.{kind}" for kind in ("json", "md", "png")]


# Options


def test_options_are_typed() -> None:
    options = read_options(["repeats=3", "device=cuda", "output=x/y", "quick=false"], KVCacheOptions)
    assert options == replace(read_options([], KVCacheOptions), repeats=3, device=DeviceChoice.cuda, output="x/y")


WRONG = {
    "repeats=0": "repeats=0 is not allowed: it must be a whole number, at least 1",
    "quick=true complete=true": "quick=true and complete=true exclude each other: give one of them",
    "device=cuda": "device=cuda is not allowed: it must be cpu: PyTorch sees no CUDA GPU here",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_option_is_named(monkeypatch: pytest.MonkeyPatch, arguments: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=WRONG[arguments]):
        read_options(arguments.split(), KVCacheOptions).torch_device()


@pytest.mark.process
def test_a_wrong_key_is_said_in_a_line(tmp_path: Path) -> None:
    done = run("experiments.kv_cache", "quik=true", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: quik is not a key.* has quick, output, tracker, complete, .*\n", done.stderr)


def test_help_is_of_the_study(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["kv_cache", "--help"])
    with pytest.raises(SystemExit):
        main(STUDY)
    printed = capsys.readouterr().out
    assert "python -m experiments.kv_cache [KEY=VALUE ...]" in printed
    assert re.findall(r"^  (\w+) +(?:false|null|1|cpu) ", printed, re.MULTILINE) == [
        *("quick", "output", "complete", "repeats", "device")
    ]


@pytest.mark.parametrize("page", ["docs/phase1.md", "docs/answers.md", "docs/kv_cache.md", "benchmarks/README.md"])
def test_the_docs_commands_are_understood(page: str) -> None:
    lines = re.findall(r"python -m experiments(?:\.(\w+))?((?: \w+=\S+)*)", (CHECKOUT / page).read_text())
    assert lines
    for name, arguments in lines:
        if name in STUDIES or not name:
            schema = importlib.import_module(f"experiments.{name}").STUDY.options if name else Options
            assert read_options(arguments.split(), schema)


# All studies


def test_every_study_is_registered() -> None:
    files = [file for file in (CHECKOUT / "experiments").glob("*.py") if "\nSTUDY = " in file.read_text()]
    assert {file.stem for file in files} == STUDIES.keys()
    for name in STUDIES:
        assert importlib.import_module(f"experiments.{name}").STUDY.name == name


@pytest.mark.process
@pytest.mark.parametrize(("status", "writes"), [(0, True), (1, True), (1, False), (-9, False)])
def test_all_studies_end_with_what_became_of_each(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path, status: int, writes: bool
) -> None:
    file = tmp_path / "kv_cache" / "kv_cache.json"
    file.parent.mkdir()
    file.write_text('{"claims": []}')  # of an earlier run

    def study(command: list[str], check: bool, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        if writes:
            file.write_text(json.dumps({"claims": [{"holds": True}, {"holds": status == 0}]}))
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", study)
    monkeypatch.setattr(all_studies, "STUDIES", {"kv_cache": "The cache."})
    assert all_studies.run_all([f"output={tmp_path}"]) == (status if writes else 2)
    expected = f"{2 - status} of 2 claims hold" if writes else f"not finished (exit status {status})"
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"kv_cache: {expected}, ")


@pytest.mark.slow
def test_all_studies_are_commands_with_the_same_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr(all_studies, "STUDIES", {name: STUDIES[name] for name in ("optimizer", "low_rank")})
    assert all_studies.run_all(["quick=true", f'output="{tmp_path}/two, really"']) == 0
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert re.fullmatch(r"optimizer: 7 of 7 claims hold, \d+ s", first)
    assert re.fullmatch(r"low_rank: 10 of 10 claims hold, \d+ s", second)
    record = json.loads((tmp_path / "two, really" / "optimizer" / "optimizer.json").read_text())
    assert record["quick"] is True
    assert record["command"].startswith("python -m experiments.optimizer quick=true ")
