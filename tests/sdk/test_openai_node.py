"""The `openai` package in Node, in three majors, and LangChain's on top of it."""

import asyncio
from typing import Any

import pytest

from tests.conftest import InProcessService, serving
from tests.sdk.conftest import OPENAI_MAJORS, Scripted
from tests.upstream import CLOSE, HANG, Script, Upstream, error, stream

pytestmark = [pytest.mark.anyio, pytest.mark.parametrize("major", OPENAI_MAJORS)]

NASTY = ["Hel", "lo\r", "\n\r\n", "[DONE]", "\n[DONE]\n", " \u2028\u0085\0", "\U0001f600 ", "data: x\n\n", "\r "]
TEXT = "".join(NASTY)
HI: Any = [{"role": "user", "content": "Hi"}]
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 8,
    "total_tokens": 20,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 5},
}


async def test_answers_in_node(node: Scripted, grok: Upstream, service: InProcessService, major: str) -> None:
    """Streamed and whole, the text is exact and usage is counted as OpenAI does; the list of models is read."""
    grok.set_scripts(stream(*NASTY, reasoning=["h\r", "\nm"], finish="length"))
    async with node("openai.mjs", major, f"{service.url}/v1") as script:
        params = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
        told = await script("create", params=params)
        assert told == {
            "content": TEXT,
            "reasoning": "h\r\nm",
            "chunks": len(NASTY) + 4,
            "finish": "length",
            "usage": USAGE,
        }
        whole = await script("create", params={"messages": HI})
        assert (whole["content"], whole["answer"]["usage"]) == (TEXT, USAGE)
        assert whole["answer"]["choices"][0]["message"]["reasoning_content"] == "h\r\nm"
        assert await script("models") == ["grok-4.3"]
    assert len(grok.calls) == 2


FAILURES: list[tuple[Script, dict[str, Any], dict[str, Any], str, int, str, int]] = [
    (stream("x"), {}, {"n": 2}, "BadRequestError", 400, "invalid_request", 0),
    (stream("x"), {}, {"model": "gpt-4o"}, "NotFoundError", 404, "model_not_found", 0),
    (stream("x"), {"access_tokens": "t" * 16}, {}, "AuthenticationError", 401, "unauthorized", 0),
    (error(401, {"error": "x"}), {}, {}, "InternalServerError", 502, "upstream_auth", 1),
    (error(500, {"error": "x"}), {"grok_retries": 0}, {}, "InternalServerError", 502, "upstream_error", 1),
    (error(429, {"error": "x"}, {"Retry-After": "100"}), {}, {}, "RateLimitError", 429, "upstream_rate_limited", 1),
    ([HANG], {"first_token_timeout": 0.3, "grok_retries": 0}, {}, "InternalServerError", 504, "first_token_timeout", 1),
]


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("played", "settings", "params", "kind", "status", "code", "calls"),
    FAILURES,
    ids=[f"{row[5]} {number}" for number, row in enumerate(FAILURES)],
)
async def test_errors_in_node(
    node: Scripted,
    major: str,
    played: Script,
    settings: dict[str, Any],
    params: dict[str, Any],
    kind: str,
    status: int,
    code: str,
    calls: int,
    streamed: bool,
) -> None:
    """The class is OpenAI's for the status, the rest is ours; what must not be paid twice is asked once."""
    async with (
        Upstream(played) as grok,
        serving(grok.url, **settings) as service,
        node("openai.mjs", major, f"{service.url}/v1") as script,
    ):
        told = await script("create", params={"messages": HI, "stream": streamed, **params})
        assert len(grok.calls) == calls
    problem = told["error"]
    assert (problem["class"], problem["status"], problem["code"]) == (kind, status, code)
    assert problem["message"].startswith(f"{status} ")
    assert problem["message"].endswith(".")
    assert problem["requestId"]


async def test_failures_after_the_status_in_node(node: Scripted, major: str) -> None:
    """They are errors with our code, after what came; and Grok is asked once."""
    async with (
        Upstream(stream("par", 0.3, CLOSE)) as grok,
        serving(grok.url, status_hold=0.05, keep_alive=0.05) as service,
        node("openai.mjs", major, f"{service.url}/v1") as script,
    ):
        told = await script("create", params={"messages": HI, "stream": True})
        assert (told["content"], told["error"]["code"]) == ("par", "upstream_cut_off")
        assert len(grok.calls) == 1
        whole = await script("create", params={"messages": HI})
        assert whole["error"]["class"] == "TypeError"  # there are no choices
        assert len(grok.calls) == 2


async def test_wait_in_node(node: Scripted, major: str) -> None:
    """What passes with waiting is waited for by the package, and then there is the answer."""
    async with (
        Upstream(error(429, {"error": "x"}, {"Retry-After": "1"}), stream("ok")) as grok,
        serving(grok.url, grok_retries=0) as service,
        node("openai.mjs", major, f"{service.url}/v1") as script,
    ):
        assert (await script("create", params={"messages": HI}))["content"] == "ok"
        assert len(grok.calls) == 2


async def test_stop_in_node(node: Scripted, grok: Upstream, service: InProcessService, major: str) -> None:
    """Who breaks the loop hangs up Grok at once."""
    grok.set_scripts(stream("so far", HANG))
    async with node("openai.mjs", major, f"{service.url}/v1") as script:
        told = await script("create", params={"messages": HI, "stream": True}, leave=1)
        await grok.calls[0].hung_up(within=1)
    assert told["content"] == "so far"


async def test_langchain_in_node(node: Scripted, grok: Upstream, service: InProcessService, major: str) -> None:
    """LangChain streams and invokes on it; a request that it would repeat seven times for a 422 is asked once."""
    if major != OPENAI_MAJORS[-1]:
        return  # it brings a major of its own along
    grok.set_scripts(stream(*NASTY))
    async with node("openai.mjs", major, f"{service.url}/v1") as script:
        for streamed in (True, False):
            told = await script("langchain", messages=[["user", "Hi"]], stream=streamed)
            assert told["content"] == TEXT
            assert (told["usage"]["output_tokens"], told["usage"]["total_tokens"]) == (8, 20)
        calls = len(grok.calls)
        async with asyncio.timeout(5):
            told = await script("langchain", messages=[["user", ""]], stream=False)
    assert told["error"]["status"] == 400
    assert len(grok.calls) == calls
