"""Which weights DynamicVRAM keeps on the GPU where not all fit: those that come first in the host's list."""

from .packed_layers import has_packed_weight


def spread(loading: list[tuple]) -> list[tuple]:
    """The host's list, in the forward's order, sorted such that few large weights stream, from all over the forward.

    The host sorts it by its first two entries, (False, ...) for small weights, and keeps what comes first. It takes the
    largest first: then many small ones stream, each of which costs the processor as much as a large one, and those that
    stream lie together, and the bus is idle while others are used. Here packed weights above the mean size come last.
    """
    packed = [i for i, (is_large, *_, module, _) in enumerate(loading) if is_large and has_packed_weight(module)]
    mean = sum(loading[i][2] for i in packed) / max(1, len(packed))
    large = [i for i in packed if loading[i][2] > mean]
    small = [i for i in packed if loading[i][2] <= mean]
    ranks = dict(zip(small, van_der_corput(len(small)), strict=True))
    ranks |= {i: 1 + place for i, place in zip(large, van_der_corput(len(large)), strict=True)}
    return [(*entry[:1], ranks.get(i, entry[1]), *entry[2:]) for i, entry in enumerate(loading)]


def van_der_corput(n: int) -> list[float]:
    """The digits of 0, 1, ..., n - 1 to the base 2, behind the point and in reverse: of 8, 0 1/2 1/4 3/4 1/8 ...

    Any beginning of what is sorted by it is spread evenly.
    """
    n_bits = max(1, (n - 1).bit_length())
    return [int(f"{i:0{n_bits}b}"[::-1], 2) / 2**n_bits for i in range(n)]
