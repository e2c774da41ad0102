"""The parts of the bench at work: upstream, relays and proxies are processes, and answers go through them."""

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from time import monotonic

import pytest

from tests.bench import processes, proxies, replicas
from tests.bench.__main__ import measured
from tests.bench.distance import DELAY, bursts
from tests.bench.load import connect, leave
from tests.bench.plan import Plan
from tests.bench.processes import Target
from tests.bench.scenarios import Lab, Values, exactness
from tests.bench.script import HEAD, TAIL, WrongAnswerError, frames
from tests.bench.test_bench import cells

linux = pytest.mark.skipif(sys.platform != "linux", reason="cores and CPU time are read as Linux has them")


@pytest.fixture
def upstream(tmp_path: Path) -> Iterator[Target]:
    """The scripted upstream."""
    with processes.upstream(tmp_path, processes.cores().upstream) as target:
        yield target


@linux
@pytest.mark.anyio
async def test_upstream_and_load(upstream: Target) -> None:
    """The scripted upstream plays the script, and the load sees all of it."""
    assert await exactness(upstream) > 10_000
    assert upstream.cpu() > 0
    assert upstream.resident() > 2**20


@linux
@pytest.mark.anyio
async def test_relays(upstream: Target, tmp_path: Path) -> None:
    """All of it comes through TLS as well, from afar, and both in one."""
    relay = partial(processes.relay, folder=tmp_path, core=processes.cores().upstream)
    with relay(upstream, tls=True) as tls, relay(tls, delay=0.02) as both, relay(upstream, delay=0.02) as far:
        assert tls.authority
        assert both.authority == tls.authority
        for tokens in await asyncio.gather(*map(exactness, (tls, both, far))):
            assert tokens > 10_000


@linux
@pytest.mark.anyio
async def test_distance(upstream: Target, tmp_path: Path) -> None:
    """A request takes a round trip, and one more on a new connection; an idle connection is closed when asked."""
    delay = 0.2
    with processes.relay(upstream, tmp_path, processes.cores().upstream, delay=delay) as far:
        caller = await connect(far)
        waits = []
        for after in ("", "", ", and close"):
            since = monotonic()
            await caller.play(1, after=after)
            waits.append(monotonic() - since)
        assert waits[0] > 4 * delay
        assert 2 * delay < min(waits[1:]) < 4 * delay
        async with asyncio.timeout(10):
            while not caller.transport.is_closing():  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.01)


@linux
@pytest.mark.anyio
async def test_proxy_that_fails(tmp_path: Path) -> None:
    """A proxy that changes a letter is found out, behind TLS too."""
    wrong = HEAD + frames(0, 1).replace(b'"A"', b'"a"') + TAIL

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            await reader.readuntil(b"}]}")
            writer.write(wrong)
            await reader.read()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        proxy = Target("wrong", server.sockets[0].getsockname()[1], 0, raw=True)
        with processes.relay(proxy, tmp_path, processes.cores().upstream, tls=True) as tls:
            for target in (proxy, tls):
                async with asyncio.timeout(10):
                    with pytest.raises(WrongAnswerError, match="differs within 1 tokens"):
                        await exactness(target)


@linux
@pytest.mark.anyio
async def test_wrong_answer_while_measured(far_lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    """A peer that answers wrongly or not at all is told and does not count; the service ends the run then."""

    async def wrong(*_: object) -> Values:
        raise WrongAnswerError("the text differs")

    async def silent(*_: object) -> Values:
        raise TimeoutError

    plan = Plan(wrong)
    for name in ("nginx", "httpx"):
        assert await measured(Plan(silent), far_lab, name) == {}
        assert capsys.readouterr().out == f"silent on {name} (plain) does not count: it took more than 60 s\n"
    with pytest.raises(RuntimeError, match="it took more than 60 s"):
        await measured(Plan(silent), far_lab, "chatproxy")
    assert await measured(plan, far_lab, "caddy") == {}
    assert capsys.readouterr().out == "wrong on caddy (plain) does not count: the text differs\n"
    for name in ("chatproxy", "httpx"):
        with pytest.raises(RuntimeError, match=rf"wrong on {name} \(plain\): the text differs"):
            await measured(plan, far_lab, name)


@linux
@pytest.mark.anyio
async def test_refusal_or_nothing() -> None:
    """An answer that is none, or has no token, is found out at once and not waited for."""
    left = asyncio.Event()
    answers = [b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", HEAD + b"0\r\n\r\n"]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            await reader.readuntil(b"}]}")
            writer.write(answers.pop(0))
            await reader.read()
        left.set()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server, asyncio.timeout(10):
        for error in ("not an event stream", "without a token"):
            caller = await connect(Target("refusing", server.sockets[0].getsockname()[1], 0, raw=True))
            caller.play(1)
            with pytest.raises(WrongAnswerError, match=error):
                await caller.begun()
            leave([caller])
            await left.wait()
            left.clear()


@pytest.fixture
def far_lab(upstream: Target, tmp_path: Path) -> Iterator[Lab]:
    """A lab without proxies whose upstream is 80 ms away."""
    cores = processes.cores()
    with processes.relay(upstream, tmp_path, cores.upstream, delay=DELAY) as far:
        fresh = partial(proxies.proxy, upstream=far, folder=tmp_path, cores=[cores.proxy])
        yield Lab(far, {}, fresh, tmp_path, cores, window=0.2, few=3)


@linux
@pytest.mark.anyio
async def test_handshakes_seen(far_lab: Lab) -> None:
    """What keeps no connection ready is seen to pay a round trip for one."""
    values = await bursts(far_lab, "httpx")
    assert values["burst_1_p50"] > 2000 * DELAY * 0.9
    assert values["burst_50_p99"] >= values["burst_50_p50"] > 2000 * DELAY * 0.9


@linux
@pytest.mark.anyio
@pytest.mark.skipif(not processes.REDIS, reason="no Redis is installed")
async def test_elsewhere(far_lab: Lab) -> None:
    """A reader at another replica is later than one at the answer's own, and has the same text."""
    values = await replicas.elsewhere(far_lab, "chatproxy")
    assert 0 < values["replica_p50"] <= values["replica_p99"]


@linux
@pytest.mark.anyio
@pytest.mark.skipif(not processes.REDIS, reason="no Redis is installed")
async def test_shared(far_lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """What replicas take of Redis is seen: each token is written to it, over two connections of each."""
    monkeypatch.setattr(replicas, "SHARED", 10)
    values = await replicas.shared(far_lab, "chatproxy")
    assert values["shared_commands"] >= 1
    assert values["shared_memory"] > 0.5
    assert values["shared_connections"] == 2
    assert values["shared_cost"] > 1


@linux
@pytest.mark.skipif(not proxies.NGINX, reason="nginx is not installed")
def test_run() -> None:
    """The command runs: every proxy passes the check, over TLS and without, on both transports, and is measured."""
    told = bench("--quick", "--only", "start", "--only", "tls-first")
    assert re.search(r"^[\d,]+ tokens checked", told, re.MULTILINE)
    (head, _, over_tls), (_, _, plain) = [cells(section) for section in told.split("**Over ")[1:]]
    assert over_tls[0] == "time to first token, added to upstream's (ms)"
    assert plain[0] == "start to the first 200 on /healthz (ms)"
    assert re.fullmatch(r"≤ 500 \(\w+\)", plain[-1])
    installed = [] if "caddy is not installed" in told else ["Caddy"]
    assert head[1 : 4 + len(installed)] == ["nginx", *installed, "chatproxy", "on httpx"]
    assert all(re.fullmatch(r"-?[\d.]+ \(.*\)", cell) for cell in over_tls[1 : 4 + len(installed)])


@linux
def test_run_without_programs(tmp_path: Path) -> None:
    """Where a program is missing, the command says so, and measures the rest."""
    told = bench("--quick", "--only", "replicas", env={"PATH": str(tmp_path)})
    assert "redis-server is not installed: no replicas, no shared\n" in told
    assert "caddy is not installed: no figures beside it\n" in told


def bench(*arguments: str, env: Mapping[str, str] | None = None) -> str:
    """What the command prints."""
    command = [sys.executable, "-m", "tests.bench", *arguments]
    return subprocess.run(  # noqa: S603 -- our own command
        command, cwd=processes.ROOT, env=env, capture_output=True, text=True, check=True, timeout=120
    ).stdout
