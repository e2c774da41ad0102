"""So many chats for each caller in a window of time, so many bytes for request bodies, and who a caller is."""

import pytest
from starlette.datastructures import Headers

from chatproxy.config import RateLimit, Settings
from chatproxy.errors import Busy, RateLimited, Unauthorized
from chatproxy.services.access import Authenticator, Caller, client_key
from chatproxy.services.limits import BodyMemory, MemoryRateLimiter

pytestmark = pytest.mark.anyio


class Clock:
    """A monotonic clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def caller(name: str) -> Caller:
    return Caller(name, name)


async def refused(limiter: MemoryRateLimiter, who: str) -> tuple[int | None, str]:
    with pytest.raises(RateLimited) as error:
        await limiter.acquire(caller(who))
    assert error.value.headers["RateLimit-Policy"] == '"chats";q=2;w=60'
    with pytest.raises(RateLimited) as checked:
        await limiter.check(caller(who))
    assert checked.value.headers == error.value.headers
    return error.value.retry_after, error.value.headers["RateLimit"]


async def left(limiter: MemoryRateLimiter, who: str) -> str:
    await limiter.check(caller(who))
    return (await limiter.acquire(caller(who)))["RateLimit"]


async def test_window(clock: Clock) -> None:
    """It begins with the first chat; when it is over, all chats are there again. Asking what is left counts nothing."""
    limiter = MemoryRateLimiter(RateLimit(2, 60), clock=clock)
    assert await left(limiter, "a") == '"chats";r=1;t=60'
    clock.now += 10.5
    assert await left(limiter, "a") == '"chats";r=0;t=50'
    assert await refused(limiter, "a") == (50, '"chats";r=0;t=50')
    clock.now += 49.4
    assert await refused(limiter, "a") == (1, '"chats";r=0;t=1')
    clock.now += 0.1
    assert await left(limiter, "a") == '"chats";r=1;t=60'


async def test_callers_are_counted_apart(clock: Clock) -> None:
    """What one has used up is not the other's, and each window has its own end."""
    limiter = MemoryRateLimiter(RateLimit(2, 60), clock=clock)
    for _ in range(2):
        await left(limiter, "a")
    clock.now += 30
    for _ in range(2):
        await left(limiter, "b")
    assert await refused(limiter, "a") == (30, '"chats";r=0;t=30')
    clock.now += 30
    assert await left(limiter, "a") == '"chats";r=1;t=60'
    assert await refused(limiter, "b") == (30, '"chats";r=0;t=30')


async def test_no_limit() -> None:
    """Without a limit nothing is counted."""
    limiter = MemoryRateLimiter(None)
    for _ in range(1000):
        await limiter.check(caller("a"))
        assert await limiter.acquire(caller("a")) == {}


async def test_windows_are_bounded(clock: Clock) -> None:
    """Callers whose window is over are forgotten, and of a flood the oldest."""
    limiter = MemoryRateLimiter(RateLimit(1, 60), max_callers=10, clock=clock)
    for number in range(100):
        await left(limiter, str(number))
    for number in (90, 99):
        with pytest.raises(RateLimited):
            await limiter.check(caller(str(number)))
    await limiter.check(caller("0"))
    clock.now += 60
    await limiter.check(caller("99"))


def test_memory_for_bodies() -> None:
    """Large bodies leave a quarter of it to small ones; what is released may be used again."""
    memory = BodyMemory(Settings(), limit=400_000)
    large = memory.hold()
    large.grow(300_000)
    with pytest.raises(Busy):
        memory.hold().grow(70_000)
    memory.used = 300_000
    small = [memory.hold() for _ in range(10)]
    for hold in small:
        hold.grow(10_000)
    with pytest.raises(Busy):
        memory.hold().grow(1)
    for hold in (*small, large, large):
        hold.release()
    assert memory.used == 1
    large.grow(300_000 - 1)


def test_memory_for_the_largest_body() -> None:
    """Where bodies may be larger than all that is kept by default, there is room for two."""
    memory = BodyMemory(Settings(max_body_bytes=100_000_000))
    memory.hold().grow(100_000_000)


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("a socket's path", "unknown"),
        ("8.8.8.8 status=200", "unknown"),
        ("1" * 1_000_000, "unknown"),
        ("", "unknown"),
    ],
)
def test_client_key(address: str, who: str) -> None:
    """An IPv4 address is a caller, and of IPv6 the network that a subscriber has. All that is neither is one caller."""
    assert client_key(address) == who


async def test_scope_of_keys() -> None:
    """Idempotency keys belong to an address, or to an access token, and to whatever else somebody authorises with."""
    header = {"authorization": "Bearer 0123456789abcdef"}
    tokens = Settings(access_tokens=("0123456789abcdef",))  # type: ignore[arg-type] # as good as secrets here

    async def scope(settings: Settings, headers: dict[str, str], address: str) -> str:
        return (await Authenticator(settings).authenticate(Headers(headers), address, address)).scope

    assert await scope(Settings(), {}, "192.0.2.1") != await scope(Settings(), {}, "192.0.2.2")
    assert await scope(Settings(), {}, "192.0.2.1") != await scope(Settings(), header, "192.0.2.1")
    assert await scope(tokens, header, "192.0.2.1") == await scope(tokens, header, "192.0.2.2")


@pytest.mark.parametrize(
    ("peer", "believed"),
    [
        ("10.0.0.1", True),
        ("::ffff:10.0.0.1", True),
        ("2001:db8::1", True),
        ("10.0.0.2", False),
        ("2001:db9::1", False),
        ("a socket's path", False),
        (None, False),
    ],
)
async def test_name_from_a_peer(peer: str | None, believed: bool) -> None:
    """A name in AUTH_HEADER counts from the addresses and networks that are set, however the system writes them."""
    settings = Settings(auth_header="x-user", forwarded_allow_ips="10.0.0.1,2001:db8::/32")
    asking = Authenticator(settings).authenticate(Headers({"X-User": "ada"}), "192.0.2.1", peer)
    if believed:
        assert (await asking).id.startswith("user:")
    else:
        with pytest.raises(Unauthorized):
            await asking
