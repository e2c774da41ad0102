"""The answers of other replicas, as far as somebody reads them here: in memory, fed from Redis.

What is published is fast, and what is in the Redis stream is true; the frames' numbers join them. Whenever it is not
certain that a message was the next one, the stream is read.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from weakref import WeakValueDictionary

import anyio
from redis.exceptions import RedisError

from chatproxy.config import Settings
from chatproxy.config.timing import Timing
from chatproxy.errors import (
    ChatError,
    InternalError,
    ReplayLost,
    StoreUnavailable,
    StreamNotFound,
    UpstreamCutOff,
)
from chatproxy.events import Failed
from chatproxy.services.redis.commands import PIPELINE_TIMEOUT, Commands
from chatproxy.services.redis.entries import Entry, decode_entry, decode_error, encode
from chatproxy.services.redis.liveness import Liveness
from chatproxy.services.redis.scripts import END_FOR_DEAD, Keys
from chatproxy.services.redis.subscriptions import Subscriptions
from chatproxy.services.resumable import FINAL_EVENT_NUMBER, ResumableStream
from chatproxy.services.store import MemoryStore

log = logging.getLogger(__name__)

# Seconds. How long a reader waits for the subscription before it is content with what is stored.
SUBSCRIBE_TIMEOUT = 1.0
# What an answer may take longer than STREAM_TIMEOUT until its end must have come.
LATE = 30.0

ENTRIES = 64  # that are read at once

Remotes = WeakValueDictionary[str, ResumableStream]
"""Streams of other replicas that somebody here knows, by id."""


class Mirror:
    """One answer of another replica, in a row of the memory store."""

    def __init__(self, stream: ResumableStream, mirrors: "Mirrors") -> None:
        self.id = stream.id
        self.row = f"mirror of {stream.id}"  # the answer may have been this replica's own
        self.readers = 0
        self.opened = asyncio.Event()
        self.have: int | None = None  # the number of the last frame; not known before the first look
        self.end: Entry | None = None
        self.error: ChatError | None = None
        self._stream = stream
        self._all = mirrors
        self._timing = mirrors.timing
        self._loop = asyncio.get_running_loop()
        self._doubt = asyncio.Event()
        self._heard = self._since = self._loop.time()
        self._owner: str | None = None
        self._liveness = Liveness(mirrors.commands, mirrors.keys, mirrors.timing)
        self._vanished_since: float | None = None

    async def run(self) -> None:
        """Follow the answer to its end."""
        self._all.subscriptions.subscribe(self._all.keys.channel(self.id), self.receive)
        try:
            with anyio.move_on_after(SUBSCRIBE_TIMEOUT):
                await self._doubt.wait()  # the acknowledgement
            while self.end is None and self.error is None:
                self._doubt.clear()
                try:
                    await self._catch_up()
                except StoreUnavailable:
                    if self._loop.time() - self._heard > self._timing.store_outage:
                        self.give_up(ReplayLost())
                    await anyio.sleep(self._timing.sweep_interval / 4)
                    continue
                await self._wait_for_doubt()
        except ChatError as error:  # there is no room for it
            self.give_up(error)
        except Exception:
            log.exception("another replica's answer could not be followed, by a mistake of ours")
            self.give_up(InternalError())
        finally:
            self.leave()

    async def _wait_for_doubt(self) -> None:
        """Until it is not certain that all is here; without any news that is soon."""
        while not self._doubt.is_set():
            with anyio.move_on_after(self._timing.sweep_interval):
                await self._doubt.wait()
            if self._loop.time() - self._heard >= self._timing.sweep_interval:
                return

    def leave(self) -> None:
        """Listen no more; the owner asks who does."""
        self._all.subscriptions.unsubscribe(self._all.keys.channel(self.id), self.receive)
        owner, self._owner = self._owner, None
        if owner is not None and self.end is None:  # from now on it counts how long nobody has read
            self._all.commands.send(("PUBLISH", self._all.keys.lease(owner), f"left {self.id}"))

    def receive(self, message: bytes | None) -> None:
        """What was published: the next frames, or only that there is something to be looked at."""
        if self.end is not None or self.error is not None:
            return
        entry = decode_entry(message) if message else None
        if entry is None or self.have is None or entry.first > self.have + 1:
            self._doubt.set()
            return
        self._heard = self._loop.time()
        self._take(entry)

    def look(self) -> None:
        """Messages may have been missed."""
        self._doubt.set()

    def _take(self, entry: Entry) -> None:
        assert self.have is not None
        frames = entry.frames[self.have - entry.first + 1 :]
        if frames:
            self.have += len(frames)
            self._all.memory.add(self.row, frames)
        if entry.end:
            self.end = entry
            self._stream.summary.close(entry.end, entry.code)
            self._all.memory.finish(self.row)
            self._doubt.set()

    def give_up(self, error: ChatError) -> None:
        """Its readers get what is here, and then this error."""
        self.error = error
        self._doubt.set()
        if self.have is not None:
            self._all.memory.finish(self.row)
        self.opened.set()

    async def _catch_up(self) -> None:
        keys, commands = self._all.keys, self._all.commands
        while True:
            start = "-" if not self.have else f"(0-{self.have}"
            meta, entries = await commands.execute(
                ("HMGET", keys.meta(self.id), "state", "owner", "error"),
                ("XRANGE", keys.events(self.id), start, "+", "COUNT", ENTRIES),
                within=2 * PIPELINE_TIMEOUT + 1,
            )
            if isinstance(meta, RedisError) or isinstance(entries, RedisError):
                self.give_up(ReplayLost())
                return
            self._heard = self._loop.time()
            for _, fields in entries:
                entry = decode_entry(fields[1])
                if entry is None or entry.first > (entry.first if self.have is None else self.have + 1):
                    self.give_up(ReplayLost())  # not ours, or trimmed meanwhile
                    return
                self._open(entry.first - 1)
                self._take(entry)
            if self.end is not None or len(entries) < ENTRIES:
                break
        if self.end is None:
            self._open(0)
            await self._look_at_owner(*meta)

    def _open(self, dropped: int) -> None:
        if self.have is None:
            self._all.memory.begin(self.row, dropped)
            self.have = dropped
        self.opened.set()

    async def _look_at_owner(self, state: bytes | None, owner: bytes | None, error: bytes | None) -> None:
        now = self._loop.time()
        if state == b"refused":
            self.give_up(decode_error(error))
        elif state == b"ended" or now - self._since > self._all.stream_timeout + LATE:
            self.give_up(ReplayLost() if state == b"ended" else UpstreamCutOff())
        elif state is None or owner is None:  # expired; or Redis has lost it, and its owner may write it again
            self._vanished_since = self._vanished_since or now
            expired = self._stream.over and not await self._all.commands.settling()
            if expired or now - self._vanished_since > self._timing.store_outage:
                self.give_up(ReplayLost())
        elif await self._liveness.is_over(self._note_owner(owner)):
            await self._end_for(owner)
        else:
            self._vanished_since = None

    def _note_owner(self, owner: bytes) -> str:
        self._owner = owner.decode(errors="replace")
        return self._owner

    async def _end_for(self, owner: bytes) -> None:
        assert self.have is not None
        error = UpstreamCutOff()
        frames = self._stream.reader_format().encode([Failed(error)])
        entry = Entry(self.have + 1, frames, "failed", error.code, by_proxy=True)
        keys = self._all.keys
        names = [keys.meta(self.id), keys.events(self.id), keys.channel(self.id)]
        # The answer comes back to us like any other entry, ours or that of whoever was first.
        await self._all.commands.demand(*END_FOR_DEAD(names, owner, encode(entry), int(self._all.replay_ttl * 1000)))
        self._doubt.set()


class Mirrors:
    """All of them: each is opened by its first reader here, and dropped with its last one."""

    def __init__(
        self,
        memory: MemoryStore,
        commands: Commands,
        subscriptions: Subscriptions,
        keys: Keys,
        settings: Settings,
        timing: Timing,
        remotes: Remotes,
    ) -> None:
        self.memory = memory
        self.commands = commands
        self.subscriptions = subscriptions
        self.keys = keys
        self.timing = timing
        self.stream_timeout = settings.stream_timeout
        self.replay_ttl = settings.replay_ttl
        self._remotes = remotes
        self._mirrors: dict[str, tuple[Mirror, asyncio.Task[None]]] = {}
        commands.on_connect.append(self._connected)

    def _connected(self, _: bool) -> None:
        for mirror, _task in self._mirrors.values():
            mirror.look()

    async def last(self, id: str) -> tuple[int, bool]:
        """Where a stream ends. While it runs, any number may be: its owner is ahead of what is stored."""
        entries = await self.commands.demand("XREVRANGE", self.keys.events(id), "+", "-", "COUNT", 1)
        entry = decode_entry(entries[0][1][1]) if entries else None
        if entry is None or not entry.end:
            return FINAL_EVENT_NUMBER - 1, False
        return FINAL_EVENT_NUMBER if entry.by_proxy else entry.first + len(entry.frames) - 1, True

    async def read(self, id: str, after: int) -> AsyncGenerator[Sequence[bytes], None]:
        """The frames after that number. Raises ChatError where the rest cannot be had."""
        mirror = self._open(id)
        mirror.readers += 1
        try:
            await mirror.opened.wait()
            position = after
            if mirror.have is not None:
                async with aclosing(self.memory.read(mirror.row, after)) as batches:
                    async for batch in batches:
                        position += len(batch)
                        yield batch
            if mirror.error is not None:
                raise type(mirror.error)(mirror.error.message)
            if mirror.end is not None and mirror.have is not None and position == after:
                # The reader came with as much as is stored here, or more: the dead owner's end is news all the same.
                if mirror.end.by_proxy:
                    yield mirror.end.frames[-1:]
                elif after > mirror.have:
                    raise ReplayLost
        finally:
            mirror.readers -= 1
            if not mirror.readers:
                self._close(mirror)

    def _open(self, id: str) -> Mirror:
        if id not in self._mirrors:
            stream = self._remotes.get(id)
            if stream is None:
                raise StreamNotFound
            mirror = Mirror(stream, self)
            self._mirrors[id] = mirror, asyncio.create_task(mirror.run())
        return self._mirrors[id][0]

    def _close(self, mirror: Mirror) -> None:
        _, task = self._mirrors.pop(mirror.id)
        task.cancel()
        mirror.leave()
        self.memory.forget(mirror.row)

    async def aclose(self) -> None:
        """Follow nothing any more."""
        for mirror, task in list(self._mirrors.values()):
            task.cancel()
            await asyncio.wait([task])
            mirror.give_up(ReplayLost())
