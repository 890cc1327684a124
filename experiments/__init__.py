"""Studies: small experiments, each of which shows what one part does and tests the claims made about it.

`python -m experiments.NAME` runs one, `python -m experiments` all of them. A study leaves a figure, a table and its
numbers as JSON, and says of each claim whether it holds.
"""

STUDIES = {
    "tokenizer": "What the tokenizer does to text, how long Alpaca's samples are, how much of them is trained on.",
    "decoding": "Greedy and beam search, what top-k and top-p keep, and perplexity by hand.",
    "gradient_accumulation": "When micro-batches give the gradient of the whole batch, and when not.",
    "gradient_checkpointing": "What it takes to keep all, none or some activations, and why every block is best.",
    "mixed_precision": "What 16 bit does to gradients and to updates, and where it saves memory.",
    "optimizer": "AdamW's state, its peak while it steps, its decay, and the schedule.",
    "lora": "What LoRA adds, saves and costs, and what changing tasks on merged weights does to them.",
    "low_rank": "The SVD, what truncating it loses, and two ways to split a product into LoRA's factors.",
    "kv_cache": "What the KV cache saves and costs when text is generated.",
}
