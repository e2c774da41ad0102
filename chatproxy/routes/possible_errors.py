"""Which errors are possible where: one set for each kind of route, for the OpenAPI document."""

from chatproxy import errors
from chatproxy.errors import ChatError, RequestError, UpstreamError

Kinds = set[type[ChatError]]
NO_ROUTE_ERRORS: Kinds = {errors.NotFound, errors.MethodNotAllowed}
HEALTH_ERRORS: Kinds = {errors.HeadersTooLarge, errors.InternalError}
NON_API_ERRORS: Kinds = {*HEALTH_ERRORS, errors.HostNotAllowed}
API_ERRORS: Kinds = {*NON_API_ERRORS, errors.OriginNotAllowed}
# With a slash in it an id makes another path; and it may be another replica's, of which only Redis knows.
BY_ID_ERRORS: Kinds = {*API_ERRORS, errors.NotFound, errors.StoreUnavailable}
STREAM_ROUTE_ERRORS: Kinds = {*BY_ID_ERRORS, errors.StreamNotFound, errors.InvalidLastEventID}
STREAM_ROUTE_ERRORS |= {errors.Busy, errors.RateLimited}
CHAT_ERRORS: Kinds = {*RequestError.__subclasses__(), *UpstreamError.__subclasses__()}
CHAT_ERRORS |= {errors.Busy, errors.Draining, errors.InternalError, errors.StoreUnavailable}
CHAT_ERRORS |= {errors.AuthUnavailable}
CHAT_ERRORS -= {*NO_ROUTE_ERRORS, errors.StreamNotFound, errors.InvalidLastEventID}
V1_CHAT_ERRORS: Kinds = {*CHAT_ERRORS, errors.InvalidLastEventID} - {errors.NotAcceptable}
CHAT_ERRORS -= {
    errors.ModelNotFound,
    errors.UpstreamCutOff,
    errors.IdleTimeout,
    errors.EmptyAnswer,
}  # only after a first chunk
V1_MODELS_ERRORS: Kinds = {*API_ERRORS, errors.Unauthorized, errors.AuthUnavailable}
V1_MODEL_ERRORS: Kinds = {*V1_MODELS_ERRORS, errors.NotFound, errors.ModelNotFound}
STREAM_ERRORS: Kinds = {*UpstreamError.__subclasses__(), errors.ContentPolicy, errors.ContextLengthExceeded}
STREAM_ERRORS |= {errors.Stopped, errors.Abandoned, errors.ReplayLost, errors.StreamNotFound, errors.StoreUnavailable}
STREAM_ERRORS |= {errors.Draining, errors.InternalError, errors.ToolLimit}
