"""Redis in trouble: what goes on, what is refused, and that all heals by itself."""

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from chatproxy.config.timing import Timing
from tests.conftest import ROOT, TIMEOUT, InProcessService, free_port, refusal, serving
from tests.readers import DONE, joined, standard
from tests.redis_servers import RedisServer, engines, needs_redis
from tests.replicas.fleets import BRISK, JSON, becomes, fleet, follow, number_of, start, until
from tests.upstream import Gate, Upstream, stream
from tests.wire.test_resume import code

pytestmark = [pytest.mark.anyio, needs_redis]

AWAY = {"status": "ok", "store": "unavailable"}


@pytest.fixture(params=engines)
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[RedisServer]:
    async with RedisServer(request.param) as redis:
        yield redis


async def refused(service: InProcessService, **fields: Any) -> None:
    """A new resumable answer is refused for now."""
    response = await service.ask(**fields)
    assert (response.status_code, refusal(response)["code"]) == (503, "store_unavailable")
    assert response.headers["Retry-After"] == "5"


async def accepted(service: InProcessService) -> str:
    """Wait until resumable answers are taken again, and give the address of one."""
    async with asyncio.timeout(TIMEOUT):
        while (response := await service.ask(headers=JSON)).status_code == 503:
            pass
    url: str = response.json()["url"]
    return url


async def logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    """Wait until this is in the log."""
    async with asyncio.timeout(TIMEOUT):
        while text not in caplog.text:  # noqa: ASYNC110 -- nobody tells when it is so
            await asyncio.sleep(0.02)


async def test_away_at_start(grok: Upstream) -> None:
    """The service starts without its Redis, is not ready until that has come, and then becomes so by itself."""
    grok.set_scripts(stream("a"))
    redis = RedisServer()
    async with serving(grok.url, BRISK, redis_url=redis.url) as service:
        response = await service.client.get("/readyz")
        assert (response.status_code, response.json()["reason"]) == (503, "store_unavailable")
        await becomes(service, "/metrics", "chatproxy_store_available 0.0")
        await refused(service, headers=JSON)
        await refused(service, resumable=True)
        assert (await service.ask()).content == b"data: a\n\ndata: [DONE]\n\n"
        response = await service.client.get("/api/chat/AAAAAAAAAAAAAAAAAAAAAA/stream")
        assert (response.status_code, refusal(response)["code"]) == (503, "store_unavailable")
        response = await service.client.delete("/api/chat/AAAAAAAAAAAAAAAAAAAAAA")
        assert (response.status_code, refusal(response)["code"]) == (503, "store_unavailable")
        async with redis:
            await until(service.client, "/readyz", 200)
            await becomes(service, "/metrics", "chatproxy_store_available 1.0")
            url = await accepted(service)
            assert joined(standard((await service.client.get(url)).content)) == "a"


@pytest.mark.parametrize("empty", [True, False], ids=["restarted", "unreachable"])
async def test_away_later(grok: Upstream, redis: RedisServer, empty: bool) -> None:
    """An outage ends no answer: readers at the owner notice nothing, those elsewhere get the rest afterwards."""
    gates = [Gate(), Gate(), Gate()]
    grok.set_scripts(stream(*(step for number, gate in enumerate(gates) for step in (f"{number}", gate))))
    patient = Timing(lease=1.2, sweep_interval=0.2, store_outage=TIMEOUT)
    async with fleet(grok, redis, 2, patient, redis_prefix="later:") as (owner, other):
        url = await start(owner, Idempotency_Key="k")
        async with follow(owner, url) as here, follow(other, url) as there:
            assert [(await live.event()).data for live in (here, there)] == ["0", "0"]
            await redis.stop() if empty else redis.pause()
            gates[0].open()
            assert (await here.event()).data == "1"
            await becomes(owner, "/readyz", "unavailable")
            response = await owner.client.get("/readyz")
            assert (response.status_code, response.json()) == (200, AWAY)
            await refused(owner, headers=JSON)
            plain = asyncio.create_task(owner.ask())
            # The key of an answer that is here is found here.
            again = await owner.ask(headers={**JSON, "Idempotency-Key": "k"})
            assert again.json()["url"] == url
            assert (await other.client.delete(url.removesuffix("/stream"))).status_code == 503
            await redis.start() if empty else redis.go_on()
            gates[1].open()
            assert [(await there.event()).data for _ in "12"] == ["1", "2"]
            gates[2].open()
            assert [[event.data for event in await live.rest()] for live in (here, there)] == [["2", DONE], [DONE]]
            assert (await plain).content.endswith(b"data: [DONE]\n\n")
        await accepted(other)
        same_key = {**JSON, "Idempotency-Key": "k"}
        async with asyncio.timeout(TIMEOUT):  # a memory that is lost is written again before a key counts as new
            while (repeated := await other.ask(headers=same_key)).status_code == 503:  # noqa: ASYNC110 -- nobody tells
                await asyncio.sleep(0.05)
        assert repeated.json()["url"] == url
        assert all(left > 0 for left in redis.everything().values())


async def test_away_for_long(grok: Upstream, redis: RedisServer) -> None:
    """Readers elsewhere are told when an outage lasts, and no event after that may follow; the owner's goes on."""
    gate = Gate()
    grok.set_scripts(stream("a", gate))
    async with fleet(grok, redis) as (owner, other):
        url = await start(owner)
        async with follow(owner, url) as here, follow(other, url) as there:
            assert [(await live.event()).data for live in (here, there)] == ["a", "a"]
            await redis.stop()
            [lost] = await there.rest()
            assert code(lost) == "replay_lost"
            gate.open()
            assert [event.data for event in await here.rest()] == [DONE]
        # The answer is kept for whoever comes to its owner.
        assert joined(standard((await owner.client.get(url)).content)) == "a"
        assert (await owner.client.delete(url.removesuffix("/stream"))).status_code == 204


async def test_no_memory(grok: Upstream, redis: RedisServer) -> None:
    """When Redis takes nothing more, new resumable answers are refused, and running ones go on, here and there."""
    gate, second = Gate(), Gate()
    grok.set_scripts(stream("a", gate, "b", second))
    async with fleet(grok, redis) as (owner, other):
        url = await start(owner)
        async with follow(owner, url) as here, follow(other, url) as there:
            assert [(await live.event()).data for live in (here, there)] == ["a", "a"]
            redis.do("CONFIG", "SET", "maxmemory", 1)
            await refused(owner, headers=JSON)
            gate.open()
            assert (await here.event()).data == "b"
            assert (await other.client.delete(url.removesuffix("/stream"))).status_code == 204
            assert code((await here.rest())[-1]) == "stopped"
            redis.do("CONFIG", "SET", "maxmemory", 0)
            assert [event.data for event in (await there.rest())[:-1]] == ["b"]
        await accepted(other)
        second.open()


async def test_slow(grok: Upstream, redis: RedisServer) -> None:
    """Nobody waits long for a Redis that takes its time."""
    grok.set_scripts(stream("a"))
    async with fleet(grok, redis, 1) as (service,):
        redis.pause()
        try:
            since = asyncio.get_running_loop().time()
            await refused(service, headers=JSON)
            assert asyncio.get_running_loop().time() - since < 2
            assert (await service.ask()).status_code == 200
        finally:
            redis.go_on()
        await accepted(service)


async def test_limits_without_redis(grok: Upstream, redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    """Without Redis limits are closed; or, where the operator says so, they hold for each replica by itself."""
    grok.set_scripts(stream("a"))
    limits = {"rate_limit": "3/hour", "max_streams_per_client": 2}
    async with (
        fleet(grok, redis, 1, BRISK, **limits) as (closed,),
        fleet(grok, redis, 1, BRISK, **limits, limits_without_redis="open") as (open,),
    ):
        assert [(await service.ask()).status_code for service in (closed, open)] == [200, 200]
        await redis.stop()
        await becomes(closed, "/readyz", "unavailable")
        await becomes(open, "/readyz", "unavailable")
        await refused(closed)
        await refused(closed, headers={"Idempotency-Key": "k"})
        assert [(await open.ask()).status_code for _ in range(4)] == [200, 200, 200, 429]
        assert caplog.text.count("limits count for each replica by itself") == 1
        await redis.start()
        await accepted(closed)
        await becomes(open, "/metrics", "chatproxy_store_available 1.0")
        assert (await open.ask()).status_code == 200
    async with fleet(grok, redis, 1, max_streams_per_client=2) as (closed,):
        await redis.stop()
        await becomes(closed, "/readyz", "unavailable")
        await refused(closed)


async def test_wrong_password(grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """A password that is not accepted is told as what it is, without itself, and mended by whoever sets it."""
    async with RedisServer(requirepass="the-right-one") as redis:
        url = redis.url.replace("the-right-one", "canary")
        async with serving(grok.url, BRISK, redis_url=url) as service:
            await logged(caplog, "REDIS_URL: redis does not accept the user or the password")
            assert (await service.client.get("/readyz")).status_code == 503
            assert "canary" not in caplog.text
            redis.do("CONFIG", "SET", "requirepass", "canary")
            await until(service.client, "/readyz", 200)


async def test_connections_are_lost(grok: Upstream, redis: RedisServer) -> None:
    """Connections that Redis closes, and scripts that it forgets, cost nobody anything but a moment."""
    gates = [Gate() for _ in range(8)]
    grok.set_scripts(stream(*(step for number, gate in enumerate(gates) for step in (f"{number}", gate))))
    async with fleet(grok, redis) as (owner, other):
        url = await start(owner)
        async with follow(other, url) as there:
            for number, gate in enumerate(gates):
                assert (await there.event()).data == f"{number}"
                redis.do("SCRIPT", "FLUSH")
                if number % 2:
                    redis.do("CLIENT", "KILL", "TYPE", "pubsub")
                else:
                    redis.do("CLIENT", "KILL", "TYPE", "normal")
                gate.open()
            assert [event.data for event in await there.rest()] == [DONE]


async def test_two_connections(grok: Upstream, redis: RedisServer) -> None:
    """However many read, a replica has two connections to Redis."""
    gate = Gate()
    grok.set_scripts(stream("a", gate))
    async with fleet(grok, redis) as (owner, other):
        urls = [await start(owner) for _ in range(10)]
        async with contextlib.AsyncExitStack() as stack:
            lives = [await stack.enter_async_context(follow(other, url)) for url in urls * 3]
            assert {(await live.event()).data for live in lives} == {"a"}
            clients = redis.do("CLIENT", "LIST")
            assert len(clients if isinstance(clients, list) else clients.splitlines()) == 2 * 2 + 1  # and ours
            gate.open()
            assert {tuple(event.data for event in await live.rest()) for live in lives} == {(DONE,)}


@pytest.mark.parametrize(
    "id",
    ["*", "A*AAAAAAAAAAAAAAAAAAAA", "[a-z]", "%0d%0aFLUSHALL%0d%0a", "{x}", "A" * 22, "A" * 5000, "%00", "..%2f.."],
)
async def test_ids_that_are_none(grok: Upstream, redis: RedisServer, id: str) -> None:
    """Patterns, line breaks and the like find nothing, and reach no key's name."""
    grok.set_scripts(stream("a"))
    async with fleet(grok, redis, 1, redis_prefix="bad:") as (service,):
        url = await start(service)
        response = await service.client.get(f"/api/chat/{id}/stream")
        assert response.status_code in (204, 404)
        for answer in (
            await service.client.delete(f"/api/chat/{id}"),
            await service.client.get(url, headers={"Last-Event-ID": f"{number_of(url)}-9999999999999999"}),
        ):
            assert answer.status_code in (204, 400, 404)
        assert joined(standard((await service.client.get(url)).content)) == "a"
        assert all(key.startswith("bad:") for key in redis.everything())


async def test_planted_keys(grok: Upstream, redis: RedisServer) -> None:
    """What somebody else has put there, or another version, is never read as an answer, and harms no other one."""
    grok.set_scripts(stream("a"))
    id = "A" * 22
    url = f"/api/chat/{id}/stream"
    meta, events = f"p:{{{id}}}:meta", f"p:{{{id}}}:events"
    fields = ["version", "1", "owner", "x", "state", "running", "digest", "d", "request", "r", "named", "0"]
    async with fleet(grok, redis, 1, redis_prefix="p:") as (service,):
        for command in (
            ("SET", meta, "text"),
            ("LPUSH", meta, "text"),
            ("HSET", meta, "version", "1"),
            ("HSET", meta, *fields, "format", "\xff\xfe"),
            ("HSET", meta, *fields, "format", "plain", "version", "2"),
        ):
            redis.do("DEL", meta, events)
            redis.do(*command)
            response = await service.client.get(url)
            assert (response.status_code, refusal(response)["code"]) == (404, "stream_not_found")
            assert (await service.client.delete(f"/api/chat/{id}")).status_code == 204
        for planted in (
            ("SET", events, "text"),
            ("XADD", events, "0-5", "x", "text"),
            ("XADD", events, "7-0", "x", "text"),
            ("XADD", events, "0-1", "x", b"\x93\x01\x91\xa1a\xa4next"),
            ("DEL", events),
        ):
            redis.do("DEL", meta, events)
            redis.do("HSET", meta, *fields, "format", "plain")
            redis.do(*planted)
            response = await service.client.get(url)
            assert response.status_code in (200, 503)
            last = standard(response.content)[-1] if response.status_code == 200 else None
            assert last is None or code(last) in ("replay_lost", "upstream_cut_off")
        mine = await start(service)
        assert joined(standard((await service.client.get(mine)).content)) == "a"


async def test_gone_while_read(grok: Upstream, redis: RedisServer) -> None:
    """An answer that vanishes from Redis while it is read elsewhere ends there in an error, and not at its owner."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b"))
    async with fleet(grok, redis, redis_prefix="gone:") as (owner, other):
        url = await start(owner)
        async with follow(owner, url) as here, follow(other, url) as there:
            assert [(await live.event()).data for live in (here, there)] == ["a", "a"]
            redis.do("FLUSHALL")
            [lost] = await there.rest()
            assert code(lost) == "replay_lost"
            gate.open()
            assert [event.data for event in await here.rest()] == ["b", DONE]
        assert (await other.client.get(url)).status_code == 404


async def test_redis_over_tls(grok: Upstream, tmp_path: Path) -> None:
    """`rediss://` verifies the server's certificate and name."""
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    files = {f"tls_{name}_file": str(tmp_path / "server.pem") for name in ("cert", "key")}
    port = str(free_port())
    options = {**files, "tls_ca_cert_file": str(tmp_path / "ca.pem"), "tls_port": port, "tls_auth_clients": "no"}
    async with RedisServer("redis-server", **options):
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={tmp_path}"
        async with serving(grok.url, BRISK, redis_url=f"{url}/stranger.pem") as service:
            await becomes(service, "/metrics", "chatproxy_store_available 0.0")
            assert (await service.client.get("/readyz")).status_code == 503
        async with serving(grok.url, BRISK, redis_url=f"{url}/ca.pem") as service:
            await until(service.client, "/readyz", 200)


async def test_unix_socket(grok: Upstream, tmp_path: Path) -> None:
    """A socket of this machine will do."""
    path = tmp_path / "redis"
    async with RedisServer(unixsocket=str(path)), serving(grok.url, redis_url=f"unix://{path}") as service:
        await until(service.client, "/readyz", 200)


async def test_old_server(grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """A server that is too old is not used, and the log says why."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            info = b"redis_version:6.0.16\r\nrun_id:x\r\n"
            for _ in range(data.count(b"\r\n*") + 1):
                writer.write(b"$%d\r\n%b\r\n" % (len(info), info))
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with (
        server,
        serving(grok.url, redis_url=f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}") as service,
    ):
        await logged(caplog, "redis is away: REDIS_URL: the server is older than Redis 6.2")
        assert (await service.client.get("/readyz")).status_code == 503


async def test_policy_that_evicts(grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """A server that may drop what is being read is warned about by name."""
    async with RedisServer(maxmemory_policy="allkeys-lru") as redis, fleet(grok, redis, 1):
        assert "maxmemory-policy allkeys-lru" in caplog.text


def test_not_imported() -> None:
    """Without REDIS_URL nothing of it is imported."""
    program = (
        "import sys, asyncio\n"
        "from chatproxy import config\n"
        "from chatproxy.server import Server\n"
        "async def main():\n"
        "    async with Server(config.load({'HOST': '127.0.0.1', 'PORT': '0'})).running(): pass\n"
        "asyncio.run(main())\n"
        "assert not {'redis', 'hiredis', 'chatproxy.services.redis'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30, capture_output=True)  # noqa: S603


async def test_rights_of_a_user(grok: Upstream) -> None:
    """A user of Redis needs no more rights than the README says, and no keys but those under the prefix."""
    [rights] = re.findall(r"`(~chatproxy:\S+ [^`]+)`", (ROOT / "README.md").read_text())
    grok.set_scripts(stream("a"))
    async with RedisServer() as redis:
        redis.do("ACL", "SETUSER", "app", "on", ">secret", *rights.split())
        url = redis.url.replace("redis://", "redis://app:secret@")
        changes = {"redis_url": url, "redis_prefix": "chatproxy:", "rate_limit": "9/day", "max_streams_per_client": 4}
        budget = {"token_budget_per_client": "90000/day"}
        async with fleet(grok, redis, 2, BRISK, **changes, **budget) as (owner, other):
            path = await start(owner, Idempotency_Key="k")
            again = await other.ask(headers={**JSON, "Idempotency-Key": "k"})
            assert again.json()["url"] == path
            assert (await other.client.get(path)).content.count(b"data: [DONE]") == 1
            assert (await other.ask(resumable=True)).status_code == 200
            assert (await other.client.delete(path.removesuffix("/stream"))).status_code == 204
