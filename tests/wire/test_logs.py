"""One log line for each request, when it ends, and one for each resumable answer, when it ends."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.conftest import HI, KEY, SubprocessService, serving, spawned
from tests.upstream import CLOSE, HANG, Gate, Script, Upstream, chunk, error, frame, sse, stream

pytestmark = pytest.mark.anyio

Line = dict[str, Any]


def parsed_json(line: str) -> Line:
    parsed: Line = json.loads(line)
    assert parsed.pop("logger").split(".")[0] in ("chatproxy", "uvicorn")
    return parsed


def parsed_text(line: str) -> Line:
    """`<time> <level> <message> name=value ...`; numbers are numbers."""
    time, level, rest = line.split(" ", 2)
    message, *pairs = re.split(r" (?=[a-z_]+=)", rest)
    fields = dict(pair.split("=", 1) for pair in pairs)
    numbers = {name: json.loads(text) for name, text in fields.items() if re.fullmatch(r"\d+(\.\d+)?", text)}
    return {"time": time, "level": level, "message": message, **fields, **numbers}


FORMATS: dict[str, Callable[[str], Line]] = {"json": parsed_json, "text": parsed_text}


class Log:
    """What the service writes, line by line."""

    def __init__(self, service: SubprocessService, parse: Callable[[str], Line]) -> None:
        self._service = service
        self._parse = parse

    def lines(self, message: str) -> list[Line]:
        """The lines with this message so far."""
        complete = self._service.stderr.splitlines(keepends=True)
        lines = [self._parse(line[:-1]) for line in complete if line.endswith("\n")]
        return [line for line in lines if line["message"] == message]

    def _about(self, request_id: str, message: str) -> list[Line]:
        return [line for line in self.lines(message) if line.get("request_id") == request_id]

    async def of(self, request_id: str, message: str = "request") -> Line:
        """The one line about this request, once it is there. What is always in it is checked, and taken out."""
        async with asyncio.timeout(5):
            while not (found := self._about(request_id, message)):  # noqa: ASYNC110 -- nobody tells when it grows
                await asyncio.sleep(0.01)
        [line] = found
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
        assert (line.pop("level"), line.pop("message"), line.pop("request_id")) == ("info", message, request_id)
        if message == "request":
            assert line.pop("client") == "127.0.0.1"
            assert 0 <= line.pop("ms", 0) < 60_000
        return line


@asynccontextmanager
async def logging(grok: Upstream, log_format: str, **changes: Any) -> AsyncIterator[tuple[SubprocessService, Log]]:
    async with spawned(grok.url, log_format=log_format, grok_retries=0, **changes) as service:
        yield service, Log(service, FORMATS[log_format])


formats = pytest.mark.parametrize("log_format", FORMATS)

CHAT = {"method": "POST", "route": "/api/chat"}
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "reasoning_tokens": 5}


@formats
async def test_lines_of_chats(log_format: str) -> None:
    """The line tells the end and the counts; it comes with the end, and not before."""
    gate = Gate()
    async with Upstream(stream("a", gate, "b")) as grok, logging(grok, log_format) as (service, log):
        async with service.asking(headers={"X-Request-ID": "done"}) as live:
            await live.event()
            assert (await service.client.get("/openapi.json", headers={"X-Request-ID": "other"})).is_success
            await log.of("other")
            assert [line["request_id"] for line in log.lines("request") if line["route"] == "/api/chat"] == []
            gate.open()
            await live.rest()
        line = await log.of("done")
        assert 0 < line.pop("first_token_ms") < 60_000
        assert line == {**CHAT, "status": 200, "end": "done", "model": "grok-4.3", "deltas": 2, **USAGE}

        grok.set_scripts(stream("a", CLOSE))
        await service.ask(headers={"X-Request-ID": "failed"})
        line = await log.of("failed")
        assert 0 < line.pop("first_token_ms") < 60_000
        cut_off = {"end": "failed", "code": "upstream_cut_off", "model": "grok-4.3", "deltas": 1}
        assert line == {**CHAT, "status": 200, **cut_off}

        grok.set_scripts(error(400, {"error": "Model not found"}))
        await service.ask(headers={"X-Request-ID": "rejected"})
        rejected = {"end": "failed", "code": "upstream_rejected", "deltas": 0}
        assert await log.of("rejected") == {**CHAT, "status": 502, **rejected}

        grok.set_scripts(stream("a", "b", HANG))
        async with service.asking(headers={"X-Request-ID": "left"}) as live:
            await live.event()
            await live.event()
        line = await log.of("left")
        assert 0 < line.pop("first_token_ms") < 60_000
        assert line == {**CHAT, "status": 200, "end": "left", "model": "grok-4.3", "deltas": 2}

        grok.set_scripts([HANG])
        async with service.caller() as caller:
            await caller.post({"messages": HI}, X_Request_ID="early")
            await grok.call()
        assert await log.of("early") == {**CHAT, "end": "left", "deltas": 0}


@formats
async def test_lines_of_other_requests(log_format: str) -> None:
    """Whatever is asked, and however it is refused, there is one line; a path that is no route is not repeated."""
    async with Upstream() as grok, logging(grok, log_format) as (service, log):
        asked = {
            "openapi": ("GET", "/openapi.json", {"route": "/openapi.json", "status": 200}),
            "nowhere": ("GET", "/canary?canary", {"route": "-", "status": 404, "code": "not_found"}),
            "invalid": ("POST", "/api/chat", {**CHAT, "status": 415, "code": "unsupported_media_type"}),
            "unknown": (
                "GET",
                f"/api/chat/canary{'0' * 16}/stream",
                {"route": "/api/chat/{id}/stream", "status": 404, "code": "stream_not_found"},
            ),
            "stop": ("DELETE", "/api/chat/canary", {"route": "/api/chat/{id}", "status": 204}),
        }
        for request_id, (method, path, expected) in asked.items():
            await service.client.request(method, path, headers={"X-Request-ID": request_id})
            assert await log.of(request_id) == {"method": method, **expected}
        made = (await service.client.get("/", headers={"X-Request-ID": "in\tsane"})).headers["X-Request-ID"]
        assert (await log.of(made))["route"] == "/"
        assert "canary" not in service.stderr


@formats
async def test_lines_of_resumable_answers(log_format: str) -> None:
    """Each reader has a line, and the answer one of its own, when it ends."""
    gate = Gate()
    async with Upstream(stream("a", gate, "b")) as grok, logging(grok, log_format) as (service, log):
        created = await service.ask(headers={"X-Request-ID": "created", "Accept": "application/json"})
        assert await log.of("created") == {**CHAT, "status": 201}
        read = {"method": "GET", "route": "/api/chat/{id}/stream", "status": 200}
        async with service.caller() as caller:
            path = created.json()["url"]
            await caller.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: left\r\n\r\n".encode())
            await caller.until(b"data: a\n")
        assert await log.of("left") == {**read, "end": "left"}
        assert log.lines("stream ended") == []
        gate.open()
        await service.client.get(path, headers={"X-Request-ID": "read"})
        assert await log.of("read") == {**read, "end": "done"}
        await service.ask(resumable=True, headers={"X-Request-ID": "streamed"})
        assert await log.of("streamed") == {**CHAT, "status": 200, "end": "done"}
        line = await log.of("created", "stream ended")
        assert 0 < line.pop("first_token_ms") < 60_000
        assert line == {"end": "done", "model": "grok-4.3", "deltas": 2, **USAGE}

        await log.of("streamed", "stream ended")
        ended = len(log.lines("stream ended"))
        grok.set_scripts(error(400, {"error": "Model not found"}))
        await service.ask(resumable=True, headers={"X-Request-ID": "refused"})
        rejected = {"end": "failed", "code": "upstream_rejected"}
        assert await log.of("refused") == {**CHAT, "status": 502, **rejected}
        assert len(log.lines("stream ended")) == ended


async def test_done_is_done() -> None:
    """Who leaves as soon as the end marker is there has seen it all, though Grok is slow to close."""
    held = [*stream("a")[:-1], HANG]  # all of the answer, but for the end of the body
    async with Upstream(held) as grok, logging(grok, "json") as (service, log):
        async with service.caller() as caller:
            await caller.post({"messages": HI}, X_Request_ID="done")
            await caller.until(b"data: [DONE]\n\n")
        line = await log.of("done")
    assert (line["end"], "code" in line) == ("done", False)


@pytest.mark.parametrize(("level", "count"), [("debug", 2), ("info", 1), ("warning", 0)])
async def test_level(level: str, count: int) -> None:
    """LOG_LEVEL decides what is written; requests are `info`, health checks `debug`."""
    async with Upstream() as grok, logging(grok, "json", log_level=level) as (service, log):
        await service.ask()
        service.process.terminate()
        await service.exit_code()
        assert len(log.lines("request")) >= count == min(count, len(log.lines("request")))


# What Grok's own words become.

UUID = "3f2504e0-4f89-11d3-9a0c-0305e82c3301"
PRIVATE = [
    KEY,
    "xai-0123456789abcdef",
    "in***ey",
    UUID,
    UUID.upper(),
    "10.1.2.3",
    "2001:db8:1:2:3:4:5:6",
    "https://console.x.ai/team/7",
    "someone@x.example",
]


async def complaints(grok: Upstream, *scripts: Script) -> list[str]:
    """What is logged of these answers of Grok's."""
    async with logging(grok, "json") as (service, log):
        for number, script in enumerate(scripts):
            grok.set_scripts(script)
            await service.ask("hello", headers={"X-Request-ID": str(number)})
            await log.of(str(number))
        lines = [json.loads(line) for line in service.stderr.splitlines()]
    lines = [line for line in lines if line["level"] in ("warning", "error")]
    assert [line["request_id"] for line in lines] == [str(number) for number, _ in enumerate(scripts)]
    return [line["message"] for line in lines]


WORDS = {
    "short words": "my pin is 123 and 9",
    "Chinese": "\u6211\u7684\u5bc6\u7801\u662f\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341",
    "Cyrillic": "\u043c\u043e\u0439 \u043f\u0430\u0440\u043e\u043b\u044c",
    "cut in a word": "My passphr",
    "escaped": r"my \u0070\u0069\u006e",
    "secrets": ", ".join(PRIVATE),
    "a line break": "my\nstatus=200 end=done",
}


@formats
@pytest.mark.parametrize("level", ["debug", "info"])
async def test_words_of_grok(log_format: str, level: str) -> None:
    """No word of Grok's is logged, whatever it quotes and wherever: in message or code, before and in the answer."""
    bodies: list[Any] = []
    for word in WORDS.values():
        quoted = f"Too much of {word} for you"
        bodies += [{"code": "invalid-argument", "error": quoted}, {"code": quoted, "error": "x"}, quoted]
        bodies += [{"error": {"message": quoted, "code": quoted}}, {"error": quoted}]
    bodies += [{"code": 123, "error": "x"}, {"error": {"code": 731, "message": "x"}}, {"code": "731", "error": "x"}]
    async with (
        Upstream() as grok,
        logging(grok, log_format, log_level=level, system_prompt="Obey canary-zebra.") as (
            service,
            _,
        ),
    ):
        for body in bodies:
            for status in (400, 403, 429, 500):
                grok.set_scripts(error(status, body))
                await service.ask("my pin is 123 and 9")
            grok.set_scripts(stream("a", frame(body)))
            await service.ask()
        service.process.terminate()
        await service.exit_code()
        for word in [*WORDS.values(), *PRIVATE, "zebra", "Too much", "pin is", "passphr"]:
            for written in (word, json.dumps(word)[1:-1], ascii(word)[1:-1]):
                assert written not in service.stderr
        assert set(re.findall(r"code (\d+)", service.stderr)) == set()
        assert "status 400" in service.stderr
        assert "'invalid-argument'" in service.stderr
        assert "code 'unknown'" in service.stderr


async def test_known_sentences(grok: Upstream) -> None:
    """What a refusal is about is told by a name from a fixed list."""
    said = {
        "Incorrect API key provided: in***ey.": "wrong API key",
        "Your team 7 has used all available credits": "no credits",
        "Model grok-9 does not support parameter reasoningEffort.": "parameter refused",
        "My own words": "none known",
    }
    logged = await complaints(grok, *(error(400, {"code": 7, "error": text}) for text in said))
    assert [
        line for line, name in zip(logged, said.values(), strict=True) if f"code 7, sentence {name!r}" not in line
    ] == []


async def test_endless_words_of_grok(grok: Upstream) -> None:
    """A message or a code as long as may be takes no time and no room."""
    long = "x" * 60_000
    bodies: list[object] = [{"error": long}, {"code": long, "error": "x"}, {"error": "a:" * 30_000}]
    loop = asyncio.get_running_loop()
    async with serving(grok.url, grok_retries=0) as service:
        for body in bodies:
            grok.set_scripts(error(500, body))
            began = loop.time()
            assert (await service.ask()).status_code == 502
            assert loop.time() - began < 0.5
    assert [len(logged) < 300 for logged in await complaints(grok, *(error(500, body) for body in bodies))] == [
        True
    ] * 3


async def test_malformed_frame(grok: Upstream) -> None:
    """Of a malformed frame only a length is logged."""
    [logged] = await complaints(grok, sse(frame(chunk({"content": "a"})), b"data: {canary\n\n"))
    assert re.fullmatch(r"upstream_error: malformed frame, in a read of \d+ bytes", logged)
