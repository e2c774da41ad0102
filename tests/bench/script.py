"""What the upstream plays and what must arrive: the tokens, their frames, and the check of an answer.

Knows bytes. Does not know sockets, processes or time.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

# A bit of everything models emit: leading spaces, markdown, line breaks inside a token, bare white space,
# characters that are no line breaks but look like it to str.splitlines(), and more than one byte each.
TEXT = (
    'A **relay** moves tokens, one after another, and "adds nothing of its own":\n\n'
    "- it reads a piece of whatever length the network chose,\n"
    "- finds the events in it (there may be none, one, or many),\n"
    "- and writes each text down at once.  \n\n"
    "```python\nfor event in events:\n    write(event)\n```\n\n"
    "Na\u00efve caf\u00e9s \u2014 \u4f60\u597d, \U0001f680, a\u2028separator \u2014 cost a few bytes more. "
    "Everything else is the price of looking at it: of waking up, of asking the kernel, of going back to sleep. "
)
TOKENS = re.findall(r" ?\w+|[^\w\s]+\n*|\s+", TEXT)

# The end of an event in either format. No token of the script breaks a line in two frames,
# so that tokens can be counted in what a socket gave before anything is parsed.
FRAME_END = b"\n\n"

# Gives the texts in some events, and the done marker.
Reader = Callable[[bytes], Iterator[str]]

# No token reads like this.
DONE = "[DONE]"

# The end of a body in chunked coding.
BODY_END = b"\r\n0\r\n\r\n"


class WrongAnswerError(Exception):
    """What arrived is not what the script says."""


def answer(tokens: int) -> str:
    """The text of so many tokens."""
    rounds, rest = divmod(tokens, len(TOKENS))
    return TEXT * rounds + "".join(TOKENS[:rest])


def chunk(choices: list[dict[str, Any]], **more: object) -> bytes:
    """One chat completion chunk as xAI frames it, in one piece of chunked coding."""
    document = {
        "id": "3a946c8f-98f8-9c0e-85e9-a4bdcd618381",
        "object": "chat.completion.chunk",
        "created": 1780935029,
        "model": "grok-4.3",
        "choices": choices,
        **more,
        "system_fingerprint": "fp_eb3c003fc66c14ed",
        "service_tier": "default",
    }
    return piece(b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n")


def piece(data: bytes) -> bytes:
    """One chunk of HTTP's chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
FIRST = chunk([{"index": 0, "delta": {"role": "assistant", "content": TOKENS[0]}}])
FRAMES = [chunk([{"index": 0, "delta": {"content": token}}]) for token in TOKENS]
TAIL = (
    chunk([{"index": 0, "delta": {}, "finish_reason": "stop"}])
    + chunk([], usage={"prompt_tokens": 7, "completion_tokens": 7, "total_tokens": 14})
    + piece(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)


def event(kind: str, **fields: object) -> bytes:
    """One event of the Responses API as xAI frames it, in one piece of chunked coding."""
    document = {"sequence_number": 10, "type": kind, **fields}
    data = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return piece(f"event: {kind}\ndata: {data}\n\n".encode())


def delta(token: str) -> bytes:
    """A token on the Responses API."""
    item = "msg_3a946c8f-98f8-9c0e-85e9-a4bdcd618381"
    kind = "response.output_text.delta"
    return event(kind, content_index=0, delta=token, item_id=item, output_index=0, logprobs=[])


MESSAGE = {"type": "message", "id": "msg_3a946c8f-98f8-9c0e-85e9-a4bdcd618381", "role": "assistant"}
RESPONSE = {"id": "3a946c8f-98f8-9c0e-85e9-a4bdcd618381", "object": "response", "model": "grok-4.3"}
OPENING = event("response.created", response=RESPONSE) + event(
    "response.output_item.added", output_index=0, item={**MESSAGE, "content": []}
)


@dataclass(frozen=True)
class Wire:
    """The frames of the tokens on one of xAI's APIs."""

    first: bytes
    frames: list[bytes]
    tail: Callable[[int], bytes]
    """What follows so many tokens."""
    round: bytes = b""

    def __post_init__(self) -> None:
        object.__setattr__(self, "round", b"".join(self.frames))


def response_tail(tokens: int) -> bytes:
    """The end of an answer, which repeats its text."""
    item = {**MESSAGE, "content": [{"type": "output_text", "text": answer(tokens), "annotations": []}]}
    usage = {"input_tokens": 7, "output_tokens": 7, "total_tokens": 14}
    response = {**RESPONSE, "output": [item], "usage": usage}
    return (
        event("response.output_item.done", output_index=0, item=item)
        + event("response.completed", response=response)
        + b"0\r\n\r\n"
    )


CHAT = Wire(FIRST, FRAMES, lambda _: TAIL)
RESPONSES = Wire(OPENING + delta(TOKENS[0]), [delta(token) for token in TOKENS], response_tail)


def frames(start: int, count: int, wire: Wire = CHAT) -> bytes:
    """The upstream's bytes for so many tokens from the one numbered `start` on, without head and tail."""
    parts = [wire.first] if start == 0 and count else []
    at, stop = start + len(parts), start + count
    while at < stop:
        here = at % len(wire.frames)
        step = min(len(wire.frames) - here, stop - at)
        parts.append(wire.round if step == len(wire.frames) else b"".join(wire.frames[here : here + step]))
        at += step
    return b"".join(parts)


def check(received: bytes, *, raw: bool, tokens: int | None = None, read: Reader | None = None) -> int:
    """The number of tokens in an answer whose every byte is as the script has it.

    `raw` says that it is the upstream's own stream (through nginx, say) and not the service's, whose events `read`
    reads if they are not of its own format. With `tokens` the answer must be whole and that long; without, it was cut
    by us and must be right as far as it goes.
    """
    head, begun, coded = received.partition(b"\r\n\r\n")
    if tokens is None and not begun:
        return 0
    if not head.startswith(b"HTTP/1.1 200 ") or b"\r\ntransfer-encoding: chunked" not in head.lower():
        raise WrongAnswerError(f"not an event stream: {head[:200]!r}")
    body, ended = unchunk(coded)
    events, _, rest = body.rpartition(FRAME_END)
    read = texts_of_upstream if raw else read or texts_of_service
    texts = list(read(events))
    done = texts[-1:] == [DONE]
    if done:
        texts.pop()
    if "".join(texts) != answer(len(texts)):
        raise WrongAnswerError(f"the text differs within {len(texts)} tokens")
    if tokens is not None and not (done and ended and not rest and len(texts) == tokens):
        raise WrongAnswerError(f"{len(texts)} of {tokens} tokens, done marker: {done}, tidy end: {ended}")
    return len(texts)


def unchunk(coded: bytes) -> tuple[bytes, bool]:
    """A body out of its chunked coding, as far as it goes, and whether it ended."""
    pieces, at = [], 0
    while (line := coded.find(b"\r\n", at)) >= 0:
        if not re.fullmatch(rb"[0-9a-fA-F]+", coded[at:line]):
            raise WrongAnswerError("chunked coding is broken")
        size = int(coded[at:line], 16)
        start, at = line + 2, line + 4 + size
        pieces.append(coded[start : start + size])
        if at > len(coded):
            break
        if coded[at - 2 : at] != b"\r\n":
            raise WrongAnswerError("chunked coding is broken")
        if size == 0:
            return b"".join(pieces), True
    return b"".join(pieces), False


def texts_of_upstream(events: bytes) -> Iterator[str]:
    """The text of each of the upstream's chunks that has one, and the done marker."""
    for event in filter(None, events.split(FRAME_END)):
        data = event.removeprefix(b"data: ")
        if data == DONE.encode():
            yield DONE
            continue
        for choice in json.loads(data)["choices"]:
            if "content" in choice["delta"]:
                yield choice["delta"]["content"]


def texts_of_service(events: bytes) -> Iterator[str]:
    """The text of each of the service's events, the done marker included."""
    for event in filter(None, events.split(FRAME_END)):
        lines = event.split(b"\n")
        if not all(line.startswith(b"data: ") for line in lines):
            raise WrongAnswerError(f"not an event of data alone: {event[:80]!r}")
        yield b"\n".join(line[6:] for line in lines).decode()


def texts_of_resumable(events: bytes) -> Iterator[str]:
    """The same where the events are numbered: from 0, which has no text, without a gap."""
    for number, event in enumerate(filter(None, events.split(FRAME_END))):
        data, _, identifier = event.rpartition(b"\nid: ")
        if not identifier.endswith(b"-%d" % number):
            raise WrongAnswerError(f"event {number} has the number {identifier[-40:]!r}")
        if number:
            yield from texts_of_service(data)


def texts_of_ui_messages(events: bytes) -> Iterator[str]:
    """The text of each of a UI message stream's deltas, and the done marker."""
    for event in filter(None, events.split(FRAME_END)):
        data = event.removeprefix(b"data: ")
        if data == DONE.encode():
            yield DONE
        elif (chunk := json.loads(data))["type"] == "text-delta":
            yield chunk["delta"]
