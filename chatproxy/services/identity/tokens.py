"""Tokens of the operator's own identity provider (JWT, RFC 7519): are they good, and whom do they name?

Knows PyJWT. Which algorithms are taken is decided by the kind of key, never by the token.
"""

import logging
from collections.abc import Collection
from typing import Any, Protocol

import jwt
from jwt import exceptions

from chatproxy.config import Settings
from chatproxy.errors import Unauthorized
from chatproxy.services.access import MAX_NAME, invalid_token

log = logging.getLogger(__name__)

# Characters. Real ones have one or two thousand.
MAX_TOKEN = 8192

# Seconds that the provider's clock and ours may differ.
LEEWAY = 30

# What the log says of a refused token, by the first kind that fits. (The library's own text may quote it.)
_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (exceptions.ExpiredSignatureError, "expired"),
    (exceptions.ImmatureSignatureError, "not valid yet"),
    (exceptions.InvalidIssuedAtError, "malformed"),
    (exceptions.InvalidSignatureError, "signature"),
    (exceptions.InvalidAudienceError, "audience"),
    (exceptions.InvalidIssuerError, "issuer"),
    (exceptions.InvalidAlgorithmError, "algorithm"),
    (exceptions.InvalidKeyError, "key"),
    (exceptions.InvalidSubjectError, "claim"),
)


class Key:
    """A key and the algorithms that it is for; `id` is what tokens call it."""

    def __init__(self, value: Any, algorithms: Collection[str], id: str | None = None) -> None:
        self.value = value
        self.algorithms = algorithms
        self.id = id


class KeySource(Protocol):
    """Where keys come from: a setting, or the provider."""

    @property
    def algorithms(self) -> Collection[str]:
        """Those that any of its keys may be for."""

    @property
    def ready(self) -> bool:
        """Whether there is any."""

    async def find(self, id: str | None, algorithm: str) -> Key | None:
        """The one key that a token with this id and algorithm can have been signed with. Raises AuthUnavailable."""


class SharedSecret:
    """A KeySource of one key, which whoever makes the tokens has, too."""

    algorithms: Collection[str] = ("HS256",)
    ready = True

    def __init__(self, secret: str) -> None:
        self._key = Key(secret.encode(), self.algorithms)

    async def find(self, id: str | None, algorithm: str) -> Key:  # noqa: ARG002 -- there is one
        """That key."""
        return self._key


class JWTVerifier:
    """Checks a token's signature, times, issuer, audience and the claim that names its holder."""

    def __init__(self, settings: Settings, keys: KeySource) -> None:
        self._keys = keys
        self._claim = settings.auth_claim
        self._issuer = settings.auth_issuer
        self._audience = settings.auth_audience
        self._options: Any = {
            "require": ["exp", settings.auth_claim],
            "verify_aud": settings.auth_audience is not None,
            "enforce_minimum_key_length": True,  # a short RSA key is accepted otherwise, with a warning only
        }

    @property
    def ready(self) -> bool:
        """Whether there is any key."""
        return self._keys.ready

    async def verify(self, token: str) -> str:
        """The claim. Raises Unauthorized or AuthUnavailable."""
        if len(token) > MAX_TOKEN or token.count(".") != 2:
            raise _refused("malformed")
        try:
            header = jwt.get_unverified_header(token)
            id, algorithm = header.get("kid"), header.get("alg")
        except (jwt.PyJWTError, ValueError, RecursionError):
            raise _refused("malformed") from None
        if not isinstance(algorithm, str) or not isinstance(id, str | None):
            raise _refused("malformed")
        if algorithm not in self._keys.algorithms:  # no reason to fetch anything
            raise _refused("algorithm")
        key = await self._keys.find(id, algorithm)
        if key is None:
            raise _refused("key")
        try:
            claims = jwt.decode(
                token,
                key.value,
                algorithms=list(key.algorithms),
                options=self._options,
                audience=self._audience,
                issuer=self._issuer,
                leeway=LEEWAY,
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            reason = next((reason for kind, reason in _REASONS if isinstance(error, kind)), "malformed")
            if isinstance(error, exceptions.MissingRequiredClaimError):
                reason = "claim"
        else:
            name = claims[self._claim]
            if isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable():
                return name
            reason = "claim"
        raise _refused(reason)


def _refused(reason: str) -> Unauthorized:
    log.info("a token was refused: %s", reason)
    return invalid_token()
