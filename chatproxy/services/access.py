"""Who calls: an address, or whoever holds one of the access tokens. Knows header fields, but no HTTP server."""

import hashlib
import hmac
from collections.abc import Mapping
from ipaddress import IPv6Address, ip_address, ip_network

from msgspec import Struct

from chatproxy.config import Settings
from chatproxy.errors import Unauthorized

# Longer than any address: what is sent instead of one must not fill memory.
MAX_ADDRESS = 64


class Caller(Struct, frozen=True):
    """Who asks for an answer.

    `id` is what limits count by: an IPv4 address, or the /64 network that one IPv6 subscriber has. `scope` is what
    idempotency keys belong to: the access token's digest where there is one, else the same as `id`.
    """

    id: str
    scope: str


def authenticate(settings: Settings, headers: Mapping[str, str], address: str | None) -> Caller:
    """The caller of a request. Raises Unauthorized where access tokens are set and none of them was sent."""
    caller = anonymous(address)
    authorization = headers.get("authorization", "")
    tokens = settings.access_tokens
    if not tokens:
        # Nobody checks it then, but whoever sends another one is somebody else.
        return Caller(caller.id, f"{caller.id} {_digest(authorization)}") if authorization else caller
    scheme, _, given = authorization.partition(" ")
    token = given.strip().encode()
    # Each is compared, in constant time, so that the time tells nothing of any.
    known = [hmac.compare_digest(token, expected.encode()) for expected in tokens]
    if not (scheme.lower() == "bearer" and any(known)):
        raise Unauthorized(headers={"WWW-Authenticate": "Bearer"})
    return Caller(caller.id, _digest(given.strip()))


def anonymous(address: str | None) -> Caller:
    """A caller of whom no more than the address is asked: who reads a stream has its id for a ticket."""
    id = client_key(address or "")
    return Caller(id, id)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def client_key(address: str) -> str:
    """What limits count an address by. Whatever is no address is one and the same."""
    try:
        ip = ip_address(address[:MAX_ADDRESS])
    except ValueError:
        return "unknown"
    if not isinstance(ip, IPv6Address):
        return str(ip)
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))
