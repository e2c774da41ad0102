"""Every error has its status and its code, however the chat was asked for and whenever it happens."""

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest

from chatproxy import errors, logs, sse
from tests.conftest import HI, KEY, InProcessService, failure, refusal, serving
from tests.upstream import HANG, Call, Script, Steps, Upstream, frame, refusing, stream
from tests.wire.test_refusals import ANSWERS, TEAM, UNREACHABLE, Expected

pytestmark = pytest.mark.anyio

ORIGIN = "https://front.example"
PATH = "/api/chat"
UNKNOWN = f"{PATH}/{'0' * 22}/stream"
MESSAGES = b'{"messages": [{"role": "user", "content": "canary"}]}'


def sent(*, method: str = "POST", path: str = PATH, content: bytes = MESSAGES, **headers: str) -> dict[str, Any]:
    """A request; without changes a good one."""
    fields = {"content-type": "application/json"} | {name.replace("_", "-"): text for name, text in headers.items()}
    return {"method": method, "url": path, "content": content, "headers": fields}


# What callers do wrong: settings, under which one chat is running already; what is sent then; our status and code, the
# field at fault and the headers that belong to it.
REFUSALS: list[tuple[dict[str, object], dict[str, Any], int, str, str | None, dict[str, str]]] = [
    ({}, sent(content=b'{"messages": ['), 400, "invalid_json", None, {}),
    ({}, sent(content=b"\xff" + MESSAGES), 400, "invalid_json", None, {}),
    ({}, sent(content=MESSAGES[:-1] + b', "x": ' + b"[" * 9_999 + b"]" * 9_999 + b"}"), 400, "invalid_json", None, {}),
    ({}, sent(content=b'{"messages": []}'), 422, "invalid_request", "messages", {}),
    ({}, sent(content=MESSAGES.replace(b"user", b"boss")), 422, "invalid_request", "messages[0].role", {}),
    ({}, sent(content=MESSAGES.replace(b"canary", b"")), 422, "invalid_request", "messages[0].content", {}),
    ({"max_body_bytes": 51}, sent(), 413, "body_too_large", None, {}),
    ({"max_messages": 1}, sent(content=b'{"messages": [%b, %b]}' % ((MESSAGES[14:-2],) * 2)), 413, "too_many_messages",
     "messages", {}),
    ({}, sent(content_type="text/plain"), 415, "unsupported_media_type", None, {}),
    ({}, sent(origin="https://evil.example"), 403, "origin_not_allowed", None, {"Vary": "Origin"}),
    ({}, sent(origin="null"), 403, "origin_not_allowed", None, {}),
    ({}, sent(sec_fetch_site="cross-site"), 403, "origin_not_allowed", None, {}),
    ({}, sent(host="evil.example"), 421, "host_not_allowed", None, {}),
    ({}, sent(path="/api/chats"), 404, "not_found", None, {}),
    ({}, sent(path="/api/chat/"), 404, "not_found", None, {}),
    ({}, sent(method="GET", path=UNKNOWN), 404, "stream_not_found", None, {}),
    ({}, sent(method="PUT"), 405, "method_not_allowed", None, {"Allow": "POST"}),
    ({}, sent(accept="image/png"), 406, "not_acceptable", None, {}),
    ({"access_tokens": "t" * 16}, sent(), 401, "unauthorized", None, {"WWW-Authenticate": "Bearer"}),
    ({"access_tokens": "t" * 16}, sent(authorization="Bearer canary"), 401, "unauthorized", None, {}),
    ({"rate_limit": "1/minute"}, sent(), 429, "rate_limited", None, {"Retry-After": "60"}),
    ({"max_streams_per_client": 1}, sent(), 429, "rate_limited", None, {"Retry-After": "1"}),
    ({"max_streams": 1}, sent(), 503, "busy", None, {"Retry-After": "1"}),
    ({"max_streams": 1}, sent(accept="application/json"), 503, "busy", None, {"Retry-After": "1"}),
]  # fmt: skip


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, allowed_origins=ORIGIN) as service:
        yield service


@pytest.mark.parametrize(
    ("settings", "request_", "status", "code", "param", "headers"),
    REFUSALS,
    ids=[f"{row[3]} {number}" for number, row in enumerate(REFUSALS)],
)
async def test_refusals(
    grok: Upstream,
    service: InProcessService,
    settings: dict[str, object],
    request_: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
    headers: dict[str, str],
) -> None:
    """What we refuse is refused before Grok is asked; the page that asked can read why, and no value comes back."""
    grok.set_scripts(stream("a", HANG))
    if settings:
        async with serving(grok.url, **settings) as other, other.caller() as caller:
            await caller.post({"messages": HI}, Authorization=f"Bearer {'t' * 16}")
            await caller.until(b"data: a\n\n")
            running = 1
            response = await other.client.request(**request_)
    else:
        running = 0
        response = await service.client.request(**request_)
    problem = refusal(response)
    assert (response.status_code, problem["code"], problem["param"]) == (status, code, param)
    assert problem["type"] == ("service_error" if status == 503 else "request_error")
    assert {name: response.headers.get(name) for name in headers} == headers
    assert "canary" not in response.text
    assert len(grok.calls) == running


async def test_readable_by_the_page(service: InProcessService) -> None:
    """A page of an allowed origin may read every refusal, and how long to wait."""
    response = await service.client.request(**sent(path="/api/chats", origin=ORIGIN))
    assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "Retry-After" in response.headers["Access-Control-Expose-Headers"]


# What Grok does wrong: the statuses of plain chats are test_refusals' matter.


async def all_of(answers: dict[str, tuple[Script, Expected]], how: str) -> dict[str, Expected]:
    """What is told for these answers of Grok when all are asked for side by side: by the status, or after the hold."""

    def script(call: Call) -> Steps:
        answer, _ = answers[call.body["messages"][0]["content"]]
        return [*([] if how == "address" else [0.3]), *(answer(call) if callable(answer) else answer)]

    async def told(service: InProcessService, name: str) -> Expected:
        if how == "address":
            response = await service.ask(name, headers={"Accept": "application/json"})
            text = response.text
            told = response.status_code, refusal(response)["code"], response.headers.get("Retry-After")
        else:
            async with service.asking(name, resumable=how == "resumable") as live:
                assert live.response.status_code == 200
                [event] = await live.rest()
            text = live.raw.decode()
            _, expected = answers[name]
            told = expected[0], failure(event, live.response)["code"], expected[2]
        assert [secret for secret in ("canary", TEAM, KEY) if secret in text] == []
        return told

    changes = {} if how == "address" else {"status_hold": 0.05}
    async with Upstream(script) as grok, serving(grok.url, grok_retries=0, **changes) as service:
        async with asyncio.TaskGroup() as group:
            tasks = {name: group.create_task(told(service, name)) for name in answers}
        await grok.until(lambda: grok.playing == 0)
    return {name: task.result() for name, task in tasks.items()}


@pytest.mark.parametrize("how", ["address", "plain", "resumable"])
async def test_table_of_grok(how: str) -> None:
    """What Grok refuses before its first chunk has the same code in a 201's place, and in a stream after the hold."""
    limiting = {name for name, (_, (status, *_)) in ANSWERS.items() if status == 429}  # others may be told to wait, too
    answers = {name: row for name, row in ANSWERS.items() if name not in limiting}
    assert await all_of(answers, how) == {name: expected for name, (_, expected) in answers.items()}
    limited = {"429 with a time": ANSWERS["429 with a time"]}
    assert await all_of(limited, how) == {"429 with a time": ANSWERS["429 with a time"][1]}


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
async def test_unreachable_after_the_hold(resumable: bool) -> None:
    """So has a Grok that cannot be reached."""
    with refusing() as url:
        async with serving(url, grok_retries=1, status_hold=0.01) as service:
            async with service.asking(resumable=resumable) as live:
                assert live.response.status_code == 200
                [event] = await live.rest()
            assert failure(event, live.response)["code"] == UNREACHABLE[1]


# Our own mistakes.


def mistake_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """One error is in the log, with its type and its place and not its text."""
    [record] = [record for record in caplog.records if record.levelno == logging.ERROR]
    for line in (logs.TextFormatter().format(record), logs.JSONFormatter().format(record)):
        assert "ZeroDivisionError" in line
        assert "test_errors.py" in line
        assert "canary" not in line
    caplog.clear()


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
async def test_internal_error(
    service: InProcessService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, accept: str
) -> None:
    """A mistake of ours is a 500 that quotes nothing, and is logged."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("canary")

    monkeypatch.setattr("chatproxy.formats.plain.decode_body", broken)
    response = await service.ask("canary", headers={"Accept": accept})
    assert (response.status_code, refusal(response)["code"]) == (500, "internal_error")
    assert refusal(response)["type"] == "service_error"
    assert "canary" not in response.text
    mistake_is_logged(caplog)


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
async def test_internal_error_in_a_stream(
    grok: Upstream,
    service: InProcessService,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    resumable: bool,
) -> None:
    """After the status it is the last event, and Grok is hung up on."""

    def broken(_: sse.DeltaSplitter, delta: str) -> list[str]:
        if delta != "a":
            raise ZeroDivisionError(delta)
        return [delta]

    monkeypatch.setattr(sse.DeltaSplitter, "feed", broken)
    grok.set_scripts(stream("a", "canary", HANG))
    async with service.asking(resumable=resumable) as live:
        token, event = await live.rest()
    assert live.response.status_code == 200
    assert token.data == "a"
    assert failure(event, live.response)["code"] == "internal_error"
    assert "canary" not in live.raw.decode()
    await grok.calls[0].hung_up()
    mistake_is_logged(caplog)


# The code of each outcome is tested somewhere: here, for Grok's in test_refusals, or
ELSEWHERE = {
    "connect_timeout", "first_token_timeout", "idle_timeout", "stream_timeout",  # test_timeouts
    "upstream_cut_off", "empty_answer",  # test_chat
    "draining",  # test_shutdown
    "tool_limit",  # test_searches
    "model_not_found",  # test_openai
    "auth_unavailable",  # test_identity
    "budget_spent",  # test_budgets
    "invalid_last_event_id", "stopped", "abandoned", "replay_lost", "store_unavailable",  # resumable answers
    "headers_too_large", "body_timeout",  # the tests of what is no chat at all
}  # fmt: skip


def test_table_is_complete() -> None:
    """No outcome is missing from the tables, and none has a second name."""

    def outcomes(kind: type[errors.ChatError]) -> list[type[errors.ChatError]]:
        return [kind] if "code" in vars(kind) else [last for sub in kind.__subclasses__() for last in outcomes(sub)]

    codes = [kind.code for kind in outcomes(errors.ChatError)]
    here = {row[3] for row in REFUSALS} | {"internal_error"}
    of_grok = {code for _, (_, code, _) in ANSWERS.values()} | {UNREACHABLE[1]}
    assert sorted(codes) == sorted(here | of_grok | ELSEWHERE)


async def test_table_of_grok_holds_for_errors_in_the_stream(grok: Upstream, service: InProcessService) -> None:
    """Grok's words stay here also when the error comes after the first token."""
    said = {"code": "canary", "error": f"canary of team {TEAM} with {KEY}"}
    grok.set_scripts(stream("a", frame(said)))
    async with service.asking() as live:
        token, event = await live.rest()
    assert token.data == "a"
    assert failure(event, live.response)["code"] == "upstream_error"
    assert [secret for secret in ("canary", TEAM, KEY) if secret in live.raw.decode()] == []
