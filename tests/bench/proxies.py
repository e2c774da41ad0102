"""The proxies: the service, and the peers it is measured beside, each with what it needs to stream at once."""

import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from sys import executable
from time import monotonic, sleep

from tests.bench.processes import Target, free_port, process, python, status

which = partial(shutil.which, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")

NGINX, CADDY = which("nginx"), which("caddy")

NGINX_CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx-{port}.pid;
error_log {folder}/nginx.log;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000;
    upstream grok {{
        {servers}
        keepalive 4096;
        keepalive_requests 1000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass {scheme}://grok{path};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
            {tls}
        }}
        location = /healthz {{ return 200; }}
    }}
}}
"""

NGINX_TLS = """
            proxy_ssl_protocols TLSv1.3;
            proxy_ssl_trusted_certificate {authority};
            proxy_ssl_name localhost;
            proxy_ssl_verify on;
"""

# Caddy passes on an event stream as it comes, without being told.
CADDY_CONFIG = """
{{
    admin off
    auto_https off
    log {{
        level ERROR
    }}
}}
http://127.0.0.1:{port} {{
    respond /healthz 200
    rewrite * /v1/chat/completions
    reverse_proxy {scheme}://127.0.0.1:{upstream} {{
        transport http {{
            versions 1.1
            keepalive_idle_conns 4096
            keepalive_idle_conns_per_host 4096
            {tls}
        }}
    }}
}}
"""

CADDY_TLS = """
            tls
            tls_trusted_ca_certs {authority}
"""

NAMES = ("nginx", "caddy", "chatproxy", "httpx")
"""Those that are compared, the yardstick first; `httpx` is the service on httpx's transport."""

RAW = {"nginx", "caddy"}
"""What passes the upstream's own stream on."""

MORE_SETTINGS = {"httpx": {"GROK_TRANSPORT": "httpx"}, "responses": {"GROK_API": "responses"}}


@contextmanager
def proxy(name: str, upstream: Target, folder: Path, cores: Collection[int], **settings: str) -> Iterator[Target]:
    """A proxy in front of the upstream: a peer; chatproxy; the same on httpx's transport, or on the Responses API."""
    port = free_port()
    if name == "nginx":
        command = nginx(folder, port, [upstream.port], "/v1/chat/completions", upstream.authority)
        env = dict(os.environ)
    elif name == "caddy":
        command = caddy(folder, port, upstream)
        env = dict(os.environ) | dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(folder))
    else:
        command = [executable, "-m", "chatproxy"]
        env = service(port, upstream) | MORE_SETTINGS.get(name, {}) | settings
    with running(name, command, port, folder, cores, env) as target:
        yield target


@contextmanager
def front(services: Sequence[Target], folder: Path, cores: Collection[int]) -> Iterator[Target]:
    """nginx in front of several processes of the service."""
    port = free_port()
    command = nginx(folder, port, [service.port for service in services])
    with running("front", command, port, folder, cores, dict(os.environ)) as target:
        yield target


@contextmanager
def running(
    name: str, command: list[str], port: int, folder: Path, cores: Collection[int], env: dict[str, str]
) -> Iterator[Target]:
    """The process, once /healthz answers."""
    since = monotonic()
    with process(command, cores, folder / f"{name}.log", env) as child:
        while status(port) != 200:
            if child.poll() is not None or monotonic() - since > 30:
                raise RuntimeError(f"{name} did not start")
            sleep(0.002)
        yield Target(name, port, child.pid, raw=name in RAW, start_ms=(monotonic() - since) * 1000)


def nginx(folder: Path, port: int, servers: list[int], path: str = "", authority: Path | None = None) -> list[str]:
    """The command of an nginx in front of these ports; without a path, callers choose it."""
    assert NGINX
    config = folder / f"nginx-{port}.conf"
    text = NGINX_CONFIG.format(
        folder=folder,
        port=port,
        servers="\n        ".join(f"server 127.0.0.1:{server};" for server in servers),
        path=path,
        scheme="https" if authority else "http",
        tls=NGINX_TLS.format(authority=authority) if authority else "",
    )
    config.write_text(text)
    return [NGINX, "-c", str(config)]


def caddy(folder: Path, port: int, upstream: Target) -> list[str]:
    """The command of a Caddy in front of the upstream."""
    assert CADDY
    config = folder / f"Caddyfile-{port}"
    tls = CADDY_TLS.format(authority=upstream.authority) if upstream.authority else ""
    scheme = "https" if upstream.authority else "http"
    config.write_text(CADDY_CONFIG.format(port=port, scheme=scheme, upstream=upstream.port, tls=tls))
    return [CADDY, "run", "--adapter", "caddyfile", "--config", str(config)]


def service(port: int, upstream: Target) -> dict[str, str]:
    """The service's environment. As with the peers, no line is logged per request."""
    scheme = "https" if upstream.authority else "http"
    return python() | {
        "GROK_API_KEY": "bench",
        "GROK_BASE_URL": f"{scheme}://127.0.0.1:{upstream.port}/v1",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "MAX_STREAMS": "4000",
        "LOG_LEVEL": "warning",
        "DRAIN_TIMEOUT": "1",
        **({"SSL_CERT_FILE": str(upstream.authority)} if upstream.authority else {}),
    }


def available() -> list[str]:
    """The names of the proxies that can be started here, the yardstick first."""
    installed = {"nginx": NGINX, "caddy": CADDY}
    return [name for name in NAMES if installed.get(name, executable)]
