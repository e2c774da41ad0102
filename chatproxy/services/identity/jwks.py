"""The keys of an identity provider (JWKS, RFC 7517): fetched, renewed, and kept while the provider is away.

Knows httpx and PyJWT. Does not know tokens.
"""

import asyncio
import logging
from typing import Any

import anyio
import httpx
import jwt
import msgspec

from chatproxy.config import Settings
from chatproxy.config.timing import Timing
from chatproxy.errors import AuthUnavailable
from chatproxy.services.grok.network import ProxyTransport, cause, ssl_context
from chatproxy.services.identity.tokens import Key

log = logging.getLogger(__name__)

# Seconds between two fetches.
REFRESH_INTERVAL = 600.0

MAX_BYTES = 262_144
MAX_KEYS = 100

# What a key of that kind and curve may be used for.
_ALGORITHMS = {
    ("RSA", None): ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    ("EC", "P-256"): ("ES256",),
    ("EC", "P-384"): ("ES384",),
    ("EC", "P-521"): ("ES512",),
    ("OKP", "Ed25519"): ("EdDSA",),
    ("OKP", "Ed448"): ("EdDSA",),
}


class _Set(msgspec.Struct):
    keys: list[dict[str, Any]]


class JWKS:
    """A KeySource for AUTH_JWKS_URL. `run` it in a task."""

    algorithms = frozenset(name for names in _ALGORITHMS.values() for name in names)

    def __init__(self, settings: Settings, timing: Timing) -> None:
        assert settings.auth_jwks_url is not None
        self._url = settings.auth_jwks_url
        self._timeout = timing.jwks_timeout
        self._interval = timing.jwks_interval
        self._lifetime = timing.jwks_lifetime
        self._loop = asyncio.get_running_loop()
        self._keys: list[Key] = []
        self._tried_at = -self._interval
        self._fetched_at = 0.0
        self._fetching: asyncio.Task[None] | None = None
        context = ssl_context(settings)
        transport: httpx.AsyncBaseTransport = (
            httpx.AsyncHTTPTransport(verify=context, trust_env=False)
            if settings.auth_proxy is None
            else ProxyTransport(settings.auth_proxy, context, REFRESH_INTERVAL, [])
        )
        self._client = httpx.AsyncClient(transport=transport, trust_env=False, timeout=self._timeout)

    @property
    def ready(self) -> bool:
        """Whether there has been any key."""
        return bool(self._keys)

    @property
    def _usable(self) -> bool:
        return self.ready and self._loop.time() - self._fetched_at < self._lifetime

    async def find(self, id: str | None, algorithm: str) -> Key | None:
        """The key of that id, or the only one that fits. An unknown id is looked for anew, but not by everybody."""
        key = self._find(id, algorithm)
        if key is None or not self._usable:
            await self._refresh()
            key = self._find(id, algorithm)
        if not self._usable:
            raise AuthUnavailable
        return key

    def _find(self, id: str | None, algorithm: str) -> Key | None:
        fitting = [key for key in self._keys if id in (None, key.id) and algorithm in key.algorithms]
        return fitting[0] if len(fitting) == 1 else None

    async def run(self) -> None:
        """Fetch the keys now, and again and again, until cancelled."""
        async with self._client:
            try:
                while True:
                    await self._refresh()
                    await anyio.sleep(REFRESH_INTERVAL if self._usable else self._interval)
            finally:
                if self._fetching is not None:
                    self._fetching.cancel()

    async def _refresh(self) -> None:
        """Fetch the keys, unless that was tried a moment ago. Who comes meanwhile waits for the same answer."""
        if self._fetching is None and self._loop.time() - self._tried_at >= self._interval:
            # A task, because whoever asked first may leave.
            self._fetching = asyncio.create_task(self._fetch_keys())
        if self._fetching is not None:
            await asyncio.wait([self._fetching])

    async def _fetch_keys(self) -> None:
        try:
            with anyio.fail_after(self._timeout):
                self._keys = _read(await self._fetch())
            self._fetched_at = self._loop.time()
        except (httpx.HTTPError, OSError, ValueError, RecursionError, TimeoutError) as error:
            reason = str(error) if isinstance(error, _NoKeys) else cause(error)
            log.warning("AUTH_JWKS_URL: there are no new keys: %s", reason)
        finally:
            self._tried_at = self._loop.time()
            self._fetching = None

    async def _fetch(self) -> bytes:
        content = b""
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        async with self._client.stream("GET", self._url, headers=headers) as response:
            if response.status_code != 200:
                raise _NoKeys(f"status {response.status_code}")
            async for piece in response.aiter_raw():
                content += piece
                if len(content) > MAX_BYTES:
                    raise _NoKeys("the answer is too large")
        return content


class _NoKeys(ValueError):
    """Why, in our own words."""


def _read(content: bytes) -> list[Key]:
    try:
        found = msgspec.json.decode(content, type=_Set).keys[:MAX_KEYS]
    except (ValueError, RecursionError):
        raise _NoKeys("the answer is no set of keys") from None
    keys = [key for each in found if (key := _key(each)) is not None]
    if not keys:
        raise _NoKeys("none of them can be used")
    return keys


def _key(data: dict[str, Any]) -> Key | None:
    """A key that signatures can be checked with. None for all else: keys to encrypt with, shared secrets."""
    id, only = data.get("kid"), data.get("alg")
    try:
        algorithms = _ALGORITHMS.get((str(data.get("kty")), data.get("crv")), ())
        if only is not None:
            algorithms = tuple(name for name in algorithms if name == only)
        if data.get("use", "sig") != "sig" or not algorithms or not isinstance(id, str | None):
            return None
        # Only what is public of it: an RSA key with `d` would be read as one to sign with.
        public: dict[str, Any] = {name: data[name] for name in ("kty", "crv", "x", "y", "n", "e") if name in data}
        return Key(jwt.PyJWK(public, algorithms[0]).key, algorithms, id)
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
