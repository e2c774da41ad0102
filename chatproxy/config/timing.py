"""Times that no setting changes, in one value that is given to whoever waits."""

import random
from collections.abc import Callable

from msgspec import Struct


class Timing(Struct, frozen=True, kw_only=True):
    """All in seconds."""

    # A client that needs longer for a megabyte is holding a connection rather than using it.
    body_timeout: float = 60.0

    # How long an upstream error's body is read.
    error_timeout: float = 5.0

    # The check of the API key at the start, and the time between two checks of a key that is unusable.
    key_check_timeout: float = 5.0
    key_check_interval: float = 60.0

    # Before the first retry; twice that before the second, and so on. Called with the least and the most.
    retry_jitter: Callable[[float, float], float] = random.uniform

    # For one fetch of an identity provider's keys; between two for tokens whose key is unknown, failed ones included;
    # and how long the last keys are used while the provider is away.
    jwks_timeout: float = 5.0
    jwks_interval: float = 30.0
    jwks_lifetime: float = 86_400.0

    # With Redis: how long a replica that has not renewed its lease counts as alive, how often it does (and looks after
    # its answers), and how long an outage may be before readers are told that the rest is lost.
    lease: float = 6.0
    sweep_interval: float = 1.0
    store_outage: float = 10.0


DEFAULT_TIMING = Timing()
