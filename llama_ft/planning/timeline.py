"""Memory over a step, by category, in few enough points to draw."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from llama_ft.measure.memory import Event
from llama_ft.measure.result import CATEGORIES, MB

MOST_POINTS = 240


@dataclass(frozen=True)
class Point:
    """What is alive after an event."""

    event: int  # counted from the step's first
    instant: str  # what runs then
    memory_mb: dict[str, float]  # by category


def timeline(events: Sequence[Event], start: int) -> list[Point]:
    """The events from the index `start` on; of each few that follow each other the one with the most memory."""
    now: dict[str, int] = defaultdict(int)
    for allocation, sign, _ in events[:start]:
        now[allocation.category] += sign * allocation.nbytes
    step = [event for event in events[start:] if event[2] != "after the step"]
    width = max(1, -(-len(step) // MOST_POINTS))
    points: list[Point] = []
    most, total = -1, sum(now.values())
    for number, (allocation, sign, instant) in enumerate(step):
        now[allocation.category] += sign * allocation.nbytes
        total += sign * allocation.nbytes
        if number % width == 0 or points[-1].instant != instant:
            points.append(Point(number, instant, {}))
            most = -1
        if total > most:
            most = total
            points[-1] = Point(number, instant, {name: now[name] / MB for name in CATEGORIES})
    return points
