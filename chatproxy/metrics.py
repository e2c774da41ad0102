"""The counters and histograms, named once. Does not know who counts.

Their labels are routes, statuses and codes of our own; nothing a caller sends becomes one.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from chatproxy.events import StreamSummary

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_SLOW = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """One set for each application, so that two of them in one process do not count together."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        # With labels: called with their values. Each is looked up once, for that costs as much as three countings.
        self.requests = cache(
            Counter(
                "chatproxy_requests", "Requests answered, by route and status.", ["route", "status"], registry=registry
            ).labels
        )
        self.streams_in_flight = Gauge(
            "chatproxy_streams_in_flight", "Answers that Grok is giving right now.", registry=registry
        )
        self.time_to_first_token = Histogram(
            "chatproxy_time_to_first_token_seconds",
            "From the request to the first text of the answer.",
            registry=registry,
            buckets=_SLOW,
        )
        self.overhead = Histogram(
            "chatproxy_overhead_seconds",
            "From a read of Grok's stream to the end of our write; of each stream the first and every 64th.",
            registry=registry,
            buckets=_FAST,
        )
        self.deltas = Counter(
            "chatproxy_deltas", "Content deltas received, counted when a stream ends.", registry=registry
        )
        self.tokens = cache(
            Counter("chatproxy_tokens", "Tokens as Grok counts them.", ["kind"], registry=registry).labels
        )
        self.tool_calls = cache(
            Counter("chatproxy_tool_calls", "Searches that Grok has made, by tool.", ["tool"], registry=registry).labels
        )
        self.stream_ends = cache(
            Counter(
                "chatproxy_stream_ends", "Ends of answers, by kind and code.", ["end", "code"], registry=registry
            ).labels
        )
        self.upstream_failures = cache(
            Counter(
                "chatproxy_upstream_failures", "Failures of Grok, retried ones included.", ["code"], registry=registry
            ).labels
        )
        self.unread_deltas = Counter(
            "chatproxy_unread_deltas", "Deltas received (and paid) that nobody ever read.", registry=registry
        )
        self.budget_estimated = Counter(
            "chatproxy_budget_estimated",
            "Answers that were booked by an estimate, because Grok did not tell their usage.",
            registry=registry,
        )
        self.upstream_connections = Gauge(
            "chatproxy_upstream_connections",
            "Connections to Grok: busy, idle, and spare ones that were made before they are needed.",
            ["state"],
            registry=registry,
        )
        self.handshakes_waited = Counter(
            "chatproxy_handshakes_waited",
            "Requests to Grok that had to wait for a new connection.",
            registry=registry,
        )
        self.hang_up = Histogram(
            "chatproxy_hang_up_seconds",
            "From the client's disconnect to the closing of Grok's stream.",
            registry=registry,
            buckets=_FAST,
        )

    def watch_connections(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Tell what the connections to Grok are doing, by state."""
        for state in counts():
            self.upstream_connections.labels(state).set_function(partial(_value, counts, state))

    def watch_store(self, available: Callable[[], bool]) -> None:
        """Tell whether the store can be reached. (What is in memory always can.)"""
        gauge = Gauge("chatproxy_store_available", "1 while Redis can be reached, else 0.", registry=self._registry)
        gauge.set_function(available)

    def watch_budget(self, limit: int, total: Callable[[], tuple[int, int]]) -> None:
        """Tell what is left of TOKEN_BUDGET. `total` gives what is used, and what is reserved."""
        gauge = Gauge(
            "chatproxy_budget_tokens",
            "Of TOKEN_BUDGET in this window: the limit, what is used, and what is reserved for running answers.",
            ["kind"],
            registry=self._registry,
        )
        gauge.labels("limit").set(limit)
        gauge.labels("used").set_function(lambda: total()[0])
        gauge.labels("reserved").set_function(lambda: total()[1])

    def count(self, summary: StreamSummary) -> None:
        """Add an answer that has ended."""
        self.stream_ends(summary.end or "", summary.code or "").inc()
        self.deltas.inc(summary.deltas)
        if summary.first_token_ms is not None:
            self.time_to_first_token.observe(summary.first_token_ms / 1000)
        counts = summary.counts
        for kind, tokens in (
            ("prompt", counts.prompt_tokens),
            ("completion", counts.completion_tokens),
            ("reasoning", counts.reasoning_tokens),
        ):
            if tokens and tokens > 0:
                self.tokens(kind).inc(tokens)
        for tool, calls in summary.tool_calls.items():
            self.tool_calls(tool).inc(calls)

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


def _value(counts: Callable[[], Mapping[str, int]], name: str) -> int:
    return counts()[name]
