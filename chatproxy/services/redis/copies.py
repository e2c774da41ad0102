"""The answers of this replica: kept in memory, as everywhere, and copied to Redis behind it.

Nobody who reads here waits for Redis. Of each answer it is only noted up to which frame Redis has confirmed it, so an
outage leaves no queue behind: what is missing is taken from memory afterwards.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Literal

import anyio
import msgspec
from redis.exceptions import RedisError

from chatproxy.config import Settings
from chatproxy.errors import ReplayLost, StoreUnavailable, StreamNotFound, UpstreamCutOff
from chatproxy.events import Failed
from chatproxy.services.redis.commands import PIPELINE_TIMEOUT, Command, Commands, Reply
from chatproxy.services.redis.entries import Entry, decode_entry, encode
from chatproxy.services.redis.mirrors import Mirrors
from chatproxy.services.redis.scripts import WRITE, Keys
from chatproxy.services.resumable import ResumableStream
from chatproxy.services.store import MemoryStore

log = logging.getLogger(__name__)

# Bytes of frames in one entry, if it has more than one. What is larger is told to readers by its number only: the
# server cuts off those whose messages pile up.
MAX_ENTRY = 32_768

# Seconds. Without a status an answer is soon forgotten by whoever does not hear of it any more.
ASKING_TTL = 30.0
MARGIN = 60.0
PAUSE = 0.002  # between two pipelines: one costs more than a frame in it, and what comes meanwhile goes together
WRITE_TIMEOUT = 2 * PIPELINE_TIMEOUT + 1  # for a pipeline that waits for the one before it

State = Literal["asking", "running", "ended"]


class Copy:
    """What is known of one answer's copy."""

    def __init__(self, stream: ResumableStream, fields: Sequence[Any], keys: list[str]) -> None:
        self.stream = stream
        self.fields = fields
        self.keys = keys  # as `WRITE` takes them
        self.copied = 0  # the number of the last frame that Redis has confirmed
        self.trimmed = 0
        self.state: State = "asking"  # as confirmed
        self.begun = False  # its status is known
        self.last = False  # the answer's end is in memory
        self.closed = False
        self.gone = False  # Redis may have lost it all
        self.renew_at = 0.0  # on the loop's clock
        self.expires_at = float("inf")


class Write(msgspec.Struct):
    """What is sent for one answer, and what it means once it is confirmed."""

    command: Command
    entry: Entry
    state: State
    renews: bool
    more: bool  # there is more than fits into one entry


class RedisStore:
    """An EventStore: a MemoryStore with copies, and mirrors of what other replicas have. `run` it in a task."""

    def __init__(
        self, memory: MemoryStore, commands: Commands, mirrors: Mirrors, keys: Keys, settings: Settings
    ) -> None:
        self.on_disowned: Callable[[str], None] = lambda _: None
        self._memory = memory
        self._commands = commands
        self._mirrors = mirrors
        self._keys = keys
        self._ttl = max(settings.resume_window, settings.replay_ttl) + MARGIN
        self._copies: dict[str, Copy] = {}
        self._dirty: set[str] = set()
        self._in_doubt = False  # nobody knows what has arrived over the connection before this one
        self._wake = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        commands.on_connect.append(self._connected)

    def add(self, stream: ResumableStream, fields: Sequence[Any]) -> None:
        """An answer whose key was claimed. `fields` and values describe it to the other replicas."""
        id, keys = stream.id, self._keys
        key = keys.idempotency(*stream.key) if stream.key else keys.meta(id)
        name = keys.name(stream.name) if stream.name else keys.meta(id)
        copy = Copy(stream, fields, [keys.meta(id), keys.events(id), keys.channel(id), key, name])
        copy.renew_at = self._loop.time() + ASKING_TTL / 3
        self._copies[id] = copy

    def drop(self, id: str) -> Copy | None:
        """An answer that is not to be copied any more."""
        self._dirty.discard(id)
        return self._copies.pop(id, None)

    def running(self) -> list[str]:
        """The ids of the answers that have not ended."""
        return [id for id, copy in self._copies.items() if not copy.closed]

    async def create(self, stream: str) -> None:
        """Begin a stream."""
        await self._memory.create(stream)

    async def append(self, stream: str, frames: Sequence[bytes], *, last: bool = False) -> None:
        """Add frames."""
        self._memory.add(stream, frames)
        if (copy := self._copies.get(stream)) is not None:
            copy.begun, copy.last = True, copy.last or last
            self._mark(stream)

    async def close(self, stream: str, keep: float) -> None:
        """End a stream."""
        await self._memory.close(stream, keep)
        if (copy := self._copies.get(stream)) is not None:
            copy.closed = True
            copy.expires_at = self._loop.time() + keep
            self._mark(stream)

    async def last(self, stream: str) -> tuple[int, bool]:
        """Where a stream ends."""
        return await (self._memory if stream in self._copies else self._mirrors).last(stream)

    def read(self, stream: str, after: int) -> AsyncGenerator[Sequence[bytes], None]:
        """The frames after that number: from memory if the answer is this replica's own."""
        return (self._memory if stream in self._copies else self._mirrors).read(stream, after)

    def _mark(self, id: str) -> None:
        self._dirty.add(id)
        self._wake.set()

    def _connected(self, other_server: bool) -> None:
        for copy in self._copies.values():
            copy.gone = copy.gone or other_server
        self._in_doubt = True
        self._wake.set()

    async def run(self) -> None:
        """Copy what has been added, as long as Redis is there."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.flush()

    async def flush(self) -> None:
        """Copy all there is now; one pipeline at a time, with one entry for each answer."""
        while self._commands.available and (self._in_doubt or self._dirty):
            try:
                if self._in_doubt:
                    self._in_doubt = False
                    await self._find_positions()
                ids, self._dirty = list(self._dirty), set()
                writes = [(id, write) for id in ids if (write := self._next_write(id)) is not None]
                if not writes:
                    continue
                replies = await self._commands.execute(*(write.command for _, write in writes), within=WRITE_TIMEOUT)
            except StoreUnavailable:
                self._in_doubt = True
                return
            for (id, write), reply in zip(writes, replies, strict=True):
                self._confirm(id, write, reply)
            await anyio.sleep(PAUSE)

    def _next_write(self, id: str) -> Write | None:
        copy = self._copies.get(id)
        if copy is None or copy.state == "ended":
            return None
        if not (copy.begun or copy.closed):
            return self._write(copy, Entry(1, []), "asking", 0)
        try:
            dropped, end, frames = self._memory.peek(id, copy.copied, MAX_ENTRY)
        except StreamNotFound:  # dropped to make room for others, before it was copied
            dropped, end, frames = copy.copied, copy.copied, []
        entry = Entry(max(copy.copied, dropped) + 1, frames)
        more = entry.first + len(frames) <= end
        if more or not (copy.last or copy.closed):
            return self._write(copy, entry, "running", dropped, more=more)
        summary = copy.stream.summary
        entry.end, entry.code = summary.end or "left", summary.code
        if not copy.last or id not in self._memory:
            error = copy.stream.error or (UpstreamCutOff() if id in self._memory else ReplayLost())
            entry.frames += copy.stream.reader_format().encode([Failed(error)])
            entry.end, entry.code, entry.by_proxy = "failed", error.code, True
        return self._write(copy, entry, "ended", dropped)

    def _write(self, copy: Copy, entry: Entry, state: State, dropped: int, *, more: bool = False) -> Write | None:
        now = self._loop.time()
        renews = state != copy.state or copy.gone or now >= copy.renew_at
        if not (entry.frames or renews or dropped > copy.trimmed):
            return None
        ttl = ASKING_TTL if state == "asking" else self._ttl
        if state == "ended":
            ttl = max(1.0, min(copy.expires_at - now, ttl))
        number = f"0-{entry.first + len(entry.frames) - 1}" if entry.frames else ""
        content = encode(entry)
        trim = f"0-{dropped + 1}" if dropped > copy.trimmed else ""
        copy.trimmed = dropped
        command = WRITE(
            copy.keys,
            *(copy.stream.id, self._keys.owner, state, "1-0" if state == "ended" else number, content),
            *(content if len(content) <= 2 * MAX_ENTRY else b"", math.ceil(ttl * 1000) if renews else 0, trim),
            *(copy.fields if copy.gone else ()),
        )
        return Write(command, entry, state, renews, more)

    def _confirm(self, id: str, write: Write, reply: Reply) -> None:
        copy = self._copies.get(id)
        if copy is None:
            return
        if isinstance(reply, RedisError):  # the memory is full: the sweep tries again, from the same frame
            copy.renew_at = copy.trimmed = 0
            return
        if reply < 0:
            self._disown(id)
            return
        copy.gone, copy.state = False, write.state
        if write.renews:
            copy.renew_at = self._loop.time() + (ASKING_TTL if write.state == "asking" else self._ttl) / 3
        if not write.entry.by_proxy:
            copy.copied = max(copy.copied, write.entry.first + len(write.entry.frames) - 1)
        if reply:  # somebody elsewhere reads along
            copy.stream.read = max(copy.stream.read, copy.copied)
        if write.more:
            self._mark(id)

    def _disown(self, id: str) -> None:
        log.warning("an answer has been ended by another replica, or its copy is gone", extra={"stream": id[:6]})
        self.drop(id)
        self.on_disowned(id)

    async def _find_positions(self) -> None:
        """Find out what has arrived of each answer."""
        ids = list(self._copies)
        commands = [("XREVRANGE", self._keys.events(id), "+", "-", "COUNT", 1) for id in ids]
        replies = await self._commands.execute(*commands, within=WRITE_TIMEOUT)
        for id, reply in zip(ids, replies, strict=True):
            copy = self._copies.get(id)
            if copy is None or isinstance(reply, RedisError):
                continue
            number = int(reply[0][0].partition(b"-")[2]) if reply else 0
            if reply and reply[0][0] == b"1-0":
                end = decode_entry(reply[0][1][1])
                if not copy.last or end is None or end.by_proxy:
                    self._disown(id)
                else:
                    copy.state = "ended"
                continue
            if not reply and not copy.gone and copy.copied:
                self._disown(id)
                continue
            copy.copied, copy.trimmed = number, 0
            if copy.gone:
                copy.state, copy.renew_at = "asking", 0.0
            self._mark(id)

    def sweep(self) -> None:
        """Renew what would expire, try again what was refused, forget what has ended."""
        now = self._loop.time()
        for id, copy in list(self._copies.items()):
            if now >= copy.expires_at:
                self.drop(id)
            elif copy.state == "ended":
                if id not in self._memory:  # dropped to make room for others: so it is in Redis
                    self._commands.send(("UNLINK", copy.keys[0], copy.keys[1], copy.keys[3]))
                    self.drop(id)
            elif now >= copy.renew_at:
                self._mark(id)
