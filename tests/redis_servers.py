"""A real Redis or Valkey for tests, on a free port of 127.0.0.1, with nothing kept on disk.

    async with RedisServer() as redis, serving(grok.url, redis_url=redis.url) as service:
        redis.do("CONFIG", "SET", "maxmemory", 1)
        await redis.restart()           # with an empty memory
        redis.pause(), redis.go_on()    # SIGSTOP, SIGCONT
        await redis.stop(); await redis.start()

`engines` are test parameters: each server that is installed, and a skipped one for each that is not.
"""

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import AsyncIterator
from typing import Any, Self

import pytest
import redis

from tests.conftest import TIMEOUT, free_port

ENGINES = ("redis-server", "valkey-server")


def _parameter(engine: str) -> Any:
    missing = [pytest.mark.skip(reason=f"{engine} is not installed")] if shutil.which(engine) is None else []
    return pytest.param(engine, marks=missing)


def available() -> list[str]:
    """Those that are installed."""
    return [engine for engine in ENGINES if shutil.which(engine)]


engines = [_parameter(engine) for engine in ENGINES] if not available() else available()
needs_redis = pytest.mark.skipif(not available(), reason="neither redis-server nor valkey-server is installed")


class RedisServer:
    """One server; `options` are those of its configuration file."""

    def __init__(self, engine: str | None = None, **options: str) -> None:
        self._engine = engine or (available() or ["redis-server"])[0]
        self._options = options
        self.port = free_port()
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        """Its address, with the password if it has one."""
        secret = f":{self._options['requirepass']}@" if "requirepass" in self._options else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start it, with an empty memory."""
        options = {"port": str(self.port), "bind": "127.0.0.1", "save": "", "appendonly": "no", **self._options}
        self.process = await asyncio.create_subprocess_exec(
            self._engine,
            *(part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(TIMEOUT):
            while True:
                with contextlib.suppress(redis.ConnectionError):
                    self.do("PING")
                    return
                await asyncio.sleep(0.02)  # a port that is not open yet tells nobody when it will be

    async def stop(self) -> None:
        """Kill it."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
            self.process = None

    async def restart(self) -> None:
        """Kill it, and start it anew."""
        await self.stop()
        await self.start()

    def pause(self) -> None:
        """It answers nothing, and keeps its connections."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """It answers again."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def do(self, *command: Any) -> Any:
        """The reply to one command, over a connection of its own."""
        with redis.Redis(
            port=self.port, protocol=2, password=self._options.get("requirepass"), socket_timeout=TIMEOUT
        ) as client:
            return client.execute_command(*command)

    def everything(self) -> dict[str, int]:
        """All keys, and the milliseconds that each has to live (-1: for ever)."""
        found: dict[str, int] = {}
        for key in self.do("KEYS", "*"):
            if (left := self.do("PTTL", key)) != -2:  # it has just expired
                found[key.decode()] = left
        return found


class Link:
    """A way to a Redis of its own: a proxy whose connections can be held up, and reset."""

    def __init__(self, port: int) -> None:
        self.port = 0
        self._port = port
        self._open = asyncio.Event()
        self._open.set()
        self._writers: set[asyncio.StreamWriter] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Link"]:
        """Inside it, it is there."""
        server = await asyncio.start_server(self._join, "127.0.0.1", 0)
        async with server:
            self.port = server.sockets[0].getsockname()[1]
            yield self
            self.reset()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far_writer}
        self._writers |= both
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        self._writers -= both

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                await self._open.wait()
                writer.write(piece)
                await writer.drain()
        writer.close()

    @property
    def url(self) -> str:
        """Its address, as that of a Redis."""
        return f"redis://127.0.0.1:{self.port}/0"

    def hold(self) -> None:
        """From now on nothing arrives, in either direction."""
        self._open.clear()

    def go_on(self) -> None:
        """What was held arrives."""
        self._open.set()

    def reset(self) -> None:
        """All connections are lost, and what is on the way."""
        for writer in self._writers:
            writer.transport.abort()
