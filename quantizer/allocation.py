"""Which type each matrix gets so that the errors of all together are least within a size."""

from collections.abc import Mapping
from typing import NamedTuple


class Choice(NamedTuple):
    """One type for one matrix: what it takes, and what it costs the result."""

    type: str
    nbytes: int
    error: float


class Step(NamedTuple):
    """From one choice of a matrix to its next larger one that pays."""

    gain: float  # error saved for each byte
    name: str
    position: int  # in the hull of the matrix


def allocate(choices: Mapping[str, list[Choice]], budget: int) -> dict[str, Choice]:
    """One choice for each matrix, with the least sum of errors that fits into `budget` bytes, or the smallest of all.

    Steps are taken in the order of what they save for each byte, along the lower convex hull of each matrix's choices:
    the optimum of the Lagrangian relaxation. What is left of the budget goes to the steps that still fit, so that the
    sum is above the optimum by less than the last step that did not.
    """
    hulls = {name: lower_hull(list_of) for name, list_of in choices.items()}
    taken = dict.fromkeys(hulls, 0)
    used = sum(hull[0].nbytes for hull in hulls.values())
    for _, name, position in sorted(steps_of(hulls), key=lambda step: (-step.gain, step.name, step.position)):
        hull = hulls[name]
        more = hull[position].nbytes - hull[position - 1].nbytes
        # A step beyond one that did not fit starts from a choice that was not taken.
        if taken[name] == position - 1 and used + more <= budget:
            taken[name], used = position, used + more
    return {name: hull[taken[name]] for name, hull in hulls.items()}


def lower_hull(choices: list[Choice]) -> list[Choice]:
    """The choices from the smallest on, without those that a mixture of two others beats."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.nbytes, choice.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and gain(hull[-1], choice) >= gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(choice)
    return hull


def gain(smaller: Choice, larger: Choice) -> float:
    """Error saved for each byte more."""
    return (smaller.error - larger.error) / (larger.nbytes - smaller.nbytes)


def steps_of(hulls: Mapping[str, list[Choice]]) -> list[Step]:
    return [
        Step(gain(hull[position - 1], hull[position]), name, position)
        for name, hull in hulls.items()
        for position in range(1, len(hull))
    ]
