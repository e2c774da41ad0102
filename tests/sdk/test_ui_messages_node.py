"""`useChat`'s own classes in Node, in every major that is still released, against the service as it is."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from chatproxy.formats.ui_messages import UIMessages
from tests.browser.wires import Relay
from tests.conftest import InProcessService, serving
from tests.sdk.conftest import AI_MAJORS, Script, Scripted
from tests.unit.test_formats import SEARCHED
from tests.upstream import CLOSE, HANG, Gate, Upstream, error, frames, sse, stream

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("major", AI_MAJORS)]

NASTY = ["Hel", "lo\r", "\n\r\n", "[DONE]", "\n[DONE]\n", " \u2028\u0085\0", "\U0001f600 ", "data: x\n\n", "\r "]
TEXT = "".join(NASTY)
USAGE = {"inputTokens": 12, "outputTokens": 8, "totalTokens": 20, "reasoningTokens": 5, "cachedInputTokens": 4}


@asynccontextmanager
async def chatting(node: Scripted, major: str, url: str, **options: object) -> AsyncIterator[Script]:
    """A script in which there is one chat, "a"."""
    async with node("ui_messages.mjs", major) as script:
        await script("new", chat="a", api=f"{url}/api/chat", **options)
        yield script


async def say(script: Script, text: str = "Hi", until: str = "ready", chat: str = "a") -> Any:
    await script("send", chat=chat, text=text)
    return await script("until", chat=chat, status=until)


async def test_whole_message(node: Scripted, grok: Upstream, service: InProcessService, major: str) -> None:
    """Text and reasoning are exact, and usage and model are the message's metadata."""
    grok.set_scripts(stream(*NASTY, reasoning=["h\r", "\nm"], finish="length"))
    async with chatting(node, major, service.url) as script:
        told = await say(script)
    question, answer = told["messages"]
    assert [part["text"] for part in question["parts"]] == ["Hi"]
    assert answer["role"] == "assistant"
    assert [(part["type"], part.get("text"), part.get("state")) for part in answer["parts"]] == [
        ("step-start", None, None),
        ("reasoning", "h\r\nm", "done"),
        ("text", TEXT, "done"),
    ]
    assert answer["metadata"] == {"model": "grok-4.3", "usage": USAGE}
    [finished] = told["finished"]
    assert (finished["finishReason"], finished["isError"]) == ("length", False)
    assert len(grok.calls) == 1


async def test_history_of_a_chat(node: Scripted, grok: Upstream, service: InProcessService, major: str) -> None:
    """Each turn comes with the ones before; an answer that is asked for again replaces the last one."""
    grok.set_scripts(stream("one"), stream("two", reasoning=["hm"]), stream("three"))
    async with chatting(node, major, service.url) as script:
        await say(script, "first")
        await say(script, "second")
        await script("regenerate", chat="a")
        told = await script("until", chat="a", text="three")
    assert [[turn["content"] for turn in call.body["messages"]] for call in grok.calls] == [
        ["first"],
        ["first", "one", "second"],
        ["first", "one", "second"],
    ]
    assert len(told["messages"]) == 4
    assert len({call.headers["x-grok-conv-id"] for call in grok.calls}) == 1


@pytest.mark.parametrize(
    ("status", "code", "calls", "settings"),
    [
        (502, "upstream_auth", 1, {}),
        (413, "body_too_large", 0, {"max_body_bytes": 20}),
        (401, "unauthorized", 0, {"access_tokens": "t" * 16}),
    ],
)
async def test_refused_message(
    node: Scripted, major: str, status: int, code: str, calls: int, settings: dict[str, Any]
) -> None:
    """The error's message is our JSON, of which the README shows how to get the sentence; nobody asks again."""
    async with (
        Upstream(error(401, {"error": "x"})) as grok,
        serving(grok.url, **settings) as service,
        chatting(node, major, service.url) as script,
    ):
        told = await say(script, until="error")
        await asyncio.sleep(0.3)  # a second request would be here by now
        assert len(grok.calls) == calls
    assert json.loads(told["error"]["message"])["error"]["code"] == code
    assert json.loads(told["error"]["message"])["error"]["message"].endswith(".")
    assert status  # which the page does not see


async def test_failed_answer_and_the_next(
    node: Scripted, grok: Upstream, service: InProcessService, major: str
) -> None:
    """An answer that fails shows our sentence and what came of it; the chat goes on after it, also without text."""
    for script_of_grok, kept in ((stream("par", CLOSE), "par"), (stream("", reasoning=["hm"]), "")):
        grok.set_scripts(script_of_grok, stream("better"))
        async with chatting(node, major, service.url) as script:
            told = await say(script, until="error")
            assert told["error"]["message"] in {
                "Grok stopped in the middle of the answer. What arrived is incomplete.",
                "Grok finished without any text. Try again, or allow a longer answer.",
            }
            assert told["text"] == kept
            await script("send", chat="a", text="Again")
            assert "timeout" not in await script("until", chat="a", text="better")
        assert [turn["content"] for turn in grok.calls[1].body["messages"]] == [
            "Hi",
            *([kept] if kept else []),
            "Again",
        ]


async def test_file_in_a_chat(node: Scripted, grok: Upstream, service: InProcessService, major: str) -> None:
    """A file gets a sentence, is not paid, and does not end the chat."""
    grok.set_scripts(stream("ok"))
    file = {"type": "file", "mediaType": "image/png", "url": "data:image/png;base64,aGk="}
    async with chatting(node, major, service.url) as script:
        await script("send", chat="a", parts=[file, {"type": "text", "text": "Look"}])
        told = await script("until", chat="a", status="error")
        assert json.loads(told["error"]["message"])["error"]["param"] == "messages[0].parts[0]"
        assert grok.calls == []
        await script("send", chat="a", text="Well?")
        assert "timeout" not in await script("until", chat="a", text="ok")
    assert [turn["content"] for turn in grok.calls[0].body["messages"]] == ["Look", "Well?"]


async def test_stop_of_a_chat(node: Scripted, grok: Upstream, service: InProcessService, major: str) -> None:
    """`stop()` keeps what came and hangs up Grok at once."""
    grok.set_scripts(stream("so far", HANG))
    async with chatting(node, major, service.url) as script:
        await script("send", chat="a", text="Hi")
        await script("until", chat="a", text="so far")
        await script("stop", chat="a")
        await grok.calls[0].hung_up(within=1)
        told = await script("until", chat="a", status="ready")
    assert told["text"] == "so far"


async def test_search_in_a_chat(node: Scripted, major: str) -> None:
    """Chunks of searches and sources are ones that every major knows: they become parts, and no error."""
    body = b"".join(UIMessages("m1").encode(SEARCHED))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b'"submit-message"')
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, chatting(node, major, url) as script:
        told = await say(script)
    parts = [(part["type"], part.get("state"), part.get("input")) for part in told["messages"][1]["parts"]]
    assert parts == [
        ("step-start", None, None),
        ("reasoning", "done", None),
        ("dynamic-tool", "output-available", {"query": "the weather"}),
        ("dynamic-tool", "output-available", {}),
        ("text", "done", None),
        ("source-url", None, None),
        ("source-url", None, None),
    ]
    assert told["text"] == "It rains"


async def test_reload_in_node(node: Scripted, grok: Upstream, service: InProcessService, major: str) -> None:
    """A page that is loaded again shows all of the answer; another reload, once it is read, shows no error."""
    gate = Gate()
    grok.set_scripts(sse(*frames(*NASTY, gate, "end")))
    chat = str(uuid4())
    options = {"api": f"{service.url}/api/chat", "id": chat, "body": {"resumable": True}}
    async with node("ui_messages.mjs", major) as first:
        await first("new", chat="a", **options)
        await first("send", chat="a", text="Hi")
        assert "timeout" not in await first("until", chat="a", text=TEXT)
    async with node("ui_messages.mjs", major) as second:
        await second("new", chat="a", **options)
        await second("resume", chat="a")
        assert "timeout" not in await second("until", chat="a", text=TEXT)
        gate.open()
        told = await second("until", chat="a", status="ready")
        assert told["text"] == TEXT + "end"
        await second("new", chat="b", **options)
        await second("resume", chat="b")
        await asyncio.sleep(0.3)  # it asks, and gets a 204
        told = await second("show", chat="b")
    assert (told["status"], told["messages"], told.get("error")) == ("ready", [], None)
    assert len(grok.calls) == 1


async def test_stop_of_a_chat_that_resumes(
    node: Scripted, grok: Upstream, service: InProcessService, major: str
) -> None:
    """There `stop()` is a disconnect; the chat's id ends the answer, and whoever reads is told so."""
    grok.set_scripts(stream("so far", HANG))
    chat = str(uuid4())
    async with chatting(node, major, service.url, id=chat, body={"resumable": True}) as script:
        await script("send", chat="a", text="Hi")
        await script("until", chat="a", text="so far")
        assert (await service.client.post(f"/api/chat/{chat}/stop")).status_code == 204
        await grok.calls[0].hung_up(within=1)
        told = await script("until", chat="a", status="error")
    assert told["error"]["message"] == "The answer was stopped on request."


async def test_cuts_of_a_chat(node: Scripted, major: str) -> None:
    """Wherever the connection is cut, a page that is loaded again has the exact text, and Grok was asked once."""
    gates: dict[str, Gate] = {}
    answer = frames(*NASTY)
    cuts = range(40, 1300, 90)

    def script(call: Any) -> Any:
        return sse(*answer[:-3], gates[call.body["messages"][0]["content"]], *answer[-3:])

    async with (
        Upstream(script) as grok,
        serving(grok.url) as service,
        Relay(service.port) as relay,
        node("ui_messages.mjs", major) as page,
    ):
        for cut in cuts:
            gate = gates[str(cut)] = Gate()
            relay.cuts = [cut]
            options = {"id": str(uuid4()), "api": f"{relay.url}/api/chat", "body": {"resumable": True}}
            await page("new", chat=f"{cut}", **options)
            await page("send", chat=f"{cut}", text=str(cut))
            told = await page("until", chat=f"{cut}", status="error")
            assert "timeout" not in told
            await page("new", chat=f"{cut} again", **options)
            await page("resume", chat=f"{cut} again")
            gate.open()
            told = await page("until", chat=f"{cut} again", text=TEXT)
            assert "timeout" not in told
        assert len(grok.calls) == len(cuts)
