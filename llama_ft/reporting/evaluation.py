"""The table of an evaluation: a column for each model, and for exact match one for the majority answer."""

from dataclasses import replace
from typing import Any

from llama_ft.reporting.table import Table, markdown

LABELS = {"model": "Model", "base": "Base", "fine_tuned": "Fine-tuned"}
MAX_NAME_LENGTH = 16  # characters of a model's name in the heading; the notes have it whole


def evaluation_table(result: dict[str, Any]) -> Table:
    """The table of what `evaluate.json` holds."""
    models = result["models"]
    majority = result["majority"]
    heading = [*(["Majority"] if majority else []), *map(_heading, models)]
    empty = [""] * len(heading)
    rows = [("Perplexity", empty)]

    def add(name: str, part: str, key: str) -> None:
        cells = [_figures(model[part][key]) for model in models]
        rows.append((name, [*(["–"] if majority else []), *cells]))

    add("  responses", "responses", "perplexity")
    if result["text"]:
        add("  text", "text", "perplexity")
        add("  text, bits per byte", "text", "bits_per_byte")
    if majority:
        columns = [majority, *(model["exact_match"] for model in models)]
        rows += [("Exact match", empty), _accuracy("all", columns)]
        for task in majority["tasks"]:
            rows.append(_accuracy(task, [column["tasks"][task] for column in columns]))
    return Table(_title(result), [("", heading)], rows, _notes(result))


def evaluation_markdown(table: Table) -> str:
    """For `evaluate.md`."""
    return markdown(replace(table, rows=[(name.replace("|", r"\|"), cells) for name, cells in table.rows]))


def _heading(model: dict[str, Any]) -> str:
    label, source = LABELS[model["role"]], model["checkpoint"].rstrip("/").rpartition("/")[2]
    if model["role"] == "fine_tuned" or len(source) > MAX_NAME_LENGTH:
        return label
    return source if model["role"] == "model" else f"{label}: {source}"


def _figures(value: float) -> str:
    """Four figures at least, thousands marked."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}"


def _accuracy(name: str, columns: list[dict[str, Any]]) -> tuple[str, list[str]]:
    label = " ".join(name.split())
    return f"  {label} ({columns[0]['records']})", [f"{column['accuracy']:.1%}" for column in columns]


def _title(result: dict[str, Any]) -> str:
    data = result["data"]
    which = "held-out records of" if data["is_held_out"] else "records of"
    return f"{result['model']}, {data['records']} {which} {data['name']}"


def _notes(result: dict[str, Any]) -> list[str]:
    data, text, models = result["data"], result["text"], result["models"]
    notes = [*(_what(model) for model in models), f"Computed in {result['dtype']} on {result['device']}."]
    counts = ("skipped", "bad"), ("dropped", "without room for an answer"), ("truncated", "with an answer cut short")
    notes += [f"Records of {data['file']} {meaning}: {data[key]}." for key, meaning in counts if data[key]]
    n_tokens = models[0]["responses"]["tokens"]
    notes.append(f"Responses: exp of the mean loss over their {n_tokens:,} tokens, EOS included, prompts not.")
    if text:
        notes += _about_text(text)
    if result["majority"]:
        notes.append(f"Exact match: greedy, at most {result['max_new_tokens']} tokens, white space around it aside.")
        cut = [f"{LABELS[model['role']].lower()} {model['exact_match']['ended_by_length']}" for model in models]
        if any(model["exact_match"]["ended_by_length"] for model in models):
            notes.append(f"Answers that had not ended by then: {', '.join(cut)}.")
        notes.append(f"Majority: the most frequent answer of each task in the {result['majority']['of']}.")
    return notes


def _about_text(text: dict[str, Any]) -> list[str]:
    window, stride, n_tokens = text["window"], text["stride"], text["tokens"]
    if n_tokens < window:
        how = "in one window"
    elif stride == window:
        how = f"in windows of {window:,} side by side; of all but the first the first token does not count"
    else:
        how = f"in windows of {window:,}, a new one every {stride:,}; each counts once, with {window - stride:,} tokens"
        how += " or more before it once the first window is full"
    return [
        f"Text: {text['file']}, {n_tokens:,} tokens after BOS, {how}.",
        "Perplexities compare where the tokenizer is the same; bits per byte compare always.",
    ]


def _what(model: dict[str, Any]) -> str:
    adapter = f" with adapter={model['adapter']}" if model["adapter"] else ""
    return f"{LABELS[model['role']]}: checkpoint={model['checkpoint']}{adapter}."
