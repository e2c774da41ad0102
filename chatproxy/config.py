"""A mapping of strings becomes one frozen Settings, or the list of all that is wrong with it.

Knows the variables' names, defaults and rules (contract G). Does not know where they come from.
"""

import re
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Meta, Struct


class Invalid(ValueError):
    """The settings are wrong. Its text has one line for each problem and never a secret's value."""


class Secret(str):
    """A string that keeps itself out of reprs, and so out of logs and tracebacks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret(...)"


# A year bounds what timers take; nobody waits that long.
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
Count = Annotated[int, Meta(ge=1)]


class Settings(Struct, frozen=True, kw_only=True):
    """One attribute for each variable, in lower case; what the variables mean is in the README."""

    grok_api_key: Secret | None = None
    grok_model: str = "grok-4.3"
    grok_base_url: str = "https://api.x.ai/v1"
    grok_reasoning_effort: str | None = None
    grok_api: Literal["chat", "responses"] = "chat"
    grok_tools: tuple[str, ...] = ()
    max_tool_calls: Count = 10
    grok_retries: Annotated[int, Meta(ge=0)] = 2
    grok_transport: Literal["auto", "own", "httpx"] = "auto"
    system_prompt: Secret | None = None

    host: str = "0.0.0.0"  # noqa: S104 -- a container publishes what it wants published
    port: Annotated[int, Meta(ge=0, le=65535)] = 8000
    root_path: str = ""
    forwarded_allow_ips: str = "127.0.0.1"

    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    access_tokens: tuple[Secret, ...] = ()
    rate_limit: "RateLimit | None" = None
    max_streams_per_client: Count | None = None

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"

    max_body_bytes: Count = 1_000_000
    max_messages: Count = 500
    max_streams: Count = 1000

    connect_timeout: Seconds = 5
    first_token_timeout: Seconds = 600
    idle_timeout: Seconds = 300
    stream_timeout: Seconds = 3600
    write_timeout: Seconds = 60
    status_hold: Seconds = 10
    keep_alive: Seconds = 15
    drain_timeout: Annotated[float, Meta(ge=0, le=31_536_000)] = 8

    resume_window: Seconds = 15
    replay_ttl: Seconds = 60
    replay_bytes: Count = 4_000_000
    replay_total_bytes: Count = 64_000_000

    try_page: bool = True


class RateLimit(Struct, frozen=True):
    """`20/minute`: so many new chats in so many seconds."""

    count: int
    seconds: int


# Their values are never shown. (People write passwords into addresses.)
UNSHOWN = {"GROK_API_KEY", "XAI_API_KEY", "GROK_BASE_URL", "ACCESS_TOKENS", "SYSTEM_PROMPT"}

# Read besides the variables that are named after an attribute.
ALIASES = ("XAI_API_KEY", "GROK_API_KEY_FILE")


def variables() -> list[str]:
    """The names of all variables that are read."""
    return [field.upper() for field in Settings.__struct_fields__] + list(ALIASES)


def load(environ: Mapping[str, str]) -> Settings:
    """Settings from variables; an empty one counts as unset. Raises Invalid with every problem found."""
    given = {name: environ[name].strip() for name in variables() if environ.get(name, "").strip()}
    problems: list[str] = []
    values: dict[str, Any] = {}
    try:
        if key := _api_key(given):
            values["grok_api_key"] = key
    except ValueError as error:
        problems.append(str(error))
    for field in msgspec.structs.fields(Settings):
        variable = field.name.upper()
        if variable not in given or field.name == "grok_api_key":
            continue
        try:
            given[variable].encode()  # what is no UTF-8 can't be sent either
            read = _READERS.get(field.name)
            value = read(given[variable]) if read else given[variable]
            values[field.name] = msgspec.convert(value, field.type, strict=False, dec_hook=_secret)
        except ValueError as error:
            shown = "" if variable in UNSHOWN else f", not {given[variable][:80]!r}"
            problems.append(f"{variable}: {_rule(field.type, error)}{shown}")
    if values.get("grok_tools") and values.get("grok_api") != "responses":
        problems.append("GROK_TOOLS: expected only with GROK_API=responses, for the other API has no tools")
    if problems:
        raise Invalid("\n".join(problems))
    return Settings(**values)


def _rule(type_: Any, error: ValueError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "expected text in UTF-8"
    if choices := [choice for choice in get_args(type_) if isinstance(choice, str)]:
        return f"expected {' or '.join(choices)}"
    rule = str(error).partition(", got ")[0].replace("`", "")
    return rule[:1].lower() + rule[1:]


def _api_key(given: Mapping[str, str]) -> Secret | None:
    names = [name for name in ("GROK_API_KEY", "XAI_API_KEY") if name in given]
    keys = {given[name] for name in names}
    if path := given.get("GROK_API_KEY_FILE"):
        names.append("GROK_API_KEY_FILE")
        try:
            keys |= {Path(path).read_text().strip()} - {""}
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"GROK_API_KEY_FILE: cannot be read ({type(error).__name__})") from None
    if len(keys) > 1:
        raise ValueError(f"{' and '.join(names)}: expected one key, but they differ")
    for key in keys:
        # It becomes a header's value; RFC 6750 allows less, but nothing outside of this.
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ValueError(f"{names[0]}: expected visible ASCII characters without spaces")
        return Secret(key)
    return None


def _secret(_: type, value: str) -> Secret:
    return Secret(value)  # the one type of ours that msgspec asks about


# As it is sent: neither a pattern, nor what browsers encode. Or an IPv6 address.
_HOSTNAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*|[0-9a-f:.]+")


def _is_plain(url: SplitResult) -> bool:
    """Whether it is the address of a web server, or of a path there, and nothing more."""
    host = _HOSTNAME.fullmatch(url.hostname or "")
    return bool(url.scheme in ("http", "https") and host) and not (
        url.query or url.fragment or url.username is not None
    )


def _list(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]


def _base_url(value: str) -> str:
    if not (_is_plain(urlsplit(value)) and re.fullmatch(r"[\x21-\x7e]+", value)):
        raise ValueError("expected an http or https address such as https://api.x.ai/v1")
    origin(value)  # its port is one
    return value.rstrip("/")


def _origins(value: str) -> Iterator[str]:
    for item in _list(value):
        url = urlsplit(item)
        if item == "*":
            yield item
        elif not _is_plain(url) or url.path not in ("", "/"):
            raise ValueError("expected origins such as https://example.com, separated by commas")
        else:
            yield origin(item)


def origin(url: str) -> str:
    """An address as a browser writes its origin: lower case, without the default port. Raises ValueError."""
    parts = urlsplit(url.lower())
    default = {"http": 80, "https": 443}.get(parts.scheme)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, default) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _hosts(value: str) -> Iterator[str]:
    for item in _list(value):
        if not re.fullmatch(r"\*|\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*", item.lower()):
            raise ValueError("expected host names without port, such as chat.example.com or .example.com, or *")
        yield item.lower()


def _rate_limit(value: str) -> RateLimit:
    match = re.fullmatch(r"([1-9]\d{0,8})/(second|minute|hour|day)", value)
    if not match:
        raise ValueError("expected a number per second, minute, hour or day, such as 20/minute")
    return RateLimit(int(match[1]), {"second": 1, "minute": 60, "hour": 3600, "day": 86400}[match[2]])


def _root_path(value: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*/?", value):
        raise ValueError("expected a path such as /grok")
    return value.rstrip("/")


def _grok_tools(value: str) -> list[str]:
    tools = list(dict.fromkeys(_list(value.lower())))
    if not set(tools) <= {"web_search", "x_search"}:
        raise ValueError("expected web_search, x_search or both, separated by a comma")
    return tools


def _tokens(value: str) -> list[str]:
    tokens = _list(value)
    # None at all would let everybody in.
    if not tokens or any(not re.fullmatch(r"[A-Za-z0-9._~+/-]{16,}=*", token) for token in tokens):
        raise ValueError("expected tokens of 16 or more letters, digits and ._~+/- separated by commas")
    return tokens


def _addresses(value: str) -> str:
    if value == "*":
        return value
    addresses = _list(value)
    try:
        for address in addresses:
            ip_network(address)
    except ValueError:
        raise ValueError("expected IP addresses or networks such as 10.0.0.0/8, separated by commas, or *") from None
    return ",".join(addresses)


_READERS: dict[str, Any] = {
    "grok_base_url": _base_url,
    "grok_api": str.lower,
    "grok_tools": _grok_tools,
    "allowed_origins": lambda value: list(_origins(value)),
    "allowed_hosts": lambda value: list(_hosts(value)),
    "access_tokens": _tokens,
    "rate_limit": _rate_limit,
    "root_path": _root_path,
    "forwarded_allow_ips": _addresses,
    "log_level": str.lower,
    "log_format": str.lower,
    "grok_transport": str.lower,
    "try_page": str.lower,
}
