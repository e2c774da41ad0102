"""Searches in the formats of other people's front ends: how they are asked for, and what is shown of them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests import responses
from tests.conftest import HI, InProcessService, refusal, serving
from tests.readers import DONE, standard
from tests.responses import CREATED, cited, delta, ended, opened, searched, source
from tests.upstream import Upstream, sse

pytestmark = pytest.mark.anyio

UI: list[Any] = [{"role": "user", "parts": [{"type": "text", "text": "Hi"}]}]
V1 = "/v1/chat/completions"


@pytest.fixture(scope="module")
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, grok_api="responses", grok_tools="web_search,x_search") as service:
        yield service


WISHES: list[tuple[str, dict[str, Any], list[str] | None]] = [
    ("/api/chat", {"messages": UI}, None),
    ("/api/chat", {"messages": UI, "tools": ["x_search"]}, ["x_search"]),
    ("/api/chat", {"messages": UI, "tools": {"web_search": {"parameters": {}}}}, None),
    (V1, {"messages": HI}, None),
    (V1, {"messages": HI, "tools": [{"type": "x_search"}, {"type": "web_search"}]}, ["x_search", "web_search"]),
    (V1, {"messages": HI, "web_search_options": {"search_context_size": "low"}}, ["web_search"]),
    (V1, {"messages": HI, "web_search_options": {}, "tools": [{"type": "web_search"}]}, ["web_search"]),
    (V1, {"messages": HI, "tools": [{"type": "web_search"}], "tool_choice": "none"}, None),
]


@pytest.mark.parametrize(("path", "body", "tools"), WISHES)
async def test_wishes(
    grok: Upstream, service: InProcessService, path: str, body: dict[str, Any], tools: list[str] | None
) -> None:
    """Grok may search what the format's own words ask for, and nothing else."""
    grok.set_scripts(responses.answer("ok"))
    assert (await service.client.post(path, json=body)).status_code == 200
    sent = grok.calls[0].body.get("tools")
    assert sent == (None if tools is None else [{"type": tool} for tool in tools])


@pytest.mark.parametrize(("path", "body", "tools"), WISHES)
async def test_wishes_without_permission(
    grok: Upstream, path: str, body: dict[str, Any], tools: list[str] | None
) -> None:
    """What the operator does not allow is refused in the status that the format has for it."""
    grok.set_scripts(responses.answer("ok"))
    async with serving(grok.url, grok_api="responses") as service:
        response = await service.client.post(path, json=body)
    if tools is None:
        assert response.status_code == 200
        return
    problem = refusal(response)
    assert (response.status_code, problem["param"]) == (400 if path == V1 else 422, "tools[0]")
    assert grok.calls == []


async def test_what_is_shown(grok: Upstream, service: InProcessService) -> None:
    """A search is a dynamic tool's call in the one, and not shown in the other; pages come at the end of each."""
    url = "https://example.com/a?b=1"
    grok.set_scripts(
        sse(
            CREATED,
            *searched(1, "canary\nquery"),
            *opened(2),
            delta(2, "It rains"),
            cited(2, source(url, "1")),
            ended(),
        )
    )
    response = await service.client.post("/api/chat", json={"messages": UI, "tools": ["web_search"]})
    *events, done = standard(response.content)
    chunks = [json.loads(event.data) for event in events]
    assert done.data == DONE
    calls = [chunk for chunk in chunks if chunk["type"].startswith("tool-")]
    assert [call["type"] for call in calls] == ["tool-input-start", "tool-input-available", "tool-output-available"]
    assert calls[1]["input"] == {"query": "canary\nquery"}
    assert len({call["toolCallId"] for call in calls}) == 1
    types = [chunk["type"] for chunk in chunks]
    assert types[types.index("text-end") :] == ["text-end", "source-url", "finish-step", "finish"]
    usage = chunks[-1]["messageMetadata"]["usage"]
    assert (usage["outputTokens"], usage["reasoningTokens"], usage["totalTokens"]) == (8, 5, 20)

    body = {"messages": HI, "tools": [{"type": "web_search"}]}
    whole = (await service.client.post(V1, json=body)).json()
    message = whole["choices"][0]["message"]
    assert message["content"] == "It rains"
    [annotation] = message["annotations"]
    assert annotation["url_citation"]["url"] == chunks[types.index("source-url")]["url"]
    assert (whole["usage"]["completion_tokens"], whole["usage"]["total_tokens"]) == (8, 20)
    streamed = await service.client.post(V1, json={**body, "stream": True})
    deltas = [json.loads(event.data)["choices"][0]["delta"] for event in standard(streamed.content)[:-1]]
    assert deltas == [{"role": "assistant", "content": "It rains"}, {"annotations": [annotation]}, {}]
    assert "canary" not in streamed.text
