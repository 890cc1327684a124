"""In which order a sweep runs its repeats, the values of `training.seed`: `sweep.order`."""

from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from llama_ft.cli.texts import parsed
from llama_ft.config.training import SEED, Order


class OrderedRepeats(Callback):
    """Puts the seeds before all else that a sweep varies, or behind it: Hydra varies what comes last the fastest.

    Hydra calls it before it makes the runs of `hydra.sweeper.params`, an experiment's, and of what was typed.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Give both in the order asked for."""
        params = dict(OmegaConf.select(config, "hydra.sweeper.params") or {})
        typed = list(config.hydra.overrides.task)
        given = [text for text, override in zip(typed, parsed(typed), strict=True) if override.key_or_group == SEED]
        seeds = [*(f"{key}={value}" for key, value in params.items() if key == SEED), *given]
        if not seeds or not parsed(seeds)[-1].is_sweep_override():  # of several the last counts, as for Hydra
            return
        others = {key: value for key, value in params.items() if key != SEED}
        is_first = config.sweep.order == Order.alternate
        config.hydra.sweeper.params = ({SEED: seeds[-1].partition("=")[2]} if is_first else {}) | others
        config.hydra.overrides.task = [text for text in typed if text not in given] + ([] if is_first else seeds[-1:])
