"""Quick runs of studies, the claims that fail where numbers are changed, and the numbers that docs/answers.md cites."""

import io
import json
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.study import Study, conduct

ANSWERS = Path(__file__).parents[2] / "docs" / "answers.md"
# Claims whose numbers are times, or depend on how much is measured.
OTHER_WHEN_QUICK = {("lora", 5), ("gradient_accumulation", 4), ("kv_cache", 1), ("kv_cache", 2), ("kv_cache", 4)}
OTHER_ELSEWHERE = {("mixed_precision", 2)}  # a few elements of a million: another CPU's fp16 may round one more to 0


@dataclass(frozen=True)
class Cited:
    """A number of the page, and where it is from."""

    shown: str
    study: str
    claim: int  # counted from 1
    name: str

    def value_in(self, record: dict[str, Any]) -> float:
        return record["claims"][self.claim - 1]["numbers"][self.name]

    def is_shown(self, value: float, tolerance: float = 0.0) -> bool:
        """Whether the page shows a value, rounded to the digits that it has; or one that is as near."""
        digits = len(self.shown.partition(".")[2])
        if not float(self.shown.replace(",", "")):
            return value == 0
        return abs(float(self.shown.replace(",", "")) - value) <= 0.5001 * 10**-digits + tolerance * abs(value)


def cited() -> list[Cited]:
    text = ANSWERS.read_text(encoding="utf-8")
    sources = re.findall(
        r'^\[([\w-]+)\]: \.\./benchmarks/studies/(\w+)/\2\.json "claim (\d+): (.+)"$', text, re.MULTILINE
    )
    assert len(sources) == len(re.findall(r"^\[[\w-]+\]: ", text, re.MULTILINE))
    by_label = {label: (study, int(claim), name) for label, study, claim, name in sources}
    assert len(by_label) == len(sources)
    numbers = re.findall(r"\[([^\]]+)\]\s?\[([\w-]+)\]", text)
    assert {label for _, label in numbers} == set(by_label)
    return [Cited(shown, *by_label[label]) for shown, label in numbers]


def quick_run(study: Study, folder: Path) -> dict[str, Any]:
    """The numbers that a quick run leaves. All claims hold, and what the page cites is found again."""
    with redirect_stdout(io.StringIO()):
        assert conduct(study, ["quick=true", f"output={folder}"]) == 0
    assert (folder / f"{study.name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / f"{study.name}.json").read_text())
    assert (folder / f"{study.name}.md").read_text() == study.table_of(record)
    others = OTHER_WHEN_QUICK | OTHER_ELSEWHERE
    again = [n for n in cited() if n.study == study.name and (n.study, n.claim) not in others]
    # Other CPUs round otherwise, which steps of training enlarge.
    assert [number for number in again if not number.is_shown(number.value_in(record), 0.02)] == []
    return record


def failed(study: ModuleType, numbers: dict[str, Any], **changed: object) -> list[int]:
    """The indices of the study's claims that do not hold when some of its numbers are others."""
    return [index for index, claim in enumerate(study.claims_of(numbers | changed)) if not claim.holds]
