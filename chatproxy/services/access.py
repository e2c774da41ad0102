"""Who calls: an address, a holder of an access token, or somebody whom a token or a proxy names.

Knows header fields, but no HTTP server, and not how a token is checked.
"""

import hashlib
import hmac
import logging
import secrets
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Protocol

from msgspec import Struct

from chatproxy.config import Settings
from chatproxy.errors import Unauthorized

log = logging.getLogger(__name__)

# Longer than any address: what is sent instead of one must not fill memory.
MAX_ADDRESS = 64

# Characters of a name, whoever gives it.
MAX_NAME = 255


class Caller(Struct, frozen=True):
    """Who asks for an answer.

    `id` is what limits and budgets count by: whoever a token or a proxy names, else an IPv4 address, or the /64 network
    that one IPv6 subscriber has. `scope` is what idempotency keys belong to: the access token's digest where there is
    one, else the same as `id`. `label` is what the log shows instead of the address: a digest of the name, unless
    LOG_CLIENTS allows the name itself.
    """

    id: str
    scope: str
    label: str | None = None


class Headers(Protocol):
    """A request's header fields, by names in whatever case."""

    def get(self, name: str, default: str, /) -> str: ...

    def getlist(self, name: str, /) -> list[str]: ...


class TokenVerifier(Protocol):
    """Checks tokens of an identity provider. See `identity.tokens`."""

    @property
    def ready(self) -> bool:
        """Whether there is any key to check them with."""

    async def verify(self, token: str) -> str:
        """The name that the token gives its holder. Raises Unauthorized or AuthUnavailable."""


class Authenticator:
    """Tells who calls, by whichever of ACCESS_TOKENS, AUTH_JWKS_URL, AUTH_JWT_SECRET and AUTH_HEADER is set."""

    def __init__(self, settings: Settings, verifier: TokenVerifier | None = None) -> None:
        self._tokens = [token.encode() for token in settings.access_tokens]
        self._verifier = verifier
        self._issuer = settings.auth_issuer or ""
        self._header = settings.auth_header
        self._proxies = [ip_network(item) for item in settings.forwarded_allow_ips.split(",")] if self._header else []
        self._log_names = settings.log_clients
        # Replicas have to agree on a caller's digest, and nobody else may guess a name from it.
        secret = settings.grok_api_key or settings.redis_url or secrets.token_hex()
        self._key = hashlib.sha256(secret.encode()).digest()
        self.required = bool(self._tokens or verifier or self._header)

    @property
    def ready(self) -> bool:
        """Whether anybody can be let in."""
        return self._verifier is None or self._verifier.ready or bool(self._tokens or self._header)

    async def authenticate(self, headers: Headers, address: str | None, peer: str | None) -> Caller:
        """The caller of a request. `peer` is the other end of the connection, whoever it speaks for.

        Raises Unauthorized where somebody has to say who it is and does not, and AuthUnavailable.
        """
        authorization = headers.get("authorization", "")
        if not self.required:
            caller = anonymous(address)
            # Nobody checks it then, but whoever sends another one is somebody else.
            return Caller(caller.id, f"{caller.id} {_digest(authorization)}") if authorization else caller
        if self._header and (name := self._name_from_proxy(headers.getlist(self._header), peer)):
            return self._named("proxy", name)
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized(headers={"WWW-Authenticate": "Bearer"})
        # Each is compared, in constant time, so that the time tells nothing of any.
        known = [hmac.compare_digest(token.encode(), expected) for expected in self._tokens]
        if any(known):
            return Caller(anonymous(address).id, _digest(token))
        if self._verifier is None:
            raise Unauthorized(headers={"WWW-Authenticate": "Bearer"})
        return self._named("token", await self._verifier.verify(token))

    def _name_from_proxy(self, values: list[str], peer: str | None) -> str | None:
        if not any(values):
            return None
        if not self._is_proxy(peer):
            log.info("AUTH_HEADER was ignored: it came from an address that is not in FORWARDED_ALLOW_IPS")
            return None
        if len(values) != 1 or len(values[0]) > MAX_NAME:
            log.info("AUTH_HEADER was ignored: it came twice, or is too long")
            return None
        return values[0]

    def _is_proxy(self, peer: str | None) -> bool:
        try:
            ip = ip_address(peer or "")
        except ValueError:
            return False
        ip = getattr(ip, "ipv4_mapped", None) or ip
        return any(ip in proxies for proxies in self._proxies)

    def _named(self, source: str, name: str) -> Caller:
        digest = hashlib.blake2b(digest_size=16, key=self._key)
        digest.update(f"{source}\n{self._issuer}\n{name}".encode())
        id = f"user:{digest.hexdigest()}"
        return Caller(id, id, name if self._log_names else f"user:{digest.hexdigest()[:8]}")


def invalid_token() -> Unauthorized:
    """The error for a token that is no good; it does not say why, for who forges one would like to know."""
    return Unauthorized(headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})


def anonymous(address: str | None) -> Caller:
    """A caller of whom no more than the address is asked: who reads a stream has its id for a ticket."""
    id = client_key(address or "")
    return Caller(id, id)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def client_key(address: str) -> str:
    """What limits count an address by. Whatever is no address is one and the same."""
    return _client_key(address[:MAX_ADDRESS])


@lru_cache(256)
def _client_key(address: str) -> str:
    try:
        ip = ip_address(address)
    except ValueError:
        return "unknown"
    if not isinstance(ip, IPv6Address):
        return str(ip)
    return str(ip.ipv4_mapped or ip_network((ip, 64), strict=False))
