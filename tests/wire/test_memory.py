"""What long conversations leave behind: nothing, also where Python never looks for reference cycles."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, TIMEOUT, Caller, SubprocessService, spawned
from tests.upstream import CLOSE, HANG, Script, Upstream, error, stream

pytestmark = pytest.mark.anyio

TOGETHER = 40
CONVERSATION = {"messages": [{"role": "user", "content": "a" * 950_000 + "\N{GRINNING FACE}"}]}
SIZE_MB = 0.95 * TOGETHER


def resident(service: SubprocessService) -> float:
    """Resident memory in MB."""
    pages = int(Path(f"/proc/{service.pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


async def reset_while_grok_thinks(grok: Upstream, client: Caller) -> None:
    await grok.call(TOGETHER - 1, within=30)  # whose call the first one is, nobody knows
    client.reset()


async def read_status(_: Upstream, client: Caller) -> None:
    await client.head()


End = Callable[[Upstream, Caller], Coroutine[Any, Any, None]]

ENDS: dict[str, tuple[Script, End, dict[str, Any]]] = {
    "the client leaves": ([HANG], reset_while_grok_thinks, {}),
    "Grok takes too long": ([HANG], read_status, {"first_token_timeout": 0.5}),
    "Grok hangs up early": ([CLOSE], read_status, {}),
    "Grok hangs up after its headers": ([stream()[0], CLOSE], read_status, {}),
    "Grok refuses": (error(400, {"error": "Model not found: x"}), read_status, {}),
    "Grok fails": (error(500, {"error": "x"}), read_status, {}),
    "the answer is read": (stream("a"), read_status, {}),
}


@pytest.fixture
def no_collector(tmp_path: Path) -> str:
    """A PYTHONPATH with which no garbage is collected but by counting references."""
    (tmp_path / "sitecustomize.py").write_text("import gc\ngc.disable()\n")
    return f"{tmp_path}:{ROOT}"


@pytest.mark.slow
@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
@pytest.mark.parametrize("end", ENDS)
async def test_conversations_are_let_go(end: str, resumable: bool, no_collector: str) -> None:
    """However a chat ends before Grok's first chunk, the next forty take no more memory than the first."""
    script, leave, own = ENDS[end]
    body = json.dumps({**CONVERSATION, "resumable": resumable}, ensure_ascii=False).encode()
    # With the threshold glibc gives large blocks back as soon as they are freed.
    environment = {"pythonpath": no_collector, "malloc_mmap_threshold_": 131_072}
    changes: dict[str, Any] = {"grok_retries": 0, "resume_window": 0.1, **environment, **own}
    async with Upstream(script) as grok, spawned(grok.url, **changes) as service:

        async def chat() -> None:
            async with service.caller() as client:
                await client.post(body)
                await leave(grok, client)

        kept = []
        for _ in range(6):
            grok.set_scripts(script)
            async with asyncio.TaskGroup() as group:
                for _ in range(TOGETHER):
                    group.create_task(chat())
            await grok.until(lambda: grok.playing == 0, within=30)
            kept.append(resident(service))
        async with asyncio.timeout(TIMEOUT):  # it may be letting go of the last ones
            while resident(service) - max(kept[:2]) >= SIZE_MB:  # noqa: ASYNC110 -- nobody tells when it has
                await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_flood_of_long_conversations() -> None:
    """With the defaults they take less than half of what compose grants; who is too much is told, others go on."""
    body = json.dumps(CONVERSATION, ensure_ascii=False).encode()
    async with Upstream([HANG]) as grok, spawned(grok.url) as service:
        statuses: list[int] = []
        arrived = asyncio.Event()

        async def chat() -> None:
            async with service.caller() as client:
                await client.post(body)
                statuses.append((await client.head())[0])
                arrived.set()
                await asyncio.sleep(30)

        flood = [asyncio.create_task(chat()) for _ in range(300)]
        async with asyncio.timeout(30):
            while len(statuses) < 200:
                await arrived.wait()
                arrived.clear()
        assert set(statuses) == {503}
        assert resident(service) < 256
        grok.set_scripts(stream("a"))
        assert (await service.ask()).status_code == 200
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
