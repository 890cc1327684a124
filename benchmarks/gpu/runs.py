"""Parts that start whole commands: tests, tables, plan against measurement, running out of memory, resuming."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from statistics import fmean

import torch

from benchmarks.gpu.check import CHECKOUT, Numbers, Outcome, Setting
from experiments.study import Claim
from llama_ft.config import ModelConfig
from llama_ft.config.presets import preset
from llama_ft.measure.card import Nvml
from llama_ft.records.metrics import read_metrics, steps_of
from llama_ft.records.result import Result
from llama_ft.system import MIB

FREE_MIB = (600, 300, 100)
KEPT = ("status", "error", "peak_memory_mib", "peak_memory_reserved_mib", "runtime_s", "tokens_per_s")
PLANNED = ("peak_memory_mib", "reserved_mib", "fits", "runtime_s")
COMPARED = {"peak_memory_mib": ("peak_memory_mib", 0.05), "peak_memory_reserved_mib": ("reserved_mib", 0.1)}


def tests(setting: Setting) -> Outcome:
    """Run tests/test_gpu.py."""
    # Tests that fill the card or are timed run last, one at a time; the others share the card.
    alone = "full_card or than or limit or no_context"
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-q", "-rA", "-p", "no:cacheprovider"]
    log, last, passed = "", [], True
    for chosen, workers in ((f"not ({alone})", "6"), (alone, "0")):
        done = subprocess.run([*command, "-n", workers, "-k", chosen], cwd=CHECKOUT, capture_output=True, text=True)
        log, passed = log + done.stdout + done.stderr, passed and done.returncode == 0
        last.append((done.stdout.strip() or done.stderr.strip() or "-").splitlines()[-1].strip("= "))
        (setting.output / "pytest.log").write_text(log, encoding="utf-8")
    return {"results": last}, [Claim(f"the GPU's tests pass: {'; '.join(last)}", passed, {})]


def table2(setting: Setting) -> Outcome:
    """The course's Table 2 on the built-in model."""
    n = ["training.max_samples=4"] if setting.dry else []
    optims = "optim=lora" if setting.dry else "optim=glob(*)"
    results = setting.train("-m", optims, "training.micro_batch_size=1", *n, folder="table2")
    fp32 = [r.train_loss_before for r in results.values() if r.compute_dtype == "float32" and r.train_loss_before]
    retries = sum(r.card.n_alloc_retries or 0 for r in results.values() if r.card)
    spread = max(fp32) / min(fp32) - 1 if fp32 else 1.0
    speeds = {}  # to see if the first steps, with cold kernels and low clocks, are slower
    for name in (name for name, result in results.items() if result.status == "ok"):
        steps = [step.tokens_per_s for step in steps_of(read_metrics(setting.output / "table2" / name))]
        speeds[name] = {"first 20": fmean(steps[:20]), "last 20": fmean(steps[-20:])}
    return {"rows": {name: _kept(r) for name, r in results.items()}, "tokens/s of steps": speeds}, [
        Claim("all rows end well", all(r.status == "ok" for r in results.values()), {"rows": len(results)}),
        Claim("the fp32 rows begin with one loss, to 0.1 %", spread <= 1e-3, {"apart by, percent": 100 * spread}),
        Claim("the allocator never had to retry", retries == 0, {"retries": retries}),
    ]


def plan(setting: Setting) -> Outcome:
    """Compare plan and measurement of the model that the card can hold."""
    shared = _of_the_model(setting)
    optims = "lora" if setting.dry else "mp_lora,ga_mp_lora,lora,baseline"
    results = setting.train("-m", *shared, f"optim={optims}", folder="sweep")
    if not setting.dry:
        results |= setting.train("-m", *shared, "optim=mp_lora", "optim.gc=true", folder="sweep")
    rows = {row["combination"]: row for row in _planned(setting, *shared, "gc=both")}
    claims = [
        claim for name, result in results.items() for claim in _as_planned(name, result, rows[result.combination])
    ]
    if not setting.dry:
        # Between the two limits the result depends on what the allocator can free in time.
        for share, key, status in ((1.02, "reserved_mib", "ok"), (0.98, "peak_memory_mib", "oom")):
            limit = f"measure.memory_limit_mib={share * rows['mp_lora'][key]:.0f}"
            (result,) = setting.train(*shared, "optim=mp_lora", limit, "plan.enforce=false", folder=status).values()
            claims.append(Claim(f"mp_lora in {share:.0%} of its planned {key}: {status}", result.status == status, {}))
    planned = {name: {key: row[key] for key in PLANNED} for name, row in rows.items()}
    return {"measured": {name: _kept(result) for name, result in results.items()}, "planned": planned}, claims


def less_memory(setting: Setting) -> Outcome:
    """Compare plan and measurement of the ladder: 4-bit weights, 8-bit moments, updates in backward, offloading."""
    ladder = ["experiment=less_memory", *_of_the_model(setting), "training.max_samples=16"]
    if setting.dry:
        ladder.append("recipe=full_8bit_in_backward,qlora_8bit_gc_offload")
    results = setting.train("-m", *ladder, folder="ladder")
    rows = {row["settings"]["recipe"]: row for row in _planned(setting, *ladder)}
    named = {name: next(rung for rung in rows if name.endswith(f"recipe={rung}")) for name in results}
    claims = [claim for name, result in results.items() for claim in _as_planned(name, result, rows[named[name]])]
    planned = {name: {key: row[key] for key in PLANNED} for name, row in rows.items()}
    return {"measured": {name: _kept(result) for name, result in results.items()}, "planned": planned}, claims


def _of_the_model(setting: Setting) -> list[str]:
    """Arguments for a few samples and the model that the card can hold, with random weights."""
    tokenizer = setting.tokenizer or preset("model", "tiny", ModelConfig).builtin_dir / "tokenizer.model"
    arguments = [f"model={setting.model}", "checkpoint=random", f"tokenizer={tokenizer}"]
    arguments += [f"data.path={setting.data}"] if setting.data else []
    return [*arguments, "training.micro_batch_size=1", "data.first=4" if setting.dry else "data.first=64"]


def _planned(setting: Setting, *arguments: str) -> list[Numbers]:
    """The rows of a plan for this machine's device."""
    folder = setting.output / "plan"
    setting.command("plan", *arguments, "gpu=cpu" if setting.dry else "gpu=auto", f"output={folder}")
    rows: list[Numbers] = json.loads((folder / "plan.json").read_text())["rows"]
    return rows


def _as_planned(name: str, result: Result, row: Numbers) -> Iterator[Claim]:
    if result.status != "ok":
        yield Claim(f"{name} is out of memory, as planned", result.status == "oom" and row["fits"] is False, {})
    for key, (of_plan, limit) in COMPARED.items():
        measured, predicted = getattr(result, key), row[of_plan]
        if result.status == "ok" and measured and predicted:
            error = predicted / measured - 1
            numbers = {"percent off": 100 * error, "MiB": measured}
            yield Claim(f"{name}: {of_plan} is planned to {limit:.0%}", abs(error) <= limit, numbers)


def out_of_memory(setting: Setting) -> Outcome:
    """Check that running out of memory is recognized, wherever it happens."""
    arguments, results = ["optim=mp_lora", "plan.enforce=false", "training.max_samples=8"], {}
    if setting.dry:
        limited = setting.train("optim=lora", *arguments[1:], "measure.memory_limit_mib=300", folder="limit")
        results["limit of 300 MiB"] = limited["limit"]
    else:
        device = setting.device
        held: list[torch.Tensor] = []
        for free_mib in FREE_MIB:
            if (excess := torch.cuda.mem_get_info(device)[0] - free_mib * MIB) > 0:
                held.append(torch.empty(excess, dtype=torch.uint8, device=device))
            results[f"{free_mib} MiB free"] = setting.train(*arguments, folder=f"free_{free_mib}")[f"free_{free_mib}"]
    return {name: _kept(result) for name, result in results.items()}, [
        Claim(f"{name}: {result.status}: {result.error or 'it fitted'}", result.status in ("ok", "oom"), {})
        for name, result in results.items()
    ]


def on_cpu(setting: Setting) -> Outcome:
    """Check that a run on the CPU does not use the GPU."""
    nvml, used, ended = Nvml(torch.device("cpu") if setting.dry else setting.device), [], threading.Event()

    def poll() -> None:
        while not ended.is_set():
            used.append(nvml.used_mib())
            time.sleep(0.1)

    poller = threading.Thread(target=poll)
    poller.start()
    try:
        (result,) = setting.train("gpu=cpu", "training.max_samples=4", folder="cpu").values()
    finally:
        ended.set()
        poller.join()
    known = [mib for mib in used if mib is not None]
    more_mib = max(known) - known[0] if known else 0.0
    claims = [Claim("it ends well, on the CPU", result.status == "ok" and result.card is None, {})]
    if known:
        claims.append(Claim("the GPU's memory in use does not grow", more_mib <= 20, {"MiB": more_mib}))
    return {"used_mib": known[:1] + known[-1:]}, claims


def resume(setting: Setting) -> Outcome:
    """Check that a saved and resumed run has the losses of an uninterrupted one."""
    optim = "optim=lora" if setting.dry else "optim=mp_lora"
    arguments = [optim, "training.max_samples=8", "training.micro_batch_size=1"]
    setting.train(*arguments, folder="whole")
    setting.train(*arguments, "training.save_every=3", folder="saved")
    (setting.output / "saved" / "result.json").unlink()  # as if it had been killed after its sixth step
    shutil.rmtree(setting.output / "saved" / "checkpoints" / "step_00000008")
    resumed = setting.train(*arguments, "training.resume=true", folder="saved")["saved"]
    whole, saved = (
        [step.loss for step in steps_of(read_metrics(setting.output / name))] for name in ("whole", "saved")
    )
    apart = max(abs(a / b - 1) for a, b in zip(whole, saved, strict=True))
    return {"whole": whole, "resumed": saved}, [
        Claim("it goes on after step 6", resumed.resumed_at_step == 6, {"step": resumed.resumed_at_step or 0}),
        Claim("losses are those of the undisturbed run, to 0.1 %", apart <= 1e-3, {"apart by": apart}),
    ]


def _kept(result: Result) -> Numbers:
    """The parts of a result to report."""
    return {key: getattr(result, key) for key in KEPT} | {"card": vars(result.card) if result.card else None}
