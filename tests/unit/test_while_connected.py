"""Work that goes on as long as the client stays."""

import asyncio
import gc
import weakref

import anyio
import pytest
from starlette.types import Message

from chatproxy.errors import EmptyAnswer
from chatproxy.routes.responses import ClientDisconnected, while_connected

pytestmark = pytest.mark.anyio


class Client:
    """Whom a request comes from, as ASGI tells of it."""

    def __init__(self) -> None:
        self._left = asyncio.Event()

    def leave(self) -> None:
        self._left.set()

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}


class Work:
    """Something that takes its time, and needs some to be cleaned up."""

    def __init__(self) -> None:
        self.begun, self.over = asyncio.Event(), asyncio.Event()
        self.cleaned_up = False

    async def __call__(self) -> None:
        try:
            self.begun.set()
            await self.over.wait()
        finally:
            await asyncio.sleep(0.01)
            self.cleaned_up = True


async def test_work_done() -> None:
    """It ends when the work does, whoever listens."""
    work = Work()
    work.over.set()
    await while_connected(Client().receive, work())
    assert work.cleaned_up


async def test_client_leaves() -> None:
    """Whoever leaves ends the work; what it has opened is closed before that is told."""
    client, work = Client(), Work()
    task = asyncio.create_task(while_connected(client.receive, work()))
    await work.begun.wait()
    client.leave()
    with pytest.raises(ClientDisconnected) as caught:
        await task
    assert work.cleaned_up
    assert 0 <= asyncio.get_running_loop().time() - caught.value.at < 5


async def test_over_at_the_same_time() -> None:
    """Servers tell of a disconnect at the end of the response, too: what is done then is done."""
    client = Client()

    async def work() -> None:
        client.leave()

    await while_connected(client.receive, work())


async def test_ended_from_outside() -> None:
    """A server that ends the request ends the work with it, and gets its own cancellation back."""
    work = Work()
    task = asyncio.create_task(while_connected(Client().receive, work()))
    await work.begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert work.cleaned_up


async def test_ended_by_a_scope() -> None:
    """So does a middleware whose task group is cancelled: that cancels every await, but not the one for the work."""
    work = Work()
    async with anyio.create_task_group() as group:
        group.start_soon(while_connected, Client().receive, work())
        await work.begun.wait()
        group.cancel_scope.cancel()
    assert work.cleaned_up


async def test_error() -> None:
    """What the work raises is raised, and is not kept by a cycle of its traceback's frames."""

    async def work() -> None:
        raise EmptyAnswer

    gc.disable()
    try:
        with pytest.raises(EmptyAnswer) as caught:
            await while_connected(Client().receive, work())
        error = weakref.ref(caught.value)
        del caught
        assert error() is None
    finally:
        gc.enable()
