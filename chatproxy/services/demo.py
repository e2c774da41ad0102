"""A fake Grok on a socket, for running without a key. Knows the wire and nothing else."""

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
                    asked = _PACE.search(body)
                    pace = float(asked[1]) if asked else PAUSE
                    for frame in _frames():
                        writer.write(b"%x\r\n%b\r\n" % (len(frame), frame))
                        await writer.drain()
                        await asyncio.sleep(pace if b'"content"' in frame else PAUSE)
                    writer.write(b"0\r\n\r\n")
                else:  # GET /api-key
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
        finally:
            writer.close()


def _frames() -> Iterator[bytes]:
    for delta in [{"role": "assistant", "reasoning_content": ""}, *_deltas("reasoning_content", REASONING)]:
        yield _frame({"choices": [{"index": 0, "delta": delta}]})
    for delta in _deltas("content", ANSWER):
        yield _frame({"choices": [{"index": 0, "delta": delta}]})
    yield _frame({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    counts = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    yield _frame({"choices": [], "usage": counts}) + b"data: [DONE]\n\n"


def _deltas(kind: str, text: str) -> Iterator[dict[str, str]]:
    """Pieces much like Grok's tokens: a word with the space before it, or line breaks."""
    for token in re.findall(r"\n+|[^\S\n]*\S+|[^\S\n]+", text):
        yield {kind: token}


def _frame(chunk: dict[str, object]) -> bytes:
    chunk = {"id": "demo", "object": "chat.completion.chunk", "created": 0, "model": "demo", **chunk}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"
