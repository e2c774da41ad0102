"""How many tokens an answer may cost, and how many one has cost whose usage Grok has not told.

The estimates err upwards, and what was begun is never free: Grok bills what it has generated, read or not.
"""

import math
import time
from collections import deque

from chatproxy import errors
from chatproxy.events import StreamSummary

# Tokens. What xAI adds to a prompt is up to 1,650 (seen with grok-4.5), and hidden reasoning outweighs most texts.
FIRST_OVERHEAD = 2000
LEAST_ANSWER = 4000
LARGEST_ANSWER = 16_384  # that is guessed of one that was hung up, if none was larger

# Tokens per second; 85 to 200 have been seen.
FIRST_SPEED = 160.0

# In tokens of grok-4.3: half a cent for each search; 5 cents for a conversation that is refused for its content.
PER_SEARCH = 2000
REFUSED_CONTENT = 20_000

# More for one answer is a mistake in what Grok has counted.
MAX_TOKENS = 10_000_000

# So many answers are remembered for the next estimates.
REMEMBERED = 100

# What ended a request before Grok's first chunk, and so that nothing is billed.
_FREE: frozenset[str] = frozenset(
    kind.code
    for kind in (
        *(errors.Busy, errors.RateLimited, errors.StoreUnavailable, errors.ContextLengthExceeded),
        *(errors.UpstreamFailed, errors.UpstreamAuth, errors.UpstreamRejected, errors.UpstreamRateLimited),
        *(errors.UpstreamOverloaded, errors.UpstreamUnreachable, errors.ConnectTimeout),
    )
)


class Estimator:
    """What an answer may cost, and what one has cost whose usage Grok has not told. Learns from those that it has."""

    def __init__(self) -> None:
        self._overheads: deque[int] = deque(maxlen=REMEMBERED)
        self._answers: deque[int] = deque(maxlen=REMEMBERED)
        self._speeds: deque[float] = deque(maxlen=REMEMBERED)
        self._largest = LARGEST_ANSWER

    def before(self, request_size: int) -> int:
        """Tokens to reserve for a request of so many bytes."""
        answers = sorted(self._answers)
        usual = answers[math.ceil(0.95 * len(answers)) - 1] if answers else 0
        return self._prompt(request_size) + max(LEAST_ANSWER, usual)

    def _prompt(self, request_size: int) -> int:
        return math.ceil(request_size / 3) + max(0, *self._overheads, 0 if self._overheads else FIRST_OVERHEAD)

    def so_far(self, request_size: int, reserved: int, summary: StreamSummary) -> int:
        """Tokens of an answer that is running, or was hung up."""
        assert summary.asked_at is not None
        seconds = time.monotonic() - summary.asked_at
        # What has come is certain, however much it is. What may have been generated besides is a guess with a bound.
        seen = max(summary.text_bytes / 3, summary.deltas)
        guess = min(seconds * max(self._speeds, default=FIRST_SPEED), max(reserved, self._largest))
        return self._prompt(request_size) + math.ceil(max(seen, guess))

    def after(self, request_size: int, reserved: int, summary: StreamSummary) -> tuple[int, bool]:
        """Tokens to book for an answer that has ended, and whether that is an estimate."""
        searches = PER_SEARCH * sum(summary.tool_calls.values())
        total = self._learn(request_size, summary)
        if total is not None:
            return total + searches, False
        if summary.asked_at is None or (not summary.answering and summary.code in _FREE):
            return 0, False
        tokens = self.so_far(request_size, reserved, summary) + searches
        if summary.code == errors.ContentPolicy.code:
            return max(REFUSED_CONTENT, tokens if summary.answering else 0), True
        return tokens, True

    def _learn(self, request_size: int, summary: StreamSummary) -> int | None:
        """All tokens that Grok has counted, if that can be true."""
        counts, total = summary.counts, summary.counts.total_tokens
        parts = [count or 0 for count in (counts.prompt_tokens, counts.completion_tokens, counts.reasoning_tokens)]
        if total is None or not 0 < total <= MAX_TOKENS or min(parts) < 0:
            return None
        prompt, *output = parts
        self._overheads.append(prompt - request_size // 3)
        self._answers.append(sum(output))
        self._largest = max(self._largest, sum(output))
        if summary.asked_at is not None and sum(output) >= 100:  # of fewer the speed is that of the network
            self._speeds.append(sum(output) / max(0.1, time.monotonic() - summary.asked_at))
        return total
