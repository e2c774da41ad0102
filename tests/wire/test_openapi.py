"""The description of the API is valid, whole and true: nothing is answered that it does not list."""

import asyncio
import re
import sys
from pathlib import Path
from typing import Any

import openapi_spec_validator
import pytest

from chatproxy import errors
from chatproxy.app import create_app
from chatproxy.config import load
from tests.conftest import KEY, InProcessService, serving
from tests.upstream import Upstream, stream

pytestmark = pytest.mark.anyio


async def description(service: InProcessService) -> Any:
    response = await service.client.get("/openapi.json")
    assert (response.status_code, response.headers["Content-Type"]) == (200, "application/json")
    return response.json()


@pytest.mark.parametrize("try_page", [True, False])
async def test_valid_and_whole(try_page: bool) -> None:
    """It is OpenAPI 3.1 and describes exactly the routes that there are."""
    async with Upstream() as grok, serving(grok.url, try_page=try_page) as service:
        described = await description(service)
    openapi_spec_validator.validate(described)
    assert described["openapi"].startswith("3.1.")
    app = create_app(load({"TRY_PAGE": str(try_page), "GROK_API_KEY": KEY}))
    routes = {(method, route.path_format) for route in app.routes for method in route.methods - {"HEAD"}}  # type: ignore[attr-defined] # they are Routes
    operations = {
        (method.upper(), path) for path, item in described["paths"].items() for method in item if method != "parameters"
    }
    assert operations == routes
    assert (("GET", "/") in operations) == try_page


async def test_every_error_is_described(service: InProcessService) -> None:
    """Every error class is in it, with status, code and sentence: each where it can happen."""
    described = await description(service)
    chat = described["paths"]["/api/chat"]["post"]["responses"]
    events = chat["200"]["content"]["text/event-stream"]["schema"]["oneOf"]
    [failed] = [event for event in events if event["properties"]["event"] == {"const": "error"}]
    in_stream = failed["properties"]["data"]["contentSchema"]["properties"]["error"]["properties"]["code"]["enum"]
    answers = [
        (int(status), answer)
        for item in [{"": {"responses": described["components"]["responses"]}}, *described["paths"].values()]
        for name, operation in item.items()
        if name != "parameters"
        for status, answer in operation["responses"].items()
    ]
    for kind in leaves(errors.ChatError):
        if kind.code not in in_stream:
            told = [answer for status, answer in answers if status == kind.status and f"`{kind.code}`" in str(answer)]
            assert told, kind
            assert all(kind.message in answer["description"] for answer in told)
    codes = re.findall(r"`(\w+)`: ", str([answer["description"] for status, answer in answers if status >= 400]))
    assert {*codes, *in_stream} == {kind.code for kind in leaves(errors.ChatError)}
    assert {"upstream_cut_off", "stopped", "abandoned", "replay_lost", "draining"} < set(in_stream)


def leaves(kind: type[errors.ChatError]) -> list[type[errors.ChatError]]:
    return [leaf for child in kind.__subclasses__() for leaf in leaves(child)] or [kind]


async def test_shapes(service: InProcessService) -> None:
    """The schemas are those that requests are decoded with; headers and ways to authenticate are named."""
    described = await description(service)
    schemas = described["components"]["schemas"]
    assert set(schemas) == {
        *(
            "ChatRequest",
            "Message",
            "Created",
            "ErrorBody",
            "ErrorDetail",
            "Health",
            "FinishData",
            "ToolData",
            "Source",
        ),
        *("UIChatRequest", "UIMessage", "IgnoredObject"),
        *("CompletionRequest", "CompletionMessage", "StreamOptions", "TypedObject", "AnyObject", "Model", "ModelList"),
    }
    assert schemas["ChatRequest"]["required"] == ["messages"]
    assert set(schemas["ChatRequest"]["properties"]) == {"messages", "sessionId", "include", "tools", "resumable"}
    assert schemas["Message"]["properties"]["content"]["minLength"] == 1
    assert schemas["ErrorDetail"]["required"] == ["type", "code", "message", "param", "request_id"]
    chat = described["paths"]["/api/chat"]["post"]
    assert {"token": []} in chat["security"]
    assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    assert [parameter["name"] for parameter in chat["parameters"]] == [
        "Idempotency-Key",
        "Last-Event-ID",
        "traceparent",
    ]
    headers = {status: set(answer["headers"]) - {"X-Request-ID"} for status, answer in chat["responses"].items()}
    assert headers["200"] == {"Content-Location", "X-Resumable-Stream-Id", "RateLimit", "RateLimit-Policy"}
    assert headers["201"] == {"Location", "RateLimit", "RateLimit-Policy"}
    assert headers["401"] == {"WWW-Authenticate"}
    assert headers["429"] == {"RateLimit", "RateLimit-Policy", "Retry-After"}
    assert headers["503"] == {"Retry-After"}
    assert all("X-Request-ID" in answer["headers"] for answer in chat["responses"].values())


@pytest.mark.parametrize(("root_path", "url"), [(None, "/"), ("/grok", "/grok"), ("/a/b/", "/a/b")])
async def test_behind_a_path(root_path: str | None, url: str) -> None:
    """Where a proxy puts the service under a path, so does the description."""
    async with Upstream() as grok, serving(grok.url, root_path=root_path) as service:
        assert (await description(service))["servers"] == [{"url": url}]


CHECKS = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
]


@pytest.mark.parametrize(
    ("phases", "header", "changes"),
    [
        pytest.param("coverage,fuzzing", "Accept: text/event-stream", {}, id="streams"),
        pytest.param("coverage,stateful", "Accept: application/json", {}, id="addresses"),
        pytest.param(
            "coverage,fuzzing",
            "Authorization: Bearer 0123456789abcdef",
            {"access_tokens": "0123456789abcdef", "rate_limit": "20/hour", "max_body_bytes": 300, "max_messages": 1},
            id="limits",
        ),
    ],
)
async def test_nothing_else_is_answered(phases: str, header: str, changes: dict[str, object], tmp_path: Path) -> None:
    """Whatever Schemathesis makes of the description and of its opposite, no answer is a 500 or undescribed."""
    async with Upstream(stream("a", reasoning=["b"])) as grok, serving(grok.url, **changes) as service:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json"),
            *("--checks", ",".join(CHECKS), "--header", header, "--phases", phases),
            *("--max-examples", "12", "--seed", "1", "--no-color"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"Tested: 13" in output  # all but the one that it has read
    assert len(grok.calls) >= 5
