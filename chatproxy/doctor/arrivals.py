"""Whether tokens arrived one by one, judged by the times at which they were there. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

# Tokens that arrive within this many seconds of each other came in one piece.
TOGETHER = 0.002

# With fewer tokens nobody can tell; with more of them in each piece it is no chance that they came together.
ENOUGH = 10
LUMP = 4

# Nobody thinks of this many tokens within this many seconds.
MANY = 20
INSTANT = 0.05


@dataclass(frozen=True)
class Arrivals:
    """`kind`: `single` one by one, `lumps`, `held` all in one piece, `few` too few to tell.

    `gap`: the seconds between two pieces, at the median.
    """

    kind: Literal["single", "lumps", "held", "few"]
    tokens: int
    pieces: int
    gap: float

    @property
    def delayed(self) -> bool:
        """Whether the gap is the 200 ms, and a token, for which Linux keeps back what is said to be continued."""
        return self.kind == "lumps" and 0.15 < self.gap < 0.3


def judge(times: Sequence[float]) -> Arrivals:
    """From the times of the tokens, in seconds on any clock."""
    starts = [at for before, at in pairwise([float("-inf"), *times]) if at - before > TOGETHER]
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    tokens, pieces = len(times), len(starts)
    gap = median(gaps) if gaps else 0.0
    if tokens < ENOUGH:
        return Arrivals("few", tokens, pieces, gap)
    if pieces == 1 or (tokens >= MANY and times[-1] - times[0] < INSTANT):
        return Arrivals("held", tokens, pieces, gap)
    return Arrivals("lumps" if tokens / pieces >= LUMP else "single", tokens, pieces, gap)
