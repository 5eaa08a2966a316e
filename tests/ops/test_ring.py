"""What the ring hands out: places in a circle, none while it is in use."""

import random

import pytest
from gguf_native.ops.ring import ALIGNMENT, Ring

KB = 1024


def take(ring: Ring, nbytes: int):
    """A place, its events of those before it, or a failure."""
    found = ring.take(nbytes)
    assert found is not None
    return found


def test_places_follow_each_other_in_a_circle():
    ring = Ring(8 * KB)
    places = []
    for nbytes in (3 * KB, 3 * KB, 2 * KB):
        place, before = take(ring, nbytes)
        assert before == []
        place.done = f"end of {len(places)}"
        places.append(place)
    assert [(place.start, place.end) for place in places] == [(0, 3 * KB), (3 * KB, 6 * KB), (6 * KB, 8 * KB)]
    again, before = take(ring, 4 * KB)
    assert (again.start, before) == (0, ["end of 0", "end of 1"])
    assert list(ring.taken) == [places[2], again]


def test_what_does_not_fit_behind_the_last_goes_to_the_start():
    ring = Ring(8 * KB)
    first, _ = take(ring, 5 * KB)
    assert ring.take(5 * KB) is None
    first.done = "end"
    second, before = take(ring, 5 * KB)
    assert (second.start, before) == (0, ["end"])


def test_places_are_aligned_and_the_last_may_end_with_the_ring():
    ring = Ring(3 * KB + 100)
    starts = [take(ring, nbytes)[0].start for nbytes in (1, KB + 1, 100)]
    assert starts == [0, KB, 3 * KB]
    assert all(start % ALIGNMENT == 0 for start in starts)


def test_nothing_is_handed_out_while_it_is_in_use_and_nothing_changes_by_asking():
    ring = Ring(4 * KB)
    first, second = take(ring, 2 * KB)[0], take(ring, 2 * KB)[0]
    # The order of giving back is that of taking: the second waits for the first.
    second.done = "end of the second"
    assert ring.take(KB) is None
    assert list(ring.taken) == [first, second]
    first.done = "end of the first"
    assert take(ring, 4 * KB)[1] == ["end of the first", "end of the second"]


@pytest.mark.parametrize("nbytes", [4 * KB + 1, 1 << 40])
def test_what_is_larger_than_the_ring_is_refused(nbytes):
    ring = Ring(4 * KB)
    assert ring.take(nbytes) is None
    assert take(ring, 4 * KB)[0].start == 0


@pytest.mark.parametrize("seed", range(40))
def test_any_sequence(seed):
    """Against a list that says which place had each unit of memory last."""
    choose = random.Random(seed)
    ring = Ring(choose.randrange(4, 40) * KB + choose.choice([0, 512]))
    owner, taken, handed = {}, [], []
    for number in range(300):
        in_use = [place for place in taken if place.done is None]
        if in_use and choose.random() < 0.5:
            choose.choice(in_use[:3]).done = number
            continue
        nbytes = choose.randrange(1, ring.nbytes + 1) if choose.random() < 0.2 else choose.randrange(1, 6 * KB)
        state = ring.head, list(ring.taken)
        found = ring.take(nbytes)
        if found is None:
            assert nbytes > ring.nbytes or in_use
            assert (ring.head, list(ring.taken)) == state
            continue
        place, before = found
        assert place.start % ALIGNMENT == 0
        assert place.start + nbytes <= ring.nbytes
        assert nbytes <= place.end - place.start < nbytes + ALIGNMENT
        handed += before
        units = range(place.start // ALIGNMENT, place.end // ALIGNMENT)
        for old in {owner[unit] for unit in units if unit in owner}:
            assert taken[old].done in handed
        owner |= dict.fromkeys(units, len(taken))
        taken.append(place)
    # The copies wait in the order in which the places were taken.
    assert len(handed) > 20
    assert handed == [place.done for place in taken[: len(handed)]]
