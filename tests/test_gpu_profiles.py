"""The GPU profiles: each is complete and plausible, has its sources beside it, and the manual says the same."""

import re
from dataclasses import asdict, replace
from functools import cache

import pytest
import yaml
from conftest import CHECKOUT
from helpers.planning import small_config

from llama_ft.config import GpuConfig
from llama_ft.config.presets import preset

FOLDER = CHECKOUT / "conf" / "gpu"
# A card's total is less than its name says, and not much less.
TOTAL = {
    "t4_16gb": (14.5, 15),
    "p100_16gb": (15.8, 16),
    "v100_32gb": (31.5, 32),
    "rtx3060_12gb": (11.6, 12),
    "rtx3090_24gb": (23.5, 24),
    "rtx4090_24gb": (23.5, 24),
    "rtx5090_32gb": (31.3, 32),
    "a10g_24gb": (21.9, 22.5),  # ECC takes a sixteenth of GDDR6
    "l4_24gb": (21.9, 22.5),
    "a100_40gb": (39, 40),
    "a100_80gb": (79, 80),
    "h100_80gb": (79, 80),
    "h200_141gb": (139, 141),
    "b200_180gb": (178, 180),
}  # GiB
CAPABILITY = {"t4": "7.5", "p100": "6.0", "v100": "7.0", "rtx3090": "8.6", "rtx4090": "8.9", "a100": "8.0"}
CAPABILITY |= {"h100": "9.0", "h200": "9.0", "b200": "10.0", "rtx5090": "12.0"}
CAPABILITY |= {"rtx3060": "8.6", "a10g": "8.6", "l4": "8.9"}
CARDS = sorted(TOTAL)
FIGURES = {"memory_mib", "context_mib", "compute_capability", "bandwidth_gb_s", "link_gb_s"}
FIGURES |= {"fp32", "tf32", "fp16", "bf16"}


@cache
def profile(card: str) -> GpuConfig:
    """The checked profile, as a command sees it."""
    return preset("gpu", card, GpuConfig)


def manual() -> dict[str, dict[str, str]]:
    """The table of profiles in the manual: cells by heading, by profile."""
    lines = (CHECKOUT / "docs" / "gpus.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    first = next(number for number, row in enumerate(rows) if row[0] == "Profile")
    tables = [dict(zip(rows[first], row, strict=False)) for row in rows[first + 2 :]]
    return {row["Profile"].strip("`"): row for row in tables if row["Profile"].startswith("`")}


def number(cell: str) -> float | None:
    """The number in a cell; None for a dash."""
    return None if cell == "–" else float(cell.replace(",", ""))


def test_these_are_all_the_profiles():
    assert sorted(file.stem for file in FOLDER.glob("*.yaml")) == sorted([*CARDS, "all", "auto", "cpu"])
    assert sorted(manual()) == CARDS


@pytest.mark.parametrize("card", CARDS)
def test_profile_is_complete(card):
    values = yaml.safe_load((FOLDER / f"{card}.yaml").read_text(encoding="utf-8"))
    assert set(values) == {"name", "device", "tflops"} | FIGURES - {"fp32", "tf32", "fp16", "bf16"}
    assert set(values["tflops"]) == {"fp32", "tf32", "fp16", "bf16"}
    assert (values["name"], values["device"]) == (card, "cuda")
    assert asdict(profile(card)) == values | {"device": profile(card).device, "index": None, "shared": False}


@pytest.mark.parametrize("card", CARDS)
def test_memory(card):
    gpu = profile(card)
    low, high = TOTAL[card]
    nominal = int(re.fullmatch(r"\w+_(\d+)gb", card)[1])
    assert low * 1024 <= gpu.memory_mib < high * 1024 <= nominal * 1024
    assert 100 <= gpu.context_mib <= 1024
    assert gpu.usable_mib == gpu.memory_mib - gpu.context_mib < nominal * 1024
    assert replace(small_config(), gpu=gpu).memory_limit_mib == gpu.usable_mib


@pytest.mark.parametrize("card", CARDS)
def test_formats_follow_the_compute_capability(card):
    gpu = profile(card)
    assert gpu.compute_capability == CAPABILITY[card.split("_")[0]]
    is_ampere = gpu.capability >= (8, 0)
    assert (gpu.tflops.bf16 is not None) == (gpu.tflops.tf32 is not None) == is_ampere
    if is_ampere:
        assert gpu.tflops.bf16 == gpu.tflops.fp16
        assert gpu.tflops.tf32 == pytest.approx(gpu.tflops.fp16 / 2, rel=0.01)


@pytest.mark.parametrize("card", CARDS)
def test_rates_are_dense_and_in_order(card):
    rates = profile(card).tflops
    assert 5 < rates.fp32 <= (rates.tf32 or rates.fp32) < rates.fp16
    # The dense rate; the maker's tables double it for sparse matrices. A B200 is two dies.
    dies = 2 if card == "b200_180gb" else 1
    assert rates.fp16 <= dies * 1130
    assert 250 <= profile(card).bandwidth_gb_s <= dies * 5000


def test_later_cards_of_a_kind_are_faster():
    chips = ["p100_16gb", "v100_32gb", "a100_40gb", "a100_80gb", "h100_80gb", "h200_141gb", "b200_180gb"]
    for figure in (lambda gpu: gpu.tflops.fp16, lambda gpu: gpu.bandwidth_gb_s, lambda gpu: gpu.capability):
        assert [figure(profile(card)) for card in chips] == sorted(figure(profile(card)) for card in chips)
    for same in (chips[2:4], chips[4:6]):
        assert profile(same[0]).tflops == profile(same[1]).tflops


@pytest.mark.parametrize("card", CARDS)
def test_every_figure_has_its_source(card):
    lines = (FOLDER / f"{card}.yaml").read_text(encoding="utf-8").splitlines()
    named = {word for line in lines for word in re.findall(r"^# (Datasheet|Whitepaper)[^:]*: https://\S+$", line)}
    seen = set()
    for position, line in enumerate(lines):
        key, _, rest = line.strip().partition(": ")
        if line.startswith("#") or not re.match(r'"?\d', rest):
            continue
        seen.add(key)
        comment = rest.partition("#")[2]
        for above in reversed(lines[:position]):
            if not above.startswith("#") or "#" in rest:
                break
            comment = above + comment
        documents = {word for word in ("Datasheet", "Whitepaper") if word.lower() in comment}
        assert documents or "https://" in comment, f"{key} has no source"
        assert documents <= named, f"{key} names a document without its address"
    assert seen == FIGURES - ({"tf32", "bf16"} if profile(card).capability < (8, 0) else set())


@pytest.mark.parametrize("card", CARDS)
def test_the_manual_agrees(card):
    gpu, row = profile(card), manual()[card]
    shown = [row[heading] for heading in ("Memory", "Context", "Usable", "fp32", "tf32", "16-bit rate", "GB/s")]
    rates = gpu.tflops
    stored = [gpu.memory_mib, gpu.context_mib, gpu.usable_mib, rates.fp32, rates.tf32, rates.fp16, gpu.bandwidth_gb_s]
    assert [number(cell) for cell in shown] == stored
    assert row["Capability"] == gpu.compute_capability
    assert row["16 bit"] == ("fp16" if rates.bf16 is None else "bf16, fp16")
