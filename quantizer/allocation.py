"""Which type each matrix gets so that the errors of all together are least within a size."""

from collections.abc import Mapping
from typing import NamedTuple


class Option(NamedTuple):
    """One type for one matrix: what it takes, and what it costs the result."""

    type: str
    nbytes: int
    error: float


class Step(NamedTuple):
    """From one option of a matrix to its next larger one that pays."""

    gain: float  # error saved for each byte
    name: str
    position: int  # in the hull of the matrix


def allocate(options: Mapping[str, list[Option]], budget: int) -> dict[str, Option]:
    """One option for each matrix, with the least sum of errors that fits into `budget` bytes, or the smallest of all.

    Steps are taken in the order of what they save for each byte, along the lower convex hull of each matrix's options:
    the optimum of the Lagrangian relaxation. What is left of the budget goes to the steps that still fit, so that the
    sum is above the optimum by less than the last step that did not.
    """
    hulls = {name: lower_hull(of_matrix) for name, of_matrix in options.items()}
    taken = dict.fromkeys(hulls, 0)
    used = sum(hull[0].nbytes for hull in hulls.values())
    for _, name, position in sorted(steps_of(hulls), key=lambda step: (-step.gain, step.name, step.position)):
        hull = hulls[name]
        more = hull[position].nbytes - hull[position - 1].nbytes
        # A step beyond one that did not fit starts from an option that was not taken.
        if taken[name] == position - 1 and used + more <= budget:
            taken[name], used = position, used + more
    return {name: hull[taken[name]] for name, hull in hulls.items()}


def lower_hull(options: list[Option]) -> list[Option]:
    """The options from the smallest on, without those that a mixture of two others beats."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and gain(hull[-1], option) >= gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def gain(smaller: Option, larger: Option) -> float:
    """Error saved for each byte more."""
    return (smaller.error - larger.error) / (larger.nbytes - smaller.nbytes)


def steps_of(hulls: Mapping[str, list[Option]]) -> list[Step]:
    return [
        Step(gain(hull[position - 1], hull[position]), name, position)
        for name, hull in hulls.items()
        for position in range(1, len(hull))
    ]
