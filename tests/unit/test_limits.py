"""So many chats for each caller in a window of time."""

import pytest

from chatproxy import limits
from chatproxy.config import RateLimit
from chatproxy.errors import RateLimited
from chatproxy.limits import Limits, caller


class Clock:
    """A monotonic clock that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("chatproxy.limits.time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def refused(counted: Limits, who: str) -> tuple[int | None, str]:
    with pytest.raises(RateLimited) as error:
        counted.take(who)
    assert error.value.headers["RateLimit-Policy"] == '"chats";q=2;w=60'
    return error.value.retry_after, error.value.headers["RateLimit"]


def test_window(clock: Clock) -> None:
    """It begins with the first chat; when it is over, all chats are there again."""
    counted = Limits(RateLimit(2, 60))
    assert counted.take("a") == {"RateLimit-Policy": '"chats";q=2;w=60', "RateLimit": '"chats";r=1;t=60'}
    clock.now += 10.5
    assert counted.take("a")["RateLimit"] == '"chats";r=0;t=50'
    assert refused(counted, "a") == (50, '"chats";r=0;t=50')
    clock.now += 49.4
    assert refused(counted, "a") == (1, '"chats";r=0;t=1')
    clock.now += 0.1
    assert counted.take("a")["RateLimit"] == '"chats";r=1;t=60'


def test_callers_are_counted_apart(clock: Clock) -> None:
    """What one has used up is not the other's, and each window has its own end."""
    counted = Limits(RateLimit(2, 60))
    for _ in range(2):
        counted.take("a")
    clock.now += 30
    for _ in range(2):
        counted.take("b")
    assert refused(counted, "a") == (30, '"chats";r=0;t=30')
    clock.now += 30
    assert counted.take("a")["RateLimit"] == '"chats";r=1;t=60'
    assert refused(counted, "b") == (30, '"chats";r=0;t=30')


def test_no_limit() -> None:
    """Without a limit nothing is counted."""
    counted = Limits(None)
    assert [counted.take("a") for _ in range(1000)] == [{}] * 1000


def test_bounded(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers whose window is over are forgotten, and of a flood the oldest."""
    monkeypatch.setattr(limits, "MAX_CALLERS", 10)
    counted = Limits(RateLimit(2, 60))
    for number in range(100):
        counted.take(str(number))
    assert list(counted._windows) == [str(number) for number in range(89, 100)]
    clock.now += 60
    counted.take("new")
    assert list(counted._windows) == ["new"]


@pytest.mark.parametrize(
    ("address", "who"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("unix socket", "unix socket"),
        ("", ""),
    ],
)
def test_caller(address: str, who: str) -> None:
    """An IPv4 address is a caller, and of IPv6 the network that a subscriber has."""
    assert caller(address) == who
