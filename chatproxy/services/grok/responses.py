"""xAI's Responses API: a chat becomes a request body, an event stream becomes neutral events.

Knows JSON and the order of events. Does not know sockets, HTTP, retries or time. What is said here of Grok's wire comes
from xAI's documentation and from recorded answers: an answer is made of output items, which may overlap and are told
apart by `output_index` (their ids repeat), and every text comes several times, first in deltas and then whole.
"""

from contextlib import suppress
from typing import Any

import msgspec
from msgspec import Raw, Struct

from chatproxy import sse
from chatproxy.config import Settings
from chatproxy.errors import ChatError, ToolLimit, UpstreamFailed
from chatproxy.events import (
    Chat,
    Citations,
    Event,
    Finished,
    Message,
    ReasoningDelta,
    Redacted,
    TextDelta,
)
from chatproxy.services.grok import failures
from chatproxy.services.grok.joined_text import JoinedText
from chatproxy.services.grok.response_events import Item, Response, decode, decode_items, objects, string
from chatproxy.services.grok.searches import Searches, Sources
from chatproxy.services.grok.usage import count_responses, readable

PATH = "/responses"

# Bytes. The event that ends an answer repeats all of it, with its searches and its encrypted reasoning, in one line.
MAX_LAST_EVENT_BYTES = 8_000_000
_LARGER = dict.fromkeys((b"response.completed", b"response.incomplete", b"response.failed"), MAX_LAST_EVENT_BYTES)

_REASONS = {"max_output_tokens": "length"}


class ResponseRequest(Redacted, Struct, omit_defaults=True):
    """The body of `POST /responses`. Without `store: false` xAI keeps prompts and answers for 30 days."""

    model: str
    input: list[Message]
    stream: bool
    store: bool
    instructions: str | None = None
    prompt_cache_key: str | None = None
    reasoning: dict[str, str] | None = None
    tools: list[dict[str, str]] | None = None


_encode = msgspec.json.Encoder().encode


def encode_request(settings: Settings, chat: Chat, cache_key: str | None = None) -> bytes:
    """The request body for a chat; answers with the same cache key find the prompt in xAI's cache."""
    effort = settings.grok_reasoning_effort
    return _encode(
        ResponseRequest(
            settings.grok_model,
            chat.messages,
            stream=True,
            store=False,
            instructions=settings.system_prompt and str(settings.system_prompt),
            prompt_cache_key=cache_key,
            reasoning={"effort": effort} if effort else None,
            tools=[{"type": tool} for tool in dict.fromkeys(chat.tools)] or None,
        )
    )


class Decoder:
    """Turns the bytes of one answer, cut anywhere, into events. See `chat_completions.Decoder` for its attributes.

    The response object comes within a second or two, before Grok has begun to work; so it is no progress, and what
    progresses is an item. After `max_tool_calls` searches the next one is a failure.
    """

    def __init__(self, max_tool_calls: int) -> None:
        self.progressed = self.complete = self.ended = False
        self.failure: tuple[ChatError, str] | None = None  # and what of it may be logged
        self._decoder = sse.Decoder(larger=_LARGER)
        self._begun = False
        self._text = JoinedText(TextDelta, "\n\n", each_part=False)
        self._reasoning = JoinedText(ReasoningDelta, "\n", each_part=True)
        self._reasoning_kinds: dict[int, str] = {}
        self._searches, self._sources = Searches(max_tool_calls), Sources()
        self._refused = False
        self._reason: str | None = None
        self._model: str | None = None
        self._usage = Raw()

    @property
    def finished(self) -> Finished:
        """Finish reason, model and usage, as far as they were told."""
        usage = readable(self._usage)
        return Finished(self._reason, self._model, usage, count_responses(usage), "responses")

    def feed(self, piece: bytes) -> list[Event]:
        """The events that are complete now."""
        self.progressed = False
        events: list[Event] = []
        try:
            for data in self._decoder.feed(piece):
                if data == b"[DONE]":  # documented, and not seen so far
                    self._complete(events)
                elif data and not data.isspace():
                    self._read(data, events)
                if self.ended:
                    break
        except ToolLimit as error:
            self._fail(error.with_traceback(None), "another search after the last that is allowed")
        except (ValueError, RecursionError):  # sse.TooLong, msgspec.DecodeError, UnicodeDecodeError
            self._fail(UpstreamFailed(), f"malformed event, in a read of {len(piece)} bytes")
        if self.ended:
            self._text.flush(events)
            self._reasoning.flush(events)
        return events

    def _read(self, data: bytes, events: list[Event]) -> None:
        event = decode(data)
        if event is None:
            return
        kind, index = event.type or "", event.output_index
        if kind == "error" or (event.error and not kind):
            self._refuse(data)
            return
        if index is not None or kind.endswith(".delta"):
            self.progressed = self._begun = True
        if event.response is not None:
            self._note(event.response)
        index, part = index or 0, event.content_index or 0
        match kind:
            case "response.output_text.delta":
                self._text.delta(index, part, string(event.delta), events)
            case "response.reasoning_summary_text.delta":
                self._reason_about(index, "summary", event.summary_index or 0, event.delta, events)
            case "response.reasoning_text.delta":
                self._reason_about(index, "text", part, event.delta, events)
            case "response.refusal.delta":
                self._refused = True
                self._text.delta(index, part, string(event.delta), events)
            case "response.output_text.done" | "response.refusal.done":
                self._refused |= kind == "response.refusal.done"
                self._text.whole(index, part, string(event.text or event.refusal), events)
            case "response.reasoning_summary_text.done":
                self._reason_about(index, "summary", event.summary_index or 0, event.text, events, whole=True)
            case "response.reasoning_text.done":
                self._reason_about(index, "text", part, event.text, events, whole=True)
            case "response.content_part.added" if isinstance(event.part, dict) and event.part.get("text"):
                if event.part.get("type") == "output_text":
                    self._text.delta(index, part, string(event.part["text"]), events)
            case "response.content_part.done":
                self._content(index, [event.part], events, first=part)
            case "response.output_text.annotation.added":
                self._sources.add(event.annotation)
            case "response.output_item.added" if event.item is not None:
                self._searches.see(index, event.item, events, completed=False)
            case "response.output_item.done" if event.item is not None:
                self._searches.see(index, event.item, events, completed=True)
                self._item(index, event.item, events)
            case "response.failed":
                self._refuse(bytes(event.response.error) if event.response and event.response.error else data)
            case "response.completed" | "response.incomplete":
                self._finish(kind, event.response or Response(), events)
            case _:
                pass

    def _note(self, response: Response) -> None:
        if isinstance(response.model, str):
            self._model = response.model
        if response.usage and bytes(response.usage) != b"null":
            self._usage = response.usage.copy()  # else it would keep the whole event in memory

    def _reason_about(
        self, index: int, kind: str, part: int, text: Any, events: list[Event], *, whole: bool = False
    ) -> None:
        # Where an item has its reasoning both as a summary and in full, the first that comes is taken.
        if text and self._reasoning_kinds.setdefault(index, kind) == kind:
            add = self._reasoning.whole if whole else self._reasoning.delta
            add(index, part, string(text), events)

    def _item(self, index: int, item: Item, events: list[Event]) -> None:
        """What an item holds that has not been told."""
        if item.type == "message":
            self._content(index, item.content, events)
        elif item.type == "reasoning":
            for kind, parts in (("summary", item.summary), ("text", item.content)):
                for number, part in enumerate(objects(parts)):
                    self._reason_about(index, kind, number, part.get("text"), events, whole=True)

    def _content(self, index: int, parts: Any, events: list[Event], first: int = 0) -> None:
        for number, part in enumerate(objects(parts), first):
            match part.get("type"):
                case "output_text":
                    self._text.whole(index, number, string(part.get("text")), events)
                case "refusal":
                    self._refused = True
                    self._text.whole(index, number, string(part.get("refusal")), events)
                case _:
                    pass
            for annotation in objects(part.get("annotations")):
                self._sources.add(annotation)

    def _finish(self, kind: str, response: Response, events: list[Event]) -> None:
        if response.output and (self._searches.running or (self._searches and not self._sources)):
            self._read_again(response.output, events)
        if response.output and not self._text.begun:
            for index, item in enumerate(decode_items(response.output) or ()):
                if item.type == "message":
                    self._content(index, item.content, events)
        details = response.incomplete_details
        reason = details.get("reason") if isinstance(details, dict) else None
        if kind == "response.completed":
            self._reason = "content_filter" if self._refused else "stop"
        else:
            self._reason = _REASONS.get(reason, reason) if reason and isinstance(reason, str) else "length"
        self.progressed = self._begun = True
        self._complete(events)

    def _read_again(self, output: Raw, events: list[Event]) -> None:
        """What of a search only the end tells: in an answer that is cut short no item is told to be done."""
        with suppress(ValueError, RecursionError):  # the answer counts without it
            items = decode_items(output) or []
            self._searches.complete(items, events)
            for item in items:
                for part in objects(item.content):
                    for annotation in objects(part.get("annotations")):
                        self._sources.add(annotation)

    def _complete(self, events: list[Event]) -> None:
        self._text.flush(events)
        self._reasoning.flush(events)
        if self._sources:
            events.append(Citations(self._sources.all()))
        self.complete = self.ended = True

    def _refuse(self, body: bytes) -> None:
        """An error in place of the answer: it stands for a status, as long as the answer has not begun."""
        error = UpstreamFailed() if self._begun else failures.classify_event(body)
        self._fail(error, failures.describe(200, body))

    def _fail(self, error: ChatError, detail: str) -> None:
        self.failure = error, detail
        self.ended = True
