"""What `python -m llama_ft.plan` can be told."""

from collections.abc import Sequence
from dataclasses import dataclass

from llama_ft.config.checks import Combinations, Goal, Settings, UserError, check, flat, setting
from llama_ft.config.groups import GpuConfig
from llama_ft.config.source import found_tokenizer
from llama_ft.config.techniques import COURSE, TECHNIQUES
from llama_ft.config.train import TrainConfig

STAND_IN_LENGTH, STAND_IN_SAMPLES = 512, 200
# In what the rows of a plan can differ, beside recipes and techniques: keys of training that change memory or time.
OF_ROWS = "epochs max_grad_norm micro_batch_size momentum optimizer optimizer_in_backward packing".split()


@dataclass
class PlanConfig(TrainConfig):
    """Everything `python -m llama_ft.plan` can be told: what `train` can, so that its arguments fit here too."""

    combinations: Combinations = setting(Combinations.all, "all of GA, MP, LoRA and techniques in both; one is optim's")
    both: list[str] = setting([], "other techniques to plan both off and on, as [gc]; gc=both says the same")
    goal: Goal | None = setting(None, "advice too: the fastest that fits, or the smallest card on which anything fits")
    calibrate: str | None = setting(None, "folder of measured runs on this device, which say how fast it really is")
    output: str | None = setting(None, "folder of the results; null is a new one in outputs/plans")

    def __post_init__(self) -> None:
        if not self.plan.enforce:
            raise UserError("plan.enforce=false is for train: plan starts no run that it could stop; leave it out")
        allowed = [each.name for each in TECHNIQUES if not each.in_course]
        check(set(self.both) <= set(allowed), "both", self.both, f"of {', '.join(allowed)}, such as [{allowed[0]}]")
        if self.measure.memory_limit_mib is not None:
            raise UserError("measure.memory_limit_mib is for train: gpu.memory_mib=N is another limit for a plan")
        if self.gpu.name == "all" and self.gpu != GpuConfig(name="all"):
            raise UserError("gpu=all plans for each card as its profile has it: name one card to change its figures")
        if self.goal is Goal.cheapest_gpu and self.gpu.name not in ("auto", "all"):
            raise UserError(f"goal=cheapest_gpu looks at all cards, and gpu={self.gpu.name} names one: leave one out")
        if self.checkpoint is None:
            self.checkpoint = "builtin" if self.model.is_builtin else "random"  # no weight is read
        self.tokenizer = self.tokenizer or found_tokenizer(self.model, self.checkpoint)
        self.data.check_for(self.model, needs_records=self.has_lengths)
        if self.both and self.combinations is Combinations.one:
            typed = f"both=[{','.join(self.both)}]"
            raise UserError(f"{typed} compares combinations, and combinations=one leaves one: leave out one of them")
        if self.goal is not None and self.combinations is Combinations.one:
            raise UserError("goal compares combinations, and combinations=one leaves one: leave out optim and recipe")
        if self.combinations is Combinations.one:  # else it is said of the rows
            self.check_optimizer()

    @property
    def used_techniques(self) -> set[str]:
        """The techniques whose numbers matter: those that are on in one of the combinations."""
        varied = {*(each.name for each in COURSE), *self.both} if self.combinations is Combinations.all else set()
        return super().used_techniques | varied

    @property
    def has_lengths(self) -> bool:
        """Whether the lengths of the data's samples can be known; else `max_length` stands in for them."""
        return self.tokenizer is not None or self.model.is_builtin

    @property
    def max_length(self) -> int:
        """Longest sample in tokens."""
        if self.data.max_length is None and not self.has_lengths:
            return min(STAND_IN_LENGTH, self.model.max_seq_len)
        return super().max_length


def row_settings(runs: Sequence[TrainConfig]) -> list[Settings]:
    """The settings, by full name, in which runs differ beside the switches; a UserError if a plan's rows may not."""
    known, sections = [flat(run.to_dict()) for run in runs], [each.name for each in TECHNIQUES]
    keys = [key for key in known[0] if any(settings.get(key) != known[0][key] for settings in known)]
    for key in keys:
        section, _, name = key.partition(".")
        is_known = section in ("recipe", "optim", *sections) or key in ("parallel.strategy", "parallel.processes")
        if not is_known and not (section == "training" and name in OF_ROWS):
            raise UserError(
                f"{section if section in ('model', 'gpu') else key} has several values, and a plan is of one: its rows"
                f" can differ in recipe, optim, parallel, {', '.join(sections)} and training.{', '.join(OF_ROWS)};"
                " gpu=all plans for all cards"
            )
    return [{key: settings[key] for key in keys if not key.startswith("optim.")} for settings in known]
