"""The reverse proxies that people put in front of the service: real ones, in the foreground, without privileges.

    async with running(NGINX, NGINX.stock, service.port) as front:
        response = await front.ask("Hi")        # as if it were the service

Knows how each is configured and started. In a configuration @listen@ is the proxy's address, @service@ that of the
service and @place@ a directory that is the proxy's own.
"""

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.conftest import TIMEOUT, Service, free_port

SBIN = f"{os.defpath}:/usr/local/sbin:/usr/sbin:/sbin"
NOBODY = 65534


@dataclass(frozen=True)
class Proxy:
    program: str
    arguments: tuple[str, ...]
    around: str
    """The configuration around a site, which comes where @site@ stands."""
    stock: str
    """The shortest site that works."""
    compressing: str
    """The same with all the compression that it offers."""
    impatient: str
    """The same for a service that is silent for one second at most."""
    prefixed: str
    """The same with the service at /grok instead of /."""
    snippet: str
    """What the README shows."""


def snippet(name: str, listen: str, listen_here: str) -> str:
    """A file that the README shows, with the addresses of a test."""
    text = (Path(__file__).parent / name).read_text()
    assert listen in text
    assert "127.0.0.1:8000" in text
    return text.replace(listen, listen_here).replace("127.0.0.1:8000", "@service@")


NGINX_SITE = """
server {
    listen @listen@;
    location / {
        proxy_pass http://@service@;
    }
}
"""
NGINX = Proxy(
    program="nginx",
    arguments=("-p", "@place@", "-e", "stderr", "-c", "@place@/configuration"),
    around="""
daemon off;
pid nginx.pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    @site@
}
""",
    stock=NGINX_SITE,
    compressing="gzip on; gzip_types *; gzip_proxied any; gzip_min_length 0;" + NGINX_SITE,
    impatient="proxy_read_timeout 1s;" + NGINX_SITE,
    prefixed=NGINX_SITE.replace("location /", "location /grok/").replace("@service@", "@service@/"),
    snippet=snippet("nginx.conf", "listen 80;", "listen @listen@;"),
)

CADDY = Proxy(
    program="caddy",
    arguments=("run", "--config", "@place@/configuration", "--adapter", "caddyfile"),
    around="""
{
    admin off
    default_bind 127.0.0.1
}
@site@
""",
    stock="http://@listen@ {\n reverse_proxy @service@\n}",
    compressing="http://@listen@ {\n encode zstd gzip\n reverse_proxy @service@\n}",
    impatient="http://@listen@ {\n reverse_proxy @service@ {\n transport http {\n read_timeout 1s\n }\n }\n}",
    prefixed="http://@listen@ {\n handle_path /grok/* {\n reverse_proxy @service@\n }\n}",
    # It takes its addresses from the environment, in compose.yaml as here.
    snippet=(Path(__file__).parent / "Caddyfile").read_text(),
)

HAPROXY_SITE = """
frontend chat
    bind @listen@
    default_backend chatproxy
backend chatproxy
    server chatproxy @service@
"""
# What Debian's configuration has in its defaults.
HAPROXY_DEFAULTS = """
defaults
    mode http
    timeout connect 5s
    timeout client 50s
    timeout server 50s
"""
HAPROXY = Proxy(
    program="haproxy",
    arguments=("-db", "-f", "@place@/configuration"),
    around=HAPROXY_DEFAULTS + "@site@",
    stock=HAPROXY_SITE,
    compressing=HAPROXY_SITE + "    compression algo gzip\n    compression type text/event-stream\n",
    impatient=HAPROXY_SITE + "    timeout server 1s\n",
    prefixed=HAPROXY_SITE + "    http-request replace-path /grok(/.*) \\1\n",
    snippet=snippet("haproxy.cfg", "bind :80", "bind @listen@"),
)

APACHE_SITE = """
<VirtualHost @listen@>
    ProxyPass / http://@service@/
</VirtualHost>
"""
APACHE_MODULES = "mpm_event authz_core proxy proxy_http deflate filter env"
APACHE = Proxy(
    program="apache2",
    arguments=("-DFOREGROUND", "-d", "@place@", "-f", "configuration"),
    around="".join(
        f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n" for name in APACHE_MODULES.split()
    )
    + """
ServerName localhost
Listen @listen@
DefaultRuntimeDir @place@
PidFile @place@/apache.pid
ErrorLog @place@/log
@site@
""",
    stock=APACHE_SITE,
    compressing="SetOutputFilter DEFLATE" + APACHE_SITE,
    impatient="ProxyTimeout 1" + APACHE_SITE,
    prefixed=APACHE_SITE.replace("ProxyPass /", "ProxyPass /grok/"),
    snippet=snippet("apache.conf", "*:80", "@listen@"),
)

PROXIES = {"nginx": NGINX, "caddy": CADDY, "haproxy": HAPROXY, "apache": APACHE}


@asynccontextmanager
async def running(proxy: Proxy, site: str, service: int) -> AsyncIterator[Service]:
    """The proxy with this site in front of the service on that port. The test is skipped where it is not installed."""
    program = shutil.which(proxy.program, path=SBIN)
    if program is None:
        pytest.skip(f"{proxy.program} is not installed")
    port = free_port()
    with tempfile.TemporaryDirectory() as place:

        def filled_in(text: str) -> str:
            for name, value in {
                "listen": f"127.0.0.1:{port}",
                "service": f"127.0.0.1:{service}",
                "place": place,
            }.items():
                text = text.replace(f"@{name}@", value)
            return text

        (Path(place) / "configuration").write_text(filled_in(proxy.around.replace("@site@", site)))
        log = Path(place) / "log"
        log.touch()
        # As root they would want to become somebody else.
        user, group = (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        os.chown(place, user, group)
        os.chown(log, user, group)
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                program,
                *map(filled_in, proxy.arguments),
                env={"HOME": place, "SITE_ADDRESS": f"http://:{port}", "UPSTREAM": filled_in("@service@")},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
                user=user,
                group=group,
            )
        try:
            await _accepting(port, process, log)
            async with httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT, trust_env=False
            ) as client:
                yield Service(port, client)
        finally:
            # With its workers, which outlive a master that is killed.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _accepting(port: int, process: asyncio.subprocess.Process, log: Path) -> None:
    async with asyncio.timeout(TIMEOUT):
        while True:
            assert process.returncode is None, log.read_text()
            with suppress(ConnectionError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.02)  # a port that is not open yet tells nobody when it will be
