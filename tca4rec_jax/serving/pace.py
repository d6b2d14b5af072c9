"""How long batches take: what may share a batch, and wait, if answers are to be in time."""

from collections.abc import Mapping, Sequence

_NEWEST = 0.3  # its weight among the batches of its size


class Pace:
    """Seconds of batches by their padded size, learned from those that were searched.

    Two that are searched side by side share the time: each then lasts twice its own.
    """

    def __init__(self, seconds_of: Mapping[int, float]):
        """`seconds_of` sizes, as far as they are known before."""
        self._seconds_of = dict(seconds_of)

    def learn(self, size: int, seconds: float) -> None:
        """From a batch that was searched."""
        before = self._seconds_of.get(size, seconds)
        self._seconds_of[size] = before + _NEWEST * (seconds - before)

    def seconds(self, size: int) -> float:
        """Of a batch; at most as much a row as in smaller ones. 0.0 as long as nothing is known."""
        known = self._seconds_of.items()
        shares = [seconds * size / smaller for smaller, seconds in known if smaller <= size]
        return min(shares, default=min(self._seconds_of.values(), default=0.0))

    def largest(self, sizes: Sequence[int], allowed: float) -> int:
        """The largest of ascending sizes that leaves time to wait for others before it.

        `allowed` are the seconds from a request to its answer: a batch may take a quarter, since
        what comes as two begin waits for both, and then shares the time once more. The smallest
        size is tried first, and taken where none fits.
        """
        if not self._seconds_of:
            return sizes[0]
        fitting = [size for size in sizes if self.seconds(size) <= allowed / 4]
        return max(fitting, default=sizes[0])

    def wait(self, rows: int, sizes: Sequence[int], allowed: float) -> float:
        """Seconds until so many rows are searched: in batches of the `largest`, and one of less."""
        size = self.largest(sizes, allowed)
        whole, rest = divmod(rows, size)
        last = self.seconds(next(one for one in sizes if one >= rest)) if rest else 0.0
        return whole * self.seconds(size) + last
