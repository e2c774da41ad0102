"""A mapping of strings becomes one frozen Settings, or the list of all that is wrong with it.

Knows the variables' names and defaults. Does not know where they come from.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from chatproxy.config import proxies, values


class Invalid(ValueError):
    """The settings are wrong. Its text has one line for each problem and never a secret's value."""


class Secret(str):
    """A string that keeps itself out of reprs, and so out of logs and tracebacks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret(...)"


# A year bounds what timers take; nobody waits that long.
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
SecondsOrNone = Annotated[float, Meta(ge=0, le=31_536_000)]
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
    grok_transport: Literal["fast", "httpx"] = "fast"
    system_prompt: Secret | None = None
    ssl_cert_file: str | None = None
    ssl_cert_dir: str | None = None

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
    drain_timeout: SecondsOrNone = 8

    resume_window: Seconds = 15
    replay_ttl: Seconds = 60
    replay_bytes: Count = 4_000_000
    replay_total_bytes: Count = 64_000_000

    redis_url: Secret | None = None
    redis_prefix: str = "chatproxy:"
    limits_without_redis: Literal["closed", "open"] = "closed"

    try_page: bool = True

    # Not variables of their own, but made of several.
    proxy: Secret | None = None  # the URL of the proxy that leads to `grok_base_url`; it may hold a password
    warnings: tuple[str, ...] = ()  # what is allowed, but may not be meant


class RateLimit(Struct, frozen=True):
    """`20/minute`: so many new chats in so many seconds."""

    count: int
    seconds: int


# Made from other variables than the one that would have its name.
DERIVED = ("proxy", "warnings")

# Their values are never shown. (People write passwords into addresses.)
UNSHOWN = {"GROK_API_KEY", "XAI_API_KEY", "GROK_BASE_URL", "ACCESS_TOKENS", "SYSTEM_PROMPT", "REDIS_URL"}

# Read besides the variables that are named after an attribute.
ALIASES = ("XAI_API_KEY", "GROK_API_KEY_FILE")
FILES = ("REDIS_URL_FILE",)

# The built-in demo is on this machine, and needs neither certificates nor a proxy.
FOR_GROK_ONLY = ("SSL_CERT_FILE", "SSL_CERT_DIR")

# What Kubernetes sets for a service named `grok`, and names of another company.
OTHERS = re.compile(r"GROK_(SERVICE_(HOST|PORT)|PORT)(_\w+)?|GROQ_\w+")


def variables() -> list[str]:
    """The names of all variables that are read, without those of proxies."""
    return [field.upper() for field in Settings.__struct_fields__ if field not in DERIVED] + [*ALIASES, *FILES]


def load(environ: Mapping[str, str], problems: Iterable[str] = ()) -> Settings:
    """Settings from variables; an empty one counts as unset.

    Raises Invalid with every problem found, after those that reading the variables has had.
    """
    given = {name: environ[name].strip() for name in variables() if environ.get(name, "").strip()}
    keys, found = _keys(given)
    found = [*problems, *found]
    read: dict[str, Any] = {"grok_api_key": Secret(keys.pop())} if keys else {}
    demo = not any(name in given for name in ("GROK_API_KEY", *ALIASES))
    for field in msgspec.structs.fields(Settings):
        variable = field.name.upper()
        if variable not in given or field.name in ("grok_api_key", *DERIVED) or (demo and variable in FOR_GROK_ONLY):
            continue
        try:
            read[field.name] = _value(field, given[variable])
        except ValueError as error:
            shown = "" if variable in UNSHOWN else f", not {given[variable][:80]!r}"
            found.append(f"{variable}: {_rule(field.type, error)}{shown}")
    found += _redis(read, given)
    if read.get("grok_tools") and read.get("grok_api") != "responses":
        found.append("GROK_TOOLS: expected only with GROK_API=responses, for the other API has no tools")
    if not demo:
        found += _way_out(read, environ)
    if found:
        raise Invalid("\n".join(found))
    return Settings(**read, warnings=(*_warnings(Settings(**read)), *_unknown(environ)))


def _keys(given: Mapping[str, str]) -> tuple[set[str], list[str]]:
    """The one key that is given, if any, and what is wrong with what was given."""
    names = [name for name in ("GROK_API_KEY", *ALIASES) if name in given]
    keys: set[str] = set()
    problems: list[str] = []
    for name in names:
        try:
            keys.add(values.api_key_file(given[name]) if name.endswith("_FILE") else values.api_key(given[name]))
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if len(keys) > 1:
        problems.append(f"{' and '.join(names)}: expected one key, but they differ")
    return keys, problems


def _redis(read: dict[str, Any], given: Mapping[str, str]) -> list[str]:
    """Take the address from its file, and find what is wrong with that."""
    if "REDIS_URL_FILE" not in given:
        return []
    try:
        url = values.redis_url(values.secret_file(given["REDIS_URL_FILE"]))
    except ValueError as error:
        return [f"REDIS_URL_FILE: {error}"]
    if read.setdefault("redis_url", Secret(url)) != url:
        return ["REDIS_URL and REDIS_URL_FILE: expected one address, but they differ"]
    return []


def _value(field: msgspec.structs.FieldInfo, text: str) -> Any:
    text.encode()  # what is no UTF-8 can't be sent either
    if text[0] in values.QUOTES and field.name != "system_prompt":
        raise ValueError("is in quotes; leave them out")
    parse = _PARSERS.get(field.name, values.number if field.type in (Seconds, SecondsOrNone) else str)
    return msgspec.convert(parse(text), field.type, strict=False, dec_hook=_secret)


def _secret(_: type, value: str) -> Secret:
    return Secret(value)  # the one type of ours that msgspec asks about


def _rule(type_: Any, error: ValueError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "expected text in UTF-8"
    choices = [choice for choice in get_args(type_) if isinstance(choice, str)]
    if choices and isinstance(error, msgspec.ValidationError):
        return f"expected {' or '.join(choices)}"
    rule = str(error).partition(", got ")[0].replace("`", "")
    return rule[:1].lower() + rule[1:]


def _way_out(read: dict[str, Any], environ: Mapping[str, str]) -> list[str]:
    """Find the proxy on the way to Grok, and what is wrong on that way."""
    problems: list[str] = []
    if proxy := proxies.find(read.get("grok_base_url", Settings().grok_base_url), environ):
        name, value = proxy
        try:
            read["proxy"] = Secret(proxies.parse(value))
        except ValueError:
            problems.append(f"{name}: {proxies.EXPECTED}")
        name, value = proxies.exceptions(environ)
        if any(quote in value for quote in values.QUOTES):
            problems.append(f"{name}: is in quotes; leave them out")
    if path := environ.get("SSLKEYLOGFILE"):
        try:
            values.writable(path)
        except ValueError as error:
            problems.append(f"SSLKEYLOGFILE: {error}")
    return problems


def _warnings(settings: Settings) -> list[str]:
    """What is allowed, but may not be meant."""
    warnings = []
    if settings.grok_api_key is not None and values.leaves_in_clear(settings.grok_base_url):
        warnings.append("GROK_BASE_URL is http:// to another machine: the API key can be read on the way")
    prompt = settings.system_prompt or ""
    if len(prompt) > 1 and prompt[0] in values.QUOTES and prompt[-1] in values.QUOTES:
        warnings.append("SYSTEM_PROMPT is in quotes, and Grok is sent them: Docker's --env-file takes them literally")
    if "*" in settings.allowed_origins:
        warnings.append("ALLOWED_ORIGINS is *: any web page may spend this key's credits")
    return warnings


def _unknown(environ: Mapping[str, str]) -> list[str]:
    """Names that are probably misspelt: those that begin with GROK_, and those that are almost one that is read."""
    known = [*variables(), *proxies.VARIABLES]
    warnings = []
    for name in sorted(environ):
        if name in known or name.lower() in map(str.lower, proxies.VARIABLES) or OTHERS.fullmatch(name):
            continue
        likely = _likely(name.upper(), known)
        if likely and not environ.get(likely, "").strip():
            warnings.append(f"{name} is not a setting and counts for nothing: is {likely} meant?")
        elif name.startswith("GROK_"):
            warnings.append(f"{name} is not a setting and counts for nothing")
    return warnings


def _likely(name: str, known: list[str]) -> str | None:
    """The variable that is meant by this name, if it is like one."""
    if name.startswith(("GROK_", "XAI_")):
        ours = [word for word in known if word.startswith(("GROK_", "XAI_"))]
        matches = get_close_matches(name.replace("XAI_", "GROK_", 1), ours, 1, 0.75)
    else:
        # Short names (HOST, PORT) are almost like those of many other programs.
        matches = get_close_matches(name, [word for word in known if len(word) >= 8], 1, 0.88)
    return matches[0] if matches else None


_PARSERS: dict[str, Any] = {
    "grok_model": values.model,
    "grok_base_url": values.base_url,
    "grok_reasoning_effort": values.model,
    "grok_transport": str.lower,
    "grok_api": str.lower,
    "grok_tools": values.tools,
    "ssl_cert_file": values.certificates,
    "ssl_cert_dir": values.certificate_directories,
    "host": values.host,
    "root_path": values.root_path,
    "forwarded_allow_ips": values.addresses,
    "allowed_origins": lambda value: list(values.origins(value)),
    "allowed_hosts": lambda value: list(values.hosts(value)),
    "access_tokens": values.tokens,
    "rate_limit": values.rate_limit,
    "redis_url": values.redis_url,
    "redis_prefix": values.redis_prefix,
    "limits_without_redis": str.lower,
    "log_level": str.lower,
    "log_format": str.lower,
    "try_page": str.lower,
}
