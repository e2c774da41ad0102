"""The processes under the load: who they are, on which core they run, what they have used.

Linux only: cores are pinned, and CPU time and memory of another process are read from the kernel.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import clock_gettime_ns, monotonic, sleep

ROOT = Path(__file__).parents[2]

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")

NGINX_CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
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
        server 127.0.0.1:{upstream};
        keepalive 2048;
        keepalive_requests 1000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://grok/v1/chat/completions;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_read_timeout 600s;
        }}
        location = /healthz {{ return 200; }}
    }}
}}
"""


@dataclass(frozen=True)
class Cores:
    """Which core the proxy has to itself, and where the upstream and the load run."""

    proxy: int
    upstream: int
    load: int


def cores() -> Cores:
    """The proxy's core is shared with nobody, unless there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return Cores(proxy=allowed[-1], upstream=allowed[0], load=allowed[len(allowed) > 2])


@dataclass(frozen=True)
class Target:
    """What the load talks to: a running proxy, or the upstream itself."""

    name: str
    port: int
    pid: int
    raw: bool
    start_ms: float = 0.0

    def cpu(self) -> float:
        """Seconds of CPU time used so far, user and system, all threads."""
        # Linux makes the ID of another process's CPU clock from its PID: clock_getcpuclockid(3).
        return clock_gettime_ns(~self.pid << 3 | 2) / 1e9

    def resident(self) -> int:
        """Bytes of resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def process(command: list[str], core: int, log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A child process on one core for the duration of the block; it may print, its complaints go to `log`."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        with log.open("a") as complaints:
            child = subprocess.Popen(  # noqa: S603 -- our own commands
                command, cwd=log.parent, env=env, stdout=subprocess.PIPE, stderr=complaints, text=True
            )
    finally:
        os.sched_setaffinity(0, own)
    with child:
        try:
            yield child
        except BaseException:
            sys.stderr.write(log.read_text()[-2000:])
            raise
        finally:
            child.terminate()
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()


@contextmanager
def upstream(folder: Path, core: int) -> Iterator[Target]:
    """The scripted upstream."""
    command = [sys.executable, "-m", "tests.bench.upstream"]
    with process(command, core, folder / "upstream.log", python()) as child:
        assert child.stdout
        yield Target("direct", int(child.stdout.readline()), child.pid, raw=True)


@contextmanager
def proxy(name: str, upstream: Target, folder: Path, core: int) -> Iterator[Target]:
    """A proxy in front of the upstream: nginx; chatproxy; the same on httpx's transport, or on the Responses API."""
    port = free_port()
    if name == "nginx" and NGINX:
        config = folder / f"nginx-{port}.conf"
        config.write_text(NGINX_CONFIG.format(folder=folder, upstream=upstream.port, port=port))
        command, env = [NGINX, "-c", str(config)], dict(os.environ)
    else:
        command, env = [sys.executable, "-m", "chatproxy"], settings(port, upstream.port)
        if name == "httpx":
            env["GROK_TRANSPORT"] = "httpx"
        if name == "responses":
            env["GROK_API"] = "responses"
    since = monotonic()
    with process(command, core, folder / f"{name}.log", env) as child:
        while not healthy(port):
            if child.poll() is not None or monotonic() - since > 30:
                raise RuntimeError(f"{name} did not start")
            sleep(0.002)
        yield Target(name, port, child.pid, raw=name == "nginx", start_ms=(monotonic() - since) * 1000)


def available() -> list[str]:
    """The names of the proxies that can be started here, the yardstick first."""
    return [*(["nginx"] if NGINX else []), "chatproxy", "httpx"]


def python() -> dict[str, str]:
    """An environment with nothing in it but what finds the code; the developer's settings and .env stay out."""
    return {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}


def settings(port: int, upstream: int) -> dict[str, str]:
    """The service's environment. As with nginx, no line is logged per request."""
    return python() | {
        "GROK_API_KEY": "bench",
        "GROK_BASE_URL": f"http://127.0.0.1:{upstream}/v1",
        "HOST": "127.0.0.1",
        "PORT": str(port),
        "MAX_STREAMS": "2000",
        "LOG_LEVEL": "warning",
        "DRAIN_TIMEOUT": "1",
    }


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def healthy(port: int) -> bool:
    """Whether /healthz answers 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            return connection.recv(1000).startswith(b"HTTP/1.1 200 ")
    except ConnectionError:
        return False
