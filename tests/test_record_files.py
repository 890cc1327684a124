"""Files of records of every kind, folders and data sets on the hub, against those who write them."""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import datasets
import pandas
import pytest
from conftest import CHECKOUT, environment
from hydra.errors import HydraException

from llama_ft import cli
from llama_ft.cli.explain import explain
from llama_ft.config import PACKAGE_DIR, DataConfig, ModelConfig, TrainConfig, UserError
from llama_ft.config.checks import OnLong
from llama_ft.config.content import content_hash
from llama_ft.config.evaluate import EvaluateConfig
from llama_ft.data.dataset import NothingLeft, Reader, load_dataset, read_records, records_file
from llama_ft.data.record_files import records_in
from llama_ft.data.records import Sample
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.data.tokenizer import Tokenizer
from llama_ft.evaluation.records import load_records

GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello."}
NASTY = [
    "NA",
    "null",
    "007",
    "1e5",
    "True",
    'a "quoted" one',
    "two\nlines",
    "a,b;c\td",
    " blanks ",
    "日本 é",
    "\u2028",
    None,
]


def values_in(path: object, *rest: Any) -> list[Any]:
    return [value for _, value in records_in(str(path), ("instruction",), *rest)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of the library's own for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny() -> Tokenizer:
    return Tokenizer(PACKAGE_DIR / "model" / "tiny" / "tokenizer.model")


# JSON, line by line


def zstandard(content: bytes) -> bytes:
    packed: bytes = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return packed


PACKERS = {".gz": gzip.compress, ".zst": zstandard}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", [".json", ".jsonl", ".csv"])
def test_packed_files_are_read_as_what_is_in_them(tmp_path, suffix, kind):
    rows = [GOOD | {"output": f"{number}"} for number in range(2000)]
    text = json.dumps(rows) if kind == ".json" else "\n".join(map(json.dumps, rows))
    if kind == ".csv":
        text = pandas.DataFrame(rows).to_csv(index=False)
    plain, packed, twice = (tmp_path / f"{name}{kind}{end}" for name, end in (("a", ""), ("b", suffix), ("c", suffix)))
    plain.write_text(text)
    packed.write_bytes(PACKERS[suffix](text.encode()))
    assert values_in(packed) == values_in(plain)
    assert len(values_in(plain)) == 2000
    half = len(text) // 2
    twice.write_bytes(b"".join(PACKERS[suffix](part.encode()) for part in (text[:half], text[half:])))  # joined
    assert values_in(twice) == values_in(plain)


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("damage", ["cut", "no such format"])
def test_packed_files_that_are_damaged(tmp_path, suffix, damage):
    file = tmp_path / f"records.jsonl{suffix}"
    whole = PACKERS[suffix]("\n".join(json.dumps(GOOD | {"output": str(n)}) for n in range(20_000)).encode())
    file.write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"hello" * 9)
    with pytest.raises(UserError, match=rf"data file .*records\.jsonl\{suffix} cannot be read: \w[^\n]*\Z"):
        values_in(file)


def test_a_long_jsonl_is_never_held(tmp_path):
    file = tmp_path / "records.jsonl"
    line = json.dumps(GOOD | {"output": "word é " * 150}, ensure_ascii=False) + "\n"
    with file.open("w", encoding="utf-8") as stream:
        stream.writelines(line for _ in range(50_000))
    assert file.stat().st_size > 60 * 10**6
    tracemalloc.start()
    try:
        assert sum(1 for _ in records_in(file, ("instruction",))) == 50_000
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_an_array_is_not_held_twice(tmp_path):
    file = tmp_path / "records.json"
    file.write_text(json.dumps(["word " * 200] * 20_000, indent=1))
    size = file.stat().st_size
    tracemalloc.start()
    try:
        assert sum(1 for _ in records_in(file, ("instruction",))) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 2.3 * size  # the text, and what is parsed of it
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("n_after", [0, 1, 5])
@pytest.mark.parametrize(
    "broken", ['{"instruction":', '{"instruction": "x', "{", '{"a": [1,', "instruction", '{"a": tru']
)
def test_a_first_line_that_is_broken_is_a_bad_record(tmp_path, broken, n_after):
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join([broken, *[json.dumps(GOOD)] * n_after, ""]))
    first, *others = records_in(file, ("instruction",))
    assert first[0] == "record 0 (line 1)"
    assert re.match("not valid JSON: .*line 1 column", str(first[1]))
    assert others == [(f"record {number} (line {number + 1})", GOOD) for number in range(1, n_after + 1)]


@pytest.mark.parametrize("n_lines", range(1, 12))
def test_an_object_over_any_number_of_lines_is_one_record(tmp_path, n_lines):
    file = tmp_path / "record.json"
    record = GOOD | {"list": list(range(n_lines))}
    for end in ("", "\n", "\n \n\n"):
        file.write_text("\n\n" + json.dumps(record, indent=1) + end)
        assert list(records_in(file, ("instruction",))) == [("record 0", record)]


# CSV and TSV, as pandas writes and reads them


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t"), (".csv.gz", ",")])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_cells_are_texts_as_they_are(tmp_path, suffix, separator, encoding):
    file = tmp_path / f"records{suffix}"
    table = pandas.DataFrame({"instruction": NASTY[::-1], "output": NASTY, "a number": range(len(NASTY))})
    table.to_csv(file, sep=separator, index=False, encoding=encoding)
    theirs = pandas.read_csv(file, sep=separator, dtype=str, keep_default_na=False, na_values=[""])
    expected = [{key: value for key, value in row.items() if value == value} for row in theirs.to_dict("records")]
    ours = values_in(file)
    assert [{key: value for key, value in row.items() if value is not None} for row in ours] == expected
    assert [row["output"] for row in ours] == NASTY
    assert all(row.keys() == {"instruction", "output", "a number"} for row in ours)


def test_places_in_a_table_are_those_of_an_editor(tmp_path):
    file = tmp_path / "records.csv"
    file.write_text('instruction,output\r\n"a\nb",x\r\n\r\nc,y,z\r\nd\r\n')
    (first, _), (second, ragged), (third, short) = records_in(file, ("instruction",))
    assert (first, second, third) == ("record 0 (line 2)", "record 1 (line 5)", "record 2 (line 6)")
    assert str(ragged) == "it has 3 cells for 2 columns: instruction, output"
    assert str(short).startswith("it has 1 cells for 2")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"instruction,output,output\na,b,c\n", r"records\.csv has two columns output: rename one"),
        (b'instruction,output\na,"b\n', r"records\.csv, line 2: unexpected end of data"),
        (b'instruction,output\na,"b"c\n', r"records\.csv, line 2: .*expected after"),
        (b"instruction,output\na,\xe9\n", r"records\.csv cannot be read: line 2 is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, content, problem):
    file = tmp_path / "records.csv"
    file.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        values_in(file)


def test_a_table_without_rows(tmp_path):
    for content in ("", "instruction,output\n"):
        (tmp_path / "records.csv").write_text(content)
        assert values_in(tmp_path / "records.csv") == []


# Parquet and folders, as pandas and datasets write them

ROWS = [{"instruction": f"Say {text!r}.", "output": text, "turns": [{"role": "user"}]} for text in NASTY]


def test_parquet(tmp_path):
    file = tmp_path / "records.parquet"
    pandas.DataFrame(ROWS).to_parquet(file)
    assert [where for where, _ in records_in(file, ())] == [f"record {index}" for index in range(len(ROWS))]
    assert values_in(file) == ROWS


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    """Folders of the kinds that there are: train has ROWS, test the first of them."""
    train = datasets.Dataset.from_list(ROWS)
    train.save_to_disk(tmp_path / "saved")
    splits = datasets.DatasetDict({"train": train, "test": train.select([0])})
    splits.save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    for name, split in splits.items():
        split.to_parquet(tmp_path / "parquet" / "data" / f"{name}-00000-of-00001.parquet")
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.parquet\n" for name in "ab")
    for name in "ab":
        (tmp_path / "subsets" / name).mkdir(parents=True)
        pandas.DataFrame([GOOD | {"output": name}]).to_parquet(tmp_path / "subsets" / name / "x.parquet")
    (tmp_path / "subsets" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return {folder.name: folder for folder in tmp_path.iterdir()}


def test_folders(folders, capfd):
    for name in ("saved", "saved_splits", "parquet"):
        assert values_in(folders[name]) == ROWS
    for name in ("saved_splits", "parquet"):
        assert values_in(folders[name], None, None, "test") == ROWS[:1]
        with pytest.raises(UserError, match=r"has no split dev: give data\.split, one of train, test"):
            values_in(folders[name], None, None, "dev")
    with pytest.raises(UserError, match=r"data\.split=train: .*saved has only one split; leave data.split out"):
        values_in(folders["saved"], None, None, "train")
    assert values_in(folders["subsets"], None, "b") == [GOOD | {"output": "b"}]
    for given, reason in ((None, r"give data\.subset, one of a, b"), ("c", "it has no subset c; give data")):
        with pytest.raises(UserError, match=rf"subsets cannot be read: {reason}[^\n]*\Z"):
            values_in(folders["subsets"], None, given)
    assert capfd.readouterr() == ("", "")  # no bars, no warnings


def test_what_datasets_cannot_read_is_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.parquet").write_text("hello")
    for name, reason in (("empty", "doesn't contain any data files"), ("bad.parquet", "Parquet file size is 5 bytes")):
        with pytest.raises(UserError, match=rf"{name} cannot be read: .*{reason}[^\n]*\Z"):
            values_in(tmp_path / name)
    file = tmp_path / "good.parquet"
    pandas.DataFrame(ROWS).to_parquet(file)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "bad.parquet" / "cache"))
    with pytest.raises(UserError, match=r"its cache, .*cache: Not a directory; HF_HOME=DIR names another folder"):
        values_in(file)
    assert capfd.readouterr() == ("", "")


def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch):
    for package, name in (("datasets", "x.parquet"), ("pyarrow", "x.jsonl.zst")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"{name} needs the package {package}: pip install 'llama_ft\[data\]'"):
            values_in(tmp_path / name)


@pytest.mark.parametrize("key", ["subset", "split"])
def test_a_file_has_neither_subsets_nor_splits(tmp_path, tiny, key):
    config = DataConfig("mine", str(tmp_path / "records.json"), **{key: "train"})
    with pytest.raises(UserError, match=rf"data\.{key}=train: .* is a single file without {key}s; leave"):
        load_dataset(config, tiny, 1024, None)


def test_the_hash_of_a_folder_is_that_of_all_its_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data" / "train.parquet").write_text("one")
    first, second = (str(tmp_path / name) for name in "ab")
    assert content_hash(first, data=True) == content_hash(second, data=True)
    (tmp_path / "b" / "data" / "train.parquet").write_text("two")
    assert content_hash(first, data=True) != content_hash(second, data=True)


# Other names for columns


def checked(*overrides: str) -> TrainConfig:
    return cli.composed_config("train", list(overrides), TrainConfig)


THEIRS = [
    {"question": "What?", "context": "Here.", "answer": "That.", "output": "no"},
    {"question": "Who?", "answer": "I."},
]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_columns_have_other_names(tmp_path, tiny, kind):
    file, table = tmp_path / f"records.{kind}", pandas.DataFrame(THEIRS)
    if kind == "parquet":
        table.to_parquet(file)
    elif kind == "csv":
        table.to_csv(file, index=False)
    else:
        file.write_text(json.dumps(THEIRS) if kind == "json" else "\n".join(map(json.dumps, THEIRS)))
    columns = {"instruction": "question", "input": "context", "output": "answer"}
    found = [(row["instruction"], row.get("input"), row["output"]) for row in values_in(file, columns)]
    assert found == [("What?", "Here.", "That."), ("Who?", None, "I.")]
    typed = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
    data = checked(f"data.path={file}", f"data.columns={{{typed}}}").data
    assert len(load_dataset(data, tiny, 1024, None).samples) == 2
    data = checked(f"data.path={file}", f"data.columns={{{typed}}}", "data.columns.task=kind").data
    found = "question, context, answer, output"
    with pytest.raises(UserError, match=rf"data\.columns has task: kind, but .* has no kind; it has {found}\Z"):
        load_dataset(data, tiny, 1024, None)


def test_one_object_of_other_names(tmp_path):
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"question": "What?", "output": "That."}, indent=1))
    assert values_in(file, {"instruction": "question"}) == [{"instruction": "What?", "output": "That."}]


def test_columns_of_ours_that_do_not_exist():
    for argument, problem in (
        (
            "data.columns={wrong: x}",
            "data.columns={wrong: x} is not allowed: it must be set by its keys, data.columns.",
        ),
        (
            "data.columns.wrong=x",
            "data.columns.wrong is not a key: data.columns has instruction, input, output, ",
        ),
    ):
        with pytest.raises(HydraException) as raised:
            checked(argument)
        assert explain(raised.value).startswith(problem)


# Samples that are too long


@pytest.mark.parametrize("policy", OnLong)
def test_long_samples_are_cut_dropped_or_refused(tmp_path, tiny, policy):
    file = tmp_path / "records.jsonl"
    rows = [GOOD, GOOD | {"output": "word " * 300}, GOOD | {"instruction": "word " * 300}, GOOD]
    file.write_text("\n".join(map(json.dumps, rows)))
    whole = [ALPACA_TEMPLATE.sample(record, tiny) for record in read_records(file, DataConfig("mine").on_bad_record)[0]]
    config = DataConfig("mine", str(file), on_long=policy)
    evaluate = EvaluateConfig(model=preset_tiny(), data=config)
    evaluate.data.max_length = 200
    reads = [
        lambda: load_dataset(config, tiny, 200, None),
        lambda: load_records(evaluate, tiny, ALPACA_TEMPLATE, print).about,
    ]
    if policy is OnLong.error:
        limit = f"{len(whole[1])} tokens are more than the 200 of data.max_length or the model's context"
        advice = "data.on_long=truncate cuts such samples, drop drops them"
        message = re.escape(f"records.jsonl, record 1 (line 2): {limit}. {advice}")
        for read in reads:
            with pytest.raises(UserError, match=message):
                read()
        return
    dataset, evaluated = reads[0](), reads[1]()
    expected = (3, 1, 1) if policy is OnLong.truncate else (2, 0, 2)
    assert (len(dataset.samples), dataset.n_truncated, dataset.n_dropped) == expected
    assert (evaluated.records, evaluated.truncated, evaluated.dropped) == expected
    assert dataset.describe().endswith("; 1 truncated; 1 dropped" if policy is OnLong.truncate else "; 2 dropped")
    with pytest.raises(NothingLeft, match="max_length=9 leaves no "):
        load_dataset(config, tiny, 9, None)


def test_a_short_sample_with_nothing_to_train_on_is_left_out(tmp_path):
    reader = Reader(tmp_path, DataConfig("mine", on_long=OnLong.error))
    assert reader.fitted("record 0", Sample([1, 2, 3], ()), 9) is None
    assert reader.n_dropped == 1


def preset_tiny() -> ModelConfig:
    return checked().model


# The hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as `datasets` speaks, for one data set, org/name."""

    COMMIT = "c" * 40
    files: dict[str, bytes]

    def log_message(self, *arguments: object) -> None:
        pass

    def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content)), "X-Repo-Commit": self.COMMIT} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if match := re.fullmatch(r"/datasets/org/name/resolve/(?:main|c+)/(.*)", path):
            if match[1] not in self.files:
                return self.answer(b"", 404, X_Error_Code="EntryNotFound")
            content = self.files[match[1]]
            return self.answer(content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')
        if match := re.fullmatch(r"/api/datasets/org/name/tree/[^/]+/?(.*)", path):
            return self.answer(json.dumps(self.entries(match[1])).encode(), 200 if self.entries(match[1]) else 404)
        if re.fullmatch(r"/api/datasets/org/name(/revision/(main|c+))?", path):
            about = {"id": "org/name", "sha": self.COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
            return self.answer(json.dumps(about).encode())
        if "/org/gated" in path:
            return self.answer(b"", 401, X_Error_Code="GatedRepo")
        return self.answer(b"", 404, X_Error_Code="RevisionNotFound" if "org/name" in path else "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
        folders = {path: self.entries(path) for path in asked if path not in self.files}
        found = [{"type": "directory", "path": path, "oid": "d"} for path, entries in folders.items() if entries]
        self.answer(json.dumps(found + [self.entry(path) for path in asked if path in self.files]).encode())

    def entry(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def entries(self, folder: str) -> list[dict[str, Any]]:
        start = f"{folder}/" if folder else ""
        below = [path for path in self.files if path.startswith(start)]
        folders = {start + path.removeprefix(start).split("/")[0] for path in below if "/" in path.removeprefix(start)}
        directories = [{"type": "directory", "path": path, "oid": "d"} for path in sorted(folders)]
        return directories + [self.entry(path) for path in below if "/" not in path.removeprefix(start)]


@pytest.fixture
def hub(folders) -> Iterator[str]:
    root = folders["parquet"]
    Hub.files = {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*.parquet")}
    Hub.files["README.md"] = b"# A data set\n"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_download_is_announced():
    lines: list[str] = []
    assert str(records_file(DataConfig("any", "hub:org/name@main"), lines.append)) == "hub:org/name@main"
    assert lines == ["data: downloading hub:org/name@main, unless datasets has it in its cache"]


READ = """
import json, sys
from llama_ft.config import UserError
from llama_ft.data.record_files import records_in
from llama_ft.data.records import Sample
from llama_ft.data.template import ALPACA_TEMPLATE
for name, split in json.loads(sys.argv[1]):
    try:
        found = [row["output"] for _, row in records_in(name, ("instruction",), split=split)]
    except UserError as error:
        found = str(error)
    print(json.dumps(found))
"""


@pytest.mark.process
def test_data_sets_on_the_hub(hub, tmp_path):
    asked = [
        ("hub:org/name", None),
        ("hub:org/name@main", "test"),
        ("hub:org/name", "dev"),
        ("hub:org/absent", None),
        ("hub:org/gated", None),
        ("hub:org/name@absent", None),
        ("hub:wrong name", None),
    ]
    (tmp_path / "cwd" / "org" / "name").mkdir(parents=True)  # a folder of the same name is not meant
    done = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(asked)],
        cwd=tmp_path / "cwd",
        env=environment({"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(CHECKOUT)}),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""
    train, test, *problems = map(json.loads, done.stdout.splitlines())
    assert (train, test) == (NASTY, NASTY[:1])
    reasons = ("no split dev: give data.split, one of ", "doesn't exist", "gated", "absent", "name")
    for (name, _), problem, reason in zip(asked[2:], problems, reasons, strict=True):
        assert problem.startswith(name)
        assert reason in problem
        assert "\n" not in problem
