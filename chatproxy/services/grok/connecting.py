"""A TCP connection to whichever address of a host answers first, that notices when its peer is lost.

Knows sockets. Does not know TLS or HTTP.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

SocketOption = tuple[int, int, int]

# Seconds. RFC 8305, section 5: how long to wait for one address before the next one is tried beside it.
ATTEMPT_DELAY = 0.25


def socket_options(seconds: float) -> list[SocketOption]:
    """Options for a TCP socket that fails with ETIMEDOUT when nothing it sent was acknowledged for so long.

    An idle connection is probed, so that its loss is found as well, after a third of that time and then each third of
    it, in whole seconds and at least 1. Where the system lacks one of the options it is left out.
    """
    interval = min(max(1, round(seconds / 3)), 32_767)  # the most that Linux takes
    options = {
        "TCP_USER_TIMEOUT": min(max(1, round(seconds * 1000)), 2**31 - 1),  # milliseconds; Linux
        "TCP_KEEPIDLE": interval,  # Linux, Windows
        "TCP_KEEPALIVE": interval,  # the same on macOS
        "TCP_KEEPINTVL": interval,
        "TCP_KEEPCNT": 2,  # without TCP_USER_TIMEOUT, which replaces it
    }
    return [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        *((socket.IPPROTO_TCP, getattr(socket, name), n) for name, n in options.items() if hasattr(socket, name)),
    ]


async def connect_happy_eyeballs(
    found: list[tuple[Any, ...]], options: Sequence[SocketOption], attempt_delay: float
) -> socket.socket:
    """A connection to whichever of the addresses answers first, after RFC 8305.

    The next address is tried when one fails, or beside it after `attempt_delay` seconds. Raises the last attempt's
    OSError.
    """
    loop = asyncio.get_running_loop()
    addresses = deque(found)
    attempts: set[asyncio.Task[socket.socket | OSError]] = set()
    try:
        while True:
            if addresses:
                attempts.add(loop.create_task(_attempt(options, *addresses.popleft())))
            timeout = attempt_delay if addresses else None
            done, _ = await asyncio.wait(attempts, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                attempts.remove(attempt)
                result = attempt.result()
                if not isinstance(result, OSError):
                    return result
                if not (attempts or addresses):
                    # A new exception, since this frame holds the other one. The number decides on the class.
                    raise OSError(*result.args)
    finally:
        for attempt in attempts:
            attempt.cancel()
            attempt.add_done_callback(_close_late)


async def _attempt(
    options: Sequence[SocketOption], family: int, kind: int, protocol: int, _name: str, address: Any
) -> socket.socket | OSError:
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        for option in options:
            sock.setsockopt(*option)
        await asyncio.get_running_loop().sock_connect(sock, address)
    except OSError as error:
        sock.close()
        return error
    except BaseException:
        sock.close()
        raise
    return sock


def _close_late(attempt: "asyncio.Task[socket.socket | OSError]") -> None:
    if not attempt.cancelled() and isinstance(sock := attempt.result(), socket.socket):
        sock.close()
