"""The registry: a technique that is added in one file and one field is there everywhere."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import CHECKOUT, run

from llama_ft.config import TECHNIQUES, OptimConfig
from llama_ft.config.techniques import COURSE, LABELS, combination_label, combinations, shown_techniques, table_order

CODE = '''"""Noise on the embeddings."""

import torch


def apply(model, config, precision):
    def add_noise(module, inputs, embeddings):
        return embeddings + config.alpha * torch.rand_like(embeddings) if module.training else embeddings

    model.tok_embeddings.register_forward_hook(add_noise)
'''
FIELD = """
    noise: NoiseConfig = technique(NoiseConfig, "NOISE", "noise on the embeddings", "llama_ft.techniques.noise:apply")


TECHNIQUES ="""
SECTION = '''@dataclass
class NoiseConfig:
    """Noise, where `optim.noise` is on."""

    alpha: float = setting(0.1, "how much of it")


@dataclass
class TechniqueConfigs:'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with one more technique: a file, and a field with its numbers. Nothing else is changed."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("llama_ft", "conf"):
        shutil.copytree(CHECKOUT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "llama_ft" / "techniques" / "noise.py").write_text(CODE)
    registry = folder / "llama_ft" / "config" / "techniques.py"
    text = registry.read_text().replace("@dataclass\nclass TechniqueConfigs:", SECTION)
    registry.write_text(re.sub(r"\n+TECHNIQUES =", lambda _: FIELD, text, count=1))
    return folder


def command(checkout: Path, *arguments: str) -> str:
    done = run(*arguments, cwd=checkout, env={"PYTHONPATH": str(checkout)}, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.process
def test_a_new_technique_is_in_help_sweeps_tables_plans_and_comparisons(checkout: Path) -> None:
    shown = command(checkout, "llama_ft.train", "--help")
    assert re.search(r"optim\.noise +false +noise on the embeddings", shown)
    assert re.search(r"noise\.alpha +0\.1 +how much of it", shown)
    small = ("training.micro_batch_size=1", "training.max_samples=3", "gpu=cpu")
    train = ("-m", "optim.noise=false,true", "optim.lora=true", *small, "tracker=disabled", "hydra.sweep.dir=sweep")
    table = command(checkout, "llama_ft.train", *train)
    assert re.search(r"NOISE +OFF +ON", table)
    results = {
        name: json.loads((checkout / "sweep" / name / "result.json").read_text()) for name in ("lora", "lora_noise")
    }
    assert results["lora_noise"]["techniques"]["noise"] == {"alpha": 0.1}
    assert results["lora_noise"]["train_loss_before"] == results["lora"]["train_loss_before"]
    assert results["lora_noise"]["loss_last"] != results["lora"]["loss_last"]
    assert "noise" in (checkout / "sweep" / "table2.csv").read_text().splitlines()[0].split(",")
    plan = command(checkout, "llama_ft.plan", "noise=both", "gpu=a100_40gb", "training.max_samples=3", "output=plan")
    assert re.search(r"NOISE +OFF", plan)
    rows = {row["combination"]: row for row in json.loads((checkout / "plan" / "plan.json").read_text())["rows"]}
    assert len(rows) == 16
    assert rows["lora_noise"]["runtime_s"] > rows["lora"]["runtime_s"]  # a time of its own
    command(checkout, "llama_ft.plan", "optim.noise=true", "optim.lora=true", *small, "output=own")
    assert "NOISE" in command(checkout, "llama_ft.report", "sweep", "own")


def test_combinations_follow_from_the_registry() -> None:
    assert [each.name for each in TECHNIQUES] == ["ga", "mp", "lora", "gc", "neft"]
    assert [each.name for each in COURSE] == ["ga", "mp", "lora"]
    eight, sixteen = list(combinations()), list(combinations(["gc"]))
    assert sixteen[:8] == eight
    assert sorted(sixteen, key=lambda optim: table_order(vars(optim))) == sixteen
    assert len({optim.combination for optim in sixteen}) == 16
    assert [technique.label for technique in shown_techniques([vars(OptimConfig())])] == ["GA", "MP", "LoRA"]
    assert shown_techniques([vars(OptimConfig(gc=True, neft=True))]) == list(TECHNIQUES)
    assert combination_label(vars(OptimConfig(ga=True, gc=True))) == f"{LABELS['ga']}+{LABELS['gc']}"
    assert OptimConfig(mp=True, gc=True).as_typed == "optim=mp optim.gc=true"
    assert (CHECKOUT / "conf" / "optim" / f"{OptimConfig(mp=True).combination}.yaml").is_file()
