"""For each fault that a reverse proxy can cause: the line to change in nginx, Caddy, HAProxy, Apache and Traefik.

Knows configuration files. Does not know how a fault is found.
"""

from collections.abc import Mapping

import httpx

# In the order in which they are listed when nobody knows which one it is; a table below may begin with a likelier one.
GATEWAY = {
    "nginx": "proxy_pass http://127.0.0.1:8000;",
    "Caddy": "reverse_proxy 127.0.0.1:8000",
    "HAProxy": "server chatproxy 127.0.0.1:8000",
    "Apache": "ProxyPass / http://127.0.0.1:8000/",
    "Traefik": "servers: [{url: http://127.0.0.1:8000}]",
}
CERTIFICATE = {
    "nginx": "ssl_certificate …/fullchain.pem; then nginx -s reload",
    "Caddy": "the site's address is the real name, ports 80 and 443 are open",
    "HAProxy": "bind :443 ssl crt … (certificate, chain and key), then reload",
    "Apache": "SSLCertificateFile …/fullchain.pem, then reload",
    "Traefik": "tls: {certResolver: …} on the router",
}
HTTP_1_0 = {
    "Apache": "remove SetEnv downgrade-1.0 and force-response-1.0",
    "nginx": "answers in HTTP/1.1; look at what stands in front of it",
    "Caddy": "answers in HTTP/1.1; look at what stands in front of it",
    "HAProxy": "answers in HTTP/1.1; look at what stands in front of it",
    "Traefik": "answers in HTTP/1.1; look at what stands in front of it",
}
HOST = {
    "nginx": "proxy_set_header Host $http_host;",
    "Apache": "ProxyPreserveHost On",
    "Caddy": "remove header_up Host … from reverse_proxy",
    "HAProxy": "remove http-request set-header Host …",
    "Traefik": "passHostHeader: true",
}
PREFIX = {
    "nginx": "location PREFIX/ { proxy_pass http://127.0.0.1:8000/; }",
    "Caddy": "handle_path PREFIX/* { reverse_proxy 127.0.0.1:8000 }",
    "HAProxy": "http-request replace-path PREFIX(/.*) \\1",
    "Apache": "ProxyPass PREFIX/ http://127.0.0.1:8000/",
    "Traefik": "middlewares: stripPrefix: {prefixes: [PREFIX]}",
}
METRICS = {
    "nginx": "location PREFIX/metrics { return 404; }",
    "Caddy": "respond PREFIX/metrics 404",
    "HAProxy": "http-request return status 404 if { path,url_dec -m beg PREFIX/metrics }",
    "Apache": "ProxyPass PREFIX/metrics !",
    "Traefik": "a rule that names what is public: PathPrefix(`PREFIX/api/`)",
}
CORS = {
    "nginx": "remove add_header and proxy_hide_header for Access-Control-*, and any answer to OPTIONS",
    "Caddy": "remove header … Access-Control-*, and any answer to OPTIONS",
    "HAProxy": "remove http-response set-header/del-header Access-Control-*, and any answer to OPTIONS",
    "Apache": "remove Header … Access-Control-*, and any answer to OPTIONS",
    "Traefik": "remove accessControl… from the headers middleware",
}
HEADERS = {
    "nginx": "remove add_header, expires and proxy_hide_header for it",
    "Caddy": "remove header … for it",
    "HAProxy": "remove http-response set-header/del-header for it",
    "Apache": "remove Header set/unset and ExpiresActive for it",
    "Traefik": "remove it from customResponseHeaders",
}
COMPRESSION = {
    "nginx": "gzip off; in this location",
    "Caddy": "@page not path PREFIX/api/* and encode @page gzip",
    "HAProxy": "no text/event-stream in compression type",
    "Apache": "SetEnvIf Request_URI ^PREFIX/api/ no-gzip",
    "Traefik": "compress: {excludedContentTypes: [text/event-stream]}",
}
BUFFERING = {
    "nginx": "remove proxy_ignore_headers X-Accel-Buffering, or proxy_buffering off;",
    "Caddy": "remove buffer_responses or response_buffers from reverse_proxy",
    "HAProxy": "option http-no-delay",
    "Apache": "ProxyPass … flushpackets=on, and no output filter on this path",
    "Traefik": "no buffering middleware on this router",
}
LUMPS = {
    "HAProxy": "option http-no-delay",
    "nginx": "tcp_nodelay on; and no proxy_ignore_headers X-Accel-Buffering",
    "Caddy": "remove flush_interval",
    "Apache": "ProxyPass … flushpackets=on",
    "Traefik": "responseForwarding: {flushInterval: 1ms}",
}
CUT = {
    "nginx": "see error_log; was it reloaded? send_timeout 60s;",
    "Caddy": "remove write from servers { timeouts { … } }",
    "HAProxy": "timeout server 60s, timeout client 60s",
    "Apache": "ProxyTimeout 60, and see ErrorLog",
    "Traefik": "respondingTimeouts: {writeTimeout: 0s}",
}
IDLE = {
    "nginx": "proxy_read_timeout 60s;",
    "Caddy": "remove read_timeout from transport http",
    "HAProxy": "timeout server 60s, timeout client 60s",
    "Apache": "ProxyTimeout 60",
    "Traefik": "respondingTimeouts: {writeTimeout: 0s}",
}
LEAVING = {
    "nginx": "remove proxy_ignore_client_abort on;",
    "Caddy": "remove flush_interval -1",
    "HAProxy": "option abortonclose",
    "Apache": "no setting; it notices with the next write",
    "Traefik": "no setting; look at what stands in front of it",
}
METHODS = {
    "nginx": "remove limit_except, or add DELETE to it",
    "Caddy": "remove the method matcher, or add DELETE to it",
    "HAProxy": "remove http-request deny if … METH, or except DELETE",
    "Apache": "remove <Limit> and <LimitExcept>, or add DELETE",
    "Traefik": "remove Method(…) from the rule, or add DELETE",
}

# What each calls itself in its Server or Via header. HAProxy and Traefik say nothing.
_SIGNS = {"nginx": "nginx", "openresty": "nginx", "caddy": "Caddy", "apache": "Apache", "haproxy": "HAProxy"}


def recognised(headers: httpx.Headers) -> str | None:
    """Which of the five proxies an answer came through, if it says so."""
    said = f"{headers.get('server', '')} {headers.get('via', '')}".lower()
    return next((name for sign, name in _SIGNS.items() if sign in said), None)


def lines(table: Mapping[str, str], proxy: str | None, prefix: str) -> dict[str, str]:
    """The lines of that table for this proxy, or for all of them, the likeliest first; for a service at `prefix`."""
    return {name: line.replace("PREFIX", prefix) for name, line in table.items() if proxy is None or name == proxy}
