"""The settings of `python -m llama_ft.plan`."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_ft.config.checks import Combinations, Goal, Settings, UserError, check, flat, setting
from llama_ft.config.groups import GpuConfig
from llama_ft.config.source import found_tokenizer
from llama_ft.config.techniques import COURSE, TECHNIQUES
from llama_ft.config.train import TrainConfig

STAND_IN_LENGTH, STAND_IN_SAMPLES = 512, 200
# Keys of training in which a plan's rows can differ, besides recipes and techniques: those that change memory or time.
OF_ROWS = "epochs max_grad_norm micro_batch_size momentum optimizer optimizer_in_backward packing".split()


@dataclass
class PlanConfig(TrainConfig):
    """All settings of `plan`, which include those of `train`: a run's arguments can be planned unchanged."""

    combinations: Combinations = setting(Combinations.all, "all of GA, MP, LoRA and techniques in both; one: optim's")
    both: list[str] = setting([], "other techniques to plan off and on, such as [gc]; gc=both is the same")
    goal: Goal | None = setting(None, "advice: the fastest that fits, or the smallest card on which anything fits")
    calibrate: str | None = setting(None, "folder of measured runs on this device, from which its real speed is taken")
    output: str | None = setting(None, "folder of the results; null is a new one in outputs/plans")
    page: str | None = setting(None, "write a page here that plans whatever its reader chooses; no other plan is made")

    def __post_init__(self) -> None:
        if not self.plan.enforce:
            raise UserError("plan.enforce=false is for train, and plan starts no run: leave it out")
        others = [each.name for each in TECHNIQUES if not each.in_course]
        check(set(self.both) <= set(others), "both", self.both, f"a list of {', '.join(others)}, such as [{others[0]}]")
        if self.measure.memory_limit_mib is not None:
            raise UserError("measure.memory_limit_mib is for train: to limit a plan give gpu.memory_mib=N")
        if self.gpu.name == "all" and self.gpu != GpuConfig(name="all"):
            raise UserError("gpu=all uses each card's profile unchanged: name one card to change its values")
        if self.goal is Goal.cheapest_gpu and self.gpu.name not in ("auto", "all"):
            raise UserError(f"goal=cheapest_gpu compares all cards, and gpu={self.gpu.name} names one: leave one out")
        if self.checkpoint is None:
            self.checkpoint = "builtin" if self.model.is_builtin else "random"  # weights are not read
        self.tokenizer = self.tokenizer or found_tokenizer(self.model, self.checkpoint)
        self.data.check_for(self.model, needs_records=self.has_lengths)
        if self.both and self.combinations is Combinations.one:
            typed = f"both=[{','.join(self.both)}]"
            raise UserError(f"{typed} compares combinations, and combinations=one plans one: leave one of them out")
        if self.goal is not None and self.combinations is Combinations.one:
            raise UserError("goal compares combinations, and combinations=one plans one: leave out optim and recipe")
        if self.combinations is Combinations.one:  # else the plan reports it per row
            self.check_optimizer()

    @property
    def used_techniques(self) -> set[str]:
        """The techniques whose settings have an effect: those on in at least one combination."""
        varied = {*(each.name for each in COURSE), *self.both} if self.combinations is Combinations.all else set()
        return super().used_techniques | varied

    @property
    def has_lengths(self) -> bool:
        """True if a tokenizer gives the samples' lengths; else `max_length` stands in for them."""
        return self.tokenizer is not None or self.model.is_builtin

    @property
    def max_length(self) -> int:
        """Longest sample in tokens."""
        if self.data.max_length is None and not self.has_lengths:
            return min(STAND_IN_LENGTH, self.model.max_seq_len)
        return super().max_length


def row_settings(runs: Sequence[TrainConfig]) -> list[Settings]:
    """The settings in which runs differ besides the switches; a UserError if a plan's rows may not differ in them."""
    known, sections = [flat(run.to_dict()) for run in runs], [each.name for each in TECHNIQUES]
    keys = [key for key in known[0] if any(settings.get(key) != known[0][key] for settings in known)]
    for key in keys:
        section, _, name = key.partition(".")
        is_known = section in ("recipe", "optim", *sections) or key in ("parallel.strategy", "parallel.processes")
        if not is_known and not (section == "training" and name in OF_ROWS):
            raise UserError(
                f"{section if section in ('model', 'gpu') else key} has several values, and a plan is for one: its rows"
                f" can differ in recipe, optim, parallel, {', '.join(sections)} and training.{', '.join(OF_ROWS)};"
                " gpu=all plans for all cards"
            )
    return [{key: settings[key] for key in keys if not key.startswith("optim.")} for settings in known]
