"""The connection for commands: one task sends all that waits as one pipeline, and reads the replies.

So commands are batched by themselves under load, and cancelling whoever waits for a reply leaves the connection whole.
Does not know what the commands are for.
"""

import asyncio
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import anyio
from hiredis import pack_command
from redis.asyncio import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from chatproxy.errors import StoreUnavailable
from chatproxy.services.redis.scripts import SCRIPTS

log = logging.getLogger(__name__)

# Seconds.
CONNECT_TIMEOUT = 1.0
REQUEST_TIMEOUT = 0.5  # that a client waits for one reply
PIPELINE_TIMEOUT = 2.0  # for all replies of a pipeline; then the connection counts as lost
RECONNECT_INTERVAL = 0.5

OLDEST = (6, 2)

# Such a server answers, but not as it should: after a failover a connection still leads to the one that was demoted.
_AWAY = (AuthenticationError, ClusterDownError, MasterDownError, NoPermissionError, ReadOnlyError, TryAgainError)
_AWAY_TEXT = ("MISCONF", "NOREPLICAS")

Command = tuple[Any, ...]
Reply = Any
"""What the server said; an error reply is an exception of redis-py."""


def make_connection(url: str, socket_timeout: float | None) -> Connection | UnixDomainSocketConnection:
    """A connection that is not open yet, for a URL with redis, rediss or unix."""
    options: dict[str, Any] = {**parse_url(url)}
    kind = options.pop("connection_class", Connection)
    options |= {
        "protocol": 2,  # redis-py 8.1 does not reconnect over RESP3 when the server has closed an idle connection
        "retry": Retry(NoBackoff(), 0),  # a command that is sent twice may be done twice
        "socket_connect_timeout": CONNECT_TIMEOUT,
        "socket_timeout": socket_timeout,
        "health_check_interval": 0,
        "decode_responses": False,
    }
    if not issubclass(kind, UnixDomainSocketConnection):
        options["socket_keepalive"] = True
    if issubclass(kind, SSLConnection):
        options |= {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    connection: Connection | UnixDomainSocketConnection = kind(**options)
    return connection


class _Call:
    def __init__(self, commands: Sequence[Command]) -> None:
        self.commands = commands
        self.replies: asyncio.Future[list[Reply]] = asyncio.get_running_loop().create_future()


class Commands:
    """Sends commands to Redis. `run` it in a task.

    `lease`: seconds after which a silent replica counts as dead. `loss_marker`: a key that is there for as long after
    some replica has found that Redis lost its memory.
    """

    def __init__(self, url: str, lease: float, loss_marker: str) -> None:
        self.seen = False  # it has been there once
        self.available = False
        self.server = b""  # the run id of the server; another one has another memory
        self.connected_at = 0.0  # on the loop's clock
        self.reached_at = 0.0  # the same, but connections that were lost for a moment do not count
        self.lost_at = 0.0
        self._first_connected_at = 0.0
        self._replaced_at = -math.inf  # when it was last found to have another memory than before
        self.on_connect: list[Callable[[bool], None]] = []  # told whether it is another server than before
        self._url = url
        self._lease = lease
        self._loss_marker = loss_marker
        self._tried = False
        self._waiting: list[_Call] = []
        self._wake = asyncio.Event()

    async def settling(self) -> bool:
        """Whether Redis may not know yet what it lost just now: who finds nothing there has to ask again.

        Raises StoreUnavailable.
        """
        now = asyncio.get_running_loop().time()
        if now - self._replaced_at < self._lease:
            return True
        # It may have happened before this replica was started.
        return now - self._first_connected_at < self._lease and bool(await self.demand("EXISTS", self._loss_marker))

    async def execute(self, *commands: Command, within: float = REQUEST_TIMEOUT) -> list[Reply]:
        """The replies, in order. Raises StoreUnavailable if they do not come: then nobody knows what has been done."""
        if self._tried and not self.available:
            raise StoreUnavailable
        call = _Call(commands)
        self._waiting.append(call)
        self._wake.set()
        try:
            with anyio.fail_after(within):
                replies = await call.replies
        except TimeoutError:
            raise StoreUnavailable from None
        again = [command for command, reply in zip(commands, replies, strict=True) if isinstance(reply, NoScriptError)]
        if again:  # somebody made the server forget its scripts
            others = iter(await self.execute(*map(_with_text, again), within=within))
            replies = [next(others) if isinstance(reply, NoScriptError) else reply for reply in replies]
        return replies

    async def demand(self, *command: Any, within: float = REQUEST_TIMEOUT) -> Reply:
        """One reply. Raises StoreUnavailable for an error reply, too: the memory is full, or a key is not ours."""
        [reply] = await self.execute(command, within=within)
        if isinstance(reply, RedisError):
            log.warning("redis refused a command: %s", type(reply).__name__)
            raise StoreUnavailable
        return reply

    def send(self, *commands: Command) -> None:
        """The same, of which nobody needs the reply."""
        if self.available:
            self._waiting.append(_Call(commands))
            self._wake.set()

    async def run(self) -> None:
        """Connect, serve, connect again, until cancelled."""
        while True:
            connection = make_connection(self._url, PIPELINE_TIMEOUT)
            try:
                await self._connect(connection)
                while True:
                    await self._serve(connection)
            except (RedisError, OSError, TimeoutError) as error:
                self._lost(error)
            finally:
                self._fail_all()
                with anyio.CancelScope(shield=True):
                    await connection.disconnect(nowait=True)
            await anyio.sleep(RECONNECT_INTERVAL)

    async def _connect(self, connection: Connection | UnixDomainSocketConnection) -> None:
        await connection.connect()  # type: ignore[no-untyped-call]
        with anyio.fail_after(PIPELINE_TIMEOUT):
            info, *_ = await _exchange(
                connection, [("INFO",), *(("SCRIPT", "LOAD", script.text) for script in SCRIPTS)]
            )
        facts = dict(re.findall(r"(?m)^(\w+):(.*?)\r?$", info.decode(errors="replace"))) if info else {}
        version = tuple(map(int, re.findall(r"\d+", facts.get("redis_version", "0"))[:2]))
        if version < OLDEST:
            raise ResponseError(f"REDIS_URL: the server is older than Redis {OLDEST[0]}.{OLDEST[1]}")
        server = facts.get("run_id", "").encode()
        other = server != self.server
        replaced = other and self.seen
        self.connected_at = asyncio.get_running_loop().time()
        if not self.seen:
            self._first_connected_at = self.connected_at
        self.server, self.seen, self._tried, self.available = server, True, True, True
        if other or self.connected_at - self.lost_at > self._lease / 3:  # no lease has run out in less
            self.reached_at = self.connected_at
        if replaced:
            self._replaced_at = self.connected_at
            self.send(("SET", self._loss_marker, "1", "PX", int(self._lease * 1000)))
        log.info("redis is there")
        if other and (policy := facts.get("maxmemory_policy", "noeviction")) != "noeviction":
            log.warning(
                "redis has maxmemory-policy %s: it may drop answers that are being read; set noeviction", policy
            )
        for callback in self.on_connect:
            callback(other)

    async def _serve(self, connection: Connection | UnixDomainSocketConnection) -> None:
        await self._wake.wait()
        self._wake.clear()
        calls, self._waiting = self._waiting, []
        try:
            with anyio.fail_after(PIPELINE_TIMEOUT):
                replies = iter(await _exchange(connection, [command for call in calls for command in call.commands]))
        except BaseException:
            self._waiting += calls  # to be failed with the others
            raise
        for call in calls:
            own = [next(replies) for _ in call.commands]
            if not call.replies.done():
                call.replies.set_result(own)

    def _lost(self, error: Exception) -> None:
        if self.available or not self._tried:
            self.lost_at = asyncio.get_running_loop().time()
            if isinstance(error, AuthenticationError | NoPermissionError):
                log.error("REDIS_URL: redis does not accept the user or the password, or allows too little")
            else:
                log.error("redis is away: %s", _reason(error))
        self._tried, self.available = True, False

    def _fail_all(self) -> None:
        calls, self._waiting = self._waiting, []
        for call in calls:
            if not call.replies.done():
                call.replies.set_exception(StoreUnavailable())
                call.replies.exception()  # nobody may be waiting


def _reason(error: Exception) -> str:
    # Error replies to commands may quote them, and so a part of an answer.
    own = isinstance(error, RedisConnectionError | RedisTimeoutError) or str(error).startswith("REDIS_URL")
    return str(error) if own else type(error).__name__


def _with_text(command: Command) -> Command:
    _, sha, *rest = command
    return ("EVAL", next(script.text for script in SCRIPTS if script.sha == sha), *rest)


async def _exchange(connection: Connection | UnixDomainSocketConnection, commands: Iterable[Command]) -> list[Reply]:
    """Send them at once, and read as many replies. Raises what makes the connection useless."""
    packed = [pack_command(command) for command in commands]  # at a tenth of what redis-py's own takes
    await connection.send_packed_command(b"".join(packed), check_health=False)
    replies: list[Reply] = []
    for _ in packed:
        try:  # without a timeout for each of them: there is one for all
            replies.append(await connection.read_response(disconnect_on_error=False, timeout=math.inf))
        except _AWAY:
            raise
        except ResponseError as error:
            if str(error).startswith(_AWAY_TEXT):
                raise
            replies.append(error)
    return replies
