"""The parts of the doctor that need no service: times into verdicts, addresses, lines, and what is printed."""

import pytest

from chatproxy.doctor import advice
from chatproxy.doctor.arrivals import judge
from chatproxy.doctor.client import Lines, Reply, Target, Unreachable, connect
from chatproxy.doctor.command import WIDTH, render
from chatproxy.doctor.visit import Check
from tests.upstream import unreachable

TABLES = {name: table for name, table in vars(advice).items() if name.isupper() and name[0] != "_"}


@pytest.mark.parametrize(
    ("times", "kind", "delayed"),
    [
        ([number * 0.03 for number in range(30)], "single", False),
        ([number * 0.03 + number % 2 * 0.029 for number in range(30)], "single", False),
        ([number // 7 * 0.21 for number in range(30)], "lumps", True),
        ([number // 7 * 0.5 for number in range(30)], "lumps", False),
        ([3.0] * 30, "held", False),
        ([3.0 + number * 0.001 for number in range(30)], "held", False),
        ([3.0, 3.01, 3.02], "few", False),
        ([], "few", False),
    ],
)
def test_arrivals(times: list[float], kind: str, delayed: bool) -> None:
    """One by one, in lumps, all at once, or too few to tell."""
    arrivals = judge(times)
    assert (arrivals.kind, arrivals.delayed, arrivals.tokens) == (kind, delayed, len(times))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (
            "https://chat.example.com",
            ("https://chat.example.com", "chat.example.com", 443, "", "https://chat.example.com"),
        ),
        (
            "http://Chat.example.com:80/",
            ("http://chat.example.com", "chat.example.com", 80, "", "http://chat.example.com"),
        ),
        ("https://[::1]:8443/grok/", ("https://[::1]:8443/grok", "::1", 8443, "/grok", "https://[::1]:8443")),
    ],
)
def test_target(url: str, expected: tuple[str, str, int, str, str]) -> None:
    """The parts of an address, as browsers write its origin."""
    target = Target.parse(url)
    assert (target.url, target.host, target.port, target.prefix, target.origin) == expected


@pytest.mark.parametrize("url", ["chat.example.com", "ftp://a", "http://", "http://a:x", "http://u:p@a", "http://a/#b"])
def test_no_target(url: str) -> None:
    """What is no plain address of a web server is refused, and what it says is not repeated."""
    with pytest.raises(ValueError, match="expected an http or https address") as refusal:
        Target.parse(url)
    assert "u:p" not in str(refusal.value)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_lines(size: int) -> None:
    """Events, ids and comments are read whole, however they are cut."""
    body = b"retry: 2000\nid: a-0\n\n: keep-alive\n\ndata: x\ndata: y\nid: a-1\n\nevent: finish\ndata: {}\nid: a-2\n\n"
    lines, reply = Lines(), Reply(0.0)
    for start in range(0, len(body), size):
        lines.feed(body[start : start + size], reply)
    assert [(event.type, event.data, event.id) for event in reply.events] == [
        ("message", "x\ny", "a-1"),
        ("finish", "{}", "a-2"),
    ]
    assert len(reply.comments) == 1


@pytest.mark.parametrize("name", TABLES)
def test_advice(name: str) -> None:
    """Each table knows all five proxies, and is readable on a phone."""
    lines = advice.lines(TABLES[name], None, "/grok")
    assert set(lines) == {"nginx", "Caddy", "HAProxy", "Apache", "Traefik"}
    assert "PREFIX" not in "".join(lines.values())
    assert max(map(len, render(Check("first token", False, "a word " * 20, lines)).splitlines())) <= WIDTH
    assert list(advice.lines(TABLES[name], "nginx", "")) == ["nginx"]


@pytest.mark.anyio
async def test_unreachable_of_the_doctor() -> None:
    """A port that never answers is told as that, and so is an address that cannot be."""
    with unreachable() as url, pytest.raises(Unreachable, match="within 0 s: is a firewall closed"):
        await connect(Target.parse(url), within=0.3)
    with pytest.raises(Unreachable, match="no connection to port 80: "):
        await connect(Target.parse("http://255.255.255.255"))
