"""What Grok's refusals mean, and what of them may be logged.

xAI's messages quote prompts, keys, team ids and addresses. So none of their words is logged or passed on: a refusal is
known by its status, its length, its code if that is one of a fixed list, and which of a fixed list of sentences it is.
"""

import re

import msgspec
from msgspec import Struct

from chatproxy.errors import (
    ChatError,
    ContentPolicy,
    ContextLengthExceeded,
    UpstreamAuth,
    UpstreamFailed,
    UpstreamOverloaded,
    UpstreamRateLimited,
    UpstreamRejected,
)
from chatproxy.events import Redacted


class UpstreamErrorDetail(Redacted, Struct):
    """OpenAI's form of an error, which xAI sends at times."""

    message: str | None = None
    code: str | int | None = None


class UpstreamErrorBody(Redacted, Struct):
    """An upstream error: `error` is a string, or an object with a message and a code; or it is that object itself."""

    error: str | UpstreamErrorDetail | None = None
    code: str | int | None = None
    message: str | None = None


_decode = msgspec.json.Decoder(UpstreamErrorBody | str).decode

# Seconds: what xAI's own client waits at most.
MAX_RETRY_AFTER = 120

# The codes that xAI sends: sentences until June 2026, slugs since August 2026; and OpenAI's own for the same.
KNOWN_CODES = {
    "Client specified an invalid argument",
    "The caller does not have permission to execute the specified operation",
    "Some requested entity was not found",
    "Some resource has been exhausted",
    "The service is currently unavailable",
    "invalid-argument",
    "permission-denied",
    "not-found",
    "resource-exhausted",
    "unavailable",
    "unauthenticated",
    "internal",
    "deadline-exceeded",
    "server_error",
    "rate_limit_exceeded",
    "invalid_api_key",
    "invalid_request_error",
    "context_length_exceeded",
    "model_not_found",
    "content_policy_violation",
    "insufficient_quota",
}

# What a message of Grok says, by words of it in lower case. The first that fits counts.
KNOWN_SENTENCES = (
    ("content policy", ("violates usage guidelines", "safety_check")),
    ("wrong API key", ("incorrect api key", "invalid api key", "api key is invalid")),
    ("no authorization", ("authorization header", "authorization token", "no api key", "api key")),
    ("no credits", ("credits", "spending limit")),
    ("no access", ("access to the", "does not have access", "permission")),
    ("prompt too long", ("maximum prompt length", "exceeds budget", "context length")),
    ("parameter refused", ("does not support parameter", "invalid reasoning effort", "argument not supported")),
    ("model retired", ("was deprecated", "no longer accessible")),
    ("model unknown", ("model not found", "does not exist")),
    ("route unknown", ("no handler found",)),
    ("empty message", ("at least one content element",)),
    ("wrong shape", ("failed to deserialize", "failed to parse")),
    ("rate limit", ("too many requests", "too many tokens", "rate limit")),
    ("at capacity", ("at capacity", "temporarily unavailable", "overloaded")),
    ("no answer of the model", ("did not respond", "timed out waiting for first token")),
    ("search retired", ("live search is deprecated",)),
)


def parse(body: bytes) -> tuple[str | int | None, str]:
    """xAI's code and message, from any of its envelopes; of anything else (HTML) neither."""
    try:
        refusal = _decode(body)
    except (ValueError, RecursionError):
        return None, ""
    if isinstance(refusal, str):
        return None, refusal
    if isinstance(refusal.error, UpstreamErrorDetail):
        return refusal.error.code if refusal.code is None else refusal.code, refusal.error.message or ""
    return refusal.code, refusal.error or refusal.message or ""


def classify(status: int, body: bytes) -> ChatError:
    """The outcome that a response other than an event stream stands for.

    A wrong key is a 400, and a 403 has four meanings: only the words tell them apart. A 403 without them (a block page
    of Cloudflare or of a proxy) says nothing of the key.
    """
    return _classify(status, *parse(body))


def _classify(status: int, code: str | int | None, message: str) -> ChatError:
    text = message.lower()
    if 400 <= status < 500:
        if "violates usage guidelines" in text or "safety_check" in text:
            return ContentPolicy()
        if status == 429:
            return UpstreamAuth() if "credits" in text or "spending limit" in text else UpstreamRateLimited()
        if status == 401:
            return UpstreamAuth()
        if status == 403:
            return UpstreamAuth() if message or code else UpstreamFailed()
        if status == 400 and ("api key" in text or "authorization" in text):
            return UpstreamAuth()
        if status == 400 and ("maximum prompt length" in text or "exceeds budget" in text or "context length" in text):
            return ContextLengthExceeded()
        return UpstreamRejected()
    if status in (503, 529):
        return UpstreamOverloaded()
    return UpstreamFailed()


def parse_retry_after(value: str) -> int | None:
    """A Retry-After in whole seconds, from 1 to MAX_RETRY_AFTER; None for any other form of it."""
    return max(1, min(int(value), MAX_RETRY_AFTER)) if re.fullmatch(r"[0-9]{1,9}", value) else None


# The status that an error within a stream stands for, by its code, and else by what its message says.
_STATUSES = {
    "Client specified an invalid argument": 400,
    "invalid-argument": 400,
    "invalid_request_error": 400,
    "Some requested entity was not found": 404,
    "not-found": 404,
    "model_not_found": 404,
    "The caller does not have permission to execute the specified operation": 403,
    "permission-denied": 403,
    "unauthenticated": 401,
    "invalid_api_key": 401,
    "insufficient_quota": 401,
    "Some resource has been exhausted": 429,
    "resource-exhausted": 429,
    "rate_limit_exceeded": 429,
    "The service is currently unavailable": 503,
    "unavailable": 503,
    "content policy": 400,
    "wrong API key": 400,
    "no authorization": 401,
    "no credits": 403,
    "no access": 403,
    "prompt too long": 400,
    "parameter refused": 400,
    "model retired": 404,
    "model unknown": 404,
    "empty message": 400,
    "rate limit": 429,
    "at capacity": 503,
}
_ERRORS = {"context_length_exceeded": ContextLengthExceeded, "content_policy_violation": ContentPolicy}


def classify_event(body: bytes) -> ChatError:
    """The outcome that an error within a stream stands for: it has no status, but a code or known words."""
    code, message = parse(body)
    if code in _ERRORS:
        return _ERRORS[str(code)]()
    if re.fullmatch(r"[45]\d\d", str(code)):
        status = int(str(code))
    else:
        status = _STATUSES.get(str(code)) or _STATUSES.get(_sentence(message), 500)
    return _classify(status, code, message)


def _sentence(message: str) -> str:
    text = message.lower()
    return next((name for name, words in KNOWN_SENTENCES if any(word in text for word in words)), "none known")


def describe(status: int, body: bytes) -> str:
    """A refusal for the log, without a word of Grok's own."""
    code, message = parse(body)
    known = _sentence(message)
    # Numbers are those of gRPC or HTTP; any other one may be out of a prompt.
    if not (isinstance(code, int) and (0 <= code <= 16 or 400 <= code < 600)) and code not in KNOWN_CODES:
        code = None if code is None else "unknown"
    return f"status {status}, code {code!r}, sentence {known!r}, {len(body)} bytes"
