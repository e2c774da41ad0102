"""The checks that cost nothing: the way to the service, its routes, and what a page elsewhere may do."""

import asyncio
import ssl
from dataclasses import dataclass
from ipaddress import ip_address

import httpx

from chatproxy.doctor import advice
from chatproxy.doctor.client import Reply, Unreachable, connect, secure
from chatproxy.doctor.visit import Visit

_REASONS = {
    "draining": "it is shutting down",
    "upstream_auth": "look at GROK_API_KEY and its credits; the log says more",
    "store_unavailable": "look at REDIS_URL",
}

_WHOSE = {
    True: "The built-in demo answers: nothing is spent.",
    False: "Grok answers: one short answer is spent.",
    None: "Demo or Grok, that is not public: at most one short answer is spent.",
}

# An id that no stream has: asking for it shows who answers under /api/, and costs nothing.
_NO_STREAM = "/api/chat/doctordoctordoctor0000/stream"  # an id as the service makes them


@dataclass(frozen=True)
class Way:
    """How to ask for more: whether certificates are verified, and what the handshake agreed on."""

    verify: ssl.SSLContext | bool
    alpn: str | None = None


async def reach(visit: Visit) -> Way | None:
    """Connection and TLS. None if there is no use in going on."""
    target = visit.target
    try:
        address, seconds = await connect(target)
    except Unreachable as problem:
        visit.tell("reachable", False, str(problem))
        return None
    visit.tell("reachable", True, f"{address}, port {target.port}, {seconds * 1000:.0f} ms")
    if not target.tls:
        visit.tell("TLS", None, "none: a page served over https cannot call it")
        return Way(verify=True)
    try:
        secured = await secure(target, httpx.create_ssl_context())
    except Unreachable as problem:
        visit.tell("TLS", False, str(problem), advice.CERTIFICATE)
        return None
    except ssl.SSLCertVerificationError as error:
        # The rest is looked at all the same, but nobody is given a secret.
        kept = " (the token is not sent)" if visit.token else ""
        visit.token = None
        visit.tell("TLS", False, f"{error.verify_message}{kept}", advice.CERTIFICATE)
        return Way(verify=False)
    visit.tell("TLS", True, f"{secured.version}, certificate valid for {secured.days:.0f} days")
    return Way(httpx.create_ssl_context(), secured.alpn)


async def survey(visit: Visit, alpn: str | None) -> bool:
    """What can be seen without an answer. False if there is no use in asking for one."""
    health, ready, metrics, page = await asyncio.gather(
        visit.ask("GET", "/healthz"),
        visit.ask("GET", "/readyz"),
        visit.ask("GET", "/metrics"),
        visit.ask("GET", _NO_STREAM, {"Origin": visit.target.origin}),
    )
    visit.proxy = advice.recognised(page.headers)
    if page.status:
        _http(visit, page, alpn)
    _health(visit, health, ready)
    _metrics(visit, metrics)
    usable = _host(visit, page)
    if usable and visit.origin:
        await _origin(visit, visit.origin)
    if usable:
        visit.announce(_WHOSE[visit.demo])
    return usable


def _http(visit: Visit, reply: Reply, alpn: str | None) -> None:
    behind = f", through {visit.proxy}" if visit.proxy else ""
    if reply.version == "HTTP/1.0":
        text = f"answers in HTTP/1.0{behind}: nobody sees whether an answer is whole"
        visit.tell("HTTP", False, text, advice.HTTP_1_0)
    elif alpn == "h2":
        visit.tell("HTTP", True, f"HTTP/2 offered, looked at over {reply.version}{behind}")
    else:
        text = f"{reply.version}{behind}; without HTTP/2 a browser opens six streams at most"
        visit.tell("HTTP", True, text)


def _health(visit: Visit, health: Reply, ready: Reply) -> None:
    if "status" in ready.json:
        visit.demo = bool(ready.json.get("demo"))
    if ready.json.get("status") == "unavailable":
        reason = str(ready.json.get("reason"))
        visit.tell("health", False, f"/readyz says {reason}: {_REASONS.get(reason, 'see its log')}")
    elif health.json.get("status") == ready.json.get("status") == "ok":
        visit.tell("health", True, "/healthz and /readyz say ok")
    elif not health.status or health.status >= 500 or health.code:
        visit.tell("health", False, *visit.explain(health))
    else:
        visit.tell("health", None, f"/healthz is not public ({health.status})")


def _metrics(visit: Visit, metrics: Reply) -> None:
    if metrics.status != 200 or b"chatproxy_" not in metrics.body:
        visit.tell("metrics", True, f"/metrics is not public ({metrics.status or 'no answer'})")
    elif visit.proxy is None and _on_this_machine(visit.target.host):
        visit.tell("metrics", None, "/metrics is open on this machine; keep it from the public")
    else:
        visit.tell("metrics", False, "/metrics is public", advice.METRICS)


def _on_this_machine(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host(visit: Visit, page: Reply) -> bool:
    """Whether the service itself answers, and takes a page of its own address for one."""
    if page.code == "stream_not_found":
        visit.tell("host", True, f"pages of {visit.target.origin} may call")
        return True
    own = visit.page
    visit.page = visit.target.origin
    visit.tell("host", False, *visit.explain(page))
    refused = page.code == "origin_not_allowed"
    # A caller that is no page may go on.
    visit.page = own if visit.origin else None
    return refused


async def _origin(visit: Visit, origin: str) -> None:
    """What a browser asks before a page elsewhere may call, and what it wants to see then."""
    wanted = {"content-type", "last-event-id"} | ({"authorization"} if visit.token else set())
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": ",".join(sorted(wanted))}
    preflight = await visit.ask("OPTIONS", "/api/chat", {"Origin": origin, **asked})
    simple = await visit.ask("GET", _NO_STREAM, {"Origin": origin})
    visit.page = origin
    for reply in (simple, preflight):
        allowed = reply.headers.get("access-control-allow-origin")
        if reply.code == "origin_not_allowed":
            visit.tell("origin", False, *visit.explain(reply))
        elif reply is preflight and not 200 <= reply.status < 300:
            visit.tell("origin", False, f"OPTIONS is answered with {reply.status}, not by the service", advice.CORS)
        elif allowed is None:
            text = f"no Access-Control-Allow-Origin for {origin}: the service sends it, and the proxy takes it off"
            visit.tell("origin", False, text, advice.CORS)
        elif allowed not in (origin, "*"):
            text = f"Access-Control-Allow-Origin is {allowed}: the proxy adds one of its own"
            visit.tell("origin", False, text, advice.CORS)
        else:
            continue
        visit.page = None
        return
    missing = wanted - _names(preflight, "access-control-allow-headers")
    hidden = {"content-location", "x-request-id"} - _names(simple, "access-control-expose-headers")
    if missing or hidden:
        text = f"the proxy answers for the service: {', '.join(sorted(missing | hidden))} not allowed or exposed"
        visit.tell("origin", False, text, advice.CORS)
    else:
        visit.tell("origin", True, f"pages of {origin} may call")


def _names(reply: Reply, header: str) -> set[str]:
    return {name.strip().lower() for name in reply.headers.get(header, "").split(",")}
