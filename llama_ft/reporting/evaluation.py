"""The table of an evaluation: a column for each model, and for exact match one for the majority answer."""

from collections.abc import Sequence

from llama_ft.records.evaluation import EvaluatedModel, EvaluatedText, Evaluation, Share
from llama_ft.reporting.table import Table

LABELS = {"model": "Model", "base": "Base", "fine_tuned": "Fine-tuned"}
MAX_NAME_LENGTH = 16  # characters of a model's name in the heading; the notes have it whole


def evaluation_table(result: Evaluation) -> Table:
    """The table of an evaluation."""
    models, majority = result.models, result.majority
    heading = [*(["Majority"] if majority else []), *map(_heading, models)]
    empty = [""] * len(heading)

    def row(name: str, values: list[float]) -> tuple[str, list[str]]:
        # At least four figures, with thousands separators.
        figures = [f"{value:,.0f}" if value >= 1000 else f"{value:#.4g}" for value in values]
        return name, ["–", *figures] if majority else figures

    rows = [("Perplexity", empty), row("  responses", [model.responses.perplexity for model in models])]
    if texts := [model.text for model in models if model.text is not None]:
        rows.append(row("  text", [text.perplexity for text in texts]))
        rows.append(row("  text, bits per byte", [text.bits_per_byte for text in texts]))
    if majority is not None:
        columns = [majority, *(model.exact_match for model in models if model.exact_match is not None)]
        rows += [("Exact match", empty), _accuracy("all", columns)]
        rows += [_accuracy(task, [column.tasks[task] for column in columns]) for task in majority.tasks]
    which = "held-out records of" if result.data.is_held_out else "records of"
    title = f"{result.model}, {result.data.records} {which} {result.data.name}"
    return Table(title, [("", heading)], rows, _notes(result))


def _heading(model: EvaluatedModel) -> str:
    label, source = LABELS[model.role], model.checkpoint.rstrip("/").rpartition("/")[2]
    if model.role == "fine_tuned" or len(source) > MAX_NAME_LENGTH:
        return label
    return source if model.role == "model" else f"{label}: {source}"


def _accuracy(name: str, columns: Sequence[Share]) -> tuple[str, list[str]]:
    label = " ".join(name.split())
    return f"  {label} ({columns[0].records})", [f"{column.accuracy:.1%}" for column in columns]


def _notes(result: Evaluation) -> list[str]:
    data, models = result.data, result.models
    notes = []
    for model in models:
        adapter = f" with adapter={model.adapter}" if model.adapter else ""
        notes.append(f"{LABELS[model.role]}: checkpoint={model.checkpoint}{adapter}.")
    notes.append(f"Computed in {result.dtype} on {result.device}.")
    counts = {
        "bad": data.skipped,
        "without room for an answer": data.dropped,
        "with an answer cut short": data.truncated,
    }
    notes += [f"Records of {data.file} {meaning}: {count}." for meaning, count in counts.items() if count]
    n_tokens = models[0].responses.tokens
    what = {"all": "all of them", "last": "the last answers, their ends included"}
    counted = what.get(result.settings["data"].get("train_on", ""), "EOS included, prompts not")
    notes.append(f"Responses: exp of the mean loss over their {n_tokens:,} tokens, {counted}.")
    if result.template is not None:
        notes.append(f"Template: {result.template}; {result.ends}.")
    if result.text is not None:
        notes += _about_text(result.text)
    if result.majority is not None:
        notes.append(f"Exact match: greedy, at most {result.max_new_tokens} tokens, ignoring white space around it.")
        cut = [(LABELS[m.role].lower(), m.exact_match.ended_by_length) for m in models if m.exact_match is not None]
        if any(count for _, count in cut):
            counts_text = ", ".join(f"{label} {count}" for label, count in cut)
            notes.append(f"Answers that had not ended by then: {counts_text}.")
        notes.append(f"Majority: the most frequent answer of each task in the {result.majority.of}.")
    return notes


def _about_text(text: EvaluatedText) -> list[str]:
    window, stride = text.window, text.stride
    if text.tokens < window:
        how = "in one window"
    elif stride == window:
        how = f"in adjacent windows of {window:,}; the first token of all but the first does not count"
    else:
        how = f"in windows of {window:,}, a new one every {stride:,}; each token counts once, with at least"
        how += f" {window - stride:,} before it once the first window is full"
    return [
        f"Text: {text.file}, {text.tokens:,} tokens after BOS, {how}.",
        "Perplexities are comparable only with the same tokenizer; bits per byte always are.",
    ]
