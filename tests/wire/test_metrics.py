"""What Prometheus reads agrees with what happened, and no caller puts a word into it."""

from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import Service, serving
from tests.upstream import CLOSE, HANG, Gate, Upstream, error, stream
from tests.wire.test_resume import address, forgotten, name, reading, rest

pytestmark = pytest.mark.anyio

NAMES = {
    "chatproxy_requests": "counter",
    "chatproxy_streams_in_flight": "gauge",
    "chatproxy_time_to_first_token_seconds": "histogram",
    "chatproxy_overhead_seconds": "histogram",
    "chatproxy_budget_estimated": "counter",
    "chatproxy_deltas": "counter",
    "chatproxy_tokens": "counter",
    "chatproxy_tool_calls": "counter",
    "chatproxy_stream_ends": "counter",
    "chatproxy_upstream_failures": "counter",
    "chatproxy_unread_deltas": "counter",
    "chatproxy_hang_up_seconds": "histogram",
    "chatproxy_upstream_connections": "gauge",
    "chatproxy_handshakes_waited": "counter",
}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def samples(service: Service) -> Samples:
    """All values, by name and labels, as Prometheus' own parser reads them."""
    response = await service.client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = list(text_string_to_metric_families(response.text))
    assert {family.name: family.type for family in families if not family.name.endswith("_created")} == NAMES
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((f"chatproxy_{name}", frozenset(labels.items())), 0)


def values(found: Samples, name: str) -> dict[Any, float]:
    """By the labels' values, in the order of their names."""
    return {
        tuple(text for _, text in sorted(labels)): number
        for (sample, labels), number in found.items()
        if sample == f"chatproxy_{name}"
    }


async def test_counts() -> None:
    """Every request, answer, delta, token and failure is counted once, where it belongs."""
    scripts = [
        *[stream("a", "b")] * 3,  # plain
        stream("a", "b", usage=False),  # resumable, read
        stream("a", "b", "c", HANG),  # resumable, and nobody comes
        stream("a", CLOSE),  # cut off
        stream(),  # no text
        *[error(503, {"error": "x"})] * 2,  # and one retry
        error(401, {"error": "x"}),
        stream("a", HANG),  # its caller leaves
    ]
    changes = {"grok_retries": 1, "resume_window": 0.2, "replay_ttl": 0.2, "max_body_bytes": 500}
    async with Upstream(*scripts) as grok, serving(grok.url, **changes) as service:
        for _ in range(3):
            assert (await service.ask()).status_code == 200
        await rest(service, await address(service))
        nobody = await address(service)
        await (await grok.call(4)).hung_up(within=2)
        last = f"{name(nobody)}-4"  # a, b, c, abandoned
        assert (await rest(service, nobody, last)).status_code == 204
        assert [(await service.ask()).status_code for _ in range(4)] == [200, 200, 503, 502]
        async with service.asking() as live:
            await live.event()
        await (await grok.call(10)).hung_up()
        assert (await service.ask("x" * 500)).status_code == 413
        assert (await service.client.get("/nowhere")).status_code == 404
        assert (await service.client.put("/api/chat")).status_code == 405
        await forgotten(service, nobody, last)
        found = await samples(service)

    requests = values(found, "requests_total")
    assert requests.pop(("/api/chat/{id}/stream", "204")) >= 1
    assert requests == {
        ("/api/chat", "200"): 6,
        ("/api/chat", "201"): 2,
        ("/api/chat", "405"): 1,
        ("/api/chat", "413"): 1,
        ("/api/chat", "502"): 1,
        ("/api/chat", "503"): 1,
        ("/api/chat/{id}/stream", "200"): 1,
        ("/api/chat/{id}/stream", "404"): 1,
        ("-", "404"): 1,
    }
    assert values(found, "stream_ends_total") == {
        ("", "done"): 4,
        ("abandoned", "failed"): 1,
        ("empty_answer", "failed"): 1,
        ("upstream_auth", "failed"): 1,
        ("upstream_cut_off", "failed"): 1,
        ("upstream_overloaded", "failed"): 1,
        ("", "left"): 1,
    }
    assert values(found, "upstream_failures_total") == {
        ("upstream_auth",): 1,
        ("upstream_cut_off",): 1,
        ("upstream_overloaded",): 2,
    }
    # Of the four answers whose usage was told: three plain ones, and the one without text.
    assert values(found, "tokens_total") == {("prompt",): 4 * 12, ("completion",): 4 * 3, ("reasoning",): 4 * 5}
    assert value(found, "deltas_total") == 3 * 2 + 2 + 3 + 1 + 1
    assert value(found, "unread_deltas_total") == 3
    assert value(found, "time_to_first_token_seconds_count") == 7  # answers with text
    assert value(found, "hang_up_seconds_count") == 1
    assert value(found, "hang_up_seconds_bucket", le="1.0") == 1
    assert value(found, "overhead_seconds_count") >= 5
    assert value(found, "overhead_seconds_bucket", le="1.0") == value(found, "overhead_seconds_count")
    assert value(found, "streams_in_flight") == 0


async def test_times() -> None:
    """The times are those that passed: Grok's before its first token, ours after it, and until the hang-up."""
    async with Upstream(stream(0.3, "a", HANG)) as grok, serving(grok.url) as service:
        async with service.asking() as live:
            await live.event()
        await grok.calls[0].hung_up()
        found = await samples(service)
    assert 0.3 <= value(found, "time_to_first_token_seconds_sum") < 1
    assert 0 < value(found, "overhead_seconds_sum") < 0.2
    assert 0 < value(found, "hang_up_seconds_sum") < 0.5


async def test_in_flight() -> None:
    """Answers that are running are counted while they run, whoever reads them."""
    gate = Gate()
    async with Upstream(stream("a", gate)) as grok, serving(grok.url) as service:
        assert value(await samples(service), "streams_in_flight") == 0
        async with service.asking() as live:
            await live.event()
            url = await address(service)
            assert value(await samples(service), "streams_in_flight") == 2
            gate.open()
            await live.rest()
        await rest(service, url)
        assert value(await samples(service), "streams_in_flight") == 0


async def test_partly_read(grok: Upstream) -> None:
    """What somebody has read of an answer is not counted as unread, and the rest is, whoever read most."""
    gate = Gate()
    grok.set_scripts(stream("a", "b", gate, "c", "d", "e", reasoning=["hm"]))
    async with serving(grok.url, replay_ttl=0.2) as service:
        url = await address(service)
        for count in (2, 1):
            async with reading(service, url) as live:
                for _ in range(count):
                    await live.event()
        gate.open()
        await grok.until(lambda: grok.playing == 0)
        await forgotten(service, url, f"{name(url)}-6")
        found = await samples(service)
    assert value(found, "deltas_total") == 5
    assert value(found, "unread_deltas_total") == 3


async def test_labels_are_ours() -> None:
    """No path, method, header or body of a caller's becomes a label."""
    async with Upstream() as grok, serving(grok.url) as service:
        before = set(await samples(service))
        for path in ("/canary", "/api/chat/canary", "/api/chat/canary/stream", "/api/chat/canary/stop", "/canary%0a"):
            for method in ("GET", "POST", "DELETE", "PROPFIND"):
                await service.client.request(
                    method, path, headers={"X-Request-ID": "canary", "Last-Event-ID": "canary-1"}
                )
        await service.ask("canary", sessionId="canary")
        after = set(await samples(service))
    routes = {"-", "/api/chat", "/api/chat/{id}", "/api/chat/{id}/stream", "/api/chat/{id}/stop", "/metrics"}
    assert {dict(labels)["route"] for sample, labels in after if sample == "chatproxy_requests_total"} == routes
    assert "canary" not in str(after - before)
    assert len(after) < len(before) + 60


async def test_two_services() -> None:
    """Two services in one process count apart."""
    async with Upstream() as grok, serving(grok.url) as one, serving(grok.url) as two:
        await one.client.get("/healthz")
        found = [value(await samples(each), "requests_total", route="/healthz", status="200") for each in (one, two)]
    assert found == [1, 0]
