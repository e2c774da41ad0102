"""The connection for what is published: channels, and who listens to each. Does not know what the messages mean."""

import asyncio
import logging
from collections.abc import Callable

import anyio
from redis.asyncio import Connection, UnixDomainSocketConnection
from redis.exceptions import RedisError

from chatproxy.services.redis.commands import RECONNECT_INTERVAL, make_connection

log = logging.getLogger(__name__)

Listener = Callable[[bytes | None], None]
"""Given each message; and None whenever the subscription has begun (again): messages may have been missed."""


class Subscriptions:
    """At most one listener for each channel. `run` it in a task.

    So many seconds of `silence` are a connection that is lost: a replica publishes something to itself more often.
    """

    def __init__(self, url: str, silence: float) -> None:
        self._silence = silence
        self._url = url
        self._listeners: dict[bytes, Listener] = {}
        self._connection: Connection | UnixDomainSocketConnection | None = None
        self._changes: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()

    def subscribe(self, channel: str, listener: Listener) -> None:
        """From when the listener is given None, messages on this channel arrive."""
        self._listeners[channel.encode()] = listener
        self._changes.put_nowait(("SUBSCRIBE", channel.encode()))

    def unsubscribe(self, channel: str, listener: Listener) -> None:
        """No further calls of this listener, if it is still the one."""
        if self._listeners.get(channel.encode()) == listener:
            del self._listeners[channel.encode()]
            self._changes.put_nowait(("UNSUBSCRIBE", channel.encode()))

    async def run(self) -> None:
        """Connect, listen, connect again, until cancelled. (The other connection logs what is wrong.)"""
        while True:
            connection = make_connection(self._url, None)
            try:
                await connection.connect()  # type: ignore[no-untyped-call]
                while not self._changes.empty():
                    self._changes.get_nowait()
                for channel in self._listeners:
                    self._changes.put_nowait(("SUBSCRIBE", channel))
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._write, connection)
                    await self._read(connection)
            except (RedisError, OSError, TimeoutError, ExceptionGroup) as error:
                log.debug("the connection for messages is lost: %s", type(error).__name__)
            finally:
                with anyio.CancelScope(shield=True):
                    await connection.disconnect(nowait=True)
            await anyio.sleep(RECONNECT_INTERVAL)

    async def _write(self, connection: Connection | UnixDomainSocketConnection) -> None:
        while True:
            command, channel = await self._changes.get()
            # Somebody may have changed his mind since: what counts is whether anybody listens now.
            if (channel in self._listeners) == (command == "SUBSCRIBE"):
                await connection.send_packed_command(connection.pack_command(command, channel), check_health=False)

    async def _read(self, connection: Connection | UnixDomainSocketConnection) -> None:
        while True:
            with anyio.fail_after(self._silence):
                kind, channel, data = await connection.read_response(disconnect_on_error=False)
            listener = self._listeners.get(channel)
            if listener is not None and kind in (b"subscribe", b"message"):
                listener(data if kind == b"message" else None)
