"""Settings come from the environment and `.env`; whatever is wrong with them is told at once, and no secret is."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import trustme

from chatproxy.config import RateLimit, Settings, SettingsError, load
from chatproxy.server import Server, listen
from tests.conftest import KEY, MEASURED, ROOT, TIMEOUT, environment, spawned
from tests.upstream import Upstream, refusing

DEFAULTS = {
    "grok_api_key": None,
    "grok_model": "grok-4.3",
    "grok_base_url": "https://api.x.ai/v1",
    "grok_reasoning_effort": None,
    "grok_retries": 2,
    "grok_api": "chat",
    "grok_tools": (),
    "max_tool_calls": 10,
    "grok_spare": 2,
    "grok_transport": "fast",
    "system_prompt": None,
    "ssl_cert_file": None,
    "ssl_cert_dir": None,
    "host": "0.0.0.0",  # noqa: S104 -- a container's
    "port": 8000,
    "root_path": "",
    "forwarded_allow_ips": "127.0.0.1",
    "allowed_origins": (),
    "allowed_hosts": (),
    "access_tokens": (),
    "auth_jwks_url": None,
    "auth_jwt_secret": None,
    "auth_issuer": None,
    "auth_audience": None,
    "auth_claim": "sub",
    "auth_header": None,
    "rate_limit": None,
    "max_streams_per_client": None,
    "token_budget": None,
    "token_budget_per_client": None,
    "log_level": "info",
    "log_format": "text",
    "log_clients": False,
    "max_body_bytes": 1_000_000,
    "max_messages": 500,
    "max_streams": 1000,
    "connect_timeout": 5,
    "first_token_timeout": 600,
    "idle_timeout": 300,
    "stream_timeout": 3600,
    "write_timeout": 60,
    "status_hold": 10,
    "keep_alive": 15,
    "drain_timeout": 8,
    "resume_window": 15,
    "replay_ttl": 60,
    "replay_bytes": 4_000_000,
    "replay_total_bytes": 64_000_000,
    "redis_url": None,
    "redis_prefix": "chatproxy:",
    "limits_without_redis": "closed",
    "try_page": True,
    "proxy": None,
    "auth_proxy": None,
    "warnings": (),
}


def test_defaults() -> None:
    """With nothing set the settings are the defaults, and an empty or blank variable is not set."""
    assert msgspec.structs.asdict(load({})) == DEFAULTS
    assert (
        load({name.upper(): " " for name in DEFAULTS}) == load(dict.fromkeys(map(str.upper, DEFAULTS), "")) == load({})
    )


@pytest.mark.parametrize(
    ("variable", "text", "value"),
    [
        ("GROK_API_KEY", f" {KEY}\n", KEY),
        ("GROK_MODEL", "grok-5", "grok-5"),
        ("GROK_BASE_URL", "http://localhost:1/v1/", "http://localhost:1/v1"),
        ("GROK_BASE_URL", "https://eu-west-1.api.x.ai/v1", "https://eu-west-1.api.x.ai/v1"),
        ("GROK_BASE_URL", "https://gateway.example/chat", "https://gateway.example/chat"),
        ("GROK_REASONING_EFFORT", "low", "low"),
        ("GROK_RETRIES", "0", 0),
        ("GROK_API", "Responses", "responses"),
        ("MAX_TOOL_CALLS", "1", 1),
        ("GROK_TRANSPORT", "HTTPX", "httpx"),
        ("SYSTEM_PROMPT", "Be brief.\nBe kind.", "Be brief.\nBe kind."),
        ("HOST", "::1", "::1"),
        ("HOST", "fe80::1%lo", "fe80::1%lo"),
        ("HOST", "chat-1.example.com", "chat-1.example.com"),
        ("PORT", "0", 0),
        ("PORT", "65535", 65535),
        ("ROOT_PATH", "/grok/", "/grok"),
        ("ROOT_PATH", "/", ""),
        ("FORWARDED_ALLOW_IPS", "10.0.0.0/8, ::1,", "10.0.0.0/8,::1"),
        ("FORWARDED_ALLOW_IPS", "*", "*"),
        ("FORWARDED_ALLOW_IPS", ",", ""),
        (
            "ALLOWED_ORIGINS",
            " https://A.example.com/ ,http://localhost:3000,https://b.example:443,http://[::1]:80,",
            ("https://a.example.com", "http://localhost:3000", "https://b.example", "http://[::1]"),
        ),
        ("ALLOWED_ORIGINS", "*", ("*",)),
        (
            "ALLOWED_ORIGINS",
            "capacitor://localhost,Tauri://localhost/,chrome-extension://abcdefgh,app://obsidian.md,ionic://localhost:80",
            (
                *("capacitor://localhost", "tauri://localhost", "chrome-extension://abcdefgh", "app://obsidian.md"),
                "ionic://localhost:80",
            ),
        ),
        ("ALLOWED_HOSTS", "Chat.example.com, .example.org,gpu_box", ("chat.example.com", ".example.org", "gpu_box")),
        ("ALLOWED_HOSTS", "*", ("*",)),
        ("ACCESS_TOKENS", "0123456789abcdef, fedcba9876543210==", ("0123456789abcdef", "fedcba9876543210==")),
        ("AUTH_JWT_SECRET", "0123456789abcdef" * 2, "0123456789abcdef" * 2),
        ("AUTH_HEADER", "X-Forwarded-User", "x-forwarded-user"),
        ("LOG_CLIENTS", "True", True),
        ("RATE_LIMIT", "20/minute", RateLimit(20, 60)),
        ("RATE_LIMIT", "1/second", RateLimit(1, 1)),
        ("RATE_LIMIT", "5/hour", RateLimit(5, 3600)),
        ("RATE_LIMIT", "100/day", RateLimit(100, 86400)),
        ("MAX_STREAMS_PER_CLIENT", "1", 1),
        ("TOKEN_BUDGET", "100000000000/day", RateLimit(100_000_000_000, 86400)),
        ("TOKEN_BUDGET_PER_CLIENT", "50000/hour", RateLimit(50_000, 3600)),
        ("LOG_LEVEL", "Debug", "debug"),
        ("LOG_FORMAT", "JSON", "json"),
        ("MAX_BODY_BYTES", "1", 1),
        ("MAX_MESSAGES", "1", 1),
        ("MAX_STREAMS", "5000", 5000),
        ("CONNECT_TIMEOUT", "0.5", 0.5),
        ("FIRST_TOKEN_TIMEOUT", "31536000", 31_536_000.0),
        ("IDLE_TIMEOUT", "1e2", 100.0),
        ("STREAM_TIMEOUT", "0.25", 0.25),
        ("WRITE_TIMEOUT", "7", 7.0),
        ("STATUS_HOLD", "0.001", 0.001),
        ("KEEP_ALIVE", "14.5", 14.5),
        ("KEEP_ALIVE", ".5", 0.5),
        ("DRAIN_TIMEOUT", ".25", 0.25),
        ("SYSTEM_PROMPT", '"Quoted" on purpose', '"Quoted" on purpose'),
        ("SYSTEM_PROMPT", '"', '"'),
        ("DRAIN_TIMEOUT", "0", 0.0),
        ("RESUME_WINDOW", "1", 1.0),
        ("REPLAY_TTL", "1", 1.0),
        ("REPLAY_BYTES", "1", 1),
        ("REPLAY_TOTAL_BYTES", "1", 1),
        ("REDIS_URL", "redis://localhost", "redis://localhost"),
        ("REDIS_URL", "redis://user:p%40ss@redis.example:6380/3", "redis://user:p%40ss@redis.example:6380/3"),
        ("REDIS_URL", "rediss://:secret@[::1]:6379/0", "rediss://:secret@[::1]:6379/0"),
        ("REDIS_URL", "unix:///run/redis.sock?db=2", "unix:///run/redis.sock?db=2"),
        ("REDIS_PREFIX", "a-team:chat.1:", "a-team:chat.1:"),
        ("LIMITS_WITHOUT_REDIS", "Open", "open"),
        ("TRY_PAGE", "False", False),
        ("TRY_PAGE", "1", True),
    ],
)
def test_values(variable: str, text: str, value: object) -> None:
    """Each variable is read as what it is, and changes nothing else."""
    settings = load({variable: text})
    assert getattr(settings, variable.lower()) == value
    others = {**msgspec.structs.asdict(settings), "warnings": DEFAULTS["warnings"]}
    assert others == {**DEFAULTS, variable.lower(): value}


QUOTED = "is in quotes; leave them out"
HOST = "expected an address such as 127.0.0.1 or ::, or a host name, without port"
VERSION = "expected an address that ends in the version of the API, such as https://api.x.ai/v1"
ENDPOINT = "expected the address without"
ADDED = ", which is added to it"
TOOLS = "expected web_search, x_search or both, separated by a comma"


@pytest.mark.parametrize("api", ["", "chat", "RESPONSES"])
@pytest.mark.parametrize(
    ("text", "tools"),
    [
        ("web_search", ("web_search",)),
        (" X_Search , web_search,x_search,", ("x_search", "web_search")),
        ("web_search x_search", None),
        ("web_search, shell", None),
    ],
)
def test_tools(api: str, text: str, tools: tuple[str, ...] | None) -> None:
    """Searches are allowed by name, and only with the API that has them."""
    variables = {"GROK_API": api, "GROK_TOOLS": text}
    if tools and api == "RESPONSES":
        assert load(variables).grok_tools == tools
        return
    with pytest.raises(SettingsError) as caught:
        load(variables)
    if tools:
        assert str(caught.value) == "GROK_TOOLS: expected only with GROK_API=responses, for the other API has no tools"
    else:
        assert str(caught.value) == f"GROK_TOOLS: {TOOLS}, not '{text}'"


ORIGINS = "expected origins such as https://example.com, separated by commas"
HOSTS = "expected host names without port, such as chat.example.com or .example.com, or *"
RATE = "expected a number per second, minute, hour or day, such as 20/minute"
ADDRESS = "expected an http or https address such as https://api.x.ai/v1"
ADDRESSES = "expected IP addresses or networks such as 10.0.0.0/8, separated by commas, or *"
REDIS = "expected an address such as redis://:password@redis.example:6379/0, rediss://… for TLS, or unix:///path"
REDIS_OPTIONS = "expected no options in the address, other than ssl_ca_certs with rediss and db with unix"
TOKENS = "expected tokens of 16 or more letters, digits and ._~+/- separated by commas"


@pytest.mark.parametrize(
    ("variable", "text", "rule"),
    [
        ("PORT", "http", "expected int, not 'http'"),
        ("PORT", "65536", "expected int <= 65535, not '65536'"),
        ("PORT", "-1", "expected int >= 0, not '-1'"),
        ("GROK_RETRIES", "-1", "expected int >= 0, not '-1'"),
        ("GROK_API", "grpc", "expected chat or responses, not 'grpc'"),
        ("MAX_TOOL_CALLS", "0", "expected int >= 1, not '0'"),
        ("MAX_STREAMS", "0", "expected int >= 1, not '0'"),
        ("MAX_STREAMS", "1.5", "expected int, not '1.5'"),
        ("MAX_STREAMS_PER_CLIENT", "0", "expected int >= 1, not '0'"),
        ("MAX_BODY_BYTES", "1MB", "expected int, not '1MB'"),
        ("KEEP_ALIVE", "0", "expected float > 0.0, not '0'"),
        ("KEEP_ALIVE", "-.5", "expected float > 0.0, not '-.5'"),
        ("KEEP_ALIVE", ".", "expected float, not '.'"),
        ("KEEP_ALIVE", "nan", "expected float > 0.0, not 'nan'"),
        ("IDLE_TIMEOUT", "inf", "expected float <= 31536000.0, not 'inf'"),
        ("IDLE_TIMEOUT", "15s", "expected float, not '15s'"),
        ("DRAIN_TIMEOUT", "-1", "expected float >= 0.0, not '-1'"),
        ("TRY_PAGE", "maybe", "expected bool, not 'maybe'"),
        ("LOG_LEVEL", "loud", "expected debug or info or warning or error, not 'loud'"),
        ("LOG_FORMAT", "xml", "expected text or json, not 'xml'"),
        ("GROK_TRANSPORT", "auto", "expected fast or httpx, not 'auto'"),
        ("HOST", "[::]", f"{HOST}, not '[::]'"),
        ("HOST", "localhost:8000", f"{HOST}, not 'localhost:8000'"),
        ("HOST", "a\0b", f"{HOST}, not 'a\\x00b'"),
        ("HOST", "a" * 64, f"{HOST}, not '{'a' * 64}'"),
        ("ROOT_PATH", "grok", "expected a path such as /grok, not 'grok'"),
        ("ALLOWED_ORIGINS", "example.com", f"{ORIGINS}, not 'example.com'"),
        ("ALLOWED_ORIGINS", "https://a.example/app", f"{ORIGINS}, not 'https://a.example/app'"),
        ("ALLOWED_ORIGINS", "https://a.example?x", f"{ORIGINS}, not 'https://a.example?x'"),
        ("ALLOWED_ORIGINS", "https://u@a.example", f"{ORIGINS}, not 'https://u@a.example'"),
        ("ALLOWED_ORIGINS", "https://a.ex\tample", f"{ORIGINS}, not 'https://a.ex\\tample'"),
        ("ALLOWED_ORIGINS", "capacitor:localhost", f"{ORIGINS}, not 'capacitor:localhost'"),
        ("ALLOWED_ORIGINS", "localhost:3000", f"{ORIGINS}, not 'localhost:3000'"),
        ("ALLOWED_ORIGINS", "app://obsidian.md/index", f"{ORIGINS}, not 'app://obsidian.md/index'"),
        ("ALLOWED_ORIGINS", "file:///index.html", f"{ORIGINS}, not 'file:///index.html'"),
        ("ALLOWED_ORIGINS", "https://*.a.example", f"{ORIGINS}, not 'https://*.a.example'"),
        ("ALLOWED_ORIGINS", "https://b\u00fccher.example", f"{ORIGINS}, not 'https://b\u00fccher.example'"),
        ("ALLOWED_ORIGINS", "null", f"{ORIGINS}, not 'null'"),
        ("ALLOWED_ORIGINS", "https://a:x", f"{ORIGINS}, not 'https://a:x'"),
        ("ALLOWED_ORIGINS", "https://a:0", f"{ORIGINS}, not 'https://a:0'"),
        ("ALLOWED_ORIGINS", "https://[::1", f"{ORIGINS}, not 'https://[::1'"),
        ("ALLOWED_ORIGINS", "https://a.example?", f"{ORIGINS}, not 'https://a.example?'"),
        ("ALLOWED_ORIGINS", "https://a.example/#", f"{ORIGINS}, not 'https://a.example/#'"),
        ("ALLOWED_HOSTS", "a.example:80", f"{HOSTS}, not 'a.example:80'"),
        ("ALLOWED_HOSTS", "*.a.example", f"{HOSTS}, not '*.a.example'"),
        ("RATE_LIMIT", "20", f"{RATE}, not '20'"),
        ("RATE_LIMIT", "0/minute", f"{RATE}, not '0/minute'"),
        ("FORWARDED_ALLOW_IPS", "10.0.0.1/8", f"{ADDRESSES}, not '10.0.0.1/8'"),
        ("FORWARDED_ALLOW_IPS", "proxy", f"{ADDRESSES}, not 'proxy'"),
        ("GROK_BASE_URL", "api.x.ai/canary", ADDRESS),
        ("GROK_BASE_URL", "https://api..x.ai/canary", ADDRESS),
        ("GROK_BASE_URL", "https://user:canary@api.x.ai/v1", ADDRESS),
        ("GROK_BASE_URL", "https://api.x.ai/v1?key=canary", ADDRESS),
        ("GROK_BASE_URL", "https://api.x.ai/v1 canary", ADDRESS),
        ("GROK_BASE_URL", "http://api.x.ai:99999/canary", ADDRESS),
        ("GROK_BASE_URL", "https://user:canary/2@api.x.ai/v1", ADDRESS),
        ("GROK_BASE_URL", "https://\u2100:canary@api.x.ai/v1", ADDRESS),
        ("GROK_BASE_URL", "https://api.x.ai:0/v1", ADDRESS),
        ("GROK_BASE_URL", "https://api.x.ai/v1#", ADDRESS),
        ("GROK_BASE_URL", 'https://gateway/canary"', QUOTED),
        ("GROK_BASE_URL", "ftp://api.x.ai/v1", ADDRESS),
        ("GROK_BASE_URL", "https://api.x.ai", VERSION),
        ("GROK_BASE_URL", "https://us-east-1.api.x.ai/canary/", VERSION),
        ("GROK_BASE_URL", "https://api.x.ai/v1/chat", VERSION),
        ("GROK_BASE_URL", "https://api.x.ai/v1/Chat/Completions", f"{ENDPOINT} /Chat/Completions{ADDED}"),
        ("GROK_BASE_URL", "https://api.x.ai/v1/chat/completions", f"{ENDPOINT} /chat/completions{ADDED}"),
        ("GROK_BASE_URL", "http://gateway/canary/responses/", f"{ENDPOINT} /responses{ADDED}"),
        ("GROK_BASE_URL", "http://gateway/models", f"{ENDPOINT} /models{ADDED}"),
        ("GROK_API_KEY", '"canary"', QUOTED),
        ("GROK_API_KEY", "canary\u201d", QUOTED),
        ("XAI_API_KEY", "'canary'", QUOTED),
        ("GROK_API_KEY_FILE", '"/canary"', QUOTED),
        ("GROK_MODEL", '"grok-4.3"', f"{QUOTED}, not '\"grok-4.3\"'"),
        ("GROK_MODEL", "grok-4.3'", f'{QUOTED}, not "grok-4.3\'"'),
        ("GROK_MODEL", "grok-4.3 # the best", "expected a name without spaces, not 'grok-4.3 # the best'"),
        ("GROK_REASONING_EFFORT", "'low'", f"{QUOTED}, not \"'low'\""),
        ("PORT", '"8000"', f"{QUOTED}, not '\"8000\"'"),
        ("LOG_LEVEL", "'info'", f"{QUOTED}, not \"'info'\""),
        ("ACCESS_TOKENS", '"canary-canary-canary"', QUOTED),
        ("GROK_API_KEY", "xai canary", "expected visible ASCII characters without spaces"),
        ("GROK_API_KEY", "canary\u00e9", "expected visible ASCII characters without spaces"),
        ("ACCESS_TOKENS", "canary", TOKENS),
        ("ACCESS_TOKENS", ",", TOKENS),
        ("ACCESS_TOKENS", "0123456789abcdef,canary", TOKENS),
        ("REDIS_URL", "canary", REDIS),
        ("REDIS_URL", "http://canary:6379", REDIS),
        ("REDIS_URL", "redis://:canary@host:99999", REDIS),
        ("REDIS_URL", "redis://:canary@host:0", REDIS),
        ("REDIS_URL", "redis://:canary@", REDIS),
        ("REDIS_URL", "redis://:canary@host/name", REDIS),
        ("REDIS_URL", "redis://:can ary@host", REDIS),
        ("REDIS_URL", "unix://canary", REDIS),
        ("REDIS_URL", "redis://:canary@host?socket_timeout=9", REDIS_OPTIONS),
        ("REDIS_URL", "rediss://:canary@host?ssl_cert_reqs=none", REDIS_OPTIONS),
        ("REDIS_URL", "redis://host?ssl_ca_certs=/canary", REDIS_OPTIONS),
        ("REDIS_URL", "rediss://host?ssl_ca_certs=/canary", "expected a readable file of certificates in PEM format"),
        ("REDIS_URL_FILE", "/canary", "cannot be read (FileNotFoundError)"),
        ("REDIS_URL_FILE", "/dev/null", REDIS),
        ("AUTH_JWT_SECRET", "0123456789abcdef", "expected 32 or more visible ASCII characters"),
        ("AUTH_HEADER", "X_User", "expected the name of a header field, such as X-Forwarded-User, not 'X_User'"),
        ("AUTH_HEADER", "Cookie", "expected a header field that nothing but the proxy sets, not 'Cookie'"),
        (
            "TOKEN_BUDGET",
            "5000",
            "expected tokens per second, minute, hour or day, such as 2000000/day, not '5000'",
        ),
        ("REDIS_PREFIX", "a*", "expected 1 to 64 letters, digits and ._:- such as chatproxy:, not 'a*'"),
        ("LIMITS_WITHOUT_REDIS", "maybe", "expected closed or open, not 'maybe'"),
        ("GROK_MODEL", "\udcff", "expected text in UTF-8, not '\\udcff'"),
        ("SYSTEM_PROMPT", "canary \udcff", "expected text in UTF-8"),
    ],
)
def test_wrong_values(variable: str, text: str, rule: str) -> None:
    """A wrong value is told with its variable and the rule, and where it may be secret without itself."""
    with pytest.raises(SettingsError) as problems:
        load({variable: text})
    assert str(problems.value) == f"{variable}: {rule}"
    assert "canary" not in rule


def test_long_values_are_cut() -> None:
    """A wrong value is quoted up to a length."""
    with pytest.raises(SettingsError) as problems:
        load({"PORT": "9" * 5000})
    assert len(str(problems.value)) < 200


def test_all_at_once() -> None:
    """All that is wrong is told together, one line each."""
    with pytest.raises(SettingsError) as problems:
        load({"PORT": "x", "KEEP_ALIVE": "0", "GROK_API_KEY": "a b", "TRY_PAGE": "?", "HOST": "fine"})
    assert [line.split(":")[0] for line in str(problems.value).splitlines()] == [
        *("GROK_API_KEY", "PORT", "KEEP_ALIVE", "TRY_PAGE"),
    ]


def test_names_of_the_key(tmp_path: Path) -> None:
    """The key may come under two names or in a file; under several only if it is the same."""
    file = tmp_path / "key"
    file.write_text(f"\n{KEY}\n")
    named = {"GROK_API_KEY": KEY, "XAI_API_KEY": KEY, "GROK_API_KEY_FILE": str(file)}
    for name, value in named.items():
        assert load({name: value}).grok_api_key == KEY
    assert load(named).grok_api_key == KEY
    assert load({**named, "GROK_API_KEY": ""}).grok_api_key == KEY
    for name in ("XAI_API_KEY", "GROK_API_KEY_FILE"):
        with pytest.raises(SettingsError) as problems:
            load({name: named[name], "GROK_API_KEY": "other"})
        assert str(problems.value) == f"GROK_API_KEY and {name}: expected one key, but they differ"


def test_file_of_the_redis_url(tmp_path: Path) -> None:
    """The address of Redis, which may hold a password, may come from a file; two that differ are refused."""
    file = tmp_path / "url"
    file.write_text("redis://:secret@redis.example\n")
    settings = load({"REDIS_URL_FILE": str(file)})
    assert settings.redis_url == "redis://:secret@redis.example"
    assert ":secret" not in repr(settings)
    assert load({"REDIS_URL_FILE": str(file), "REDIS_URL": "redis://:secret@redis.example"}) == settings
    with pytest.raises(SettingsError) as problems:
        load({"REDIS_URL_FILE": str(file), "REDIS_URL": "redis://:other@redis.example"})
    assert str(problems.value) == "REDIS_URL and REDIS_URL_FILE: expected one value, but they differ"


JWKS = "https://auth.example.com/.well-known/jwks.json"
NO_JWKS = "AUTH_JWKS_URL: expected an address such as https://auth.example.com/.well-known/jwks.json"


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"AUTH_JWKS_URL": JWKS}, "AUTH_ISSUER: expected with AUTH_JWKS_URL, for many providers sign for all with the"),
        (
            {"AUTH_JWKS_URL": JWKS, "AUTH_ISSUER": "a", "AUTH_JWT_SECRET": "x" * 32},
            "AUTH_JWKS_URL and AUTH_JWT_SECRET:",
        ),
        ({"AUTH_ISSUER": "a"}, "AUTH_ISSUER: expected only with AUTH_JWKS_URL or AUTH_JWT_SECRET"),
        ({"AUTH_AUDIENCE": "a"}, "AUTH_AUDIENCE: expected only with AUTH_JWKS_URL or AUTH_JWT_SECRET"),
        *(
            (
                {"AUTH_HEADER": "X-User", "FORWARDED_ALLOW_IPS": trusted},
                "AUTH_HEADER: expected with a proxy's address in",
            )
            for trusted in ("*", ",", "0.0.0.0/0", "10.0.0.1, ::/0")
        ),
        ({"AUTH_JWKS_URL": "http://auth.example.com/k", "AUTH_ISSUER": "a"}, NO_JWKS),
        ({"AUTH_JWKS_URL": "file:///keys", "AUTH_ISSUER": "a"}, NO_JWKS),
        ({"AUTH_JWKS_URL": "ftp://localhost/keys", "AUTH_ISSUER": "a"}, NO_JWKS),
        ({"AUTH_JWKS_URL": "https://a:canary@auth.example.com/k", "AUTH_ISSUER": "a"}, NO_JWKS),
        ({"AUTH_JWKS_URL": "https://auth.example.com/k?token=canary", "AUTH_ISSUER": "a"}, NO_JWKS),
    ],
)
def test_identity_settings(variables: dict[str, str], problem: str) -> None:
    """What would let the wrong people in, or nobody, ends the start."""
    with pytest.raises(SettingsError) as problems:
        load(variables)
    assert str(problems.value).startswith(problem)
    assert "\n" not in str(problems.value)
    assert "canary" not in str(problems.value)


@pytest.mark.parametrize("url", [JWKS, "http://localhost:8080/keys", "http://keycloak/keys", "http://127.0.0.1/keys"])
def test_addresses_of_keys(url: str) -> None:
    """Keys come over TLS, from this machine, or from the container network; a missing audience is a warning."""
    settings = load({"AUTH_JWKS_URL": url, "AUTH_ISSUER": "a", "HTTPS_PROXY": "http://proxy:3128"})
    assert settings.auth_jwks_url == url
    assert settings.auth_proxy == ("http://proxy:3128" if url == JWKS else None)
    assert settings.proxy is None  # the demo is on this machine
    assert settings.warnings == ("AUTH_AUDIENCE is not set: tokens that were made for other services are taken, too",)
    assert load({"AUTH_JWKS_URL": url, "AUTH_ISSUER": "a", "AUTH_AUDIENCE": "b"}).warnings == ()


def test_files_of_the_key(tmp_path: Path) -> None:
    """A file of the key that holds none, cannot be read, or is no text, is a mistake, and never starts the demo."""
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "quoted").write_text('"canary"\n')
    (tmp_path / "lines").write_text("canary\ncanary\n")
    (tmp_path / "notepad").write_text(f"\ufeff{KEY}\r\n", encoding="utf-8")
    for path, problem in {
        tmp_path / "empty": "holds no key",
        Path("/dev/null"): "holds no key",
        Path("/dev/zero"): "expected visible ASCII characters without spaces",
        tmp_path / "quoted": QUOTED,
        tmp_path / "lines": "expected visible ASCII characters without spaces",
        tmp_path / "missing": "cannot be read (FileNotFoundError)",
        tmp_path / "binary": "cannot be read (UnicodeDecodeError)",
        tmp_path: "cannot be read (IsADirectoryError)",
        tmp_path / "\0": "cannot be read (ValueError)",
    }.items():
        for others in ({}, {"GROK_API_KEY": KEY}):
            with pytest.raises(SettingsError) as problems:
                load({"GROK_API_KEY_FILE": str(path), **others})
            assert str(problems.value) == f"GROK_API_KEY_FILE: {problem}"
    assert load({"GROK_API_KEY_FILE": str(tmp_path / "notepad")}).grok_api_key == KEY
    assert load({"GROK_API_KEY_FILE": ""}).grok_api_key is None  # as compose sets it where there is no such file


AUTHORITY = trustme.CA()


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    """A file with one certificate."""
    AUTHORITY.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return tmp_path / "ca.pem"


def test_certificates(tmp_path: Path, authority: Path) -> None:
    """Certificates to trust come as a file or as directories, of which not each needs to exist."""
    hashed = tmp_path / "hashed"
    hashed.mkdir()
    (hashed / "0a1b2c3d.0").write_bytes(authority.read_bytes())
    for variable, value in {"SSL_CERT_FILE": str(authority), "SSL_CERT_DIR": f"/nowhere:{hashed}"}.items():
        assert getattr(load({variable: value, "GROK_API_KEY": KEY}), variable.lower()) == value


def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    """A file or directory without certificates is a wrong value; the demo needs none and does not look."""
    (tmp_path / "empty").touch()
    (tmp_path / "key.pem").write_bytes(AUTHORITY.private_key_pem.bytes())
    file = "SSL_CERT_FILE: expected a readable file of certificates in PEM format"
    directory = "SSL_CERT_DIR: expected a directory of certificates, prepared by `openssl rehash`".replace("`", "")
    for problem, path in [
        *((file, path) for path in (tmp_path, tmp_path / "missing", tmp_path / "empty", tmp_path / "key.pem", "a\0")),
        *((directory, path) for path in (tmp_path, tmp_path / "missing", tmp_path / "empty", "a\0")),
    ]:
        variables = {problem.partition(":")[0]: str(path)}
        with pytest.raises(SettingsError) as problems:
            load({**variables, "GROK_API_KEY": KEY})
        assert str(problems.value) == f"{problem}, not {str(path)!r}"
        assert load(variables) == Settings()
        with pytest.raises(SettingsError) as problems:  # what an identity provider's certificate is checked against
            load({**variables, "AUTH_JWKS_URL": JWKS, "AUTH_ISSUER": "a"})
        assert str(problems.value) == f"{problem}, not {str(path)!r}"


def test_key_log(tmp_path: Path) -> None:
    """SSLKEYLOGFILE, which Python itself opens for each SSL context, must not fail later."""
    assert load({"GROK_API_KEY": KEY, "SSLKEYLOGFILE": str(tmp_path / "log")}).grok_api_key == KEY
    with pytest.raises(SettingsError) as problems:
        load({"GROK_API_KEY": KEY, "SSLKEYLOGFILE": str(tmp_path)})
    assert str(problems.value) == "SSLKEYLOGFILE: cannot be written (IsADirectoryError)"


@pytest.mark.parametrize(
    ("url", "warned"),
    [
        ("http://gateway:8080/v1", True),
        ("http://192.0.2.1/v1", True),
        ("http://localhost.example/v1", True),
        ("https://gateway:8080/v1", False),
        ("http://localhost:8080/v1", False),
        ("http://grok.localhost/v1", False),
        ("http://127.0.0.2:1/v1", False),
        ("http://[::1]:1/v1", False),
    ],
)
def test_key_in_clear(url: str, warned: bool) -> None:
    """Whoever sends the key to another machine without TLS is warned."""
    warning = "GROK_BASE_URL is http:// to another machine: the API key can be read on the way"
    assert load({"GROK_BASE_URL": url, "GROK_API_KEY": KEY}).warnings == ((warning,) if warned else ())
    assert load({"GROK_BASE_URL": url}).warnings == ()


# What shells, desktops, container platforms and CI set.
USUAL = re.findall(
    r"\S+",
    """
HOME HOSTNAME LOGNAME LANG LC_ALL PATH PWD OLDPWD SHELL SHLVL TERM TZ USER DISPLAY EDITOR PAGER TMPDIR MAIL _
SSH_AUTH_SOCK SSH_CONNECTION XDG_RUNTIME_DIR XDG_SESSION_ID DBUS_SESSION_BUS_ADDRESS GIT_SSL_CAINFO FTP_PROXY
RSYNC_PROXY PYTHONPATH PYTHONUNBUFFERED PYTHON_VERSION GPG_KEY VIRTUAL_ENV PIP_INDEX_URL NIX_SSL_CERT_FILE
REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NODE_EXTRA_CA_CERTS NODE_ENV DEBUG CI GITHUB_TOKEN GITHUB_ACTIONS OPENAI_API_KEY
ANTHROPIC_API_KEY GROQ_API_KEY GROQ_BASE_URL GEMINI_API_KEY AWS_REGION AWS_ACCESS_KEY_ID KUBERNETES_SERVICE_HOST
KUBERNETES_PORT_443_TCP_ADDR REDIS_URL REDIS_PORT GROK_SERVICE_HOST GROK_SERVICE_PORT GROK_PORT GROK_PORT_80_TCP
GROK_PORT_80_TCP_PROTO CHATPROXY_PORT BIND_ADDRESS SITE_ADDRESS SITE_BIND_ADDRESS NETWORK UPSTREAM COMPOSE_PROFILES
XAI_RECORDINGS REQUIRE_ALL HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy all_proxy no_proxy host
port
""",
)


def test_usual_variables() -> None:
    """What others set in the environment is no reason for a warning."""
    assert load(dict.fromkeys(USUAL, "")).warnings == ()


@pytest.mark.parametrize(
    ("name", "likely"),
    [
        ("GROK_API_KEYS", "GROK_API_KEY"),
        ("ALLOWED_ORIGIN", "ALLOWED_ORIGINS"),
        ("MAX_STREAM", "MAX_STREAMS"),
        ("ACCESS_TOKEN", "ACCESS_TOKENS"),
        ("RATELIMIT", "RATE_LIMIT"),
        ("XAI_APIKEY", "GROK_API_KEY"),
        ("XAI_API_KEY_FILE", "GROK_API_KEY_FILE"),
        ("XAI_BASE_URL", "GROK_BASE_URL"),
        ("GROK_URL", "GROK_BASE_URL"),
        ("GROK_TIMEOUT", None),
        ("allowed_hosts", "ALLOWED_HOSTS"),
        ("HTTPS_PROXYS", "HTTPS_PROXY"),
        ("GROK_VOICE", None),
        ("ACCESS_TOKENS_FILE", "ACCESS_TOKENS"),
        ("SYSTEM_PROMPT_FILE", "SYSTEM_PROMPT"),
        ("GROK_MODEL_FILE", "GROK_MODEL"),
    ],
)
def test_misspelt_variables(name: str, likely: str | None) -> None:
    """A name that is almost a setting's is told, with that setting if it is not set, and without any value."""
    warning = f"{name} is not a setting and counts for nothing"
    assert load({name: "canary"}).warnings == (f"{warning}: is {likely} meant?" if likely else warning,)
    if likely == "MAX_STREAMS":
        assert load({name: "1", likely: "1"}).warnings == ()


def test_quotes_around_the_prompt() -> None:
    """Quotes around the whole system prompt are allowed, since some mean them, but told."""
    assert load({"SYSTEM_PROMPT": '"Quoted" on purpose'}).warnings == ()
    for prompt in ('"canary"', "'canary'", "\u201ccanary\u201d"):
        settings = load({"SYSTEM_PROMPT": prompt})
        assert settings.system_prompt == prompt
        assert settings.warnings == (
            "SYSTEM_PROMPT is in quotes, and Grok is sent them: Docker's --env-file takes them literally",
        )


def test_secrets_have_no_repr() -> None:
    """Keys, tokens and the system prompt are in no repr, of themselves or of the settings. Settings don't change."""
    settings = load({"GROK_API_KEY": "canary", "ACCESS_TOKENS": "canary-canary-canary", "SYSTEM_PROMPT": "canary"})
    assert "canary" not in repr(settings) + repr(
        [settings.grok_api_key, settings.access_tokens, settings.system_prompt]
    )
    with pytest.raises(AttributeError):
        settings.port = 1  # type: ignore[misc] # on purpose
    assert Settings(port=1) != Settings()


# The process.


def run(cwd: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    """`python -m chatproxy`, which is to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "chatproxy"],
        cwd=cwd,
        env=variables | MEASURED,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


def test_exit_code(tmp_path: Path) -> None:
    """Wrong settings, from the environment or `.env`, end the process with code 2 before it does anything."""
    (tmp_path / ".env").write_text("KEEP_ALIVE=never\nHOST=127.0.0.1\n\n# tokens\nACCESS_TOKENS='a canary\n")
    ended = run(tmp_path, PYTHONPATH=str(ROOT), PORT="x", GROK_API_KEY="a canary")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.splitlines() == [
        ".env: line 5 cannot be read: expected NAME=value, with every quote closed",
        "GROK_API_KEY: expected visible ASCII characters without spaces",
        "PORT: expected int, not 'x'",
        "KEEP_ALIVE: expected float, not 'never'",
    ]


def test_env_file_that_is_no_text(tmp_path: Path) -> None:
    """So does a `.env` that cannot be read."""
    (tmp_path / ".env").write_bytes("GROK_API_KEY=canary\n".encode("utf-16"))
    ended = run(tmp_path, PYTHONPATH=str(ROOT))
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == ".env: cannot be read (UnicodeDecodeError)\n"


def test_port_in_use(tmp_path: Path) -> None:
    """An address that cannot be listened on is told in one line."""
    with refusing() as url:
        port = url.split(":")[2].removesuffix("/v1")
        ended = run(tmp_path, PYTHONPATH=str(ROOT), HOST="127.0.0.1", PORT=port)
    [line] = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert line.startswith(f"HOST, PORT: cannot listen on 127.0.0.1:{port}: Address already in use")


def test_start_that_fails() -> None:
    """What goes wrong while the service starts is raised, and not waited for."""
    settings = load(environment("http://127.0.0.1:1/v1"))
    sock = listen(settings)
    sock.close()

    async def start() -> None:
        async with asyncio.timeout(TIMEOUT):
            await Server(settings).running(sock).__aenter__()

    with pytest.raises(OSError, match="Bad file descriptor"):
        asyncio.run(start())


@pytest.mark.anyio
async def test_env_file(tmp_path: Path) -> None:
    """`.env` is read as it stands; a real variable overrides it, and an empty one hides it."""
    (tmp_path / ".env").write_text(
        "# comment\nGROK_MODEL='from-$HOME'\nSYSTEM_PROMPT=from the file\nGROK_REASONING_EFFORT=low\nEDITOR\n"
    )
    async with (
        Upstream() as grok,
        spawned(grok.url, cwd=tmp_path, system_prompt="real", grok_reasoning_effort="") as service,
    ):
        assert (await service.ask()).status_code == 200
        sent = grok.calls[0].body
    assert sent["model"] == "from-$HOME"
    assert sent["messages"][0] == {"role": "system", "content": "real"}
    assert "reasoning_effort" not in sent


@pytest.mark.anyio
@pytest.mark.parametrize(("origins", "warnings"), [("*", 1), ("https://example.com", 0)])
async def test_warning(origins: str, warnings: int) -> None:
    """Who lets any page spend the key is warned, once."""
    async with Upstream() as grok, spawned(grok.url, allowed_origins=origins) as service:
        service.process.terminate()
        assert await service.exit_code() == 0
    assert sum("warning ALLOWED_ORIGINS is *" in line for line in service.stderr.splitlines()) == warnings
