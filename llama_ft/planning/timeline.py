"""Memory over a step, by category, in few enough points to draw."""

from collections import defaultdict
from collections.abc import Sequence

from llama_ft.measure.memory import Event
from llama_ft.records import CATEGORIES
from llama_ft.records.plan import MemoryPoint
from llama_ft.system import MIB

MAX_POINTS = 200


def timeline(events: Sequence[Event], start: int) -> list[MemoryPoint]:
    """The step whose events begin at the index `start`; of each few that follow each other the one with most memory.

    Fused AdamW allocates nothing in a step whose state is there: its point is what is alive when it runs.
    """
    now: dict[str, int] = defaultdict(int)

    def apply(event: Event) -> None:
        now[event[0].category] += event[1] * event[0].nbytes

    def point(number: int, phase: str) -> MemoryPoint:
        return MemoryPoint(number, phase, {name: now[name] / MIB for name in CATEGORIES})

    begin = next(number for number in range(start, len(events)) if events[number][2] == "forward")
    end = next((n for n in range(begin, len(events)) if events[n][2] == "after the step"), len(events))
    for event in events[:begin]:  # accumulated gradients included
        apply(event)
    width = max(1, -(-(end - begin) // MAX_POINTS))
    points: list[MemoryPoint] = []
    highest = 0
    for number, event in enumerate(events[begin:end]):
        apply(event)
        if number % width == 0 or points[-1].phase != event[2]:
            points.append(point(number, event[2]))
            highest = sum(now.values())
        elif (total := sum(now.values())) > highest:
            highest, points[-1] = total, point(number, event[2])
    return [*points, point(end - begin, "optimizer step")]
