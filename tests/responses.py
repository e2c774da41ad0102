"""What Grok says on the Responses API, in the shapes that were recorded: steps for the scripts of `tests.upstream`.

answer("a", gate, "b")      a whole answer; strings are tokens, anything else is a step of the script
answer("a", CLOSE)          cut off after a token; also RESET, HANG
answer("a", finish="length", usage=False, reasoning=["hm"])
sse(CREATED, *searched(0, "cats"), *message(1, "a"), ended())
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from tests.upstream import Step, sse

ID = "0808def2-38dc-9ffc-8149-668ec70f697c"
SYSTEM_PROMPT = "canary-system-prompt"
USAGE = {
    "input_tokens": 12,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 8,
    "output_tokens_details": {"reasoning_tokens": 5},
    "total_tokens": 20,
    "num_sources_used": 0,
    "num_server_side_tools_used": 0,
    "cost_in_usd_ticks": 37756000,
}


def event(type: str, **fields: Any) -> bytes:
    """One event: its type, and one line of JSON in raw UTF-8, half emojis as escapes."""
    data = json.dumps({"sequence_number": 1, "type": type, **fields}, ensure_ascii=False, separators=(",", ":"))
    # What has no UTF-8 is written as JSON can carry it.
    line = "".join(f"\\u{ord(char):04x}" if "\ud800" <= char <= "\udfff" else char for char in data)
    return f"event: {type}\ndata: {line}\n\n".encode()


def response(**fields: Any) -> dict[str, Any]:
    """The response object, which every answer begins and ends with."""
    return {
        "created_at": 1791066870,
        "completed_at": None,
        "id": ID,
        "model": "grok-4.3",
        "object": "response",
        "output": [],
        "status": "in_progress",
        "usage": None,
        "incomplete_details": None,
        "error": None,
        "instructions": SYSTEM_PROMPT,
    } | fields


CREATED = event("response.created", response=response())
IN_PROGRESS = event("response.in_progress", response=response())


def ended(
    reason: str | None = None, output: Iterable[Mapping[str, Any]] = (), usage: object = USAGE, **fields: Any
) -> bytes:
    """The last event: the answer is complete, or for a reason it is not. It repeats all items."""
    status = "incomplete" if reason else "completed"
    details = {"reason": reason} if reason else None
    told = response(status=status, incomplete_details=details, output=[*output], usage=usage, **fields)
    return event(f"response.{status}", response=told)


def failed(code: str, message: str) -> bytes:
    """The last event of an answer that failed."""
    told = response(status="failed", error={"code": code, "message": message})
    return event("response.failed", response=told)


def message_item(*texts: str, annotations: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """A whole message, of these parts."""
    content = [{"type": "output_text", "text": text, "logprobs": [], "annotations": [*annotations]} for text in texts]
    return {"content": content, "id": f"msg_{ID}", "role": "assistant", "type": "message", "status": "completed"}


def reasoning_item(*texts: str) -> dict[str, Any]:
    """A whole reasoning, of these parts."""
    summary = [{"type": "summary_text", "text": text} for text in texts]
    return {"id": f"rs_{ID}", "summary": summary, "type": "reasoning", "status": "completed", "encrypted_content": "x"}


def added(index: int, item: Mapping[str, Any]) -> bytes:
    return event("response.output_item.added", item=item, output_index=index)


def done(index: int, item: Mapping[str, Any]) -> bytes:
    return event("response.output_item.done", item=item, output_index=index)


def delta(index: int, text: str, part: int = 0) -> bytes:
    """The next token of a message."""
    kind = "response.output_text.delta"
    return event(kind, content_index=part, delta=text, item_id=f"msg_{ID}", output_index=index, logprobs=[])


def thought(index: int, text: str, part: int = 0) -> bytes:
    """The next token of a reasoning's summary."""
    kind = "response.reasoning_summary_text.delta"
    return event(kind, delta=text, item_id=f"rs_{ID}", output_index=index, summary_index=part)


def cited(index: int, annotation: object) -> bytes:
    """An annotation of a message."""
    kind = "response.output_text.annotation.added"
    return event(kind, annotation=annotation, annotation_index=0, content_index=0, output_index=index)


def source(url: object, title: object = "1", **span: int) -> dict[str, Any]:
    """An annotation that refers to a page."""
    span = span or {"start_index": 3, "end_index": 30}
    return {"type": "url_citation", "url": url, "title": title, **span}


def opened(index: int) -> list[bytes]:
    """How a message begins."""
    part = {"type": "output_text", "text": "", "logprobs": [], "annotations": []}
    return [
        added(index, {**message_item(), "status": "in_progress"}),
        event("response.content_part.added", content_index=0, output_index=index, part=part),
    ]


def closed(index: int, text: str, annotations: Iterable[Mapping[str, Any]] = ()) -> list[bytes]:
    """How a message ends: its text comes three times more."""
    item = message_item(text, annotations=annotations)
    return [
        event("response.output_text.done", content_index=0, output_index=index, text=text, logprobs=[]),
        event("response.content_part.done", content_index=0, output_index=index, part=item["content"][0]),
        done(index, item),
    ]


def message(index: int, *tokens: str) -> list[bytes]:
    """A message, token by token."""
    return [*opened(index), *(delta(index, token) for token in tokens), *closed(index, "".join(tokens))]


def reasoned(index: int, *tokens: str) -> list[bytes]:
    """A reasoning, token by token; without tokens it is opened and closed at once."""
    item, text = reasoning_item(*(["".join(tokens)] if tokens else [])), "".join(tokens)
    part = {"type": "summary_text", "text": text}
    kind = "response.reasoning_summary"
    inner = [
        event(f"{kind}_part.added", output_index=index, summary_index=0, part={**part, "text": ""}),
        *(thought(index, token) for token in tokens),
        event(f"{kind}_text.done", output_index=index, summary_index=0, text=text),
        event(f"{kind}_part.done", output_index=index, summary_index=0, part=part),
    ]
    return [added(index, reasoning_item()), *(inner if tokens else []), done(index, item)]


def web_search(index: int, query: str = "", status: str = "completed") -> dict[str, Any]:
    """A search of the web, as an item."""
    action = {"type": "search", "query": query, "sources": [{"type": "url", "url": "https://example.com/unused"}]}
    return {"id": f"ws_{ID}_call-{index}", "type": "web_search_call", "status": status, "action": action}


def x_search(index: int, query: str = "", name: str = "x_keyword_search") -> dict[str, Any]:
    """A search on X, as an item."""
    given = json.dumps({"query": query, "limit": 1}) if query else ""
    return {"id": f"ctc_{ID}_call-{index}", "type": "custom_tool_call", "name": name, "input": given}


def searched(index: int, query: str) -> list[bytes]:
    """A search of the web, from its beginning to its end."""
    steps = ("in_progress", "searching", "completed")
    return [
        added(index, web_search(index, status="in_progress")),
        *(event(f"response.web_search_call.{step}", output_index=index) for step in steps),
        done(index, web_search(index, query)),
    ]


def answer(*deltas: str | Step, finish: str = "stop", reasoning: Iterable[str] = ()) -> list[Step]:
    """A whole answer as Grok streams it: as `tests.upstream.stream` on Chat Completions, but there is no `[DONE]`."""
    thoughts, tokens = [*reasoning], [item for item in deltas if isinstance(item, str)]
    index = 1 if thoughts else 0
    played: list[Step] = [CREATED, IN_PROGRESS, *(reasoned(0, *thoughts) if thoughts else []), *opened(index)]
    played += [delta(index, item) if isinstance(item, str) else item for item in deltas]
    text = "".join(tokens)
    output = [*([reasoning_item("".join(thoughts))] if thoughts else []), message_item(text)]
    if finish == "stop":
        played += [*closed(index, text), ended(None, output)]
    else:  # nothing is closed before it
        played.append(ended("max_output_tokens", output))
    return sse(*played)
