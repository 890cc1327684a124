"""Studies: small experiments that show what one part does and test the claims made about it.

`python -m experiments.NAME` runs one, `python -m experiments` all of them. A study writes a figure, a table and its
numbers as JSON, and reports which claims hold.
"""

STUDIES = {
    "tokenizer": "The tokenizer's effect on text, the lengths of Alpaca's samples, and the share that is trained on.",
    "decoding": "Greedy and beam search, the tokens that top-k and top-p keep, and perplexity by hand.",
    "gradient_accumulation": "When micro-batches give the gradient of the whole batch, and when they do not.",
    "gradient_checkpointing": "The cost of keeping all, none or some activations, and why every block is best.",
    "mixed_precision": "The effect of 16 bit on gradients and updates, and where it saves memory.",
    "optimizer": "AdamW's state, its peak memory during a step, its decay, and the schedule.",
    "lora": "LoRA's size, savings and costs, and the effect of changing tasks on merged weights.",
    "low_rank": "The SVD, its error when truncated, and two ways to split a product into LoRA's factors.",
    "kv_cache": "The savings and costs of the KV cache in generation.",
}
