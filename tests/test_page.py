"""`report.html`, and the comparison of two sweeps, on results made by hand."""

import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from PIL import Image
from test_report import CATEGORIES, TECHNIQUES, combinations, report, tables, undrawn, write

from llama_ft.records.metrics import read_metrics
from llama_ft.reporting import comparison, settings
from llama_ft.reporting.curves import MAX_POINTS, ticks

EVIL = "<script>alert('&\"')</script>"
COMMAND = "python -m llama_ft.train experiment=table2 training.lr=1e-4"
VERSIONS = {"llama_ft": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "cuda": None}
VOID = {"meta", "img", "br", "link", "input"}
CONFIG = """\
optim: {ga: false, mp: false, lora: true, gc: false}
lora: {rank: 16, targets: [wq, wv]}
training: {lr: 0.0001, seed: 0, save_every: null}
data: {name: sample, path: null, cache_dir: ~/.cache/llama_ft}
gpu: {name: auto, memory_mib: null}
tracker: {mode: auto, project: llama_ft}
measure: {memory_limit_mib: null}
"""


class Page(HTMLParser):
    """Reads a page, and complains of what is no HTML: tags that are not balanced, attributes and ids given twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        assert text.startswith("<!doctype html>")
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in [name for name, _ in self.open], f"<{tag}/> is no HTML"
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1][0] in ("td", "th"):
            self.rows[-1][-1] += data
        if self.open and self.open[-1][0] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def section(page: str, label: str) -> str:
    """The part of a page that is about one run."""
    (part,) = re.findall(
        rf"<details><summary><b>{re.escape(label)}</b>.*?</details>\n+(?=<details><summary><b>|</body>|<h)",
        page,
        re.DOTALL,
    )
    return part


def step(number: int, **values: Any) -> str:
    line = {
        "step": number,
        "total_steps": 24,
        "loss": 7 - 0.1 * number,
        "grad_norm": 2.0 + number % 3,
        "lr": 1e-4 / number,
        "tokens": 70 * number,
        "tokens_per_s": 1_000.0 + number,
        "memory_mib": 350.0,
        "time_s": 0.1 * number,
    }
    return json.dumps(line | values) + "\n"


def optim(combination: str) -> dict[str, bool]:
    return {key: key in combination.split("_") for key in TECHNIQUES}


def write_steps(run_dir: Path, count: int, more: str = "") -> None:
    (run_dir / "metrics.jsonl").write_text("".join(step(n) for n in range(1, count + 1)) + more)


def polylines(part: str) -> list[list[tuple[float, float]]]:
    found = re.findall(r'<polyline[^>]* points="([^"]*)"', part)
    return [[(float(x), float(y)) for x, y in (point.split(",") for point in text.split())] for text in found]


# ----------------------------------------------------------------------------------------------- the page of a sweep


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every ending, one with the worst that a user can write into it."""
    folder = tmp_path_factory.mktemp("page") / "sweep"
    facts = {"command": COMMAND, "versions": VERSIONS, "peak_phase": "backward", "compute_dtype": "float32"}
    breakdown = [
        {"category": "parameter", "dtype": "float32", "mb": 81.25},
        {"category": "other", "dtype": "int64", "mb": 0.001, "item": "batches"},
    ]
    write(folder, "baseline", peak_memory_mib=203.0, runtime_s=51.0, breakdown=breakdown, **facts)
    write(folder, "lora", peak_memory_mib=48.2, runtime_s=25.5, **facts)
    write(folder, "mp", "error", error=f"the loss of optimizer step 3 is nan {EVIL}", command=f"train {EVIL} \udcff")
    write(folder, "mp_lora", "interrupted")
    write(folder, "ga", "killed")
    write(folder, "ga_lora", "oom", memory_limit_mib=300)
    write(folder, f"baseline,model={EVIL.replace('/', '_')}", model=EVIL, device="\x00\x1b[1m")
    write_steps(folder / "baseline", 24)
    write_steps(folder / "lora", 24, more='{"step": 25, "total_st')
    not_finite = step(3, loss=math.nan, grad_norm=None)  # the last step of a run that its loss has stopped
    write_steps(folder / "mp", 2, more=not_finite)
    write_steps(folder / "mp_lora", 1)
    (folder / "lora" / "config.yaml").write_text(CONFIG + f"tokenizer: {EVIL}\n")
    assert report(folder).returncode == 0
    return folder


@pytest.fixture(scope="module")
def text(sweep: Path) -> str:
    return (sweep / "report.html").read_text(encoding="utf-8")


def test_page_is_html_that_needs_nothing_else(text: str) -> None:
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    sources = [
        attributes.get(name) for _, attributes in page.tags for name in ("src", "href", "srcset") if name in attributes
    ]
    assert sources
    assert all(str(source).startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"@import|url\(|https?://", text)
    assert {"lang": "en"} in page.named("html")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")


def test_page_escapes_what_users_can_write(text: str) -> None:
    assert "<script" not in text
    assert Page(text).text.count("<script>alert('&\"')") >= 4  # a model's name, an error, a command, a config
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_page_is_the_same_each_time_and_small(sweep: Path, text: str) -> None:
    assert report(sweep).returncode == 0
    assert (sweep / "report.html").read_text(encoding="utf-8") == text
    assert len(text) < 150_000


def test_page_holds_every_cell_of_table2(sweep: Path, text: str) -> None:
    rows = [tuple(row) for row in Page(text).rows]
    for table in tables((sweep / "table2.md").read_text(encoding="utf-8")):
        del table["---"]
        for name, cells in table.items():
            assert (name.removesuffix(" (2)"), *cells) in rows
    assert ("Peak memory, MiB", "203", "48.2", "error", "stopped", "killed", "×") in rows


def test_page_begins_with_table_and_picture_and_counts_the_endings(text: str) -> None:
    order = [
        text.index(part)
        for part in ("<h1>", "7 runs: 3 ok", "<h2>", "Peak memory, MiB", "<img", "<h3>Memory", "<h3>Runs")
    ]
    assert order == sorted(order)
    assert "3 ok, 1 out of memory, 1 killed, 1 interrupted, 1 failed" in Page(text).text


def test_page_holds_memory_by_category(text: str) -> None:
    rows = Page(text).rows
    assert ["", *(category.replace("_", " ") for category in CATEGORIES), "sum", "during"] in rows
    assert ["LoRA", "19.3", "9.64", "9.64", "7.23", "2.41", "48.2", "backward"] in rows  # 40, 20, 20, 15 and 5 %
    assert ["GA+LoRA", *["–"] * 5, "×", "–"] in rows


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (
            "LoRA",
            ["ok: peak 48.2 MiB, 25.5 s, 1,400 tokens/s, loss 7.250 before, 6.125 after", COMMAND, "torch 2.13.0"],
        ),
        ("LoRA", ["1,000 of 4,000 (25 %)", "200 samples, 14,000 tokens", "hash of lora", "config.yaml", "rank: 16"]),
        ("MP", ["error: the loss of optimizer step 3 is nan", "sweep/mp"]),
        ("MP+LoRA", ["interrupted: why mp_lora is interrupted", "python -m llama_ft.train"]),
        ("GA", ["killed: why ga is killed", "No optimizer step was finished."]),
        ("GA+LoRA", ["oom: why ga_lora is oom"]),
    ],
)
def test_page_has_a_section_for_each_run(text: str, label: str, words: list[str]) -> None:
    found = Page("<!doctype html>" + section(text, label)).text
    assert [word for word in words if word not in found] == []
    assert "cuda" not in found  # null: there is none


def test_page_shows_the_tensors_at_the_peak(text: str) -> None:
    rows = Page(text).rows
    assert ["parameter", "float32", "81.2"] in rows
    assert ["other (batches)", "int64", "<0.01"] in rows


def test_a_curve_has_a_point_for_each_step(text: str) -> None:
    curves = polylines(section(text, "LoRA"))
    assert [len(points) for points in curves] == [24] * 5  # the 25th line was cut short
    for points in curves:
        assert [x for x, _ in points] == sorted(x for x, _ in points)
    loss, lr, *_, memory = curves
    spaces = [b - a for (_, a), (_, b) in itertools.pairwise(loss)]
    assert all(space == pytest.approx(spaces[0], abs=0.15) and space > 0 for space in spaces)  # down the page is less
    assert lr[0][1] < lr[-1][1]
    assert len({y for _, y in memory}) == 1
    assert all(
        title in section(text, "LoRA") for title in ("learning rate", "gradient norm", "tokens/s", "memory in use, MiB")
    )
    assert section(text, "LoRA").count(">optimizer step</text>") == 5


def test_steps_without_a_finite_value_have_no_point(text: str) -> None:
    assert [len(points) for points in polylines(section(text, "MP"))] == [2, 3, 2, 3, 3]  # loss and gradient norm


def test_a_single_step_is_a_dot(text: str) -> None:
    part = section(text, "MP+LoRA")
    assert part.count("<circle") == 5
    assert polylines(part) == []


def test_many_steps_are_thinned_and_no_spike_is_lost(tmp_path: Path) -> None:
    write(tmp_path, "baseline")
    spiky = "".join(step(n, loss=9.0 if n == 777 else 1.0) for n in range(1, 2_001))
    (tmp_path / "baseline" / "metrics.jsonl").write_text(spiky)
    with undrawn():
        assert report(tmp_path).returncode == 0
    part = section((tmp_path / "report.html").read_text(encoding="utf-8"), "baseline")
    curves = polylines(part)
    assert [len(points) for points in curves] == [MAX_POINTS] * 5
    band = [tuple(map(float, p.split(","))) for p in re.findall(r'<polygon points="([^"]*)"', part)[0].split()]
    top, usual = min(y for _, y in band), max(y for _, y in band)
    (spike,) = [x for x, y in band if y == top]
    assert usual - top > 80  # nearly the whole height of the axes
    left, right = curves[0][0][0], curves[0][-1][0]
    assert (spike - left) / (right - left) == pytest.approx(777 / 2_000, abs=0.01)
    assert min(y for _, y in curves[0]) == pytest.approx(usual - (usual - top) / 10, abs=0.2)  # a mean of ten


def test_a_damaged_step_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"loss": 1}', "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write(folder, "baseline")
        write_steps(folder / "baseline", 2, more=f"{text}\n{step(4)}")
        done = report(folder)
        assert done.returncode == 2
        assert f"{folder / 'baseline' / 'metrics.jsonl'}, line 3" in done.stderr
        assert done.stderr.count("\n") == 1
        assert [file.name for file in folder.iterdir()] == ["baseline"]


def test_metrics_of_a_run_that_never_began_are_none(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 7')
    assert read_metrics(tmp_path) == []


def test_eight_rows_of_many_steps_are_a_small_page(tmp_path: Path) -> None:
    lines = "".join(
        step(n, loss=math.sin(n) + 3, tokens_per_s=1_000 + n % 97, grad_norm=n % 13 / 3) for n in range(1, 1_001)
    )
    for name in list(combinations())[:8]:
        write(tmp_path, name)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
    assert report(tmp_path).returncode == 0
    assert (tmp_path / "report.html").stat().st_size < 600_000


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 1e-3, ["0.0000", "0.0005", "0.0010"]),
        (1, 24, ["5", "10", "15", "20"]),
        (4.3, 7.4, ["5", "6", "7"]),
        (2e-7, 8.6e-6, ["2e-06", "4e-06", "6e-06", "8e-06"]),
        (9e-6, 1e-5, ["9e-06", "9.5e-06", "1e-05"]),
        (59_000, 62_000, ["59,000", "60,000", "61,000", "62,000"]),
        (7, 7, ["7"]),
    ],
)
def test_ticks_are_round_and_few(low: float, high: float, texts: list[str]) -> None:
    assert [text for _, text in ticks(low, high, 5)] == texts


def test_ticks_of_steps_are_whole() -> None:
    assert ticks(1, 3, 5, whole=True) == [(1, "1"), (2, "2"), (3, "3")]
    for last in range(2, 300):
        found = ticks(1, last, 5, whole=True)
        assert 1 < len(found) <= 5
        assert all(value == round(value) and 1 <= value <= last for value, _ in found)
        assert len({text for _, text in found}) == len(found)


# --------------------------------------------------------------------------------------------------- the comparison


def write_pair(
    tmp_path: Path, name: str = "lora", a: dict[str, Any] | None = None, b: dict[str, Any] | None = None
) -> None:
    """The same run in the sweeps a and b but for the values given."""
    for side, values in (("a", a or {}), ("b", b or {})):
        write(tmp_path / side, name, **values)
        (tmp_path / side / name / "config.yaml").write_text(CONFIG)


def compare(tmp_path: Path) -> tuple[dict[str, list[str]], str]:
    """The rows of comparison.md, such as `Runtime, s A`, and all of it; its pictures are left out."""
    with undrawn():
        done = report(tmp_path / "a", tmp_path / "b")
    assert (done.returncode, done.stderr) == (0, "")
    text = (tmp_path / "b" / "comparison.md").read_text(encoding="utf-8")
    rows, measure = {}, ""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("|---"):
            name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            measure = measure if any(cells) else name
            rows[f"{measure} {name}".strip()] = cells
    return rows, text


def differences(rows: dict[str, list[str]]) -> list[str]:
    return [cell for name, cells in rows.items() if name.endswith("difference") for cell in cells]


def test_equal_sweeps_are_equal_everywhere(tmp_path: Path) -> None:
    for name in list(combinations())[:8]:
        write_pair(tmp_path, name)
    rows, text = compare(tmp_path)
    assert differences(rows) == ["="] * 8 * 4
    assert settings.SAME_SETTINGS == "Settings, device and versions are the same."
    assert settings.SAME_SETTINGS in text
    page = Page((tmp_path / "b" / "comparison.html").read_text(encoding="utf-8"))
    assert settings.SAME_SETTINGS in page.text
    assert not [cell for cell in page.named("td") if cell.get("class") in ("better", "worse", "changed")]


def test_a_sweep_is_equal_to_itself(tmp_path: Path) -> None:
    write(tmp_path / "a", "baseline")
    write(tmp_path / "a", "mp", "oom")
    done = report(tmp_path / "a", tmp_path / "a")
    assert done.returncode == 0
    assert settings.SAME_SETTINGS in done.stdout
    assert {file.name for file in (tmp_path / "a").iterdir() if file.is_file()} == set(comparison.FILES)


def test_changes_are_given_in_percent_and_marked(tmp_path: Path) -> None:
    a = {"peak_memory_mib": 200.0, "runtime_s": 10.0, "tokens_per_s": 1_000.0, "train_loss_after": 6.0}
    b = {"peak_memory_mib": 150.0, "runtime_s": 12.5, "tokens_per_s": 800.0, "train_loss_after": 6.25}
    write_pair(tmp_path, a=a, b=b)
    write_pair(tmp_path, "mp", a=a, b=a | {"peak_memory_mib": 200.9, "runtime_s": 10.2})
    rows, text = compare(tmp_path)
    assert rows["Peak memory, MiB A"] == ["200", "200"]
    assert rows["Peak memory, MiB B"] == ["150", "201"]
    assert rows["Peak memory, MiB difference"] == ["-25.0%", "+0.4%"]
    assert rows["Runtime, s difference"] == ["+25.0%", "+2.0%"]
    assert rows["Tokens/s difference"] == ["-20.0%", "="]
    assert rows["Loss after difference"] == ["+0.250", "="]
    assert "Difference: of B from A" in text
    html = (tmp_path / "b" / "comparison.html").read_text(encoding="utf-8")
    marks = re.findall(r'<td class="(better|worse)">([^<]*)<', html)
    assert marks == [
        ("better", "-25.0%"),
        ("worse", "+25.0%"),
        ("worse", "-20.0%"),
        ("worse", "+0.250"),
    ]  # less is better


def test_a_row_that_failed_on_one_side_is_marked_changed(tmp_path: Path) -> None:
    write(tmp_path / "a", "baseline", "oom", memory_limit_mib=300)
    write(tmp_path / "b", "baseline")
    write(tmp_path / "a", "mp", "oom")
    write(tmp_path / "b", "mp", "oom")
    write(tmp_path / "a", "ga", "oom")
    write(tmp_path / "b", "ga", "error")
    rows, text = compare(tmp_path)
    assert rows["Peak memory, MiB A"] == ["×", "×", "×"]
    assert rows["Peak memory, MiB B"] == ["100", "×", "error"]
    assert rows["Runtime, s difference"] == ["changed", "=", "changed"]
    assert "ga in B: why ga is error" in text
    assert '<td class="changed">changed</td>' in (tmp_path / "b" / "comparison.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [0.0, None, math.nan, math.inf])
def test_no_share_is_taken_of_what_is_no_number(tmp_path: Path, value: float | None) -> None:
    write_pair(tmp_path, a={"tokens_per_s": value, "train_loss_after": math.nan if value is None else value})
    rows, _ = compare(tmp_path)
    assert rows["Tokens/s difference"] == ["changed"]
    assert rows["Loss after difference"] == ["+6.125" if value == 0 else "changed"]


def test_rows_of_one_folder_only_are_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write(tmp_path / "a", "mp")
    write(tmp_path / "a", "ga_mp")
    write(tmp_path / "b", "ga")
    write(tmp_path / "b", "baseline,lora.rank=8")
    rows, text = compare(tmp_path)
    assert rows["LoRA"] == ["ON"]
    assert "- Only in A: tiny · sample: mp, ga_mp" in text
    assert "- Only in B: tiny · sample: ga" in text
    assert "- Only in B: tiny · sample · lora.rank=8: baseline" in text
    page = (tmp_path / "b" / "comparison.html").read_text(encoding="utf-8")
    assert "Only in A: tiny · sample: mp, ga_mp" in Page(page).text


def test_settings_that_differ_are_listed_once_each(tmp_path: Path) -> None:
    for name in ("baseline", "lora"):
        versions = [{"versions": VERSIONS | {"torch": torch}} for torch in ("2.13.0", "2.14.0")]
        write_pair(
            tmp_path,
            name,
            versions[0] | {"memory_limit_mib": None},
            versions[1] | {"memory_limit_mib": 300, "device": "another"},
        )
        other = CONFIG.replace("rank: 16", "rank: 8").replace("memory_limit_mib: null", "memory_limit_mib: 300")
        for same in ("mode: auto", "project: llama_ft", "~/.cache", "save_every: null"):
            other = other.replace(same, f"{same[: same.rindex(' ')] if ' ' in same else ''} other")
        (tmp_path / "b" / name / "config.yaml").write_text(other)
    _, text = compare(tmp_path)
    listed = [line.removeprefix("- ") for line in text.splitlines() if " in A, " in line]
    assert listed == [
        "device: a processor in A, another in B",
        "lora.rank: 16 in A, 8 in B",
        "measure.memory_limit_mib: null in A, 300 in B",
        "torch: 2.13.0 in A, 2.14.0 in B",
    ]
    page = Page((tmp_path / "b" / "comparison.html").read_text(encoding="utf-8"))
    assert ["Not the same", "A", "B"] in page.rows
    assert ["lora.rank", "16", "8"] in page.rows
    assert settings.SAME_SETTINGS not in text + page.text


def test_another_card_is_one_line_whatever_its_profile_holds(tmp_path: Path) -> None:
    write_pair(tmp_path)
    file = tmp_path / "b" / "lora" / "config.yaml"
    file.write_text(CONFIG.replace("{name: auto, memory_mib: null}", "{name: a100_40gb, memory_mib: 40441}"))
    assert [line for line in compare(tmp_path)[1].splitlines() if " in A, " in line] == [
        "- gpu.name: auto in A, a100_40gb in B"
    ]


def test_without_a_config_the_results_are_compared(tmp_path: Path) -> None:
    write_pair(tmp_path, b={"techniques": {"ga": {"steps": 4}, "lora": {"rank": 16}}, "micro_batch_size": 2})
    (tmp_path / "a" / "lora" / "config.yaml").unlink()
    listed = [line for line in compare(tmp_path)[1].splitlines() if " in A, " in line]
    assert "- ga.steps: 8 in A, 4 in B" in listed
    assert "- training.micro_batch_size: 1 in A, 2 in B" in listed
    assert not [line for line in listed if "training.seed" in line or "lora.rank" in line]


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    write_pair(tmp_path)
    file = tmp_path / "b" / "lora" / "config.yaml"
    file.write_text("a: [")
    done = report(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 2
    assert str(file) in done.stderr
    assert not list((tmp_path / "b").glob("comparison*"))


def test_groups_are_compared_with_their_likes(tmp_path: Path) -> None:
    """Two sweeps of other settings beside each other, as where one went on after a change, in both folders."""
    for side, hashes in (("a", "xy"), ("b", "yx")):
        for folder, settings_hash in zip(("mp", "mp once more"), hashes, strict=True):
            values = {"combination": "mp", "optim": optim("mp"), "settings_hash": settings_hash}
            write(tmp_path / side, folder, peak_memory_mib=100.0 if settings_hash == "x" else 300.0, **values)
    with undrawn():
        done = report(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line for line in lines if line[:1] == ["difference"]] == [["difference", "="]] * 8
    assert "Only in" not in done.stdout


def test_the_same_combination_twice_is_two_columns(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write(tmp_path / "a", "lora copied", combination="lora", optim=optim("lora"))
    rows, text = compare(tmp_path)
    assert rows["LoRA"] == ["ON"]
    assert "- Only in A: tiny · sample: lora (2)" in text


def test_sixteen_combinations_side_by_side_fit_into_80_columns(tmp_path: Path) -> None:
    for name in combinations():
        write_pair(tmp_path, name, {"peak_memory_mib": 103_456.0}, {"peak_memory_mib": 223_456.0})
    with undrawn():
        done = report(tmp_path / "a", tmp_path / "b")
    body = [line for line in done.stdout.splitlines() if line.startswith(("GA", "  A ", "  B ", "  difference "))]
    assert len(body) == 2 * (1 + 3 * 4)
    assert {len(line.split()) for line in body} == {9}
    assert max(map(len, body)) <= 80
    assert "+116.0%" in done.stdout


def test_losses_of_both_are_in_one_picture(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_steps(tmp_path / "a" / "lora", 12)
    write_steps(tmp_path / "b" / "lora", 24)
    compare(tmp_path)
    html = (tmp_path / "b" / "comparison.html").read_text(encoding="utf-8")
    assert Page(html).text.count("LoRA: loss") == 1
    assert [len(points) for points in polylines(html)] == [12, 24]
    assert [line.get("class") for line in Page(html).named("polyline")] == ["a", "b"]
    a, b = polylines(html)
    assert a[-1] == pytest.approx(b[11], abs=0.1)  # on the same axes


def test_a_comparison_escapes_is_the_same_each_time_and_has_a_picture(tmp_path: Path) -> None:
    write_pair(tmp_path, a={"model": EVIL, "device": f"$x$ {EVIL}"}, b={"model": EVIL, "device": "another"})
    seen = []
    for _ in range(2):
        assert report(tmp_path / "a", tmp_path / "b").returncode == 0
        seen.append([(tmp_path / "b" / name).read_bytes() for name in comparison.FILES])
    assert seen[0] == seen[1]
    html = seen[0][1].decode()
    page = Page(html)
    assert "<script" not in html
    assert EVIL in page.text
    assert all(str(image["src"]).startswith("data:") for image in page.named("img"))
    with Image.open(tmp_path / "b" / "comparison.png") as image:
        colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 24)}
    assert {(0x99, 0x99, 0x99), (0x00, 0x72, 0xB2)} <= colours  # A's bars and B's


def test_sweeps_without_a_common_run_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", "baseline")
    write(tmp_path / "b", "baseline", model="llama2_7b")
    write(tmp_path / "b", "lora")
    done = run("llama_ft.report", "a", "b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: a and b have no run of the same model, data and combination\n"
    assert not list((tmp_path / "b").glob("comparison*"))


def test_the_command_compares_two_folders(tmp_path: Path) -> None:
    write_pair(tmp_path, b={"runtime_s": 11.0})
    done = run("llama_ft.report", "a", "b", cwd=tmp_path, env={"COLUMNS": "80"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "+10.0%" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stdout.endswith("Written: comparison.md, comparison.html, comparison.png in b\n")


def test_a_comparison_that_cannot_be_written_is_said_in_a_line(tmp_path: Path) -> None:
    write_pair(tmp_path)
    (tmp_path / "b" / "comparison.png").mkdir()
    done = report(tmp_path / "a", tmp_path / "b")
    assert done.returncode == 2
    assert done.stderr == f"error: the comparison cannot be written into {tmp_path / 'b'}: Is a directory\n"
    assert not list((tmp_path / "b").glob(".*"))
