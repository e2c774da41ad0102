"""A fake Grok on a socket, for running without a key: both of xAI's APIs. Knows the wire and nothing else."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress

REASONING = "There is no API key, so nobody is thinking here. I am the built-in demo and will say so."

ANSWER = """\
Hello from the **chatproxy demo** 👋

No API key is set, so this is not Grok. The words still take Grok's way, token by token:

- markdown arrives *as written*,
- line breaks survive, also in code:

```python
for token in answer:
    print(token, end="")
```

Set `GROK_API_KEY` and restart to talk to the real one.
"""

# What is added where a search is asked for.
QUERY = "how chatproxy streams"
SOURCES = (
    "https://docs.x.ai/developers/tools/web-search",
    "https://html.spec.whatwg.org/multipage/server-sent-events.html",
)
FOUND = f"""
You let Grok search, so here is what a search looks like, though nobody has searched: what Grok finds it cites in the
text[[1]]({SOURCES[0]}), and the sources come in an event of their own[[2]]({SOURCES[1]}).
"""

# About the pace at which one reads along.
PAUSE = 0.03

# A message may ask for another pace, to see what becomes of a slow or silent answer on its way.
_PACE = re.compile(rb"one word every (\d{1,2}(?:\.\d{1,3})?) s")


@asynccontextmanager
async def demo() -> AsyncIterator[str]:
    """Serve the fake on a free port of this machine's loopback; gives its base URL."""
    conversations: set[asyncio.Task[None]] = set()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_converse(reader, writer))
        conversations.add(task)
        task.add_done_callback(conversations.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()
        for task in conversations:
            task.cancel()
        await asyncio.gather(*conversations, return_exceptions=True)


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one request after the other, until the other side hangs up."""
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"\r\ncontent-length: *(\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if head.startswith(b"post"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
                    writer.write(b"transfer-encoding: chunked\r\n\r\n")
                    responses = head.startswith(b"post /v1/responses ")
                    asked = _PACE.search(body)
                    pace = float(asked[1]) if asked else PAUSE
                    for frame in _response_frames(body) if responses else _chat_frames():
                        writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
                        await writer.drain()
                        text = b'"content"' in frame or b"output_text.delta" in frame
                        await asyncio.sleep(pace if text else PAUSE)
                    writer.write(b"0\r\n\r\n")
                else:  # GET /api-key
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        finally:
            writer.close()


def _chat_frames() -> Iterator[bytes]:
    for delta in [{"role": "assistant", "reasoning_content": ""}, *_deltas("reasoning_content", REASONING)]:
        yield _frame({"choices": [{"index": 0, "delta": delta}]})
    for delta in _deltas("content", ANSWER):
        yield _frame({"choices": [{"index": 0, "delta": delta}]})
    yield _frame({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    counts = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    yield _frame({"choices": [], "usage": counts}) + b"data: [DONE]\n\n"


def _deltas(kind: str, text: str) -> Iterator[dict[str, str]]:
    for token in _tokens(text):
        yield {kind: token}


def _tokens(text: str) -> list[str]:
    """Pieces much like Grok's: a word with the space before it, line breaks, or a reference to a source."""
    return re.findall(r"\n+|\[\[\d\]\]\(\S*?\)|[^\S\n]*[^\s\[]+|[^\S\n]*\[|[^\S\n]+", text)


def _frame(chunk: dict[str, object]) -> bytes:
    chunk = {"id": "demo", "object": "chat.completion.chunk", "created": 0, "model": "demo", **chunk}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


def _response_frames(request: bytes) -> Iterator[bytes]:
    """The items of an answer: reasoning, a search of the first kind that is asked for, a message."""
    tools = [tool["type"] for tool in json.loads(request).get("tools") or []]
    yield _event("response.created", response={"model": "demo", "status": "in_progress", "output": []})
    output: list[dict[str, object]] = [
        {"type": "reasoning", "id": "rs_demo", "summary": [{"type": "summary_text", "text": REASONING}]}
    ]
    yield _event("response.output_item.added", output_index=0, item={**output[0], "summary": []})
    for token in _tokens(REASONING):
        yield _event("response.reasoning_summary_text.delta", output_index=0, summary_index=0, delta=token)
    yield _event("response.output_item.done", output_index=0, item=output[0])
    text = ANSWER
    if tools:
        text += FOUND
        blank, search = (_search(tools[0], query) for query in ("", QUERY))
        yield _event("response.output_item.added", output_index=1, item=blank)
        yield from [b": keepalive\n\n"] * 30  # it takes a second
        yield _event("response.output_item.done", output_index=1, item=search)
        output.append(search)
    yield from _message(len(output), text, output)
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    yield _event("response.completed", response={"model": "demo", "output": output, "usage": usage})


def _message(index: int, text: str, output: list[dict[str, object]]) -> Iterator[bytes]:
    item = {"type": "message", "id": "msg_demo", "role": "assistant"}
    yield _event("response.output_item.added", output_index=index, item={**item, "content": []})
    annotations: list[dict[str, object]] = []
    sent = 0
    for token in _tokens(text):
        yield _event("response.output_text.delta", output_index=index, content_index=0, delta=token)
        sent += len(token)
        if token.startswith("[["):
            number = len(annotations)
            span = {"start_index": sent - len(token), "end_index": sent, "title": str(number + 1)}
            annotations.append({"type": "url_citation", "url": SOURCES[number], **span})
            kind = "response.output_text.annotation.added"
            yield _event(kind, output_index=index, annotation_index=number, annotation=annotations[number])
    content = [{"type": "output_text", "text": text, "annotations": annotations}]
    output.append({**item, "content": content})
    yield _event("response.output_item.done", output_index=index, item=output[-1])


def _search(tool: str, query: str) -> dict[str, object]:
    if tool == "web_search":
        action = {"type": "search", "query": query, "sources": []}
        return {"type": "web_search_call", "id": "ws_demo", "action": action}
    given = json.dumps({"query": query}) if query else ""
    return {"type": "custom_tool_call", "id": "ctc_demo", "name": "x_keyword_search", "input": given}


def _event(kind: str, **fields: object) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields}, ensure_ascii=False)}\n\n".encode()
