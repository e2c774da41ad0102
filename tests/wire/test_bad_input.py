"""Whatever a caller sends, the answer is a clear JSON error that quotes nothing, and Grok is not called."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.conftest import HI, InProcessService, refusal, serving
from tests.readers import answer
from tests.upstream import Upstream, stream

pytestmark = pytest.mark.anyio

USER = {"role": "user", "content": "canary"}


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, max_body_bytes=50_000, max_messages=5) as service:
        yield service


def body(**fields: object) -> bytes:
    return json.dumps({"messages": [USER], **fields}).encode()


def content(literal: bytes) -> bytes:
    """A body whose one content is this JSON text."""
    return b'{"messages": [{"role": "user", "content": ' + literal + b"}]}"


NOT_JSON = {
    "nothing": b"",
    "a blank": b" ",
    "cut short": b'{"messages": [{"role": "user", "content": "canary"}',
    "a word": b"canary",
    "NaN": b'{"messages": NaN}',
    "single quotes": b"{'messages': []}",
    "a trailing comma": body()[:-1] + b",}",
    "something after it": body() + b" canary",
    "two of them": body() + body(),
    "a raw line break in a string": content(b'"a\nb"'),
    "a bad escape": content(rb'"\x41"'),
    "Latin-1": content('"caf\xe9"'.encode("latin-1")),
    "UTF-16": body().decode().encode("utf-16"),
    "an encoded surrogate": content(b'"\xed\xa0\xbd"'),
    "an overlong encoding": content(b'"\xc0\xaf"'),
    "not UTF-8 where nobody looks": body()[:-1] + b', "x": "\xff"}',
    "nested too deep where nobody looks": body()[:-1] + b', "x": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "objects nested too deep": body()[:-1] + b', "x": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
}


@pytest.mark.parametrize("sent", NOT_JSON.values(), ids=NOT_JSON.keys())
async def test_not_json(grok: Upstream, service: InProcessService, sent: bytes) -> None:
    """What is not JSON in UTF-8, or nested too deep, is a 400."""
    response = await post(service, sent)
    problem = refusal(response)
    assert (response.status_code, problem["code"], problem["param"]) == (400, "invalid_json", None)
    assert "canary" not in response.text
    assert grok.calls == []


WRONG_SHAPES = {
    "null": (b"null", None),
    "a list": (b"[]", None),
    "a string": (b'"canary"', None),
    "10,000 nested arrays": (b"[" * 10_000 + b"]" * 10_000, None),
    "an empty object": (b"{}", "messages"),
    "no messages": (body(messages=[]), "messages"),
    "null messages": (body(messages=None), "messages"),
    "messages that are no list": (body(messages={"0": USER}), "messages"),
    "a message that is no object": (body(messages=[USER, "canary"]), "messages[1]"),
    "a message without a role": (body(messages=[{"content": "canary"}]), "messages[0].role"),
    "a message without content": (body(messages=[{"role": "user"}]), "messages[0].content"),
    "an unknown role": (body(messages=[USER, USER, {"role": "canary", "content": "a"}]), "messages[2].role"),
    "a role of Grok's that is not ours": (body(messages=[{"role": "tool", "content": "a"}]), "messages[0].role"),
    "a role that is no string": (body(messages=[{"role": 1, "content": "a"}]), "messages[0].role"),
    "empty content": (content(b'""'), "messages[0].content"),
    "null content": (content(b"null"), "messages[0].content"),
    "a number as content": (content(b"5"), "messages[0].content"),
    "a list of parts as content": (content(b'[{"type": "text", "text": "canary"}]'), "messages[0].content"),
    "nested arrays as content": (content(b"[" * 10_000 + b"]" * 10_000), "messages[0].content"),
    "a number as sessionId": (body(sessionId=5), "sessionId"),
    "a huge number as sessionId": (body()[:-1] + b', "sessionId": 1e999}', "sessionId"),
    "a long number as sessionId": (body()[:-1] + b', "sessionId": ' + b"9" * 5_000 + b"}", "sessionId"),
    "a string as include": (body(include="reasoning"), "include"),
    "an unknown include": (body(include=["finish", "canary"]), "include[1]"),
    "a string as resumable": (body(resumable="canary"), "resumable"),
    "a number as resumable": (body(resumable=1), "resumable"),
}


@pytest.mark.parametrize(("sent", "param"), WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
async def test_wrong_shape(grok: Upstream, service: InProcessService, sent: bytes, param: str | None) -> None:
    """JSON of the wrong shape is a 422 that names the field."""
    response = await post(service, sent)
    problem = refusal(response)
    assert (response.status_code, problem["code"], problem["param"]) == (422, "invalid_request", param)
    assert param is None or param in problem["message"]
    assert "canary" not in response.text
    assert grok.calls == []


@pytest.mark.parametrize(
    "media_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/jsonp"]
)
async def test_other_media_types(grok: Upstream, service: InProcessService, media_type: str | None) -> None:
    """A body of another type, which a page may send without a preflight, is refused unread."""
    headers = {} if media_type is None else {"Content-Type": media_type}
    response = await service.client.post("/api/chat", content=body(), headers=headers)
    assert (response.status_code, refusal(response)["code"]) == (415, "unsupported_media_type")
    assert grok.calls == []


async def test_too_large(grok: Upstream, service: InProcessService) -> None:
    """A body over the limit is refused, with a length or without, and before it has been sent."""
    large = body(messages=[{"role": "user", "content": "x" * 50_000}])

    async def pieces() -> AsyncIterator[bytes]:
        yield large

    json_type = {"Content-Type": "application/json"}
    for response in (
        await post(service, large),
        await service.client.post("/api/chat", content=pieces(), headers=json_type),
    ):
        assert (response.status_code, refusal(response)["code"]) == (413, "body_too_large")
    async with service.caller() as caller:
        await caller.post(b"", Content_Length="1000000000")
        assert (await caller.head())[0] == 413
    assert grok.calls == []


@pytest.mark.parametrize("sent", [b"{}", b"[]"])
async def test_nothing_but_structure(sent: bytes) -> None:
    """A large body that is nothing but structure holds up nobody: what is not known is skipped, not built."""
    large = body()[:-1] + b', "x": [' + b",".join([sent] * 300_000) + b"]}"
    loop = asyncio.get_running_loop()
    async with Upstream() as grok, serving(grok.url) as service:
        began = loop.time()
        allowed = await post(service, large)
        assert loop.time() - began < 1
    assert answer(allowed.content) == "Hello, world"


HALVES = {
    "a first half": (rb"cut \ud83d", "cut \ufffd"),
    "a second half": (rb"\ude00 cut", "\ufffd cut"),
    "halves in the wrong order": (rb"\ude00\uD83D", "\ufffd\ufffd"),
    "a half after a whole one": (rb"\ud83d\ude00\uD83d!", "\U0001f600\ufffd!"),
    "an escaped backslash before": (rb"\\ud83d \ud83d", "\\ud83d \ufffd"),
    "a half before an escape": (rb"\ud83d\n\u0041", "\ufffd\nA"),
}


@pytest.mark.parametrize(("escaped", "mended"), HALVES.values(), ids=HALVES.keys())
async def test_half_an_emoji(grok: Upstream, service: InProcessService, escaped: bytes, mended: str) -> None:
    """What JavaScript makes of a text that it cuts inside an emoji reaches Grok as U+FFFD."""
    grok.set_scripts(stream("ok"))
    assert (await post(service, content(b'"' + escaped + b'"'))).status_code == 200
    assert grok.calls[0].body["messages"][-1]["content"] == mended


@pytest.mark.parametrize("field", [rb'"x": "\ud83d"', rb'"x": {"\udc00": ["\ud83d"]}', rb'"sessionId": "\ud83d"'])
async def test_half_an_emoji_elsewhere(grok: Upstream, service: InProcessService, field: bytes) -> None:
    """Nor does one in another field make the conversation invalid, whether or not anybody reads it."""
    grok.set_scripts(stream("ok"))
    assert (await post(service, body()[:-1] + b", " + field + b"}")).status_code == 200
    assert len(grok.calls) == 1


async def test_other_codings(grok: Upstream, service: InProcessService) -> None:
    """A compressed body is another media type; a byte order mark is none of the JSON."""
    grok.set_scripts(stream("ok"))
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    packed = await service.client.post("/api/chat", content=gzip.compress(body()), headers=headers)
    assert (packed.status_code, refusal(packed)["code"]) == (415, "unsupported_media_type")
    assert grok.calls == []
    assert (await post(service, b"\xef\xbb\xbf" + body())).status_code == 200
    grok.set_scripts()


async def test_too_many_messages(grok: Upstream, service: InProcessService) -> None:
    """One message over the limit is refused."""
    response = await post(service, body(messages=HI * 6))
    assert (response.status_code, refusal(response)["code"]) == (413, "too_many_messages")
    assert grok.calls == []


@pytest.mark.parametrize("accept", ["text/html", "image/png, text/plain", "application/xml;q=0.5"])
async def test_not_acceptable(grok: Upstream, service: InProcessService, accept: str) -> None:
    """Who takes neither an event stream nor JSON is told so."""
    response = await service.ask(headers={"Accept": accept})
    assert (response.status_code, refusal(response)["code"]) == (406, "not_acceptable")
    assert grok.calls == []


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD"])
async def test_other_methods_of_other_paths(service: InProcessService, method: str) -> None:
    """Another method gets a 405 that says what is allowed."""
    response = await service.client.request(method, "/api/chat")
    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"
    if method != "HEAD":
        assert refusal(response)["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    "path", ["/api/chat/", "/api", "/api/", "/chat", "/api/chat/x/y/z", "/healthz/", "/%00", "/nowhere"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_other_paths(grok: Upstream, service: InProcessService, method: str, path: str) -> None:
    """Another path is a 404 in JSON; a trailing slash is never redirected."""
    response = await service.client.request(method, path, json={"messages": HI})
    assert (response.status_code, refusal(response)["code"]) == (404, "not_found")
    assert "Location" not in response.headers
    assert grok.calls == []


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(body(sessionId=None, include=None, resumable=None), id="nulls"),
        pytest.param(body(resumable=False, include=[], sessionId=""), id="empty"),
        pytest.param(body(messages=HI * 5), id="as many messages as allowed"),
        pytest.param(
            body()[:-1] + b', "x": 1e999, "y": -1e-999, "z": ' + b"9" * 5_000 + b"}", id="huge numbers nobody uses"
        ),
        pytest.param(content(rb'"\ud83d\ude00"'), id="a pair of surrogates"),
        pytest.param(body()[:-1] + b', "x": ' + b"[" * 99 + b"]" * 99 + b"}", id="nested deep"),
        pytest.param(content(b'"' + rb"[{\"" * 101 + b'"'), id="brackets in a text"),
        pytest.param(
            content(rb'"a\\"')[:-1] + b', "sessionId": "' + b"[" * 101 + b'"}',
            id="brackets after a text that ends in \\",
        ),
        pytest.param(b"\n " + body() + b"\r\n", id="blanks around it"),
        pytest.param(body()[:-1] + b" " * (50_000 - len(body())) + b"}", id="as large as allowed"),
    ],
)
@pytest.mark.parametrize("media_type", ["application/json", "Application/JSON; charset=UTF-8"])
async def test_odd_but_right(grok: Upstream, service: InProcessService, sent: bytes, media_type: str) -> None:
    """What keeps to the rules is answered, odd as it may look."""
    grok.set_scripts(stream("ok"))
    response = await service.client.post("/api/chat", content=sent, headers={"Content-Type": media_type})
    assert answer(response.content) == "ok"
    assert len(grok.calls) == 1


async def post(service: InProcessService, sent: bytes) -> httpx.Response:
    return await service.client.post("/api/chat", content=sent, headers={"Content-Type": "application/json"})
