"""A mapping of strings becomes one frozen Settings, or the list of all that is wrong with it.

Knows the variables' names and defaults. Does not know where they come from.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from chatproxy.config import contradictions, misspelt, proxies, values


class SettingsError(ValueError):
    """The settings are wrong. Its text has one line for each problem and never a secret's value."""


class Secret(str):
    """A string that keeps itself out of reprs, and so out of logs and tracebacks."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "Secret(...)"


# A year bounds what timers take; nobody waits that long.
Seconds = Annotated[float, Meta(gt=0, le=31_536_000)]
SecondsOrZero = Annotated[float, Meta(ge=0, le=31_536_000)]
Count = Annotated[int, Meta(ge=1)]


class Settings(Struct, frozen=True, kw_only=True):
    """One attribute for each variable, in lower case; what the variables mean is in the README.

    Times are in seconds, and sizes in bytes.
    """

    grok_api_key: Secret | None = None
    grok_model: str = "grok-4.3"
    grok_base_url: str = "https://api.x.ai/v1"
    grok_reasoning_effort: str | None = None
    grok_api: Literal["chat", "responses"] = "chat"
    grok_tools: tuple[str, ...] = ()
    max_tool_calls: Count = 10
    grok_retries: Annotated[int, Meta(ge=0)] = 2
    grok_spare: Annotated[int, Meta(ge=0, le=100)] = 2
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
    auth_jwks_url: str | None = None
    auth_jwt_secret: Secret | None = None
    auth_issuer: str | None = None
    auth_audience: str | None = None
    auth_claim: str = "sub"
    auth_header: str | None = None
    rate_limit: "RateLimit | None" = None
    max_streams_per_client: Count | None = None
    token_budget: "RateLimit | None" = None
    token_budget_per_client: "RateLimit | None" = None

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    log_clients: bool = False

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
    drain_timeout: SecondsOrZero = 8

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
    auth_proxy: Secret | None = None  # the same for `auth_jwks_url`
    warnings: tuple[str, ...] = ()  # what is allowed, but may not be meant


class RateLimit(Struct, frozen=True):
    """`20/minute`: so many new chats, or tokens, in so many seconds."""

    count: int
    seconds: int


# Made from other variables than the one that would have its name.
DERIVED = ("proxy", "auth_proxy", "warnings")

# Their values are never shown. (People write passwords into addresses.)
SECRET_VARIABLES = {
    "GROK_API_KEY",
    "XAI_API_KEY",
    "GROK_BASE_URL",
    "ACCESS_TOKENS",
    "SYSTEM_PROMPT",
    "REDIS_URL",
    "AUTH_JWKS_URL",
    "AUTH_JWT_SECRET",
}

# Read besides the variables that are named after an attribute.
ALIASES = ("XAI_API_KEY", "GROK_API_KEY_FILE")
FILES = {"REDIS_URL_FILE": values.redis_url, "AUTH_JWT_SECRET_FILE": values.jwt_secret}

# The built-in demo is on this machine, and needs neither certificates nor a proxy; an identity provider does.
FOR_OTHER_MACHINES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


def variable_names() -> list[str]:
    """The names of all variables that are read, without those of proxies."""
    return [field.upper() for field in Settings.__struct_fields__ if field not in DERIVED] + [*ALIASES, *FILES]


def load(environ: Mapping[str, str], problems: Iterable[str] = ()) -> Settings:
    """Settings from variables; an empty one counts as unset.

    Raises SettingsError with every problem found, after those that reading the variables has had.
    """
    given = {name: environ[name].strip() for name in variable_names() if environ.get(name, "").strip()}
    keys, found = _keys(given)
    found = [*problems, *found]
    read: dict[str, Any] = {"grok_api_key": Secret(keys.pop())} if keys else {}
    demo = not any(name in given for name in ("GROK_API_KEY", *ALIASES))
    ignored = {"GROK_API_KEY", *(FOR_OTHER_MACHINES if demo and "AUTH_JWKS_URL" not in given else ())}
    for field in msgspec.structs.fields(Settings):
        variable = field.name.upper()
        if variable not in given or variable in ignored or field.name in DERIVED:
            continue
        try:
            read[field.name] = _value(field, given[variable])
        except ValueError as error:
            shown = "" if variable in SECRET_VARIABLES else f", not {given[variable][:80]!r}"
            found.append(f"{variable}: {_expectation(field.type, error)}{shown}")
    for name, parse in FILES.items():
        found += _from_file(name, parse, read, given)
    found += contradictions.find(read, given)
    if not demo:
        found += _way_out(read, "proxy", read.get("grok_base_url", Settings().grok_base_url), environ)
    if "auth_jwks_url" in read:
        found += [each for each in _way_out(read, "auth_proxy", read["auth_jwks_url"], environ) if each not in found]
    if found:
        raise SettingsError("\n".join(found))
    return Settings(**read, warnings=(*_warnings(Settings(**read)), *misspelt.warnings(environ, variable_names())))


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


def _from_file(name: str, parse: Callable[[str], str], read: dict[str, Any], given: Mapping[str, str]) -> list[str]:
    """Take a secret from the file that this variable names, and find what is wrong with that."""
    if name not in given:
        return []
    try:
        value = parse(values.secret_file(given[name]))
    except ValueError as error:
        return [f"{name}: {error}"]
    variable = name.removesuffix("_FILE")
    if read.setdefault(variable.lower(), Secret(value)) != value:
        return [f"{variable} and {name}: expected one value, but they differ"]
    return []


def _value(field: msgspec.structs.FieldInfo, text: str) -> Any:
    text.encode()  # what is no UTF-8 can't be sent either
    if text[0] in values.QUOTES and field.name != "system_prompt":
        raise ValueError("is in quotes; leave them out")
    parse = _PARSERS.get(field.name, values.number if field.type in (Seconds, SecondsOrZero) else str)
    return msgspec.convert(parse(text), field.type, strict=False, dec_hook=_secret)


def _secret(_: type, value: str) -> Secret:
    return Secret(value)  # the one type of ours that msgspec asks about


def _expectation(type_: Any, error: ValueError) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "expected text in UTF-8"
    choices = [choice for choice in get_args(type_) if isinstance(choice, str)]
    if choices and isinstance(error, msgspec.ValidationError):
        return f"expected {' or '.join(choices)}"
    rule = str(error).partition(", got ")[0].replace("`", "")
    return rule[:1].lower() + rule[1:]


def _way_out(read: dict[str, Any], field: str, url: str, environ: Mapping[str, str]) -> list[str]:
    """Find the proxy on the way to that address, and what is wrong on that way."""
    problems: list[str] = []
    if proxy := proxies.find(url, environ):
        name, value = proxy
        try:
            read[field] = Secret(proxies.parse(value))
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
    if (settings.auth_jwks_url or settings.auth_jwt_secret) and not settings.auth_audience:
        warnings.append("AUTH_AUDIENCE is not set: tokens that were made for other services are taken, too")
    return warnings


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
    "auth_jwks_url": values.jwks_url,
    "auth_jwt_secret": values.jwt_secret,
    "auth_header": values.header_name,
    "rate_limit": values.rate_limit,
    "token_budget": values.token_budget,
    "token_budget_per_client": values.token_budget,
    "redis_url": values.redis_url,
    "redis_prefix": values.redis_prefix,
    "limits_without_redis": str.lower,
    "log_level": str.lower,
    "log_format": str.lower,
    "log_clients": str.lower,
    "try_page": str.lower,
}
