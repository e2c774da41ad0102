"""An event stream is one response, at whatever moment its timer goes off."""

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from chatproxy.config import load
from chatproxy.errors import EmptyAnswer
from chatproxy.formats.plain import Plain
from chatproxy.metrics import Metrics
from chatproxy.routes.responses import EventSourceResponse, RequestContext
from chatproxy.services.relay import Frames
from tests.conftest import KEY

pytestmark = pytest.mark.anyio

INTERVAL = 0.05


class Client:
    """It stays. While its `gate` is closed, a comment does not go through."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.gate = asyncio.Event()

    async def receive(self) -> Message:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.sent.append(message)
        if message.get("body", b"").startswith(b":"):
            await self.gate.wait()

    async def get(self, frames: AsyncGenerator[Frames, None]) -> None:
        """Be sent that stream."""
        context = RequestContext("0", None)
        settings = load({"GROK_API_KEY": KEY, "KEEP_ALIVE": str(INTERVAL)})
        response = EventSourceResponse(frames, Plain("0"), settings, Metrics(), status_hold=INTERVAL)
        await response({"type": "http", "state": {"context": context}}, self.receive, self.send)


async def test_failure_as_the_hold_ends() -> None:
    """Where the answer fails in the very turn of the loop in which the hold ends, the status is left to the error."""

    async def frames() -> AsyncGenerator[Frames, None]:
        time.sleep(2 * INTERVAL)  # noqa: ASYNC251 -- the timer is due in the turn that follows
        await asyncio.sleep(0)
        if not client.sent:
            raise EmptyAnswer
        yield [], False

    client = Client()
    with pytest.raises(EmptyAnswer):
        await client.get(frames())
    await asyncio.sleep(2 * INTERVAL)
    assert client.sent == []


async def test_frame_as_a_comment_ends() -> None:
    """Where a comment has waited until the next one is due, the frame that waits behind it comes first."""
    client, wanted = Client(), asyncio.Event()

    async def frames() -> AsyncGenerator[Frames, None]:
        yield [], False
        await wanted.wait()
        yield [b"data: [DONE]\n\n"], True

    async with asyncio.TaskGroup() as group:
        group.create_task(client.get(frames()))
        await asyncio.sleep(1.5 * INTERVAL)
        wanted.set()
        await asyncio.sleep(0)
        client.gate.set()
        time.sleep(INTERVAL)  # noqa: ASYNC251 -- the timer is due in the turn that follows
    await asyncio.sleep(2 * INTERVAL)
    assert [message.get("more_body") for message in client.sent] == [None, True, False]
