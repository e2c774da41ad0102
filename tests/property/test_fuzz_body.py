"""Whatever the bytes of a body are, they are a chat that is asked as it stands, or a clear refusal and no call."""

import json
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chatproxy.errors import InvalidJSON, InvalidRequest
from chatproxy.formats import Asked
from chatproxy.formats.plain import decode_request
from tests.conftest import HI, InProcessService, refusal, serving
from tests.upstream import Upstream

MAX_BYTES, MAX_MESSAGES = 4_000, 3

GOOD = json.dumps({"messages": [*HI, *HI], "sessionId": "s", "include": ["reasoning"], "resumable": True}).encode()
WORDS = [
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud83d", b"null", b"true", b"1e999", b"-0", b"NaN"),
    *(b'"messages"', b'"role"', b'"content"', b'"user"', b'"system"', b'"include"', b'"finish"', b'"resumable"'),
    *(b'"sessionId"', b" ", b"\n", b"\xff", b"\xed\xa0\xbd", b"\xef\xbb\xbf", b"\0", b"9" * 400, b"[" * 1200),
    *(b'{"role": "user", "content": "a"}', b'"messages": [', b'"\xf0\x9f\x98\x80"'),
]

# Bytes of no kind; JSON in pieces; a good body with pieces cut out and others put in.
soup = st.lists(st.sampled_from(WORDS), max_size=25).map(b"".join)
edits = st.lists(
    st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from([b"", *WORDS]) | st.binary(max_size=3)),
    min_size=1,
    max_size=3,
)

# JSON in much the right shape, but for what is in it.
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner), max_leaves=5
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | values,
        "content": st.text(max_size=10) | values,
        "name": values,
    },
)
shapes = st.fixed_dictionaries(
    {"messages": st.lists(messages | values, max_size=4) | values},
    optional={
        "sessionId": st.text() | values,
        "include": st.lists(st.sampled_from(["reasoning", "finish", "x"]), max_size=3) | values,
        "resumable": st.booleans() | values,
        "model": values,
    },
)


def edited(changes: list[tuple[int, int, bytes]]) -> bytes:
    body = GOOD
    for start, length, put in changes:
        body = body[:start] + put + body[start + length :]
    return body


bodies = st.one_of(st.binary(max_size=50), soup, edits.map(edited), (shapes | values).map(json.dumps).map(str.encode))

PARAM = re.compile(r"(messages(\[\d+\](\.(role|content))?)?|sessionId|include(\[\d+\])?|resumable|Idempotency-Key)")


@given(body=bodies)
@example(GOOD)
@example(b"[" * 100_000)
@example(b'{"messages":' * 50_000)
@example(GOOD[:-1] + b', "x": ' + b"9" * 10_000 + b"}")
@settings(max_examples=1000, deadline=None)
def test_decoding(body: bytes) -> None:
    """A body is the chat that another reader of JSON finds in it, or one of two errors, which name our fields only."""
    asked = outcome(body)
    if isinstance(asked, Asked):
        sent = read(body)
        assert [{"role": each.role, "content": each.content} for each in asked.chat.messages] == heard(sent)
        assert asked.chat.session_id == mended(sent.get("sessionId"))
        assert asked.resumable == bool(sent.get("resumable"))
    else:
        assert asked.param is None or PARAM.fullmatch(asked.param)
        assert asked.message.endswith(".")


def mended(text: str | None) -> str | None:
    """With U+FFFD in place of each half of a pair."""
    return text and text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def outcome(body: bytes) -> Asked | InvalidJSON | InvalidRequest:
    try:
        return decode_request(body, "id")
    except (InvalidJSON, InvalidRequest) as error:
        return error


def read(body: bytes) -> Any:
    return json.loads(body, parse_int=str, parse_float=str)  # Python makes no numbers of 5,000 digits


def heard(sent: Any) -> list[dict[str, str | None]]:
    """The messages in it, which must be ones."""
    found = [{"role": each["role"], "content": mended(each["content"])} for each in sent["messages"]]
    assert found
    assert all(each["role"] in ("user", "assistant", "system") and each["content"] for each in found)
    return found


def test_many_edits() -> None:
    """So it is for 200,000 more bodies, each a good one with some bytes cut out and others put in."""
    chance = random.Random(0)  # noqa: S311 -- the same bodies each time
    kinds = set()
    for _ in range(200_000):
        edits = [
            (chance.randrange(len(GOOD)), chance.randrange(8), chance.choice((b"", chance.randbytes(1), *WORDS)))
            for _ in range(chance.randrange(1, 4))
        ]
        kinds.add(type(outcome(edited(edits))))
    assert kinds == {Asked, InvalidJSON, InvalidRequest}


@given(chat=st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(min_size=1)), min_size=1))
@settings(max_examples=300, deadline=None)
def test_good_chats(chat: list[tuple[str, str]]) -> None:
    """What is in the right shape is never refused, whatever is said in it."""
    body = json.dumps({"messages": [{"role": role, "content": content} for role, content in chat]})
    assert [(each.role, each.content) for each in decode_request(body.encode(), "id").chat.messages] == chat


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, max_body_bytes=MAX_BYTES, max_messages=MAX_MESSAGES) as service:
        yield service


REFUSALS = {
    (400, "invalid_json"),
    (413, "body_too_large"),
    (413, "too_many_messages"),
    (422, "invalid_request"),
}


@pytest.mark.anyio
@given(body=bodies)
@example(GOOD)
@example(b"[" * MAX_BYTES)
@example(b"[" * (MAX_BYTES + 1))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_asking(grok: Upstream, service: InProcessService, body: bytes) -> None:
    """The answer is 200 and one call with these very messages, or one of four refusals and none; never a 500."""
    grok.set_scripts()
    response = await service.client.post("/api/chat", content=body, headers={"Content-Type": "application/json"})
    if response.status_code == 200:
        [call] = grok.calls
        assert call.body["messages"] == heard(read(body))
        assert set(call.body) == {"messages", "model", "stream", "stream_options"}
    else:
        assert (response.status_code, refusal(response)["code"]) in REFUSALS
        assert grok.calls == []
