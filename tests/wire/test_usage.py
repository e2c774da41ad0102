"""What Grok, or whoever answers in its place, says of an answer's cost and of its own name, true or not."""

import json
from typing import Any

import pytest

from tests import responses
from tests.conftest import serving, spawned
from tests.upstream import DONE, Upstream, chunk, frame, sse

pytestmark = pytest.mark.anyio

TEXT = "Hello"

# JSON, for some of it cannot be written by Python's.
NUMBERS = {
    "more than a float can hold": "1" + "0" * 400,
    "the largest float": "1e308",
    "no float": "1e999",
    "more than 64 bits": "18446744073709551616",
    "negative": "-7",
    "a fraction": "1.5",
}


def answer(api: str, number: str) -> list[Any]:
    """A whole answer whose output takes this many tokens."""
    if api == "responses":
        counts = {"input_tokens": 1, "output_tokens": "NUMBER"}
        return sse(
            responses.CREATED,
            *responses.message(0, TEXT),
            responses.ended(usage=counts).replace(b'"NUMBER"', number.encode()),
        )
    usage = frame(chunk(None, usage={"prompt_tokens": 1, "completion_tokens": "NUMBER"}))
    return sse(
        frame(chunk({"content": TEXT})),
        frame(chunk({}, finish="stop")),
        usage.replace(b'"NUMBER"', number.encode()),
        DONE,
    )


ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}]}),
    "resumable": ("/api/chat", {"messages": [{"role": "user", "content": "Hi"}], "resumable": True}),
    "UI messages": ("/api/chat", {"messages": [{"role": "user", "parts": [{"type": "text", "text": "Hi"}]}]}),
    "chunks": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
    "whole": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
}


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS.keys())
async def test_counts_that_cannot_be_true(grok: Upstream, api: str, number: str) -> None:
    """They cost the counts and not the answer, whose place is free afterwards; and spoil no metric."""
    grok.set_scripts(answer(api, number))
    async with serving(grok.url, grok_api=api, max_streams=1, token_budget="1000000/day") as service:  # noqa: S106 -- no password
        for path, body in ASKED.values():
            response = await service.client.post(path, json={"model": "grok-4.3", **body})
            assert response.status_code == 200
            assert TEXT in response.text
            assert "[DONE]" in response.text or json.loads(response.text)["choices"][0]["finish_reason"] == "stop"
        metrics = (await service.client.get("/metrics")).text
        assert f'chatproxy_stream_ends_total{{code="",end="done"}} {len(ASKED)}.0' in metrics
        assert "chatproxy_tokens_total{" not in metrics


MODELS = {"grok-4.3": True, "x-ai/grok-4:free": True, "canary of words": False, "\u79d8\u5bc6": False, "x" * 65: False}


@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_models_in_the_log(grok: Upstream, api: str) -> None:
    """What Grok calls itself is logged if it is a name, and not if it is a text."""
    scripts = {}
    for model in MODELS:
        chat = [frame(chunk({"content": TEXT}, finish="stop", model=model)), DONE]
        ended = [*responses.message(0, TEXT), responses.ended(model=model)]
        scripts[model] = sse(*(chat if api == "chat" else ended))
    async with spawned(grok.url, grok_api=api, log_level="debug", log_format="json") as service:
        for model, script in scripts.items():
            grok.set_scripts(script)
            finish = (await service.ask(include=["finish"])).text
            assert json.dumps(model, ensure_ascii=False) in finish
        service.process.terminate()
        await service.exit_code()
        lines = [json.loads(line) for line in service.stderr.splitlines()]
    logged = [line.get("model") for line in lines if line["message"] == "request" and line["route"] == "/api/chat"]
    assert logged == [model if is_name else None for model, is_name in MODELS.items()]
