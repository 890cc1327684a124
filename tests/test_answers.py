"""docs/answers.md: each measured number is its study's, each claim that it leans on held, each paper is named alike."""

import importlib
import json
import re
from functools import cache
from typing import Any

import pytest
from conftest import CHECKOUT
from helpers.studies import ANSWERS, Cited, cited

from experiments import STUDIES

RECORDS = CHECKOUT / "benchmarks" / "studies"
# Numbers that are not results: settings of the studies, a version, models' names and sizes, what Alpaca's page says.
SETTINGS = {"0.1", "0.9", "0.03", "4.46", "60 %", "1.2", "3.2", "6.7", "50 GiB"}
# LLaMA's pre-training data, from its paper: trillions of tokens, and the shares of its sources. Sections of the survey.
SETTINGS |= {"1.0", "1.4", "67.0 %", "15.0 %", "4.5 %", "2.5 %", "2.0 %", "67.0", "15.0", "4.5", "2.5", "2.0"}
SETTINGS |= {"4.1", "7.1", "7.2"}
SETTINGS |= {"0.02", "0.13", "0.70", "64 times"}  # a weight, what a law says, how often a study repeats


@cache
def record(study: str) -> dict[str, Any]:
    """The numbers of the whole study, as they were committed."""
    return json.loads((RECORDS / study / f"{study}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", cited(), ids=lambda number: f"{number.study}-{number.claim}-{number.name}")
def test_a_number_is_its_studys(number: Cited) -> None:
    assert number.is_shown(number.value_in(record(number.study)))


def test_every_study_is_cited() -> None:
    assert {number.study for number in cited()} == set(STUDIES)
    assert len(cited()) >= 80


@pytest.mark.parametrize("study", STUDIES)
def test_the_committed_numbers_are_of_a_whole_run_whose_claims_hold(study: str) -> None:
    found, module = record(study), importlib.import_module(f"experiments.{study}")
    assert found["quick"] is False
    assert all(claim["holds"] for claim in found["claims"])
    claims = module.STUDY.claims_of(found)
    computed = [{"text": claim.text, "holds": claim.holds, "numbers": claim.numbers} for claim in claims]
    assert json.loads(json.dumps(computed)) == found["claims"]
    assert (RECORDS / study / f"{study}.md").read_text(encoding="utf-8") == module.STUDY.table_of(found)
    assert (RECORDS / study / f"{study}.png").read_bytes().startswith(b"\x89PNG")
    picture = f"](../benchmarks/studies/{study}/{study}.png)"
    assert picture in ANSWERS.read_text(encoding="utf-8")


@pytest.mark.parametrize("study", STUDIES)
def test_benchmarks_names_the_versions_of_the_numbers(study: str) -> None:
    section = (CHECKOUT / "benchmarks" / "README.md").read_text(encoding="utf-8").partition("\n## The studies\n")[2]
    versions = record(study)["versions"]
    assert f"Python {versions['python']}, torch {versions['torch']}." in section.partition("\n## ")[0]


def test_no_result_is_typed() -> None:
    """What has a decimal point or is a percentage is linked, unless it is a setting."""
    text = ANSWERS.read_text(encoding="utf-8")
    text = re.sub(r"```.*?```|`[^`]*`|^\[[\w-]+\]: .*?$|^#.*?$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"\[[^\]]*\]\s?(\[[^\]]*\]|\([^)]*\))", "", text)
    typed = re.findall(r"\d[\d,]*\.\d+|\d[\d,.]* ?(?:%|percent|GiB|MiB|kB|times)", text)
    assert [number for number in typed if number not in SETTINGS] == []


def test_a_paper_is_linked_by_its_number() -> None:
    papers = re.findall(
        r"\[arXiv\s(\d{4}\.\d{5})\]\(https://arxiv\.org/abs/(\d{4}\.\d{5})\)", ANSWERS.read_text(encoding="utf-8")
    )
    assert len(papers) >= 20
    assert all(shown == linked for shown, linked in papers)
