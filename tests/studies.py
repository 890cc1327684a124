"""What the tests of the studies share."""

from types import ModuleType

from experiments.study import Numbers


def failed(study: ModuleType, numbers: Numbers, **changed: object) -> list[int]:
    """The claims that do not hold, by their place, when some of the numbers are others."""
    return [place for place, claim in enumerate(study.claims_of(numbers | changed)) if not claim.holds]
