"""Compare the page `docs/will_it_fit.html`, in a browser, with the planner: `python -m benchmarks.will_it_fit FOLDER`.

Fifty choices are drawn: models, cards, techniques, lengths, micro-batches, numbers of cards. Then LitGPT's published
runs (`benchmarks/plan_published.py`) are chosen as its reader would, and compared with what LitGPT measured.
"""

import base64
import gzip
import json
import random
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from benchmarks.plan_published import GB, LITGPT, Published
from llama_ft import cli
from llama_ft.config import PlanConfig
from llama_ft.files import write_text
from llama_ft.plan import overrides
from llama_ft.planning.predict import predict
from llama_ft.records.plan import PlanRow

PAGE = Path(__file__).parents[1] / "docs" / "will_it_fit.html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
N_CHOICES = 50
Choices = dict[str, Any]  # by control of the page
ASK = """(() => {
  const chosen = choices(), found = plan(chosen, cardOf(chosen));
  return { needed: found.needed, peak: found.peak, fits: found.fits, speed: found.tokensPerSecond,
    reserved: found.memory.reserved };
})()"""
TIMED = """[1, 2, 3].map(() => { const start = performance.now(); answer(); return performance.now() - start; })"""


@contextmanager
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Playwright; None if there is none on this machine."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        program = None
    if program is None:
        yield None
        return
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


def fragment(chosen: Choices) -> str:
    """The link's end that makes the page show these choices."""
    return "#" + urlencode(
        {key: str(value).lower() if value in (True, False) else value for key, value in chosen.items()}
    )


def page_data() -> dict[str, Any]:
    """The data in the page."""
    found = re.search(r'id="data">([^<]+)<', PAGE.read_text(encoding="utf-8"))
    assert found
    return dict(json.loads(gzip.decompress(base64.b64decode(found[1]))))


def drawn(draw: random.Random, data: dict[str, Any]) -> Choices:
    """Choices that `train` accepts."""
    card = draw.choice(list(data["cards"]))
    has_bf16 = data["cards"][card]["has_bf16"]
    model = draw.choice([name for name in data["models"] if data["models"][name]["n_layers"] <= 40])
    cards, mp = draw.choice([1, 1, 1, 2, 4, 8]), draw.random() < 0.7
    length = int(2 ** draw.uniform(7, min(14, data["models"][model]["max_seq_len"].bit_length() - 1)))
    return {
        "model": model,
        "card": card,
        "cards": cards,
        "ga": draw.random() < 0.5,
        "mp": mp,
        "lora": draw.random() < 0.6,
        "gc": draw.random() < 0.5,
        "frozen": draw.choice(["compute", "fp32", "nf4", "nf4_single"]),
        "trainable": draw.choice(["fp32", "compute"]) if has_bf16 else "fp32",
        "optimizer": draw.choice(["adamw", "adamw_8bit"]) if cards == 1 else "adamw",
        "rank": draw.choice([4, 16, 64, 100]),
        "steps": draw.choice([2, 8]),
        "length": length,
        "micro_batch": draw.choice([1, 1, 2, 3, 4, 8, 32]),
        "packing": draw.choice(["", "", length * 3]) if mp and has_bf16 else "",
    }


def typed(chosen: Choices) -> list[str]:
    """The plan's arguments for the page's choices."""
    on = [name for name in ("ga", "mp", "lora") if chosen[name]]
    words = [f"model={chosen['model']}", f"gpu={chosen['card']}", f"optim={'_'.join(on) or 'baseline'}"]
    words += [f"optim.gc={str(chosen['gc']).lower()}", "checkpoint=random"]
    words += [f"data.max_length={chosen['length']}", f"training.micro_batch_size={chosen['micro_batch']}"]
    if chosen["mp"]:
        words.append(f"mp.trainable_weights={chosen['trainable']}")
    if chosen["mp"] and chosen["lora"]:
        words.append(f"mp.frozen_weights={chosen['frozen'].removesuffix('_single')}")
        words += ["mp.double_quantization=false"] if chosen["frozen"] == "nf4_single" else []
    words.append(f"lora.rank={chosen['rank']}" if chosen["lora"] else f"training.optimizer={chosen['optimizer']}")
    words += [f"ga.steps={chosen['steps']}"] if chosen["ga"] else []
    words += [f"training.packing={chosen['packing']}"] if chosen["packing"] else []
    return words + (["parallel=fsdp", f"parallel.processes={chosen['cards']}"] if chosen["cards"] > 1 else [])


def planned(chosen: Choices) -> PlanRow:
    """The plan's row for the page's choices, for as many samples as an update has."""
    config = cli.composed_config("plan", overrides(typed(chosen)), PlanConfig)
    n_samples = config.training.micro_batch_size * config.accumulation_steps
    return predict([config], [config.gpu], [(chosen["length"], 1)] * n_samples)[0]


def shown(opened: Any, chosen: Choices) -> dict[str, Any]:
    """What the page finds for these choices."""
    page = opened.new_page()
    page.goto(PAGE.resolve().as_uri() + fragment(chosen))
    page.wait_for_function("document.querySelector('#detail').textContent")
    found = dict(page.evaluate(ASK))
    page.close()
    return found


def choices_of(run: Published) -> Choices:
    """A published run, as chosen on the page."""
    words = dict(word.split("=") for word in run.arguments.split())
    frozen = words.get("mp.frozen_weights", "compute") + ("_single" if "mp.double_quantization" in words else "")
    return {
        "model": words["model"],
        "card": "a100_40gb",
        "program": "other",
        "frozen": frozen,
        "trainable": words.get("mp.trainable_weights", "fp32"),
        "rank": words["lora.rank"],
        "length": words["data.max_length"],
        "micro_batch": words.get("training.micro_batch_size", "1"),
    }


def compared(opened: Any) -> list[dict[str, Any]]:
    """The drawn choices, on the page and planned."""
    data, draw, rows = page_data(), random.Random(0), []
    while len(rows) < N_CHOICES:
        chosen = drawn(draw, data)
        row, found = planned(chosen), shown(opened, chosen)
        error = found["needed"] / (row.required_mib or 0.0) - 1
        rows.append(
            {"chosen": typed(chosen), "plan_mib": row.required_mib, "page_mib": found["needed"], "error": error}
        )
        rows[-1] |= {"plan_fits": row.fits, "page_fits": found["fits"]}
        rows[-1] |= {"plan_tokens_per_s": row.tokens_per_s, "page_tokens_per_s": found["speed"]}
        print(
            f"{len(rows)} of {N_CHOICES}: {error:+.3%} {row.fits == found['fits']} {' '.join(typed(chosen))}",
            flush=True,
        )
    return rows


def table(runs: list[dict[str, Any]]) -> str:
    """LitGPT's runs, in Markdown."""
    lines = [
        "| LitGPT on an A100 of 40 GB | reserved, GB | on the page, GB | error | fits |",
        "|---|---:|---:|---:|---|",
    ]
    for run in runs:
        gb = "out of memory" if run["measured_gb"] is None else f"{run['measured_gb']:.2f}"
        error = "" if run["measured_gb"] is None else f"{run['page_gb'] / run['measured_gb'] - 1:+.1%}"
        lines.append(f"| {run['name']} | {gb} | {run['page_gb']:.2f} | {error} | {'yes' if run['fits'] else '×'} |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Write and print both comparisons."""
    folder = Path(sys.argv[1])
    with browser() as opened:
        if opened is None:
            print("this needs a browser such as chromium, and Playwright: pip install 'llama_ft[web]'", file=sys.stderr)
            return 1
        runs = []
        for run in LITGPT:
            found = shown(opened, choices_of(run))
            runs.append(
                {"name": run.name, "measured_gb": run.gb, "page_gb": found["reserved"] / GB, "fits": found["fits"]}
            )
        print(table(runs))
        rows = compared(opened)
    errors = [abs(row["error"]) for row in rows]
    alike = sum(row["plan_fits"] == row["page_fits"] for row in rows)
    print(f"{len(rows)} choices: at most {max(errors):.2%} from the plan, {alike} verdicts equal")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "will_it_fit.json", json.dumps({"choices": rows, "litgpt": runs}, indent=1) + "\n")
    write_text(folder / "litgpt.md", table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
