"""Which weights DynamicVRAM keeps on the GPU where not all fit: those that come first in the host's list."""

from .packed_layers import has_packed_weight


def spread(loading: list[tuple]) -> list[tuple]:
    """The host's list, in the forward's order, sorted such that what stays of the packed weights is spread over it.

    The host sorts it by its first two entries, (False, ...) for small weights, and keeps what comes first. It takes the
    largest first: then those that stream lie together, and the bus is idle while others are used. Any beginning of a
    van der Corput sequence is spread evenly.
    """
    packed = [i for i, (is_large, *_, module, _) in enumerate(loading) if is_large and has_packed_weight(module)]
    ranks = dict(zip(packed, van_der_corput(len(packed)), strict=True))
    return [(*entry[:1], ranks.get(i, entry[1]), *entry[2:]) for i, entry in enumerate(loading)]


def van_der_corput(n: int) -> list[float]:
    """The digits of 0, 1, ..., n - 1 to the base 2, behind the point and in reverse: of 8, 0 1/2 1/4 3/4 1/8 ..."""
    n_bits = max(1, (n - 1).bit_length())
    return [int(f"{i:0{n_bits}b}"[::-1], 2) / 2**n_bits for i in range(n)]
