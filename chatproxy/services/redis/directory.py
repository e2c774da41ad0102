"""Which replica has which answer: by id, by idempotency key, by name. A `Directory` for all replicas."""

import asyncio
import logging
import re
from collections.abc import Mapping
from typing import Any

import anyio
from redis.exceptions import RedisError

from chatproxy.config import Settings
from chatproxy.config.timing import Timing
from chatproxy.errors import StoreUnavailable, StreamNotFound
from chatproxy.events import StreamSummary
from chatproxy.formats import MakeFormat, StreamFormat
from chatproxy.formats.plain import Plain
from chatproxy.formats.ui_messages import UIMessages
from chatproxy.services.redis.commands import Command, Commands
from chatproxy.services.redis.copies import ASKING_TTL, RedisStore
from chatproxy.services.redis.entries import FORMAT, decode_error, encode_error
from chatproxy.services.redis.liveness import Liveness
from chatproxy.services.redis.mirrors import Remotes
from chatproxy.services.redis.scripts import CLAIM, NOTE_READ, RELEASE, Keys
from chatproxy.services.resumable import STREAM_ID, ResumableStream, other_body

log = logging.getLogger(__name__)

# Seconds. A request to stop that its owner has not heard of is found by its next sweep.
STOP_TTL = 60
# Between two looks at whether an answer of another replica has a status.
STATUS_INTERVAL = 0.05

_FORMATS: Mapping[str, type[StreamFormat]] = {"plain": Plain, "ui_messages": UIMessages}
_FIELDS = ("version", "owner", "state", "digest", "request", "format", "named")


class RedisDirectory:
    """The answers of all replicas that share a Redis and a prefix."""

    def __init__(
        self,
        commands: Commands,
        store: RedisStore,
        keys: Keys,
        settings: Settings,
        remotes: Remotes,
        timing: Timing,
    ) -> None:
        self._commands = commands
        self._store = store
        self._keys = keys
        self._status_hold = settings.status_hold
        self._remotes = remotes
        self._timing = timing
        self._unsent: list[Command] = []  # releases, to be sent when Redis is there again
        self._waiting: set[asyncio.Task[None]] = set()
        self._warned = False
        commands.on_connect.append(self._connected)

    async def claim(self, stream: ResumableStream) -> ResumableStream:
        """Make it known to all, or give the one that its idempotency key has started elsewhere."""
        keys = self._keys
        digest = keys.digest(stream.body_digest)
        format = stream.reader_format()
        kind = next(name for name, kind in _FORMATS.items() if isinstance(format, kind))
        values = (FORMAT, keys.owner, "asking", digest, stream.summary.request_id, kind, int(bool(stream.name)))
        fields = [part for pair in zip(_FIELDS, values, strict=True) for part in pair]
        names = [
            keys.meta(stream.id),
            keys.idempotency(*stream.key) if stream.key else keys.meta(stream.id),
            keys.name(stream.name) if stream.name else keys.meta(stream.id),
        ]
        if stream.key and await self._commands.settling():
            raise StoreUnavailable  # it may have started an answer that Redis does not know yet again
        for _ in range(3):  # what has the key may vanish before it is looked at
            found = await self._commands.demand(
                *CLAIM(names, keys.prefix, stream.id, keys.owner, int(ASKING_TTL * 1000), *fields)
            )
            if found is None:
                self._store.add(stream, fields)
                return stream
            try:
                remote, body = await self._find(found.decode())
            except StreamNotFound:
                continue
            if body != digest.encode():
                raise other_body()
            return remote
        raise StoreUnavailable

    def release(self, stream: ResumableStream) -> None:
        """Tell whoever waits for it elsewhere, and free its key."""
        keys, error = self._keys, stream.error
        self._store.drop(stream.id)
        assert error is not None
        command = RELEASE(
            [
                keys.meta(stream.id),
                keys.idempotency(*stream.key) if stream.key else keys.meta(stream.id),
                keys.name(stream.name) if stream.name else keys.meta(stream.id),
                keys.channel(stream.id),
            ],
            *(stream.id, keys.owner, encode_error(error)),
        )
        if self._commands.available:
            self._commands.send(command)
        elif len(self._unsent) < 1000:  # what was claimed and is not renewed is soon gone by itself
            self._unsent.append(command)

    def _connected(self, _: bool) -> None:
        commands, self._unsent = self._unsent, []
        if commands:
            self._commands.send(*commands)

    async def find(self, id: str) -> ResumableStream:
        """Another replica's stream."""
        return (await self._find(id))[0]

    async def _find(self, id: str) -> tuple[ResumableStream, bytes]:
        """The same, and the digest of its request's body. Raises StreamNotFound or StoreUnavailable."""
        if not re.fullmatch(STREAM_ID, id):
            raise StreamNotFound
        fields = await self._fields(self._keys.meta(id), *_FIELDS)
        version, owner, state, digest, request, kind, named = fields
        if version is None and await self._commands.settling():
            raise StoreUnavailable
        if version != FORMAT or None in fields or kind.decode(errors="replace") not in _FORMATS:
            self._warn(version is not None)
            raise StreamNotFound
        if state == b"refused":
            raise StreamNotFound
        stream = self._remotes.get(id)
        if stream is None:
            request_id = request.decode(errors="replace")
            make = _make_format(kind.decode(), request_id)
            name = "named" if named == b"1" else None
            stream = ResumableStream(None, StreamSummary(request_id), make, None, b"", name, id)
            self._remotes[id] = stream
        stream.over = state == b"ended"
        if state != b"asking":
            stream.status_sent = True
            stream.first_chunk_or_error.set()
        elif not stream.first_chunk_or_error.is_set():
            task = asyncio.create_task(self._wait_for_status(stream, owner.decode(errors="replace")))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
        return stream, digest

    async def _fields(self, key: str, *names: str) -> list[Any]:
        """The values; none where the key is no hash, for then it is not ours. Raises StoreUnavailable."""
        [reply] = await self._commands.execute(("HMGET", key, *names))
        if isinstance(reply, RedisError):
            self._warn(True)
            return [None] * len(names)
        values: list[Any] = reply
        return values

    def _warn(self, planted: bool) -> None:
        if planted and not self._warned:
            self._warned = True
            log.warning("redis has keys under REDIS_PREFIX that this version has not written; they are ignored")

    async def _wait_for_status(self, stream: ResumableStream, owner: str) -> None:
        liveness = Liveness(self._commands, self._keys, self._timing)
        with anyio.move_on_after(self._status_hold + 1):
            while True:
                await anyio.sleep(STATUS_INTERVAL)
                try:
                    state, error = await self._fields(self._keys.meta(stream.id), "state", "error")
                    # A dead replica tells no status: then whoever reads the answer writes its end.
                    if state == b"asking" and not await liveness.is_over(owner):
                        continue
                except StoreUnavailable:
                    continue
                if state is None or state == b"refused":
                    stream.error = decode_error(error)
                stream.first_chunk_or_error.set()
                return

    async def find_by_name(self, name: str, own: ResumableStream | None) -> ResumableStream | None:
        """The last stream of that name, which may be our own."""
        try:
            id = await self._id_of(name)
            if id is None:
                if await self._commands.settling():
                    raise StoreUnavailable
                return own
            [read] = await self._fields(self._keys.meta(id), "read")
            if read:
                return None
            return own if own is not None and own.id == id else await self.find(id)
        except StreamNotFound:
            return own
        except StoreUnavailable:
            if own is None:
                raise
            return own

    async def _id_of(self, name: str) -> str | None:
        [id] = await self._commands.execute(("GET", self._keys.name(name)))
        return id.decode() if isinstance(id, bytes) and re.fullmatch(STREAM_ID.encode(), id) else None

    def note_read(self, stream: ResumableStream) -> None:
        """Who asks by its name need not read it again."""
        if stream.name:
            self._commands.send(NOTE_READ([self._keys.meta(stream.id)]))

    async def stop(self, id: str) -> None:
        """Ask the owner to end an answer. Raises StoreUnavailable if it cannot be asked."""
        keys = self._keys
        found = id if re.fullmatch(STREAM_ID, id) else await self._id_of(id.lower())
        if found is None:
            return
        owner, state = await self._fields(keys.meta(found), "owner", "state")
        if owner is None or state not in (b"asking", b"running"):
            return
        flag, heard = await self._commands.execute(
            ("SET", keys.stop(found), "1", "EX", STOP_TTL),
            ("PUBLISH", keys.lease(owner.decode(errors="replace")), f"stop {found}"),
        )
        if isinstance(flag, RedisError) and not heard:
            raise StoreUnavailable

    async def has_readers(self, stream: ResumableStream) -> bool:
        """Whether another replica has a reader, or may have one after a short outage."""
        try:
            [reply] = await self._commands.execute(("PUBSUB", "NUMSUB", self._keys.channel(stream.id)))
        except StoreUnavailable:
            return asyncio.get_running_loop().time() - self._commands.lost_at < self._timing.store_outage
        return not isinstance(reply, RedisError) and bool(reply[1])

    async def aclose(self) -> None:
        """Wait for nothing any more."""
        for task in list(self._waiting):
            task.cancel()
            await asyncio.wait([task])


def _make_format(kind: str, request_id: str) -> MakeFormat:
    if kind == "plain":
        return lambda _, frame: Plain(request_id, frame=frame)
    return lambda id, frame: UIMessages(id, frame=frame)
