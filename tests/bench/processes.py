"""The processes under the load: who they are, on which core they run, what they have used.

Linux only: cores are pinned, and CPU time and memory of another process are read from the kernel.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import clock_gettime_ns, monotonic, sleep

import trustme

ROOT = Path(__file__).parents[2]

REDIS = shutil.which("redis-server") or shutil.which("valkey-server")


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
    authority: Path | None = None  # the file of the one that its certificate is of, if it speaks TLS

    def cpu(self) -> float:
        """Seconds of CPU time used so far, user and system, all threads."""
        # Linux makes the ID of another process's CPU clock from its PID: clock_getcpuclockid(3).
        return clock_gettime_ns(~self.pid << 3 | 2) / 1e9

    def resident(self) -> int:
        """Bytes of resident memory."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def process(
    command: list[str], cores: Collection[int], log: Path, env: Mapping[str, str]
) -> Iterator[subprocess.Popen[str]]:
    """A child process on these cores for the duration of the block; it may print, its complaints go to `log`."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
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
    with process(command, [core], folder / "upstream.log", python()) as child:
        assert child.stdout
        yield Target("direct", int(child.stdout.readline()), child.pid, raw=True)


@contextmanager
def relay(upstream: Target, folder: Path, core: int, *, delay: float = 0.0, tls: bool = False) -> Iterator[Target]:
    """The upstream behind TLS, or so many seconds away (in each direction)."""
    command = [sys.executable, "-m", "tests.bench.relay", str(upstream.port), "--delay", str(delay)]
    authority = upstream.authority
    if tls:
        authority, certificate = certificates(folder, upstream.port)
        command += ["--certificate", str(certificate)]
    with process(command, [core], folder / "relay.log", python()) as child:
        assert child.stdout
        yield Target("direct", int(child.stdout.readline()), child.pid, raw=True, authority=authority)


def certificates(folder: Path, port: int) -> tuple[Path, Path]:
    """The files of an authority of its own for what is at this port, and of a certificate from it, with its key."""
    authority, certificate = folder / f"authority-{port}.pem", folder / f"certificate-{port}.pem"
    made = trustme.CA()
    made.cert_pem.write_to_path(authority)
    made.issue_cert("127.0.0.1", "localhost").private_key_and_cert_chain_pem.write_to_path(certificate)
    return authority, certificate


@contextmanager
def redis(folder: Path, core: int) -> Iterator[str]:
    """The address of a Redis that keeps nothing on disk."""
    assert REDIS
    path = folder / "redis.sock"
    command = [REDIS, "--port", "0", "--unixsocket", str(path), "--save", "", "--appendonly", "no", "--logfile", "none"]
    with process(command, [core], folder / "redis.log", dict(os.environ)) as child:
        since = monotonic()
        while not path.is_socket():
            if child.poll() is not None or monotonic() - since > 10:
                raise RuntimeError("Redis did not start")
            sleep(0.002)
        yield f"unix://{path}"


def python() -> dict[str, str]:
    """An environment with nothing in it but what finds the code; the developer's settings and .env stay out."""
    return {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    """A port nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def status(port: int, path: str = "/healthz") -> int | None:
    """The status of a GET, None while nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            line = connection.recv(1000)
    except ConnectionError:
        return None
    return int(line[9:12]) if line.startswith(b"HTTP/1.1 ") else None
