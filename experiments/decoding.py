"""`python -m experiments.decoding`: greedy and beam search on the textbook's tree, top-k and top-p, perplexity by hand.

The tree is that of https://huggingface.co/blog/how-to-generate, in a model that looks its words up. The other numbers
are those of the built-in model on held-out records.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from experiments.figure import BLUE, GRAY, ORANGE, drawn
from experiments.shared import load_tiny, prompt_source, sample_records, tiny_tokenizer
from experiments.study import Claim, Log, Numbers, Options, Study, main, table
from llama_ft.config import DecodingConfig, ModelConfig
from llama_ft.data.template import ALPACA_TEMPLATE
from llama_ft.decoding.beam import beam_search
from llama_ft.decoding.sampling import choose, keep_top_k, keep_top_p
from llama_ft.decoding.state import GenerationState
from llama_ft.evaluation.perplexity import perplexity
from llama_ft.model.transformer import Transformer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WORDS = ["<eos>", *"The nice dog car woman house guy has runs and is drives turns".split()]
TREE = {
    "The": {"nice": 0.5, "dog": 0.4, "car": 0.1},
    "The nice": {"woman": 0.4, "house": 0.3, "guy": 0.3},
    "The dog": {"has": 0.9, "runs": 0.05, "and": 0.05},
    "The car": {"is": 0.3, "drives": 0.5, "turns": 0.2},
}
TOP_K, TOP_P = 40, 0.9
BY_HAND = 1e-5  # relative
MIN_SHOWN = 1e-6  # probability in the figure


def measure(options: Options, log: Log) -> Numbers:
    """Walk the tree, measure the sets, compute perplexities."""
    log("the tree, the sets, perplexities")
    return {"tree": tree(), "sets": sets(64), "perplexity": perplexities(60)}


class Tree(Transformer):
    """A model that looks up its next word."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.config = ModelConfig("tree", vocab_size=len(WORDS))
        self.output = nn.Linear(1, 1)

    def forward(self, tokens: Tensor, **_: Any) -> Tensor:
        """The logits of each row's next word."""
        logits = torch.full((len(tokens), len(WORDS)), -math.inf)
        for row, ids in enumerate(tokens.tolist()):
            text = " ".join(WORDS[number] for number in ids)
            for word, probability in TREE.get(text, {"<eos>": 1.0}).items():
                logits[row, WORDS.index(word)] = math.log(probability)
        return logits


def tree_state(rows: int) -> GenerationState:
    """The sequence "The" in equal rows, to continue with the tree's words."""
    return GenerationState(Tree(), [[WORDS.index("The")]] * rows, 2, False)


def tree() -> Numbers:
    """The results of greedy decoding and of two beams, two words deep, with their probabilities."""
    state, probability = tree_state(1), 1.0
    for _ in range(2):
        logits = state.next_logits()
        chosen = choose(logits, DecodingConfig())
        probability *= logits.softmax(-1)[0, chosen].item()
        state.append(chosen)
    greedy = " ".join(WORDS[number] for number in state.tokens[0].tolist())
    best, *_ = beam_search(tree_state(2), 2, 2, [WORDS.index("<eos>")], length_penalty=0.0)
    beam = " ".join(["The", *(WORDS[number] for number in best.tokens)])
    return {"greedy": greedy, "greedy_p": probability, "beam": beam, "beam_p": math.exp(best.score)}


def sets(n_positions: int) -> dict[str, list[Any]]:
    """The tokens kept by top-k and top-p, and their probability, at positions of the held-out records."""
    with torch.inference_mode():
        text = torch.tensor([prompt_source()[:512]])
        logits = load_tiny()(text, logits_at=torch.linspace(5, 510, n_positions).long())
    probabilities = logits.double().softmax(-1)
    numbers: dict[str, list[Any]] = {}
    for name, kept in (("top_k", keep_top_k(logits, TOP_K)), ("top_p", keep_top_p(logits, TOP_P))):
        inside = [row[finite] for row, finite in zip(probabilities, kept.isfinite(), strict=True)]
        numbers[f"{name}_tokens"] = [len(row) for row in inside]
        numbers[f"{name}_mass"] = [row.sum().item() for row in inside]
        numbers[f"{name}_least"] = [row.min().item() for row in inside]
    order = sorted(range(n_positions), key=numbers["top_p_tokens"].__getitem__)
    for name, position in (("sure", order[0]), ("unsure", order[-1])):
        numbers[name] = probabilities[position].sort(descending=True).values.tolist()
    return numbers


def perplexities(n_records: int) -> dict[str, float]:
    """Perplexity of held-out responses: from `evaluate`, by hand in fp64 Python, and of a model that knows nothing."""
    model, tokenizer = load_tiny(), tiny_tokenizer()
    samples = [ALPACA_TEMPLATE.sample(record, tokenizer) for record in sample_records("heldout", n_records)]
    nats: list[float] = []
    with torch.inference_mode():
        for sample in samples:
            rows = model(torch.tensor([sample.tokens]))[0].tolist()
            for position in range(sample.n_prompt, len(sample)):
                row = rows[position - 1]  # the previous token predicts it
                nats.append(math.log(sum(math.exp(logit) for logit in row)) - row[sample.tokens[position]])
    by_hand = math.exp(math.fsum(nats) / len(nats))
    evaluated = perplexity(model, samples, batch_size=8).perplexity
    with torch.no_grad():
        model.output.weight.zero_()
    uniform = perplexity(model, samples, batch_size=8).perplexity
    return {
        "by_hand": by_hand,
        "evaluated": evaluated,
        "uniform": uniform,
        "vocabulary": model.config.vocab_size,
        "tokens": len(nats),
    }


def claims_of(numbers: Numbers) -> list[Claim]:
    """The claims, checked against the numbers."""
    return [
        *_tree_claims(numbers["tree"]),
        *_set_claims(numbers["sets"]),
        *_perplexity_claims(numbers["perplexity"]),
    ]


def _tree_claims(walk: Numbers) -> list[Claim]:
    return [
        Claim(
            'greedy decoding takes "The nice woman", 0.5 * 0.4',
            walk["greedy"] == "The nice woman" and math.isclose(walk["greedy_p"], 0.2, rel_tol=1e-6),
            {"probability": walk["greedy_p"]},
        ),
        Claim(
            'two beams find "The dog has", 0.4 * 0.9, which is more probable',
            walk["beam"] == "The dog has" and math.isclose(walk["beam_p"], 0.36, rel_tol=1e-6),
            {"probability": walk["beam_p"]},
        ),
    ]


def _set_claims(kept: Numbers) -> list[Claim]:
    sizes, masses = kept["top_p_tokens"], kept["top_p_mass"]
    without_least = [mass - least for mass, least in zip(masses, kept["top_p_least"], strict=True)]
    return [
        Claim(
            f"top-k keeps {TOP_K} tokens whatever they are worth: their share of the probability differs by 50"
            " percentage points or more",
            set(kept["top_k_tokens"]) == {TOP_K} and max(kept["top_k_mass"]) - min(kept["top_k_mass"]) >= 0.5,
            {"share at least": min(kept["top_k_mass"]), "share at most": max(kept["top_k_mass"])},
        ),
        Claim(
            f"top-p keeps the smallest set whose probability reaches {TOP_P}: without its least token it has less",
            min(masses) >= TOP_P - 1e-6 and max(without_least) < TOP_P,
            {"with it at least": min(masses), "without it at most": max(without_least)},
        ),
        Claim(
            "so top-p keeps few tokens where the model is sure, and 10 times as many where it is not",
            max(sizes) >= 10 * min(sizes),
            {"tokens at least": min(sizes), "tokens at most": max(sizes)},
        ),
    ]


def _perplexity_claims(measured: Numbers) -> list[Claim]:
    apart = abs(measured["evaluated"] / measured["by_hand"] - 1)
    return [
        Claim(
            "perplexity by hand, exp of the mean of -log p of each token, is what evaluate finds",
            apart <= BY_HAND,
            {"by hand": measured["by_hand"], "evaluate": measured["evaluated"], "relative difference": apart},
        ),
        Claim(
            "a model that knows nothing has the vocabulary's size as its perplexity",
            math.isclose(measured["uniform"], measured["vocabulary"], rel_tol=BY_HAND),
            {"perplexity": measured["uniform"], "vocabulary": measured["vocabulary"]},
        ),
    ]


def table_of(numbers: Numbers) -> str:
    """The texts found and the numbers of tokens kept."""
    walk, kept = numbers["tree"], numbers["sets"]
    sizes = [
        [f"{name}, tokens", f"{min(kept[key])} to {max(kept[key])}", ""]
        for name, key in (("top-k", "top_k_tokens"), ("top-p", "top_p_tokens"))
    ]
    paths = [["greedy", walk["greedy"], walk["greedy_p"]], ["two beams", walk["beam"], walk["beam_p"]]]
    return table(("", "found", "probability"), [*paths, *sizes])


def draw(numbers: Numbers, file: Path) -> None:
    """Draw the tree with both paths, and top-k and top-p on the most and the least certain distribution."""
    with drawn(file, ("greedy and two beams", "probability of the n-th best token")) as (left, right):
        _draw_tree(left, numbers["tree"])
        kept = numbers["sets"]
        ends = (("sure", BLUE, min(kept["top_p_tokens"])), ("unsure", ORANGE, max(kept["top_p_tokens"])))
        for name, color, size in ends:
            values, label = kept[name], f"{name}: top-p keeps {size}"
            right.plot(range(1, 1 + len(values)), values, color=color, lw=3, label=label)
            right.vlines(size, MIN_SHOWN, 1, color=color, ls="--", lw=2)
        right.vlines(TOP_K, MIN_SHOWN, 1, color=GRAY, ls=":", lw=3, label=f"top-k keeps {TOP_K}")
        right.set(xscale="log", yscale="log", xlabel="n", ylim=(MIN_SHOWN, 300), yticks=[1, 1e-2, 1e-4, 1e-6])
        right.legend(frameon=False, loc="upper left")


def _draw_tree(axes: "Axes", walk: Numbers) -> None:
    """Draw words from left to right, with the paths found in color."""
    axes.axis("off")
    axes.set(xlim=(-0.25, 2.6), ylim=(-0.6, 8.6))
    paths = {walk["greedy"]: BLUE, walk["beam"]: ORANGE}
    axes.text(0, 4, "The", ha="center", va="center", weight="bold")
    for branch, (first, share) in enumerate(TREE["The"].items()):
        height = 7 - 3 * branch
        _draw_edge(axes, (0, 4), (1, height), first, share, [c for path, c in paths.items() if first in path])
        for leaf, (second, chance) in enumerate(TREE[f"The {first}"].items()):
            colors = [color for path, color in paths.items() if path == f"The {first} {second}"]
            _draw_edge(axes, (1, height), (2, height + 1 - leaf), second, chance, colors)
    for height, (name, p) in enumerate((("two beams", walk["beam_p"]), ("greedy", walk["greedy_p"]))):
        axes.text(-0.2, 0.7 * height - 0.4, f"{name}: {p:.2f}", color=(ORANGE, BLUE)[height], weight="bold")


def _draw_edge(
    axes: "Axes", begin: tuple[float, float], end: tuple[float, float], word: str, share: float, colors: list[str]
) -> None:
    color = colors[0] if colors else GRAY
    start = begin[0] + (0.5 if begin[0] else 0.15)  # the end of the previous word
    axes.plot((start, end[0] - 0.05), (begin[1], end[1]), color=color, lw=4 if colors else 1.5)
    axes.text(end[0], end[1], f"{word} {share:g}", va="center", color=color, weight="bold" if colors else "normal")


STUDY = Study("decoding", Options, measure, claims_of, table_of, draw)

if __name__ == "__main__":
    main(STUDY)
