"""The course: an answer for every question, and its two tables in its own form."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKOUT, run
from helpers.reports import EIGHT, SIXTEEN, gpu, plan_of, row, tables, write, write_varied
from rich.console import Console

from dev import phases
from llama_ft.config import TrainingConfig, UserError
from llama_ft.records.plan import Table1, Table1Cell, Table1Row
from llama_ft.reporting.course import COMPUTATION, MEMORY, latex
from llama_ft.reporting.reports import COURSE_FILES, report_plan, report_sweep, write_plan
from llama_ft.reporting.table import Table

ANSWERS, INDEX = ((CHECKOUT / "docs" / name).read_text(encoding="utf-8") for name in ("answers.md", "phase1.md"))
# Section 2 has 20 questions, and 6 more in the older list; section 3 has these many in each part.
QUESTIONS = [f"2.{n}" for n in range(1, 27)]
QUESTIONS += [f"3.{part}.{n}" for part, count in ((1, 2), (2, 2), (3, 11), (4, 3)) for n in range(1, count + 1)]


def anchor(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def answers() -> dict[str, tuple[str, str]]:
    """By number: the heading, and the text below it."""
    parts = re.split(r"^#{2,3} (.+)$", ANSWERS.partition("\n[t-texts]:")[0], flags=re.MULTILINE)
    sections = zip(parts[1::2], parts[2::2], strict=True)
    return {heading.split()[0]: (heading, text) for heading, text in sections if re.match(r"\d\.\d", heading)}


def test_every_question_is_in_the_index_and_leads_to_its_answer() -> None:
    rows = re.findall(r"^\| ([\d.]+) \| (.+\?) \| \[(.+)\]\(answers\.md#(.+)\) \|$", INDEX, re.MULTILINE)
    assert [number for number, *_ in rows] == QUESTIONS
    for number, _, title, target in rows:
        heading, _ = answers()[number]
        assert heading == f"{number} {title}"
        assert target == anchor(heading)


@pytest.mark.parametrize("number", QUESTIONS)
def test_every_question_has_an_answer(number: str) -> None:
    _, text = answers()[number]
    assert re.search(r"\*\*[^*]+\?\*\*", text), "a question in bold"
    said = re.sub(r"\*\*[^*]+\?\*\*|!?\[[^\]]*\]\([^)]*\)|`[^`]*`", "", text)
    assert len(said.split()) >= 12, "an answer of some words"


SOURCE = r"arXiv\s\d{4}\.\d{5}|the survey|github\.com|\]\[[\w-]+\]|\(.*\d{4}.*\)|\.py\)"
NO_SOURCE_NEEDED = {"2.16", "2.26", "3.3.1", "3.3.2", "3.3.4", "3.3.6"}  # definitions; 3.3.6 is the study's above


@pytest.mark.parametrize("number", [n for n in QUESTIONS if n not in NO_SOURCE_NEEDED])
def test_an_answer_names_its_source(number: str) -> None:
    assert re.search(SOURCE, answers()[number][1], re.IGNORECASE | re.DOTALL)


def test_defaults_in_the_answers_are_those_of_the_config() -> None:
    warm_up = re.search(r"`training\.warmup_ratio`\s+of the steps,\s+([\d.]+) by default", ANSWERS)
    assert warm_up
    assert float(warm_up[1]) == TrainingConfig().warmup_ratio


def test_checkpointing_is_not_said_to_cost_a_whole_forward_pass() -> None:
    """w2 of each block and the head are not computed again: the plan has 26 and 39 percent."""
    for page in ("docs/gradient_checkpointing.md", "docs/techniques.md", "README.md"):
        text = re.sub(r"\s+", " ", (CHECKOUT / page).read_text(encoding="utf-8"))
        assert not re.search(r"by 33 %|by 50 %|(?<!of )a second forward pass", text), page


# ------------------------------------------------------------------------------------------ its tables


def report(folder: Path) -> dict[str, str]:
    report_sweep(folder, Console(file=io.StringIO()), is_course=True)
    return {name: (folder / name).read_text(encoding="utf-8") for name in COURSE_FILES}


def columns(markdown: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two tables, each its rows by name."""
    first, second = tables(markdown)
    return first, second


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Sixteen combinations, each of whose categories is known."""
    for name in SIXTEEN:
        on = name.split("_")
        maxima = {"parameter": 100.0, "activation": 50.0, "gradient": 100.0, "optimizer_state": 200.0}
        maxima |= {"gradient": 2.0, "optimizer_state": 4.0} if "lora" in on else {}
        maxima |= {"activation": 30.0, "parameter": 130.0} if "mp" in on else {}
        maxima |= {"activation": 10.0} if "gc" in on else {}
        runtime = 100.0 + 30 * ("gc" in on) - 40 * ("lora" in on) - 3 * ("ga" in on) - 20 * ("mp" in on)
        status = "oom" if name == "ga_mp" else "ok"
        values = {} if status == "oom" else {"memory_max_mib": maxima, "runtime_s": runtime, "peak_memory_mib": 450.0}
        write(tmp_path / "sweep", name, status, **values)
    return tmp_path / "sweep"


def test_table_1_has_a_column_for_each_technique(sweep: Path) -> None:
    table1, _ = columns(report(sweep)["course.md"])
    assert table1[""] == ["Grad. accumulation", "Grad. checkpoint", "Mixed precision", "LoRA"]
    assert table1["Memory: parameter"] == ["–", "–", "↑", "–"]
    assert table1["Memory: activation"] == ["–", "↓", "↓", "–"]
    assert table1["Memory: gradient"] == ["–", "–", "–", "↓"]
    assert table1["Memory: optimizer state"] == ["–", "–", "–", "↓"]
    assert table1["Computation"] == ["–", "↑", "↓", "↓"]  # 3 % is within what is called no difference


def test_table_2_has_the_eight_combinations_and_a_cross_for_out_of_memory(sweep: Path) -> None:
    _, table2 = columns(report(sweep)["course.md"])
    assert table2["GA"] == ["OFF"] * 4 + ["ON"] * 4
    assert table2["Peak Mem, MiB"] == ["450"] * 6 + ["×", "450"]
    assert table2["Runtime, s"] == ["100", "60.0", "80.0", "40.0", "97.0", "57.0", "×", "37.0"]


def test_what_was_not_run_is_blank(tmp_path: Path) -> None:
    for name in ("baseline", "lora"):
        write(tmp_path / "sweep", name)
    text = report(tmp_path / "sweep")["course.md"]
    table1, _ = columns(text)
    assert [table1[name][:3] for name in (*MEMORY.values(), COMPUTATION)] == [["", "", ""]] * 5
    assert "no finished run of ga, gc, mp." in text
    assert "- Not run: mp, mp_lora, ga, ga_lora, ga_mp, ga_mp_lora." in text


def test_combinations_with_gc_and_those_not_run_are_named(sweep: Path) -> None:
    text = report(sweep)["course.md"]
    assert "- GC is off." in text
    assert "- Combinations with GC are in table2.md." in text
    assert "Not run" not in text
    for name in ("lora", "lora_gc", "ga_mp_lora"):
        shutil.rmtree(sweep / name)
    assert "- Not run: lora, ga_mp_lora." in report(sweep)["course.md"]


def test_repeats_have_means_with_their_spread_and_show_the_ones_that_failed(tmp_path: Path) -> None:
    seconds = {"baseline": (100.0, 110.0, 120.0), "lora": (100.0, 104.0, 108.0), "mp": (50.0, 51.0, 52.0)}
    for name, each in seconds.items():
        for seed, runtime_s in enumerate(each):
            values = {} if (name, seed) == ("mp", 2) else {"runtime_s": runtime_s}
            config = {"training": {"seed": seed}}
            run_name = f"{name},training.seed={seed}"
            write_varied(tmp_path / "sweep", run_name, config, "ok" if values else "oom", **values)
    text = report(tmp_path / "sweep")["course.md"]
    table1, table2 = columns(text)
    # t is 4.303 for three runs and 12.706 for two: 4.303 * 10 / sqrt(3), 4.303 * 4 / sqrt(3), 12.706 * 0.707 / sqrt(2)
    assert table2["Runtime, s"] == ["110 ± 25", "104 ± 10", "50.5 ± 6.4"]
    assert table2["Runs"] == ["3", "3", "2, 1 ×"]
    assert table1["Computation"] == ["", "", "↓", "–"]  # LoRA's is within the spread
    for said in ("± half the width of their 95 % confidence interval", "×: out of memory", "bytes of tensors"):
        assert said in text


def test_a_file_of_the_user_is_not_overwritten(sweep: Path) -> None:
    report(sweep)
    report(sweep)  # its own files are replaced
    (sweep / "course.md").write_text("my notes on the course\n")
    with pytest.raises(UserError, match=r"holds course\.md, which llama_ft did not write"):
        report(sweep)
    assert (sweep / "course.md").read_text() == "my notes on the course\n"


def test_latex_escapes_what_it_would_interpret() -> None:
    text = latex(Table(r"a_b \ {c} ~^ 5 % #", [("", ["x"])], [("y & z", ["1"])], []))
    assert r"\caption{a\_b \textbackslash{} \{c\} \textasciitilde{}\textasciicircum{} 5 \% \#}" in text
    assert r"y \& z & 1 \\" in text


def test_latex_has_the_same_cells_and_balanced_braces(sweep: Path) -> None:
    text = report(sweep)["course.tex"]
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    assert r"Memory: gradient & -- & -- & -- & $\downarrow$ \\" in text
    assert r"Runtime, s & 100 & 60.0 & 80.0 & 40.0 & 97.0 & 57.0 & $\times$ & 37.0 \\" in text
    assert not re.search(r"(?<!\\)[%_#](?!$)", text, re.MULTILINE)
    for table in text.split(r"\begin{table}")[1:]:
        rows = [line for line in table.splitlines() if line.endswith(r" \\")]
        assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in rows} == {len(re.findall("lr+", table)[0])}


def test_a_plan_gives_the_tables_too(tmp_path: Path) -> None:
    def cells(arrow: str) -> dict[str, Table1Cell]:
        return {name: Table1Cell(arrow, 1.0, 2.0, "MiB") for name in (*MEMORY, "computation")}

    contents = [Table1Row("ga", "GA", "effective batch held", cells("↓")), Table1Row("ga", "GA", "other", cells("↑"))]
    contents += [Table1Row(name, name.upper(), "plain", cells("–")) for name in ("gc", "mp", "lora")]
    card = gpu("a100_40gb")
    plan = plan_of([row(name, card) for name in EIGHT], card, table1=Table1("all off", contents, []))
    write_plan(plan, tmp_path)
    report_plan(tmp_path, Console(file=io.StringIO()), is_course=True)
    table1, table2 = columns((tmp_path / "course.md").read_text(encoding="utf-8"))
    assert table1["Memory: activation"] == ["↓", "–", "–", "–"]  # of GA's rows the first
    assert table2["Peak Mem, MiB"] == ["20,000"] * 8


def test_without_a_baseline_no_note_explains_arrows(tmp_path: Path) -> None:
    write(tmp_path / "sweep", "lora")
    text = report(tmp_path / "sweep")["course.md"]
    assert "↑" not in text
    assert "- Blank: this sweep has no finished run of baseline, ga, gc, mp." in text


def test_a_sweep_over_other_settings_is_refused(tmp_path: Path) -> None:
    for rank in (4, 16):
        write_varied(tmp_path / "sweep", f"lora,lora.rank={rank}", {"lora": {"rank": rank}})
    with pytest.raises(UserError, match="form=course"):
        report(tmp_path / "sweep")


# ------------------------------------------------------------------------------------------ its pages


def test_the_pages_become_html_that_needs_no_other_file() -> None:
    for names in phases.PAGES.values():
        page = phases.render(names)
        assert page.count("data:image/png;base64,") == page.count("<img")
        assert "<table>" in page
        ids = re.findall(r'<h\d id="(.+?)">', page)
        assert set(re.findall(r'href="#(.+?)"', page)) <= set(ids)
    assert 'href="#224-learning-rate-schedules"' in phases.render(phases.PAGES["phase1"])


def test_without_a_browser_or_pandoc_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["phases", str(tmp_path / "pages")])
    assert phases.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all("install a browser" in line for line in lines)
    assert sorted(file.name for file in (tmp_path / "pages").iterdir()) == ["phase1.html", "phase2.html", "phase3.html"]


def test_a_browser_that_hangs_or_prints_nothing_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "SECONDS_TO_PRINT", 0.1)
    assert phases.printed(["sleep", "5"], tmp_path / "page.pdf") == "it has not ended in 0.1 s"
    monkeypatch.setattr(phases, "SECONDS_TO_PRINT", 10)
    assert phases.printed(["sh", "-c", "echo no display >&2; exit 1"], tmp_path / "page.pdf") == "no display"
    assert phases.printed(["true"], tmp_path / "page.pdf") == "no output"


@pytest.mark.process
@pytest.mark.skipif(not phases.printing_command(Path("/a"), Path("/b")), reason="neither a browser nor pandoc is here")
def test_make_phases_prints_pdfs(tmp_path: Path) -> None:
    done = run("dev.phases", str(tmp_path), cwd=CHECKOUT)
    assert (done.returncode, done.stderr) == (0, "")
    assert [(tmp_path / f"phase{n}.pdf").read_bytes()[:5] for n in (1, 2, 3)] == [b"%PDF-"] * 3
