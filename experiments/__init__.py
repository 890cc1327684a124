"""Studies: small experiments, each of which shows what one part does and tests the claims made about it.

`python -m experiments.NAME` runs one, `python -m experiments` all of them. A study leaves a figure, a table and its
numbers as JSON, and says of each claim whether it holds.
"""

STUDIES = {"kv_cache": "What the KV cache saves and costs when text is generated."}
