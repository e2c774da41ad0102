"""What people say, what Grok says and the key are seen by nobody who runs the service."""

import io
import json
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from chatproxy import logs
from chatproxy.config import load
from chatproxy.events import TextDelta
from chatproxy.formats.plain import decode_request
from chatproxy.services.grok import chat_completions, failures
from tests import responses
from tests.conftest import Service, environment, serving, spawned
from tests.readers import standard
from tests.responses import CREATED
from tests.upstream import CLOSE, HANG, RESET, Script, Upstream, chunk, error, frame, sse, stream
from tests.wire.test_identity import RSA, Provider, forged, provided, settings, token

pytestmark = pytest.mark.anyio

KEY = "xai-canarykey0123456789"
TOKEN = "canarytoken0123456789"  # noqa: S105 -- of this test only
PROMPT = "canaryprompt and something after it"
ANSWER = "canaryanswer"
SESSION = "canarysession"
SYSTEM = "canarysystem"
NAME = "canaryname"
CANARY = "canary"

QUOTES = f"Incorrect API key provided: {KEY}. You said: {PROMPT}. See https://canary.example or mail canary@x.example."

# Every way that Grok may go, each full of canaries.
SCRIPTS: list[Script] = [
    stream(ANSWER, reasoning=[ANSWER]),
    stream(ANSWER, CLOSE),
    stream(ANSWER, RESET),
    stream(finish="length", reasoning=[ANSWER]),
    sse(frame(chunk({"content": ANSWER})), frame({"error": QUOTES, "code": "x"})),
    sse(frame(chunk({"content": ANSWER})), b"data: {" + ANSWER.encode() + b"\n\n"),
    sse(b"data: " + ANSWER.encode() + b"\n\n"),
    sse(frame(chunk({"content": ANSWER}, usage={"prompt_tokens": ANSWER}))),
    error(400, {"code": "invalid-argument", "error": QUOTES}),
    error(400, {"error": {"message": QUOTES, "code": 400}}),
    error(401, QUOTES),
    error(403, {"code": "permission-denied", "error": f"Content violates usage guidelines. {PROMPT}"}),
    error(422, {"error": QUOTES}),
    error(500, f"<html>{QUOTES}</html>"),
    error(503, {"error": QUOTES}),
    error(302, QUOTES, {"Location": "https://canary.example"}),
    error(200, {"choices": [{"message": {"content": ANSWER}}]}),
    [ANSWER.encode(), CLOSE],
]


NOTE = responses.source(f"https://canary.example/{ANSWER}", ANSWER)
FOUND = [*responses.searched(0, ANSWER), *responses.message(1, ANSWER), responses.cited(1, NOTE)]
REFUSAL = {"code": ANSWER, "message": QUOTES}

# The same on the Responses API, where there are searches and sources as well.
RESPONSES: list[Script] = [
    sse(CREATED, *responses.reasoned(2, ANSWER), *FOUND, responses.ended(None, [responses.message_item(ANSWER)])),
    sse(CREATED, *FOUND, CLOSE),
    sse(CREATED, *FOUND, *responses.searched(3, ANSWER)),  # one too many
    sse(CREATED, *FOUND, responses.event("error", **REFUSAL)),
    sse(CREATED, responses.event("error", **REFUSAL)),
    sse(CREATED, responses.failed(ANSWER, QUOTES)),
    sse(CREATED, b"data: {" + ANSWER.encode() + b"\n\n"),
    sse(CREATED, frame({"error": QUOTES, "code": ANSWER})),
    sse(CREATED, responses.delta(0, ANSWER), responses.ended(ANSWER, usage={"input_tokens": ANSWER})),
    sse(CREATED, *[responses.event(f"response.{ANSWER}", delta=ANSWER)] * 2),
    sse(CREATED),
    error(422, {"error": QUOTES}),
    error(200, responses.response(output=[responses.message_item(ANSWER)])),
]


async def every_way(service: Service, scripts: list[Script]) -> list[httpx.Response]:
    """Everything that a caller may do, full of canaries; gives the answers that are no streams."""
    fields = {"sessionId": SESSION, CANARY: CANARY}
    headers = {"Authorization": f"Bearer {TOKEN}", "Idempotency-Key": CANARY}
    answers = []
    for resumable in (False, True):
        for number, _ in enumerate(scripts):
            key = {"Idempotency-Key": f"{CANARY}-{number}-{resumable}"}
            response = await service.ask(PROMPT, resumable=resumable, headers={**headers, **key}, **fields)
            assert all(CANARY not in event.data for event in standard(response.content) if event.type == "error")
            if response.status_code != 200:
                answers.append(response)
    async with service.asking(PROMPT, headers=headers) as live:  # the last script hangs; this one leaves
        await live.event()
    body = json.dumps({"messages": [{"role": "user", "content": PROMPT}]})
    for content in (
        *(f"{{{CANARY}", f'"{CANARY}"', body.replace("user", CANARY), body.replace('"content"', f'"{CANARY}"')),
        *(body[:-1] + f', "include": ["{CANARY}"]}}', body[:-1] + f', "resumable": "{CANARY}"}}', body * 2),
        *(body[:-1] + f', "tools": ["{CANARY}"]}}', body[:-1] + f', "tools": "{CANARY}"}}'),
    ):
        headers["Content-Type"] = "application/json"
        answers.append(await service.client.post("/api/chat", content=content, headers=headers))
    answers += [
        await service.client.post("/api/chat", content=body, headers={**headers, "Content-Type": f"text/{CANARY}"}),
        await service.client.post("/api/chat", content=body, headers={**headers, "Accept": f"image/{CANARY}"}),
        await service.client.post("/api/chat", content=body, headers={"Authorization": f"Bearer {CANARY}"}),
        await service.client.post(f"/{CANARY}?{CANARY}={CANARY}", content=body),
        await service.client.get(f"/api/chat/{CANARY}/stream", headers={"Last-Event-ID": f"{CANARY}-1"}),
        await service.client.get("/healthz", headers={"X-Request-ID": f"{CANARY} {CANARY}"}),
        await service.client.get("/readyz", headers={"Cookie": CANARY, "User-Agent": CANARY, "Referer": CANARY}),
        await service.client.post("/api/chat", content=body, headers={"Origin": f"https://{CANARY}.example"}),
        await service.client.get("/metrics", headers={"Host": f"{CANARY}.example"}),
        await service.client.request(CANARY.upper(), "/api/chat", content=body),
        await service.client.get("/metrics"),
    ]
    return answers


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize(
    ("transport", "api", "scripts"),
    [("fast", "chat", SCRIPTS), ("httpx", "chat", SCRIPTS), ("fast", "responses", RESPONSES)],
    ids=["fast", "httpx", "responses"],
)
async def test_nowhere(log_format: str, transport: str, api: str, scripts: list[Script]) -> None:
    """Neither in logs at the level of debugging, errors, metrics, nor the list of processes; through every failure."""
    last = stream(ANSWER, HANG) if api == "chat" else responses.answer(ANSWER, HANG)
    grok = Upstream(*scripts, *scripts, last, key=error(400, {"error": QUOTES}))
    async with (
        grok,
        spawned(
            grok.url,
            python=("-X", "dev"),
            grok_api_key=KEY,
            access_tokens=TOKEN,
            system_prompt=SYSTEM,
            grok_transport=transport,
            grok_api=api,
            max_tool_calls=1,
            log_level="debug",
            log_format=log_format,
            grok_retries=0,
            resume_window=0.2,
            drain_timeout=0,
        ) as service,
    ):
        answers = await every_way(service, scripts)
        command = Path(f"/proc/{service.pid}/cmdline").read_bytes()
        async with service.asking(PROMPT, headers={"Authorization": f"Bearer {TOKEN}"}) as live:
            await live.event()
            service.process.send_signal(signal.SIGTERM)
            await live.rest()
        assert await service.exit_code() == 0
    assert len(grok.calls) == 2 * len(scripts) + 2
    for answer in answers:
        assert CANARY not in answer.text
        assert CANARY not in str(answer.headers).lower()
    assert len(service.stderr.splitlines()) > len(grok.calls)
    assert [line for line in service.stderr.splitlines() if CANARY in line.lower()] == []
    assert CANARY.encode() not in command


@pytest.mark.parametrize("log_format", ["text", "json"])
async def test_who_asks_is_nowhere(log_format: str) -> None:
    """Neither a token, good or bad, nor the name that it or a proxy gives, nor what the provider has said."""
    provider = Provider()
    good = token(sub=NAME, jti=CANARY)
    tokens = [
        good,
        token(sub=NAME, exp=1),
        token(sub=NAME, aud=CANARY),
        token(sub=NAME, iss=CANARY),
        token(sub=f"{NAME}\n"),
        token("x" * 64, "HS256", CANARY, sub=NAME),
        token(RSA, "RS256", CANARY, sub=NAME),
        forged({"alg": CANARY, "kid": "rsa"}, {"sub": NAME}),
        forged({"alg": "RS256", "kid": "rsa", "crit": [CANARY]}, {"sub": NAME}),
        forged({"alg": "RS256", "kid": [CANARY]}, CANARY.encode()),
        f"{CANARY}.{CANARY}.{CANARY}",
        *(good.replace(".", f".{CANARY}"), good[:-4] + "AAAA", good.partition(".")[2], CANARY * 2000),
    ]
    parts = [part for each in tokens for part in each.split(".") if len(part) > 4]
    async with Upstream() as grok, provided(provider) as url:
        changes: dict[str, Any] = {
            **settings(f"{url}/{CANARY}"),
            "auth_header": "X-User",
            "grok_api_key": KEY,
            "log_level": "debug",
            "log_format": log_format,
            "rate_limit": "9/day",
        }
        async with spawned(grok.url, python=("-X", "dev"), **changes) as service:
            named = [await service.ask(headers={"X-User": name}) for name in (NAME, NAME * 50)]
            assert [response.status_code for response in named] == [200, 401]
            sent = [await service.ask(headers={"Authorization": f"Bearer {each}"}) for each in tokens]
            assert [response.status_code for response in sent] == [200] + [401] * (len(tokens) - 1)
            metrics = (await service.client.get("/metrics")).text
        provider.reply = b"HTTP/1.1 200 canary\r\nX: canary\r\n\r\ncanary"
        async with spawned(grok.url, **changes) as unready:
            sent.append(await unready.ask(headers={"Authorization": f"Bearer {good}"}))
            assert sent[-1].status_code == 503
    assert "there are no new keys" in unready.stderr
    assert service.stderr.count("a token was refused") == len(tokens) - 1
    answers = "".join(f"{response.text} {response.headers}" for response in (*named, *sent))
    written = service.stderr + unready.stderr + metrics + answers
    assert CANARY not in written.lower()
    assert [part for part in parts if part in written] == []


@pytest.fixture(params=[logs.TextFormatter, logs.JSONFormatter])
def written(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What the service would write to its log."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(request.param())
    logging.getLogger().addHandler(handler)
    yield written
    logging.getLogger().removeHandler(handler)


def broken(*said: object) -> None:
    """A mistake of ours that quotes what it was given."""
    raise ValueError(f"{PROMPT} {said}") from KeyError(KEY)


@pytest.mark.parametrize(
    "place", ["formats.plain.decode_body", "formats.plain.encode_json", "services.grok.chat_completions._encode"]
)
@pytest.mark.parametrize("resumable", [False, True])
async def test_tracebacks(
    place: str,
    resumable: bool,
    written: io.StringIO,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The traceback of a mistake of ours tells where it happened, and nothing that was said."""
    monkeypatch.setattr(f"chatproxy.{place}", broken)
    async with Upstream(stream(ANSWER)) as grok, serving(grok.url, grok_api_key=KEY, log_level="debug") as service:
        response = await service.ask(PROMPT, include=["finish"], resumable=resumable)
    caplog.clear()
    assert "internal_error" in response.text
    errors = [event.data for event in standard(response.content) if event.type == "error"] or [response.text]
    assert CANARY not in errors[0] + written.getvalue().replace(Path(__file__).name, "")
    [line] = [line for line in written.getvalue().splitlines() if "mistake of ours" in line]
    assert "ValueError" in line
    assert f"{Path(__file__).name}:" in line


async def test_reprs() -> None:
    """What holds the key or what was said does not show it."""
    held = {"system_prompt": SYSTEM, "access_tokens": TOKEN, "auth_jwt_secret": CANARY * 6}
    loaded = load(environment("http://localhost/v1", grok_api_key=KEY, **held))
    body = {"messages": [{"role": "user", "content": PROMPT}], "sessionId": SESSION}
    chat = decode_request(json.dumps(body).encode(), "id").chat
    said = chat_completions.Chunk([], error=ANSWER)
    request = chat_completions.CompletionRequest("grok", chat.messages, True, {})
    refused = failures.UpstreamErrorBody(ANSWER, ANSWER)
    for holder in (loaded, chat, chat.messages, said, TextDelta(ANSWER), request, refused):
        assert CANARY not in repr(holder)
        assert len(repr(holder)) > 5
