"""How many chats one caller may start (RATE_LIMIT). In memory, for one process; knows no HTTP server.

The header fields are those of the IETF draft "RateLimit header fields for HTTP".
"""

import math
import time
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network

from chatproxy.config import RateLimit
from chatproxy.errors import RateLimited

# More callers than this within one window are a flood; the oldest are forgotten first.
MAX_CALLERS = 100_000


@lru_cache(1024)
def caller(address: str) -> str:
    """Who a caller is: an IPv4 address, or the /64 network that one IPv6 subscriber has."""
    try:
        ip = ip_address(address)
    except ValueError:
        return address
    if not isinstance(ip, IPv6Address):
        return address
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))


class Limits:
    """So many chats for each caller in a window that begins with the first of them.

    `bodies` are the bytes of all request bodies that are coming in.
    """

    def __init__(self, rate: RateLimit | None) -> None:
        self.bodies = 0
        self._rate = rate
        self._windows: dict[str, tuple[float, int]] = {}  # until when, how many left; the oldest first

    def take(self, caller: str) -> dict[str, str]:
        """Count one chat; gives the header fields that tell what is left. Raises RateLimited."""
        rate = self._rate
        if rate is None:
            return {}
        now = time.monotonic()
        while self._windows and (len(self._windows) > MAX_CALLERS or next(iter(self._windows.values()))[0] <= now):
            del self._windows[next(iter(self._windows))]
        until, left = self._windows.get(caller, (now + rate.seconds, rate.count))
        wait = math.ceil(until - now)
        headers = {
            "RateLimit-Policy": f'"chats";q={rate.count};w={rate.seconds}',
            "RateLimit": f'"chats";r={max(0, left - 1)};t={wait}',
        }
        if not left:
            raise RateLimited(retry_after=wait, headers=headers)
        self._windows[caller] = until, left - 1
        return headers
