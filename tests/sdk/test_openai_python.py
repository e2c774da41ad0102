"""The `openai` package and LangChain's on top of it, in Python: what a program sees, and how often Grok is asked."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk
from pydantic import SecretStr

from tests.conftest import InProcessService, serving
from tests.upstream import CLOSE, HANG, Call, Script, Steps, Upstream, error, frame, refusing, stream

pytestmark = pytest.mark.anyio

NASTY = ["Hel", "lo\r", "\n\r\n", "[DONE]", "\n[DONE]\n", " \u2028\u0085\0", "\U0001f600 ", "data: x\n\n", "\r "]
TEXT = "".join(NASTY)
HI: Any = [{"role": "user", "content": "Hi"}]
MODEL = "grok-4.3"


@asynccontextmanager
async def using(url: str) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="any", timeout=20) as client:
        yield client


async def test_stream_in_python(grok: Upstream, service: InProcessService) -> None:
    """Text and reasoning are exact; usage is counted as OpenAI does, and adds up."""
    grok.set_scripts(stream(*NASTY, reasoning=["h\r", "\nm"], finish="length"))
    content, reasoning, reasons, usage = "", "", [], []
    async with using(service.url) as client:
        chunks = await client.chat.completions.create(
            model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in chunks:
            usage += [chunk.usage] if chunk.usage else []
            for choice in chunk.choices:
                content += choice.delta.content or ""
                reasoning += getattr(choice.delta, "reasoning_content", "")
                reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (content, reasoning, reasons) == (TEXT, "h\r\nm", ["length"])
    [counted] = usage
    assert (counted.prompt_tokens, counted.completion_tokens, counted.total_tokens) == (12, 8, 20)
    assert counted.prompt_tokens_details is not None
    assert counted.completion_tokens_details is not None
    assert counted.prompt_tokens_details.cached_tokens == 4
    assert counted.completion_tokens_details.reasoning_tokens == 5
    assert len(grok.calls) == 1


async def test_whole_in_python(grok: Upstream, service: InProcessService) -> None:
    """Without `stream` it is one completion."""
    grok.set_scripts(stream(*NASTY))
    async with using(service.url) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == TEXT
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", MODEL, "stop")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 20


async def test_silence_in_python() -> None:
    """Keep-alives before, between and in place of tokens disturb neither form."""
    async with (
        Upstream([0.2, *stream("a", 0.2, "b")]) as grok,
        serving(grok.url, status_hold=0.05, keep_alive=0.05) as service,
        using(service.url) as client,
    ):
        chunks = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in chunks]) == "ab"
        answer = await client.chat.completions.create(model=MODEL, messages=HI)
        assert answer.choices[0].message.content == "ab"


# What Grok does, or we refuse: the class and code that the program sees, and how often Grok is asked.
FAILURES: list[tuple[Script, dict[str, Any], dict[str, Any], type[Exception], int, str, int]] = [
    (stream("x"), {}, {"n": 2}, openai.BadRequestError, 400, "invalid_request", 0),
    (stream("x"), {}, {"model": "gpt-4o"}, openai.NotFoundError, 404, "model_not_found", 0),
    (stream("x"), {"access_tokens": "t" * 16}, {}, openai.AuthenticationError, 401, "unauthorized", 0),
    (stream("x"), {"allowed_hosts": "a.example", "max_body_bytes": 10}, {}, openai.APIStatusError, 413,
     "body_too_large", 0),
    (error(401, {"error": "x"}), {}, {}, openai.InternalServerError, 502, "upstream_auth", 1),
    (error(400, {"error": "exceeds budget"}), {}, {}, openai.BadRequestError, 400, "context_length_exceeded", 1),
    (error(422, {"error": "x"}), {}, {}, openai.InternalServerError, 502, "upstream_rejected", 1),
    (error(500, {"error": "x"}), {"grok_retries": 0}, {}, openai.InternalServerError, 502, "upstream_error", 1),
    (error(429, {"error": "x"}, {"Retry-After": "100"}), {}, {}, openai.RateLimitError, 429,
     "upstream_rate_limited", 1),
    ([HANG], {"first_token_timeout": 0.3, "grok_retries": 0}, {}, openai.InternalServerError, 504,
     "first_token_timeout", 1),
]  # fmt: skip


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("script", "settings", "params", "kind", "status", "code", "calls"),
    FAILURES,
    ids=[f"{row[5]} {number}" for number, row in enumerate(FAILURES)],
)
async def test_errors_in_python(
    script: Script,
    settings: dict[str, Any],
    params: dict[str, Any],
    kind: type[Exception],
    status: int,
    code: str,
    calls: int,
    streamed: bool,
) -> None:
    """The class is OpenAI's for the status, the rest is ours; what must not be paid twice is asked once."""
    async with Upstream(script) as grok, serving(grok.url, **settings) as service, using(service.url) as client:
        with pytest.raises(openai.APIStatusError) as raised:
            await client.chat.completions.create(**{"model": MODEL, "messages": HI, "stream": streamed, **params})
        assert len(grok.calls) == calls
    problem = raised.value
    assert type(problem) is kind
    assert (problem.status_code, problem.code) == (status, code)
    assert problem.request_id == problem.body["request_id"]  # type: ignore[index] # it is our error
    assert problem.body["message"].endswith(".")  # type: ignore[index]


async def test_unreachable_in_python() -> None:
    """A Grok that cannot be reached is not asked for again and again."""
    with refusing() as url:
        async with serving(url, grok_retries=0) as service, using(service.url) as client:
            began = asyncio.get_running_loop().time()
            with pytest.raises(openai.InternalServerError) as raised:
                await client.chat.completions.create(model=MODEL, messages=HI)
            assert asyncio.get_running_loop().time() - began < 2
    assert raised.value.code == "upstream_unreachable"


async def test_wait_in_python() -> None:
    """What passes with waiting is waited for by the package, and then there is the answer."""
    limit = error(429, {"error": "x"}, {"Retry-After": "1"})
    async with (
        Upstream(limit, stream("ok")) as grok,
        serving(grok.url, grok_retries=0) as service,
        using(service.url) as client,
    ):
        answer = await client.chat.completions.create(model=MODEL, messages=HI)
        assert answer.choices[0].message.content == "ok"
        assert len(grok.calls) == 2


@pytest.mark.parametrize(
    ("script", "code"),
    [(stream("par", CLOSE), "upstream_cut_off"), (stream("par", frame({"error": "x"})), "upstream_error")],
)
async def test_failure_in_the_middle_in_python(
    grok: Upstream, service: InProcessService, script: Steps, code: str
) -> None:
    """After the status a failure is an APIError with our words, after what came; Grok is asked once."""
    grok.set_scripts(script)
    content = ""

    async def read(chunks: AsyncStream[ChatCompletionChunk]) -> None:
        nonlocal content
        async for chunk in chunks:
            content += chunk.choices[0].delta.content or ""

    async with using(service.url) as client:
        chunks = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        with pytest.raises(openai.APIError) as raised:
            await read(chunks)
    assert (content, raised.value.code) == ("par", code)
    assert raised.value.message.endswith(".")
    assert len(grok.calls) == 1


async def test_failure_of_a_whole_in_python() -> None:
    """Where the status was sent already, the program fails at the choices that are not there; Grok is asked once."""
    async with (
        Upstream(stream("par", 0.3, CLOSE)) as grok,
        serving(grok.url, status_hold=0.05, keep_alive=0.05) as service,
        using(service.url) as client,
    ):
        answer: Any = await client.chat.completions.create(model=MODEL, messages=HI)
        assert answer.choices is None
        assert answer.error["code"] == "upstream_cut_off"  # the package keeps what it does not know
        assert len(grok.calls) == 1


async def test_stop_in_python(grok: Upstream, service: InProcessService) -> None:
    """Who closes the stream, or cancels the task, hangs up Grok at once."""
    grok.set_scripts(stream("so far", HANG))
    async with using(service.url) as client:
        chunks = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        assert (await anext(chunks)).choices[0].delta.content == "so far"
        await chunks.close()
        await grok.calls[0].hung_up(within=1)
        task = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=HI))
        call: Call = await grok.call(1)
        task.cancel()
        await call.hung_up(within=1)


async def test_models_in_python(service: InProcessService) -> None:
    """The list is what a program's menu is filled from."""
    async with using(service.url) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        assert (await client.models.retrieve(MODEL)).owned_by == "xai"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("gpt-4o")


def langchain(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key=SecretStr("any"), model=MODEL, timeout=20)


async def test_langchain_in_python(grok: Upstream, service: InProcessService) -> None:
    """LangChain streams and invokes, with usage in its own names."""
    grok.set_scripts(stream(*NASTY))
    model = langchain(service.url)
    pieces = [piece async for piece in model.astream("Hi", stream_usage=True)]
    assert "".join(str(piece.content) for piece in pieces) == TEXT
    answer = await model.ainvoke("Hi")
    assert answer.content == TEXT
    for usage in (answer.usage_metadata, *[piece.usage_metadata for piece in pieces if piece.usage_metadata]):
        assert usage is not None
        assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (12, 8, 20)


async def test_langchain_failures_in_python() -> None:
    """It goes by the package's rules: a refusal is asked for once, and an error in the JSON is an error."""
    async with Upstream(error(401, {"error": "x"})) as grok, serving(grok.url) as service:
        with pytest.raises(openai.InternalServerError):
            await langchain(service.url).ainvoke("Hi")
        assert len(grok.calls) == 1
    async with Upstream(stream("par", 0.3, CLOSE)) as grok, serving(grok.url, status_hold=0.05) as service:
        with pytest.raises(ValueError, match="upstream_cut_off"):
            await langchain(service.url).ainvoke("Hi")
        assert len(grok.calls) == 1
