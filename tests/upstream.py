"""The scripted Grok: a listening socket that plays what a test tells it to.

    async with Upstream(stream("Hel", "lo")) as upstream, serving(upstream.url) as service:
        response = await service.ask("Hi")
        assert upstream.calls[0].body["messages"] == [{"role": "user", "content": "Hi"}]

One script is played per chat call, in order; the last one is played for every call after it. A script is an iterable
of steps, or a function from the `Call` to one (for endless or one-shot iterators). A step is one of

    bytes           written as they are, in one write that the kernel has taken before the next step begins;
                    for a service in the same loop one step is one read
    float           a pause in seconds
    Gate()          played until here: `gate.reached` is set; goes on once the test calls `gate.open()`
    HANG            nothing more, until the caller leaves
    CLOSE, RESET    FIN, RST

A script that ends without CLOSE or RESET leaves the connection open for the next request, as Grok does. `stream` and
`sse` speak transfer-encoding chunked, one transfer chunk for each bytes step; `raw` speaks "until the connection
closes", so that the bytes on the wire are the body and nothing else; `error` is a whole answer with a length.

    stream("a", gate, "b")      role, tokens, finish reason, usage, [DONE]; strings are tokens, dicts are deltas
    stream("a", CLOSE)          cut off after a token; also RESET, HANG
    stream("a", finish="length", usage=False, done=False, reasoning=["hm"])
    sse(frame(chunk({"content": "a"})), b": ping\n\n", 0.1, DONE)
    error(503, {"code": "...", "error": "..."}, {"Retry-After": "3"})

That is Chat Completions; the same for the Responses API is in `tests.responses`. A call of either is a chat call.

What was seen: `upstream.calls` (chat calls only), `upstream.probes` (GET /v1/api-key, answered by `key`),
`upstream.strays` (anything else, answered 404), `upstream.connections`, `upstream.open`, `upstream.playing`;
`upstream.set_scripts(*scripts)` forgets the calls and plays others from then on.
To wait: `await upstream.call(n)`, `await upstream.until(lambda: upstream.playing == 0)`,
`await call.hung_up(within=1)`. All waits fail after a time; an error in a script is raised when the context closes.

`upstream.lose_connections()` drops what arrives on those that are open, as a NAT does that forgot them.

Addresses where nothing answers: `refusing()` (connection refused) and `unreachable()` (it is never made).
"""

import asyncio
import ctypes
import enum
import json
import socket
import ssl
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import urlsplit

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Signal(enum.Enum):
    HANG = "hang"
    CLOSE = "close"
    RESET = "reset"


HANG, CLOSE, RESET = Signal.HANG, Signal.CLOSE, Signal.RESET


class Gate:
    """A place in a script where it waits for the test."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self._open = asyncio.Event()

    def open(self) -> None:
        self._open.set()

    async def pass_through(self) -> None:
        self.reached.set()
        await self._open.wait()


Step = bytes | float | Gate | Signal
Steps = Iterable[Step]
Script = Steps | Callable[["Call"], Steps]


# What Grok says, in the shapes that were recorded.

DONE = b"data: [DONE]\n\n"
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 3,
    "total_tokens": 20,
    "prompt_tokens_details": {"text_tokens": 12, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 4},
    "completion_tokens_details": {
        "reasoning_tokens": 5,
        "audio_tokens": 0,
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 0,
    },
    "num_sources_used": 0,
}
GOOD_KEY = {
    "redacted_api_key": "xai-...0000",
    "name": "test",
    "acls": ["api-key:model:*", "api-key:endpoint:*"],
    "team_blocked": False,
    "api_key_blocked": False,
    "api_key_disabled": False,
}


def chunk(delta: Mapping[str, Any] | None, *, finish: str | None = None, **top: Any) -> dict[str, Any]:
    """One chat completion chunk. A delta of None makes `choices` empty, as in the usage chunk."""
    choice: dict[str, Any] = {"index": 0, "delta": delta}
    if finish is not None:
        choice["finish_reason"] = finish
    return {
        "id": "90807bcd-2c53-997c-a49c-32249e695133",
        "object": "chat.completion.chunk",
        "created": 1780935030,
        "model": "grok-4.3",
        "choices": [] if delta is None else [choice],
        "system_fingerprint": "fp_0000000000",
        "service_tier": "default",
    } | top


def frame(payload: object) -> bytes:
    """One upstream frame: `data: `, one line of JSON in raw UTF-8, a blank line."""
    return b"data: " + json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def frames(
    *deltas: str | Mapping[str, Any] | Step,
    finish: str | None = "stop",
    usage: bool = True,
    done: bool = True,
    reasoning: Iterable[str] = (),
) -> list[Step]:
    """The frames of one answer: `reasoning`, then `deltas` (steps among them stay as they are), then how it ends."""
    played: list[Step] = []
    role: dict[str, Any] = {"role": "assistant"}  # on the first delta, whatever it holds
    for item in [*({"reasoning_content": text} for text in reasoning), *deltas]:
        delta = {"content": item} if isinstance(item, str) else item
        if isinstance(delta, Mapping):
            played.append(frame(chunk({**delta, **role})))
            role = {}
        else:
            played.append(delta)
    if finish is not None:
        played.append(frame(chunk({}, finish=finish)))
    if usage:
        played.append(frame(chunk(None, usage=USAGE)))
    if done:
        played.append(DONE)
    return played


# The HTTP around it.

REASONS = {200: "OK", 302: "Found", 400: "Bad Request", 429: "Too Many Requests", 503: "Service Unavailable"}
EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
END = b"0\r\n\r\n"


def head(status: int = 200, headers: Mapping[str, str] = EVENT_STREAM) -> bytes:
    """A status line and headers, exactly these."""
    lines = [
        f"HTTP/1.1 {status} {REASONS.get(status, 'Whatever')}",
        *(f"{name}: {text}" for name, text in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


STREAM_HEAD = head(200, {**EVENT_STREAM, "Transfer-Encoding": "chunked"})


def piece(data: bytes) -> bytes:
    """One transfer chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def sse(*steps: Step) -> list[Step]:
    """A 200 whose body is the bytes among `steps`, one transfer chunk each; ended tidily unless a signal is first."""
    played: list[Step] = [STREAM_HEAD]
    for step in steps:
        if isinstance(step, Signal):
            return [*played, step]
        if step != b"":  # an empty transfer chunk would be the end
            played.append(piece(step) if isinstance(step, bytes) else step)
    return [*played, END]


def raw(*steps: Step) -> list[Step]:
    """A 200 whose body is the bytes among `steps` as they are, ended by closing the connection."""
    return [head(200, {**EVENT_STREAM, "Connection": "close"}), *steps, CLOSE]


def stream(
    *deltas: str | Mapping[str, Any] | Step,
    finish: str | None = "stop",
    usage: bool = True,
    done: bool = True,
    reasoning: Iterable[str] = (),
) -> list[Step]:
    """A whole answer as Grok streams it (see `frames`)."""
    return sse(*frames(*deltas, finish=finish, usage=usage, done=done, reasoning=reasoning))


def error(status: int, body: object, headers: Mapping[str, str] | None = None) -> list[Step]:
    """A whole answer that is no stream: a string is sent as HTML, bytes as they are, anything else as JSON."""
    if isinstance(body, bytes):
        kind, data = "application/json", body
    elif isinstance(body, str):
        kind, data = "text/html; charset=UTF-8", body.encode()
    else:
        kind, data = "application/json", json.dumps(body, ensure_ascii=False).encode()
    length = str(len(data))
    return [head(status, {"Content-Type": kind, **(headers or {}), "Content-Length": length}) + data]


# Who plays it.


class Call:
    """One request, and what became of it."""

    def __init__(self, method: str, path: str, headers: dict[str, str], content: bytes, connection: int) -> None:
        self.method = method
        self.path = path
        self.headers = headers
        """Names in lower case."""
        self.content = content
        self.connection = connection
        """Which connection it came on, counted from 1."""
        self.arrived_at = asyncio.get_running_loop().time()
        self.sent = 0
        """Bytes of the script that the kernel has taken."""
        self.played = asyncio.Event()
        """The script has come to its end."""
        self.left = asyncio.Event()
        """The caller closed or reset the connection before that."""
        self.left_at = 0.0

    @property
    def body(self) -> Any:
        return json.loads(self.content)

    async def hung_up(self, within: float = 1.0) -> float:
        """Wait until the caller has left, at most `within` seconds from now; the loop's time when it did."""
        async with asyncio.timeout(within):
            await self.left.wait()
        return self.left_at


class _Connection(asyncio.Protocol):
    def __init__(self, upstream: "Upstream") -> None:
        self._upstream = upstream
        self._received = bytearray()
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._call: Call | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if transport.get_extra_info("ssl_object") is None:  # over TLS asyncio would take 0 for never
            # Nothing is held back here: a step is over when the kernel has its bytes.
            transport.set_write_buffer_limits(high=0)
        self._transport = transport
        self._number = self._upstream._joined(self)
        self._task = asyncio.get_running_loop().create_task(self._serve())
        self._task.add_done_callback(self._ended)

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._arrived.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 -- the protocol's signature
        call = self._call
        if call is not None and not call.played.is_set():
            call.left_at = asyncio.get_running_loop().time()
            call.left.set()
        self._task.cancel()
        self._upstream._parted(self)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (failure := task.exception()) is not None:
            self._upstream._failures.append(failure)
            self._transport.abort()

    async def stop(self) -> None:
        """Reset the connection and see its task out."""
        self._task.cancel()
        self._transport.abort()
        await asyncio.wait([self._task])

    async def _serve(self) -> None:
        while True:
            call = await self._request()
            self._call = call
            steps = self._upstream._script(call)
            await self._play(call, steps)
            call.played.set()
            self._call = None
            self._upstream._changed()

    async def _request(self) -> Call:
        lines = (await self._take(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ")
        headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines[1:] if line)}
        length = int(headers.get("content-length", 0))
        while len(self._received) < length:
            await self._more()
        content = bytes(self._received[:length])
        del self._received[:length]
        return Call(method, path, headers, content, self._number)

    async def _take(self, end: bytes) -> bytes:
        while (found := self._received.find(end)) < 0:
            await self._more()
        taken = bytes(self._received[: found + len(end)])
        del self._received[: found + len(end)]
        return taken

    async def _more(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    async def _play(self, call: Call, steps: Steps) -> None:
        for step in steps:
            match step:
                case bytes():
                    self._transport.write(step)
                    await self._writable.wait()
                    call.sent += len(step)
                    # Two turns of the loop, for a reader in it: in the first the bytes are seen, in the second read.
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                case float() | int():
                    await asyncio.sleep(step)
                case Gate():
                    await step.pass_through()
                case Signal.HANG:
                    await asyncio.get_running_loop().create_future()
                case Signal.CLOSE:
                    self._finish(call)
                    self._transport.close()
                case _:  # RESET
                    self._finish(call)
                    self._transport.get_extra_info("socket").setsockopt(
                        socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE
                    )
                    self._transport.abort()

    def _finish(self, call: Call) -> None:
        call.played.set()  # this side ends it, so nobody left
        self._upstream._changed()


class Upstream:
    """A scripted Grok on a free port of 127.0.0.1, for as long as its context is open."""

    def __init__(self, *scripts: Script, key: Script | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.set_scripts(*scripts)
        self._tls = tls
        self.key: Script = error(200, GOOD_KEY) if key is None else key
        """What GET /v1/api-key gets."""
        self.connections = 0
        """Connections ever made."""
        self._connections: set[_Connection] = set()
        self._failures: list[BaseException] = []
        self._change = asyncio.Event()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", 0, backlog=4096, ssl=self._tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        while self._connections:
            await asyncio.gather(*(connection.stop() for connection in [*self._connections]))
            await asyncio.sleep(0)  # connection_lost comes one turn later
        await self._server.wait_closed()
        if self._failures:
            raise BaseExceptionGroup("a script failed", self._failures)

    def set_scripts(self, *scripts: Script) -> None:
        """Forget the calls so far, and play these from now on: one service may serve many tests."""
        self.scripts = list(scripts) or [stream("Hello", ", ", "world")]
        self.calls: list[Call] = []
        self.probes: list[Call] = []
        self.strays: list[Call] = []

    @property
    def open(self) -> int:
        """Connections open now."""
        return len(self._connections)

    @property
    def playing(self) -> int:
        """Chat calls whose script is running now."""
        return sum(not (call.played.is_set() or call.left.is_set()) for call in self.calls)

    def lose_connections(self) -> None:
        """From now on drop what arrives on the connections that are open, without a word to anybody. Linux only."""
        for connection in self._connections:
            drop_received(connection._transport.get_extra_info("socket"))

    async def call(self, index: int = 0, within: float = 5.0) -> Call:
        """The chat call with this index, once it has arrived."""
        await self.until(lambda: len(self.calls) > index, within)
        return self.calls[index]

    async def until(self, true: Callable[[], bool], within: float = 5.0) -> None:
        """Wait until something about calls or connections has become true."""
        async with asyncio.timeout(within):
            while not true():
                await self._change.wait()

    def _changed(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _joined(self, connection: _Connection) -> int:
        self._connections.add(connection)
        self.connections += 1
        self._changed()
        return self.connections

    def _parted(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        self._changed()

    def _script(self, call: Call) -> Steps:
        script: Script
        match call.method, urlsplit(call.path).path:  # asked as an HTTP proxy, it is the target as well
            case "POST", "/v1/chat/completions" | "/v1/responses":
                self.calls.append(call)
                script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
            case "GET", "/v1/api-key":
                self.probes.append(call)
                script = self.key
            case _:
                self.strays.append(call)
                script = error(404, {"code": "not-found", "error": f"No handler found on route {call.path}"})
        self._changed()
        return script(call) if callable(script) else script


def drop_received(sock: Any) -> None:
    """Let a TCP socket receive and acknowledge nothing any more, as behind a NAT that forgot it. Linux only."""
    instruction = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # BPF: return 0, the bytes to keep
    filter_ = struct.pack("HL", 1, ctypes.addressof(instruction))
    sock.setsockopt(socket.SOL_SOCKET, 26, filter_)  # SO_ATTACH_FILTER


@contextmanager
def refusing() -> Iterator[str]:
    """A base URL whose port is taken and refuses every connection."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/v1"


@contextmanager
def unreachable() -> Iterator[str]:
    """A base URL where a connection is never made: the queue of those who want one is full."""
    with socket.socket() as full, socket.socket() as first, socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(address)
        yield f"http://127.0.0.1:{address[1]}/v1"
