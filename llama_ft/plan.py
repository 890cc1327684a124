"""`python -m llama_ft.plan`: plan the memory and time of each combination of techniques on a card, without it."""

import os
import sys
from functools import partial

from rich.console import Console

from llama_ft import cli
from llama_ft.bitsandbytes import is_installed, needs_package
from llama_ft.config import (
    TECHNIQUES,
    DeviceChoice,
    Goal,
    GpuConfig,
    ModelConfig,
    PlanConfig,
    UserError,
    config_dir,
    path_of,
)
from llama_ft.config.checks import check
from llama_ft.config.plan import row_settings
from llama_ft.config.presets import preset
from llama_ft.files import explained, output_folder, write_text
from llama_ft.reporting.progress import progress_bar
from llama_ft.reporting.reports import PLAN_FILES, print_plan, write_plan

USAGE = cli.Usage(
    "plan",
    "Plan the memory that each combination of techniques needs on a card, whether it fits, and its shortest possible"
    " time, by running the real training step on tensors without data: no GPU, no weights.",
    "[-m] [GROUP=CHOICE ...] [KEY=VALUE ...]",
    PlanConfig,
    (
        "model=llama2_7b gpu=a100_40gb data=alpaca_200",
        "model=llama2_7b gpu=all data.max_length=1024 training=course",
        "model=llama2_13b gpu=rtx4090_24gb gc=both goal=fit training=course",
        "model=llama2_7b tokenizer=FILE data.path=records.jsonl gpu=h100_80gb optim=ga_mp_lora",
        "experiment=less_memory model=llama2_7b gpu=rtx4090_24gb",
        "-m model=llama2_7b gpu=a100_40gb optim=mp_lora,lora lora.rank=8,64 training.micro_batch_size=1,4",
        "page=will_it_fit.html",
    ),
    ("-m, --multirun", "--help", "--version"),
)
NOT_ON_PAGE = ("tiny", "llama2_7b_1layer", "from_checkpoint")
FIRST = {"model": "llama2_7b", "gpu": "rtx4090_24gb"}  # on the page, unless named


def overrides(arguments: list[str]) -> list[str]:
    """The arguments for Hydra: `NAME=both` goes into `both`, and naming a technique leaves one combination."""
    short = {f"{each.name}=both": each.name for each in TECHNIQUES if not each.in_course}
    both = [argument for argument in arguments if argument in short]
    if cli.is_sweep(arguments):
        goals = [argument for argument in arguments if argument.startswith("goal=") and argument != "goal=null"]
        for argument in [*both, *goals]:
            raise UserError(f"{argument} compares combinations, and a sweep lists its runs: leave one of them out")
        return [*arguments, "combinations=one"]
    names_optim = any(argument.startswith(("optim=", "optim.", "recipe=")) for argument in arguments)
    if names_optim and both:
        raise UserError(f"{both[0]} plans combinations with and without it, and optim names one: leave one of them out")
    others = [argument for argument in arguments if argument not in short]
    if both:
        others.append(f"both=[{','.join(short[argument] for argument in both)}]")
    return [*others, "combinations=one"] if names_optim else others


def planned_runs(arguments: list[str]) -> list[PlanConfig]:
    """The runs of a sweep, each once; without a sweep the one config, from which the plan makes combinations."""
    arguments = overrides(arguments)
    if not cli.is_sweep(arguments):
        return [cli.composed_config("plan", arguments, PlanConfig)]
    runs = cli.composed_runs("plan", arguments, PlanConfig)
    row_settings(runs)  # raises if they cannot be rows of one plan
    return [run for number, run in enumerate(runs) if run not in runs[:number]]


def main() -> int:
    """Run the command."""
    if any(argument.startswith("page=") for argument in sys.argv[1:]):
        return make_page(sys.argv[1:])
    runs = planned_runs(sys.argv[1:])
    config = runs[0]
    console, errors = Console(), Console(stderr=True)
    log = partial(errors.print, highlight=False, markup=False, soft_wrap=True, style="dim")
    gpus = known_gpus() if config.goal is Goal.cheapest_gpu else planned_gpus(config.gpu)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # planning needs no GPU: `planning/worker.py` says why it must see none
    from llama_ft.planning.lengths import data_lengths

    lengths, data, held_out = data_lengths(config, log)
    log(f"data: {data.about}")
    with output_folder(config.output, "plans", config.model.name, PLAN_FILES) as folder:
        from llama_ft.planning.plan import make_plan

        progress = partial(progress_bar, errors)
        plan = make_plan(runs, gpus, lengths, data, cli.command_line(), progress, known_gpus(), held_out)
        write_plan(plan, folder)
    print_plan(plan, console)
    console.print(f"\nWritten: {', '.join(PLAN_FILES)} in {folder}", highlight=False, markup=False, soft_wrap=True)
    return 0


def make_page(arguments: list[str]) -> int:
    """Write the page on which every choice can be planned; `model` and `gpu` are what it shows first."""
    typed = [argument for argument in arguments if not argument.startswith(("page=", "model=", "gpu="))]
    if typed:
        raise UserError(f"page=FILE plans whatever its reader chooses, so {typed[0]} has no effect: leave it out")
    config = cli.composed_config("plan", arguments, PlanConfig)
    if config.page is None:
        raise UserError("page=FILE names the file to write")
    if not is_installed():
        raise UserError(needs_package("page"))
    models = [preset("model", file.stem, ModelConfig) for file in sorted((config_dir() / "model").glob("*.yaml"))]
    models = [model for model in models if model.name not in NOT_ON_PAGE]
    chosen = dict(FIRST)
    for key, name, known in (("model", config.model.name, models), ("gpu", config.gpu.name, known_gpus())):
        if any(argument.startswith(f"{key}=") for argument in arguments):
            names = [each.name for each in known]
            check(name in names, key, name, f"on the page, which has {', '.join(names)}")
            chosen[key] = name
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from llama_ft.planning.variants import OTHERS, all_traced, structure_of
    from llama_ft.reporting.will_it_fit import TITLE, page_data, will_it_fit_page

    file, errors = path_of(config.page), Console(stderr=True)
    if file.exists() and not (file.is_file() and TITLE in file.read_text(encoding="utf-8", errors="replace")):
        raise UserError(f"page={file} is there, and is no page that llama_ft wrote: name another file")
    kept = file.with_name(f"{file.name}.traces")
    with explained(f"page={file} cannot be written"):
        try:
            traces = all_traced({*OTHERS, *map(structure_of, models)}, kept, partial(progress_bar, errors))
        except KeyboardInterrupt:
            errors.print(f"\nKept in {kept}: the same command continues from there", highlight=False, soft_wrap=True)
            raise
        write_text(file, will_it_fit_page(page_data(traces, models, known_gpus()), chosen))
        kept.unlink()
    Console().print(f"Written: {file}", highlight=False, markup=False, soft_wrap=True)
    return 0


def planned_gpus(gpu: GpuConfig) -> list[GpuConfig]:
    """The profiles to plan for: all cards', or the given one; `auto` is this machine's GPU, else the CPU."""
    if gpu.name == "all":
        return known_gpus()
    if gpu.device is DeviceChoice.auto:
        from llama_ft.planning.gpu_traits import profile_here

        return [profile_here(gpu)]
    return [gpu]


def known_gpus() -> list[GpuConfig]:
    """The profiles of all cards, smallest first."""
    profiles = [preset("gpu", file.stem, GpuConfig) for file in sorted((config_dir() / "gpu").glob("*.yaml"))]
    cards = (profile for profile in profiles if profile.device is DeviceChoice.cuda)
    return sorted(cards, key=lambda card: card.memory_mib or 0)


if __name__ == "__main__":
    cli.run_command(main, USAGE)
