"""What callers may spend in tokens, over a real socket: reserved before Grok is asked, booked at every end."""

import asyncio
import math
import re
from collections.abc import AsyncIterator

import httpx
import pytest

from tests import responses
from tests.conftest import HI, InProcessService, Service, failure, refusal, serving
from tests.readers import standard
from tests.upstream import CLOSE, DONE, HANG, RESET, Gate, Script, Upstream, chunk, error, frame, sse, stream

pytestmark = pytest.mark.anyio


def usage(prompt: object, completion: object = 0, reasoning: object = 0) -> dict[str, object]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def answer(*tokens: str, counts: object) -> Script:
    """An answer with that usage."""
    return sse(*[frame(chunk({"content": token})) for token in tokens or ("a",)], finish(counts), DONE)


def finish(counts: object) -> bytes:
    """Grok's last chunk."""
    return frame(chunk({}, finish="stop", usage=counts))


def common(budget: str) -> dict[str, object]:
    """The setting of the budget for all."""
    return {"token_budget": budget}


def own(budget: str) -> dict[str, object]:
    """The setting of the budget for each."""
    return {"token_budget_per_client": budget}


async def spent(service: Service) -> tuple[int, int, int]:
    """Of the budget for all: used, reserved; and how many answers were booked by an estimate."""
    lines = (await service.client.get("/metrics")).text.splitlines()

    def value(name: str) -> int:
        [line] = [line for line in lines if line.startswith(f"chatproxy_budget_{name} ")]
        return int(float(line.rpartition(" ")[2]))

    return value('tokens{kind="used"}'), value('tokens{kind="reserved"}'), value("estimated_total")


async def settled(service: Service) -> tuple[int, int]:
    """Once nothing is reserved: what is used, and how many answers were booked by an estimate."""
    async with asyncio.timeout(5):
        while (found := await spent(service))[1]:  # noqa: ASYNC110 -- nobody tells when
            await asyncio.sleep(0.01)
    return found[0], found[2]


def denied(response: httpx.Response) -> int:
    """Checks that it is a refusal for the budget's sake; gives the seconds to wait."""
    assert (response.status_code, refusal(response)["code"]) == (429, "budget_spent")
    return int(response.headers["Retry-After"])


def left(response: httpx.Response) -> int:
    """What the caller is told that is left of its own budget."""
    return int(re.findall(r'"tokens";r=(\d+);t=\d+', response.headers["RateLimit"])[0])


@pytest.fixture
async def service(grok: Upstream) -> AsyncIterator[InProcessService]:
    async with serving(grok.url, **common("100000/day"), grok_retries=0, resume_window=0.1) as service:
        yield service


# What is booked.


@pytest.mark.parametrize(
    ("counts", "booked"),
    [
        (usage(40, 10), 50),
        (usage(40, 10, 200), 250),
        (usage(1), 1),
        ({"prompt_tokens": 7}, 7),
    ],
)
async def test_booked_usage(grok: Upstream, service: InProcessService, counts: object, booked: int) -> None:
    """What Grok has counted is booked: the prompt, the text and the reasoning."""
    grok.set_scripts(answer(counts=counts))
    assert (await service.ask()).status_code == 200
    assert await settled(service) == (booked, 0)


@pytest.mark.parametrize(
    "counts", [None, {}, usage(0), usage(-5, 10), usage(10, -5), usage("many"), usage(10, 20_000_000), "x"]
)
async def test_odd_counts(grok: Upstream, service: InProcessService, counts: object) -> None:
    """Where the usage is missing or cannot be true, an estimate is booked, which is not zero and not absurd."""
    grok.set_scripts(answer(counts=counts))
    assert (await service.ask()).status_code == 200
    booked, estimated = await settled(service)
    assert (1000 < booked < 20_000, estimated) == (True, 1)


async def test_late_usage(grok: Upstream, service: InProcessService) -> None:
    """Usage that comes after the finish reason, and more than once, is booked once, as it was told last."""
    late = [frame(chunk(None, usage=usage(count))) for count in (40, 50)]
    grok.set_scripts(sse(frame(chunk({"content": "a"})), finish(None), *late, DONE))
    assert (await service.ask()).status_code == 200
    assert await settled(service) == (50, 0)


async def test_usage_before_the_end(grok: Upstream, service: InProcessService) -> None:
    """Usage that came counts, though the caller did not stay for the end."""
    grok.set_scripts(sse(frame(chunk({"content": "a"})), finish(usage(40, 10)), HANG))
    async with service.asking(include=["finish"]) as live:
        await live.event()
        await asyncio.sleep(0.05)
    assert await settled(service) == (50, 0)


LEAVING: dict[str, Script] = {
    "before the head": [HANG],
    "before the first chunk": [stream()[0], HANG],
    "in the reasoning": sse(frame(chunk({"reasoning_content": "hm"})), HANG),
    "in the text": stream("a", "b", HANG),
    "after the finish reason": sse(frame(chunk({"content": "a"})), finish(None), HANG),
}


@pytest.mark.parametrize("resumable", [False, True], ids=["plain", "resumable"])
@pytest.mark.parametrize("when", LEAVING)
async def test_booked_when_left(grok: Upstream, service: InProcessService, when: str, resumable: bool) -> None:
    """Whenever the caller hangs up, what Grok may have generated by then is booked."""
    grok.set_scripts(LEAVING[when])
    async with service.caller() as caller:
        await caller.post({"messages": HI, "resumable": resumable})
        call = await grok.call()
        await asyncio.sleep(0.05)
        assert (await spent(service))[:2] == (0, math.ceil(len(call.content) / 3) + 2000 + 4000)
        caller.reset()
    booked, estimated = await settled(service)
    assert (2000 < booked < 6000, estimated) == (True, 1)


@pytest.mark.parametrize(("text", "least"), [("x" * 90_000, 30_000), ("\u6f22" * 30_000, 30_000)], ids=["latin", "han"])
async def test_long_before_left(grok: Upstream, service: InProcessService, text: str, least: int) -> None:
    """What was received is booked in full, in any script, though it is more than a guess may be."""
    grok.set_scripts(stream(text, HANG))
    async with service.asking() as live:
        await live.event()
    booked, estimated = await settled(service)
    assert (least < booked < least + 10_000, estimated) == (True, 1)


@pytest.mark.parametrize(
    "script",
    [
        error(400, {"code": "x", "error": "x"}),
        error(400, {"error": "This model's maximum prompt length is 131072 but the request contains 140000 tokens."}),
        error(401, {"error": "x"}),
        error(429, {"error": "x"}, {"Retry-After": "60"}),
        error(500, {"error": "x"}),
        error(503, {"error": "x"}),
        [RESET],
    ],
)
async def test_refused_by_grok(grok: Upstream, service: InProcessService, script: Script) -> None:
    """What Grok refuses costs nothing."""
    grok.set_scripts(script)
    assert (await service.ask()).status_code >= 400
    assert await settled(service) == (0, 0)


async def test_refused_content(grok: Upstream, service: InProcessService) -> None:
    """A conversation that Grok refuses for its content is booked as dearly as xAI has charged for it."""
    grok.set_scripts(error(403, {"code": "permission-denied", "error": "Content violates usage guidelines."}))
    assert refusal(await service.ask())["code"] == "content_policy"
    assert await settled(service) == (20_000, 1)


@pytest.mark.parametrize("script", [stream("a", CLOSE), stream("a", RESET), sse(frame({"error": "x"}))])
async def test_failing(grok: Upstream, service: InProcessService, script: Script) -> None:
    """An answer that fails in the middle is booked by an estimate."""
    grok.set_scripts(script)
    response = await service.ask()
    assert response.status_code != 200 or failure(standard(response.content)[-1], response)
    booked, estimated = await settled(service)
    assert (booked > 2000) == bool(estimated) == (response.status_code == 200)


async def test_retried(grok: Upstream) -> None:
    """An answer that took several tries is booked once."""
    grok.set_scripts(error(500, {"error": "x"}), [RESET], answer(counts=usage(40, 10)))
    async with serving(grok.url, **common("100000/day")) as service:
        assert (await service.ask()).status_code == 200
        assert await settled(service) == (50, 0)


async def test_timeout_of_the_first_token(grok: Upstream) -> None:
    """Who waited in vain for the first token has cost something all the same."""
    grok.set_scripts([HANG])
    async with serving(grok.url, **common("100000/day"), first_token_timeout=0.1, grok_retries=0) as service:
        assert (await service.ask()).status_code == 504
        booked, estimated = await settled(service)
        assert (booked > 2000, estimated) == (True, 1)


async def test_searches_count(grok: Upstream) -> None:
    """Each search is booked as so many tokens as it costs, besides those that Grok has counted."""
    found = [*responses.searched(0, "x"), *responses.searched(1, "y"), *responses.message(2, "a")]
    end = responses.ended(None, usage={"input_tokens": 40, "output_tokens": 10})
    grok.set_scripts(sse(responses.CREATED, *found, end))
    async with serving(grok.url, **common("100000/day"), grok_api="responses", grok_tools="web_search") as service:
        assert (await service.ask(tools=["web_search"])).status_code == 200
        assert await settled(service) == (4050, 0)


async def test_no_answer_of_its_own(grok: Upstream, service: InProcessService) -> None:
    """To come back, by id or by key, to look and to stop costs nothing; neither does what is refused before Grok."""
    grok.set_scripts(answer(counts=usage(40, 10)))
    key = {"Idempotency-Key": "k"}
    first = await service.ask(headers=key)
    assert (await service.ask(headers=key)).content == first.content
    path = first.headers["Content-Location"]
    assert (await service.client.get(path)).status_code in (200, 204)
    assert (await service.client.delete(path.removesuffix("/stream"))).status_code == 204
    assert (await service.client.post("/api/chat", json={"messages": []})).status_code == 422
    assert await settled(service) == (50, 0)


# Who is refused.


async def test_edge(grok: Upstream) -> None:
    """At the edge of a budget two hundred chats at once get one answer more, and each other a refusal that is true."""
    gate = Gate()
    grok.set_scripts(sse(gate, frame(chunk({"content": "a"})), finish(usage(40, 9960)), DONE))
    async with serving(grok.url, **own("15000/day")) as service:
        asking = [asyncio.create_task(service.ask()) for _ in range(200)]
        done = 0
        while done < 198:  # two of 6,000 fit
            done = sum(task.done() for task in asking)
            await asyncio.sleep(0.01)
        await grok.call(1)
        gate.open()
        answers = [await task for task in asking]
        assert sum(response.status_code == 200 for response in answers) == 2
        assert {denied(response) for response in answers if response.status_code != 200} == {10}
        messages = {refusal(response)["message"] for response in answers if response.status_code != 200}
        assert messages == {"Your tokens are reserved for answers that are running. Wait for Retry-After seconds."}
        assert denied(await service.ask()) > 80_000  # 20,000 are used: one answer too much
        assert len(grok.calls) == 2


@pytest.mark.parametrize("resumable", [False, True])
async def test_last_answer(grok: Upstream, resumable: bool) -> None:
    """While anything is left an answer may begin, however large; the one after it waits for the next window."""
    grok.set_scripts(answer(counts=usage(40, 10)), answer(counts=usage(1000, 1000)))
    async with serving(grok.url, **own("100/day")) as service:
        first = await service.ask(resumable=resumable)
        assert (first.status_code, left(first)) == (200, 0)  # what is reserved counts
        assert (await service.ask(resumable=resumable)).status_code == 200
        response = await service.ask(resumable=resumable)
        assert 86_000 < denied(response) <= 86_400
        assert left(response) == 0
        assert response.headers["RateLimit-Policy"] == '"tokens";q=100;w=86400;qu="tokens"'
        assert "Your tokens are used up" in refusal(response)["message"]


async def test_what_is_left(grok: Upstream) -> None:
    """Each answer tells what is left of the caller's own budget, beside its chats; and nothing of the common one."""
    grok.set_scripts(answer(counts=usage(40, 10)))
    async with serving(grok.url, **own("50000/day"), **common("70000/day"), rate_limit="9/hour") as service:
        for taken in (0, 50):
            response = await service.ask()
            size = len(grok.calls[-1].content)
            estimate = math.ceil(size / 3) + 4000 + (2000 if not taken else 40 - size // 3)
            assert left(response) == 50_000 - taken - max(estimate, math.ceil(size / 3) + 4000)
            policies = response.headers["RateLimit-Policy"].split(", ")
            assert policies == ['"chats";q=9;w=3600', '"tokens";q=50000;w=86400;qu="tokens"']
            assert response.headers["RateLimit"].count("r=") == 2


async def test_common_budget(grok: Upstream) -> None:
    """The budget for all is spent by whoever comes; the refusal tells nothing of the total."""
    grok.set_scripts(answer(counts=usage(40, 60)))
    async with serving(grok.url, **common("100/day")) as service:
        first = await service.ask()
        assert "RateLimit" not in first.headers
        response = await service.ask(headers={"X-Forwarded-For": "203.0.113.9"})
        assert denied(response) > 80_000
        assert "RateLimit" not in response.headers
        assert "The tokens of this service are used up" in refusal(response)["message"]
        assert "100" not in response.text.replace(refusal(response)["request_id"], "")


async def test_each_caller(grok: Upstream) -> None:
    """What one caller has spent is not another one's."""
    grok.set_scripts(answer(counts=usage(40, 60)))
    async with serving(grok.url, **own("100/day")) as service:
        for number in range(2):
            headers = {"X-Forwarded-For": f"203.0.113.{number}"}
            assert (await service.ask(headers=headers)).status_code == 200
            denied(await service.ask(headers=headers))


async def test_budget_window(grok: Upstream) -> None:
    """The window begins with the first use, and with the next one the tokens are all there again."""
    grok.set_scripts(answer(counts=usage(40, 60)))
    async with serving(grok.url, **own("100/second"), **common("200/second")) as service:
        assert (await service.ask()).status_code == 200
        assert denied(await service.ask()) == 1
        await asyncio.sleep(1.05)
        assert (await service.ask()).status_code == 200
        assert (await settled(service))[0] == 100


async def test_place_taken(grok: Upstream) -> None:
    """A chat that another limit refuses reserves and costs nothing."""
    grok.set_scripts(stream("a", HANG))
    async with (
        serving(grok.url, **common("100000/day"), max_streams=1, rate_limit="2/day") as service,
        service.asking() as live,
    ):
        await live.event()
        reserved = await spent(service)
        assert refusal(await service.ask())["code"] == "busy"
        assert refusal(await service.ask())["code"] == "rate_limited"
        assert await spent(service) == reserved


@pytest.mark.parametrize("resumable", [False, True])
async def test_budget_before_rate(grok: Upstream, resumable: bool) -> None:
    """A chat that the budget refuses does not count as one, and one that the rate refuses leaves nothing reserved."""
    grok.set_scripts(answer(counts=usage(40, 60)))

    def key(name: str) -> dict[str, str]:
        return {"Idempotency-Key": name} if resumable else {}

    async with serving(grok.url, **own("100/day"), rate_limit="2/day") as service:
        assert (await service.ask(headers=key("a"))).status_code == 200
        for name in "bcd":
            denied(await service.ask(headers=key(name)))
    async with serving(grok.url, **common("100000/day"), rate_limit="1/day") as service:
        assert (await service.ask(headers=key("a"))).status_code == 200
        assert refusal(await service.ask(headers=key("b")))["code"] == "rate_limited"
        assert await spent(service) == (100, 0, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_openai_shape(grok: Upstream, stream: bool) -> None:
    """OpenAI's SDKs get the refusal in their own shape, and are told not to ask again where that would not help."""
    grok.set_scripts(answer(counts=usage(40, 60)))
    async with serving(grok.url, **common("100/day")) as service:
        body = {"messages": HI, "model": "grok-4.3", "stream": stream}
        assert (await service.client.post("/v1/chat/completions", json=body)).status_code == 200
        response = await service.client.post("/v1/chat/completions", json=body)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "budget_spent")
        assert response.headers["X-Should-Retry"] == "false"


async def test_whole_answer_is_booked(grok: Upstream) -> None:
    """An answer that comes in one piece is booked as a stream is, also if the caller does not wait for it."""
    body = {"messages": HI, "model": "grok-4.3"}
    grok.set_scripts(answer(counts=usage(40, 60)), stream("a", HANG))
    async with serving(grok.url, **common("100000/day")) as service, service.caller() as caller:
        assert (await service.client.post("/v1/chat/completions", json=body)).json()["usage"]["total_tokens"] == 100
        assert await settled(service) == (100, 0)
        await caller.post(body, path="/v1/chat/completions")
        await grok.call(1)
        await asyncio.sleep(0.05)
        caller.reset()
        booked, estimated = await settled(service)
        assert (booked > 100 + len(grok.calls[1].content) / 3, estimated) == (True, 1)


async def test_spent_is_forgotten(grok: Upstream) -> None:
    """Without Redis a restart forgets what was spent."""
    grok.set_scripts(answer(counts=usage(40, 60)))
    for _ in range(2):
        async with serving(grok.url, **own("100/day")) as service:
            assert (await service.ask()).status_code == 200
            denied(await service.ask())


async def test_raised(grok: Upstream) -> None:
    """What a long answer has already cost is reserved, so that others cannot spend it a second time."""
    grok.set_scripts(stream(*["x" * 30_000] * 2, HANG))
    async with serving(grok.url, **common("100000/day")) as service, service.asking() as live:
        await live.event()
        reserved = (await spent(service))[1]
        async with asyncio.timeout(10):
            while (await spent(service))[1] <= reserved + 10_000:  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.05)
