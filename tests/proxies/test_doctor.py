"""Sick deployments, made with the real proxies: the doctor names each, with the line to change."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest

from chatproxy.doctor.client import Target
from chatproxy.doctor.command import examine
from chatproxy.doctor.visit import Check, Visit
from tests.conftest import free_port, serving
from tests.proxies.proxies import APACHE, CADDY, HAPROXY, NGINX, PROXIES, Proxy, running

pytestmark = pytest.mark.anyio

NOBODY = "http://127.0.0.1:1/v1"
PAGE = "https://www.example.com"

# A service whose silences are short, so that they need not be waited for.
BRIEF: Mapping[str, object] = {"grok_api_key": None, "keep_alive": 0.3, "resume_window": 0.3}


async def doctor(
    url: str, *, origin: str | None = None, token: str | None = None, silence: float = 1.5, window: float = 1.8
) -> list[Check]:
    """What it tells of the service at this address."""
    checks: list[Check] = []
    target, quiet = Target.parse(url), lambda _: None
    await examine(Visit(target, checks.append, quiet, origin=origin, token=token, silence=silence, window=window))
    return checks


def faults(checks: list[Check]) -> dict[str, tuple[str, str]]:
    """What is wrong: for each name of a check its message and the lines to change."""
    return {
        check.name: (check.message, "\n".join(f"{proxy}: {line}" for proxy, line in check.fixes.items()))
        for check in checks
        if check.ok is False
    }


@dataclass(frozen=True)
class Case:
    """A proxy with this site in front of a service with these settings.

    `fault` is the check that fails; `says` and `line` are parts of its message and of the lines that are to be changed.
    `besides` are others that fail for the same reason.
    """

    proxy: Proxy
    site: str
    fault: str
    says: str
    line: str
    besides: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    origin: str | None = None
    path: str = ""


def inside(proxy: Proxy, line: str, before: str) -> str:
    """The README's site with one more line."""
    assert before in proxy.snippet
    return proxy.snippet.replace(before, f"{line}\n    {before}", 1)


def without(proxy: Proxy, line: str) -> str:
    assert line in proxy.snippet
    return proxy.snippet.replace(line, "")


HELD = inside(NGINX, "proxy_ignore_headers X-Accel-Buffering;", "proxy_pass")
GZIP = "gzip on; gzip_types *; gzip_proxied any; gzip_min_length 0;"
TOLD = {"allowed_origins": PAGE}
ROOTED = {"root_path": "/grok"}

CASES = {
    "held": Case(
        CADDY,
        CADDY.snippet.replace("8000}", "8000} {\nbuffer_responses\n}"),
        "tokens",
        " at once: a buffer holds",
        "Caddy: remove buffer_responses",
    ),
    "gzipped": Case(NGINX, GZIP + NGINX.snippet, "headers", "compressed (gzip)", "nginx: gzip off;"),
    "gzipped and held": Case(
        NGINX, GZIP + HELD, "tokens", "compression or buffering", "nginx: remove proxy_ignore_headers", ("headers",)
    ),
    "gzipped by Apache": Case(
        APACHE, inside(APACHE, "SetOutputFilter DEFLATE", "ProxyPass /metrics"), "headers", "(gzip)", "Apache: SetEnvIf"
    ),
    "no delay": Case(
        HAPROXY, without(HAPROXY, "option http-no-delay"), "tokens", "in lumps", "HAProxy: option http-no-delay"
    ),
    "idle limit of nginx": Case(
        NGINX,
        inside(NGINX, "proxy_read_timeout 5s;", "location / {"),
        "keep-alive",
        "cut off after 5.0 s of silence",
        "nginx: proxy_read_timeout 60s;",
        settings={"keep_alive": 15},
    ),
    "idle limit of HAProxy": Case(
        HAPROXY,
        HAPROXY.snippet + "    timeout server 1s\n",
        "keep-alive",
        "cut off after 1.",
        "HAProxy: timeout server 60s",
        settings={"keep_alive": 15},
    ),
    "idle limit of Caddy": Case(
        CADDY,
        CADDY.impatient,
        "keep-alive",
        "cut off after 1.",
        "Caddy: remove read_timeout",
        ("metrics",),
        settings={"keep_alive": 15},
    ),
    "idle limit of Apache": Case(
        APACHE,
        inside(APACHE, "ProxyTimeout 1", "ProxyPass /metrics"),
        "keep-alive",
        "cut off after 1.",
        "Apache: ProxyTimeout 60",
        settings={"keep_alive": 15},
    ),
    "Host of nginx": Case(
        NGINX, without(NGINX, "proxy_set_header Host $http_host;"), "host", "Host", "nginx: proxy_set_header Host $http"
    ),
    "Host of Apache": Case(
        APACHE, without(APACHE, "ProxyPreserveHost On"), "host", "Host", "Apache: ProxyPreserveHost On"
    ),
    "Host of Caddy": Case(
        CADDY,
        CADDY.snippet.replace("8000}", "8000} {\nheader_up Host chat.internal\n}"),
        "host",
        "the proxy does not pass the Host header on",
        "Caddy: remove header_up Host",
        ("answer",),  # without an Origin the name itself is refused
    ),
    "CORS not set": Case(NGINX, NGINX.snippet, "origin", f"ALLOWED_ORIGINS={PAGE}", "", origin=PAGE),
    "CORS taken off": Case(
        NGINX,
        inside(NGINX, "proxy_hide_header Access-Control-Allow-Origin;", "proxy_pass"),
        "origin",
        "takes it off",
        "nginx: remove add_header and proxy_hide_header",
        settings=TOLD,
        origin=PAGE,
    ),
    "CORS twice": Case(
        CADDY,
        CADDY.snippet.replace("respond", "header +Access-Control-Allow-Origin *\nrespond"),
        "origin",
        "adds one of its own",
        "Caddy: remove header",
        settings=TOLD,
        origin=PAGE,
    ),
    "OPTIONS answered": Case(
        APACHE,
        inside(APACHE, "<Location />\nRequire method GET POST DELETE\n</Location>", "ProxyPass /metrics"),
        "origin",
        "OPTIONS is answered with 403",
        "Apache: remove Header",
        settings=TOLD,
        origin=PAGE,
    ),
    "not exposed": Case(
        HAPROXY,
        inside(HAPROXY, "http-response del-header Access-Control-Expose-Headers", "server chatproxy"),
        "origin",
        "content-location",
        "HAProxy: remove http-response",
        settings=TOLD,
        origin=PAGE,
    ),
    "metrics of nginx": Case(
        NGINX, NGINX.stock, "metrics", "public", "nginx: location /metrics { return 404; }", ("host",)
    ),
    "metrics of Caddy": Case(CADDY, CADDY.stock, "metrics", "public", "Caddy: respond /metrics 404"),
    "HTTP/1.0": Case(
        APACHE,
        inside(APACHE, "SetEnv downgrade-1.0 1\nSetEnv force-response-1.0 1", "ProxyPass /metrics"),
        "HTTP",
        "HTTP/1.0, through Apache",
        "Apache: remove SetEnv downgrade-1.0",
    ),
    "prefix not taken off": Case(
        NGINX,
        NGINX.snippet.replace("location / ", "location /grok/ "),
        "host",
        "404: the service sees another path; /grok",
        "nginx: location /grok/ { proxy_pass http://127.0.0.1:8000/; }",
        ("health",),
        path="/grok",
    ),
    "prefix not known": Case(CADDY, CADDY.prefixed, "resume", "ROOT_PATH=/grok", "", ("metrics",), path="/grok"),
    "cut": Case(
        replace(CADDY, around=CADDY.around.replace("admin off", "admin off\nservers {\ntimeouts {\nwrite 1s\n}\n}")),
        CADDY.snippet,
        "ending",
        "broken off after 1.",
        "Caddy: remove write",
    ),
    "gateway": Case(
        NGINX,
        NGINX.snippet.replace("@service@", "127.0.0.1:1"),
        "host",
        "502 from the proxy (an HTML page)",
        "nginx: proxy_pass",
        ("health",),
    ),
    "another site": Case(
        NGINX,
        NGINX.snippet.replace("proxy_pass", "default_type text/html; return 200 '<html>'; #"),
        "host",
        "200 and an HTML page: not chatproxy",
        "nginx: proxy_pass",
    ),
    "a login": Case(
        HAPROXY, inside(HAPROXY, "http-request auth", "server chatproxy"), "host", "401 from the proxy", ""
    ),
    "redirected": Case(
        CADDY, "http://@listen@ {\n redir https://chat.example.com{uri}\n}", "host", "https://chat.example.com/", ""
    ),
    "DELETE not allowed": Case(
        NGINX,
        inside(NGINX, "limit_except GET POST { deny all; }", "proxy_pass"),
        "stop",
        "DELETE",
        "nginx: remove limit_except",
    ),
    "key in a header": Case(
        NGINX,
        inside(NGINX, "add_header X-Debug xai-0123456789abcdef;", "proxy_pass"),
        "key",
        "x-debug",
        "nginx: remove",
    ),
    "headers rewritten": Case(
        HAPROXY,
        inside(HAPROXY, "http-response set-header Cache-Control private", "server chatproxy"),
        "headers",
        "no-transform",
        "HAProxy: remove http-response set-header",
    ),
    "Content-Location taken off": Case(
        NGINX,
        inside(NGINX, "proxy_hide_header Content-Location;", "proxy_pass"),
        "resume",
        "Content-Location",
        "nginx: remove add_header, expires and proxy_hide_header",
    ),
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
async def test_sick(case: Case) -> None:
    """The fault is named, with the line to change, and nothing else is found wrong."""
    silence = 7.0 if "5s" in case.site else 1.5
    async with (
        serving(NOBODY, **{**BRIEF, **case.settings}) as service,
        running(case.proxy, case.site, service.port) as front,
    ):
        checks = await doctor(front.url + case.path, origin=case.origin, silence=silence)
    found = faults(checks)
    assert {*found} == {case.fault, *case.besides}, checks
    message, lines = found[case.fault]
    assert case.says in message
    assert case.line in lines


@pytest.mark.parametrize("proxy", [pytest.param(proxy, id=name) for name, proxy in PROXIES.items()])
async def test_nothing_wrong(proxy: Proxy) -> None:
    """On the README's own configurations nothing is found wrong, and everything is seen."""
    async with serving(NOBODY, **BRIEF, **TOLD) as service, running(proxy, proxy.snippet, service.port) as front:
        checks = await doctor(front.url, origin=PAGE)
    assert [check for check in checks if not check.ok and check.name != "TLS"] == []


async def test_buffering_that_holds_nothing() -> None:
    """nginx passes on each chunk of a chunked answer, even if it is told to buffer: nothing is found wrong."""
    async with serving(NOBODY, **BRIEF) as service, running(NGINX, HELD, service.port) as front:
        checks = await doctor(front.url)
    assert faults(checks) == {}


@pytest.mark.parametrize("proxy", [pytest.param(proxy, id=name) for name, proxy in PROXIES.items()])
async def test_service_down(proxy: Proxy) -> None:
    """A gateway without a service is told from a service, whatever the gateway says."""
    async with running(proxy, proxy.snippet, free_port()) as front:
        found = faults(await doctor(front.url))
    assert {*found} == {"health", "host"}
    message, lines = found["host"]
    assert message.startswith(("502 ", "503 "))
    assert "service is down" in message
    assert "127.0.0.1:8000" in lines
