"""Every way a chat can fail: one class per outcome, with its status, code and sentence.

    ChatError
        RequestError    the client can mend it
        ServiceError    this service's own state
        UpstreamError   Grok, or the way to Grok

Does not know who raises them, nor whether they become a status line or an event.
The sentences are for a front-end developer; upstream's own words never get in here.
"""

from collections.abc import Mapping
from typing import ClassVar, Self


class ChatError(Exception):
    """An outcome the client is told about.

    `param` names the field at fault, `retry_after` is in whole seconds; `headers` go with the
    status line, where there is one.
    """

    status: ClassVar[int]
    code: ClassVar[str]
    type: ClassVar[str]
    message: str
    retry_after: int | None = None

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if message is not None:
            self.message = message
        if retry_after is not None:
            self.retry_after = retry_after
        self.param = param
        self.headers = headers or {}
        super().__init__(self.message)

    def copy(self) -> Self:
        """The same for another one who is told: raising an error adds to its traceback."""
        return type(self)(self.message, param=self.param, retry_after=self.retry_after, headers=self.headers)


def by_code(code: str) -> type[ChatError]:
    """The class with that code; InternalError for a code that is unknown."""
    kinds = [kind for side in ChatError.__subclasses__() for kind in side.__subclasses__()]
    return next((kind for kind in kinds if kind.code == code), InternalError)


# The client's side.


class RequestError(ChatError):
    type = "request_error"


class InvalidJSON(RequestError):
    status, code = 400, "invalid_json"
    message = "The request body is not valid JSON in UTF-8, or it is nested too deeply."


class InvalidRequest(RequestError):
    status, code = 422, "invalid_request"
    message = "The request does not have the expected shape."


class InvalidLastEventID(RequestError):
    status, code = 400, "invalid_last_event_id"
    message = "Last-Event-ID is not an event id of this stream. Send the id of the last event you received, unchanged."


class BodyTooLarge(RequestError):
    status, code = 413, "body_too_large"
    message = "The request body is larger than this service accepts. Send a shorter conversation."


class BodyTimeout(RequestError):
    status, code = 408, "body_timeout"
    message = "The request body did not arrive in time. Send the request again."


class TooManyMessages(RequestError):
    status, code = 413, "too_many_messages"
    message = "The conversation has more messages than this service accepts. Leave out the oldest ones."


class UnsupportedMediaType(RequestError):
    status, code = 415, "unsupported_media_type"
    message = "Send the request body as Content-Type: application/json."


class NotAcceptable(RequestError):
    status, code = 406, "not_acceptable"
    message = "Accept text/event-stream for the stream itself, or application/json for its address."


class OriginNotAllowed(RequestError):
    status, code = 403, "origin_not_allowed"
    message = "This page's origin may not use this service. Its operator can add the origin to ALLOWED_ORIGINS."


class HostNotAllowed(RequestError):
    status, code = 421, "host_not_allowed"
    message = "This service does not answer to this host name. Its operator can add the name to ALLOWED_HOSTS."


class Unauthorized(RequestError):
    status, code = 401, "unauthorized"
    message = "Send a valid access token as Authorization: Bearer <token>."


class RateLimited(RequestError):
    status, code = 429, "rate_limited"
    message = "You have reached this service's limit for one caller. Wait for Retry-After seconds."
    retry_after = 1


class BudgetSpent(RequestError):
    status, code = 429, "budget_spent"
    message = "The tokens that this service grants are used up for now. Wait for Retry-After seconds."
    retry_after = 10


class NotFound(RequestError):
    status, code = 404, "not_found"
    message = "There is nothing at this path."


class StreamNotFound(RequestError):
    status, code = 404, "stream_not_found"
    message = "This stream is unknown or no longer kept. Start a new chat."


class ModelNotFound(RequestError):
    status, code = 404, "model_not_found"
    message = "This service does not offer this model; GET /v1/models tells which one it does."


class MethodNotAllowed(RequestError):
    status, code = 405, "method_not_allowed"
    message = "This path does not take this method; see the Allow header."


class HeadersTooLarge(RequestError):
    status, code = 431, "headers_too_large"
    message = "The request has too many headers, or they are too long."


class ContentPolicy(RequestError):
    status, code = 400, "content_policy"
    message = "Grok refused this conversation because of its content rules. Change the messages."


class ContextLengthExceeded(RequestError):
    status, code = 400, "context_length_exceeded"
    message = "The conversation is longer than the model can read. Leave out the oldest messages."


# This service's own state.


class ServiceError(ChatError):
    type = "service_error"


class InternalError(ServiceError):
    status, code = 500, "internal_error"
    message = "This service made a mistake. Quote the request id to its operator."


class Busy(ServiceError):
    status, code = 503, "busy"
    message = "This service has as much to do as it may have at one time. Try again shortly."
    retry_after = 1


class Draining(ServiceError):
    status, code = 503, "draining"
    message = "This service is shutting down or restarting. Try again shortly."
    retry_after = 5


class Stopped(ServiceError):
    status, code = 503, "stopped"
    message = "The answer was stopped on request."


class Abandoned(ServiceError):
    status, code = 503, "abandoned"
    message = "Nobody was reading the answer, so it was stopped. Start a new chat."


class ToolLimit(ServiceError):
    status, code = 503, "tool_limit"
    message = "Grok wanted to search more often than this service allows for one answer. Ask for something narrower."


class ReplayLost(ServiceError):
    status, code = 503, "replay_lost"
    message = "Part of the answer that you missed is no longer kept. Start a new chat."


class StoreUnavailable(ServiceError):
    status, code = 503, "store_unavailable"
    message = "The answers that are kept for later cannot be reached. Try again shortly."
    retry_after = 5


class AuthUnavailable(ServiceError):
    status, code = 503, "auth_unavailable"
    message = "Who you are cannot be checked now: the identity provider's keys cannot be had. Try again shortly."
    retry_after = 5


# Grok's side.


class UpstreamError(ChatError):
    type = "upstream_error"


class UpstreamFailed(UpstreamError):
    status, code = 502, "upstream_error"
    message = "Grok failed to answer. Try again."


class UpstreamCutOff(UpstreamError):
    status, code = 502, "upstream_cut_off"
    message = "Grok stopped in the middle of the answer. What arrived is incomplete."


class EmptyAnswer(UpstreamError):
    status, code = 502, "empty_answer"
    message = "Grok finished without any text. Try again, or allow a longer answer."


class UpstreamAuth(UpstreamError):
    status, code = 502, "upstream_auth"
    message = "Grok does not accept this service's API key or its credits are used up. Only its operator can mend this."


class UpstreamRejected(UpstreamError):
    status, code = 502, "upstream_rejected"
    message = "Grok rejected the request as this service sends it. Its operator should check the model settings."


class UpstreamRateLimited(UpstreamError):
    status, code = 429, "upstream_rate_limited"
    message = "Grok is receiving too many requests. Wait for Retry-After seconds."
    retry_after = 1


class UpstreamOverloaded(UpstreamError):
    status, code = 503, "upstream_overloaded"
    message = "Grok is at capacity. Wait for Retry-After seconds."
    retry_after = 1


class UpstreamUnreachable(UpstreamError):
    status, code = 502, "upstream_unreachable"
    message = "Grok cannot be reached. Try again."


class ConnectTimeout(UpstreamError):
    status, code = 504, "connect_timeout"
    message = "Connecting to Grok took too long. Try again."


class FirstTokenTimeout(UpstreamError):
    status, code = 504, "first_token_timeout"
    message = "Grok did not start to answer in time. Try again."


class IdleTimeout(UpstreamError):
    status, code = 504, "idle_timeout"
    message = "Grok fell silent in the middle of the answer. What arrived is incomplete."


class StreamTimeout(UpstreamError):
    status, code = 504, "stream_timeout"
    message = "The answer took longer than this service allows. What arrived is incomplete."
