"""The page `will_it_fit.html`: traces, and the script that replays them for the sizes that its reader chooses."""

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from typing import Any

from llama_ft.config import GpuConfig, ModelConfig
from llama_ft.device import versions
from llama_ft.planning.advice import SPARE
from llama_ft.planning.gpu_traits import N_WORKSPACES, WORKSPACE_BYTES, traits_of, workspace_bytes
from llama_ft.planning.layers import DEPTHS
from llama_ft.planning.operators import LINK, RATES
from llama_ft.planning.symbols import SYMBOLS
from llama_ft.planning.trace import PLACES
from llama_ft.planning.variants import structure_of
from llama_ft.records import CATEGORIES
from llama_ft.reporting.figure import COLORS, RESERVED_COLOR
from llama_ft.reporting.page import render, versions_text

Json = Any
TITLE = "Will it fit? · llama_ft"


class Table:
    """Values that occur often, each stored once."""

    def __init__(self) -> None:
        self.values: list[Json] = []
        self._numbers: dict[str, int] = {}

    def number(self, value: Json) -> int:
        """The value's number."""
        text = json.dumps(value)
        if text not in self._numbers:
            self._numbers[text] = len(self.values)
            self.values.append(value)
        return self._numbers[text]


def page_data(traces: Mapping[str, Json], models: Sequence[ModelConfig], cards: Sequence[GpuConfig]) -> Json:
    """Everything that the page's script reads."""
    formulas, kinds, lists = Table(), Table(), Table()
    short: dict[str, Json] = {}
    for key, each in traces.items():
        short[key] = {
            "kinds": [
                kinds.number([formulas.number(formula), category, dtype]) for formula, category, dtype in each["kinds"]
            ],
            "sections": [[phase, *map(lists.number, parts)] for phase, *parts in each["sections"]],
            "costs": [
                [
                    [dtype, formulas.number(flops), formulas.number(n_bytes), *counts]
                    for dtype, flops, n_bytes, *counts in costs
                ]
                for costs in each["costs"]
            ],
        }
    return {
        "symbols": SYMBOLS,
        "categories": CATEGORIES,
        "depth": DEPTHS[0],
        "spare": SPARE,
        "places": PLACES,
        "link": LINK,
        "rates": RATES,
        "formulas": formulas.values,
        "kinds": kinds.values,
        "lists": lists.values,
        "traces": short,
        "workspace": N_WORKSPACES * WORKSPACE_BYTES,
        "models": {model.name: model_json(model) for model in models},
        "cards": {card.name: card_json(card) for card in cards},
    }


def model_json(model: ModelConfig) -> Json:
    """A model's sizes and structure."""
    keys = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len")
    structure = "".join(str(int(flag)) for flag in structure_of(model))
    return {key: getattr(model, key) for key in keys} | {"structure": structure}


def card_json(card: GpuConfig) -> Json:
    """A card's memory and rates."""
    keys = ("memory_mib", "context_mib", "bandwidth_gb_s", "link_gb_s")
    about = {key: getattr(card, key) for key in keys} | {"tflops": asdict(card.tflops)}
    return about | {"has_bf16": traits_of(card).has_bf16, "workspace": workspace_bytes(card)}


def will_it_fit_page(data: Json, chosen: Mapping[str, str]) -> str:
    """The page; `chosen` are the model and the card that it shows first."""
    packed = gzip.compress(json.dumps(data, separators=(",", ":")).encode(), mtime=0)
    colors = {name.replace("_", " "): color for name, color in COLORS.items()}
    return render(
        "will_it_fit.html.jinja",
        data=base64.b64encode(packed).decode(),
        models=list(data["models"]),
        cards=list(data["cards"]),
        chosen={"model": chosen["model"], "card": chosen["gpu"]},
        title=TITLE,
        made=f"Made on {date.today().isoformat()} by llama_ft: {versions_text(versions())}.",
        colors=colors | {"reserved, not in use": RESERVED_COLOR},
    )
