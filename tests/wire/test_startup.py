"""Before the first request: what is configured counts, or the process says why not and does not start."""

import asyncio
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from tests.conftest import KEY, MEASURED, ROOT, TIMEOUT, free_port, refusal, spawned
from tests.readers import answer
from tests.upstream import Upstream

pytestmark = pytest.mark.anyio

NOBODY = "http://127.0.0.1:1/v1"


def ended(cwd: Path, **variables: object) -> tuple[int, list[str]]:
    """The exit code of `python -m chatproxy`, which is to end by itself, and the lines that it has written."""
    process = subprocess.run(
        [sys.executable, "-m", "chatproxy"],
        cwd=cwd,
        env={name: str(value) for name, value in variables.items()} | {"PYTHONPATH": str(ROOT)} | MEASURED,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return process.returncode, (process.stdout + process.stderr).splitlines()


def test_all_that_is_wrong(tmp_path: Path) -> None:
    """The file's lines, keys, certificates and proxies are told together, without a secret, and nothing starts."""
    (tmp_path / ".env").write_text(
        'GROK_API_KEY=xai-canary\nGROK_MODEL="grok"\nRATE_LIMIT: canary\nSSL_CERT_FILE=none\n'
    )
    (tmp_path / "key").touch()
    wrong = {
        "GROK_API_KEY_FILE": tmp_path / "key",
        "https_proxy": "socks4://user:canary@proxy",
        "GROK_MODEL": '"grok-4.3"',
    }
    assert ended(tmp_path, **wrong) == (
        2,
        [
            ".env: line 3 cannot be read: expected NAME=value, with every quote closed",
            "GROK_API_KEY_FILE: holds no key",
            "GROK_MODEL: is in quotes; leave them out, not '\"grok-4.3\"'",
            "SSL_CERT_FILE: expected a readable file of certificates in PEM format, not 'none'",
            "https_proxy: expected a proxy such as http://proxy.example:3128, by http, https, socks5 or socks5h",
        ],
    )


def test_env_file_that_is_a_directory(tmp_path: Path) -> None:
    """A directory in place of `.env`, which Docker makes where a file to mount is missing, is not passed over."""
    (tmp_path / ".env").mkdir()
    assert ended(tmp_path, PORT="x") == (2, [".env: cannot be read (IsADirectoryError)", "PORT: expected int, not 'x'"])


async def test_demo_with_bad_certificates_and_proxies() -> None:
    """The demo needs neither, and starts."""
    bad: dict[str, Any] = {"ssl_cert_file": "/nowhere", "ssl_cert_dir": "/nowhere", "all_proxy": "socks://proxy:1080"}
    async with spawned(NOBODY, grok_api_key=None, **bad) as service:
        assert "demo" in answer((await service.ask()).content)


async def test_warnings_at_start(tmp_path: Path) -> None:
    """What is allowed but may not be meant is logged once, with names and without values."""
    (tmp_path / ".env").write_text("MAX_STREAM=canary\n")
    changes: dict[str, Any] = {"allowed_origin": "https://canary.example", "grok_base_url": "http://gateway.example/v1"}
    async with spawned(NOBODY, cwd=tmp_path, **changes) as service:
        service.process.terminate()
        assert await service.exit_code() == 0
    assert "canary" not in service.stderr
    assert re.findall(r" warning (.*)", service.stderr) == [
        "GROK_BASE_URL is http:// to another machine: the API key can be read on the way",
        "ALLOWED_ORIGIN is not a setting and counts for nothing: is ALLOWED_ORIGINS meant?",
        "MAX_STREAM is not a setting and counts for nothing: is MAX_STREAMS meant?",
    ]


# Certificates.


@pytest.mark.parametrize("transport", ["fast", "httpx"])
async def test_certificates_to_trust(transport: str, tmp_path: Path) -> None:
    """A Grok whose authority SSL_CERT_FILE names is reached, also if `.env` sets it; else the log says what to do."""
    authority, other = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    (tmp_path / ".env").write_text("SSL_CERT_FILE=ca.pem\n")
    async with Upstream(tls=context) as grok:
        async with spawned(grok.url, cwd=tmp_path, grok_transport=transport) as service:
            assert answer((await service.ask()).content) == "Hello, world"
        other.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        async with spawned(grok.url, cwd=tmp_path, grok_transport=transport, grok_retries=0) as service:
            response = await service.ask()
            assert (response.status_code, refusal(response)["code"]) == (502, "upstream_unreachable")
            service.process.terminate()
            await service.exit_code()
    why = "unable to get local issuer certificate; SSL_CERT_FILE names the certificates to trust"
    assert re.findall(r" warning (.*?)(?: request_id=.*)?\n", service.stderr) == [
        f"upstream_unreachable: SSLCertVerificationError: {why}"
    ]


# The listening socket.


async def listening(stderr: asyncio.StreamReader) -> str:
    """What the log says about where the service listens, once it does."""
    async with asyncio.timeout(30):
        text = (await stderr.readuntil(b": open http")) + await stderr.readline()
    return text.decode().rpartition(" info listening on ")[2].rstrip()


def health_check() -> list[str]:
    """The command of the image's HEALTHCHECK, with this Python."""
    text = (ROOT / "Dockerfile").read_text()
    [code] = re.findall(r'HEALTHCHECK .* CMD \["python", "-ISc", "(.*?)"\]', text, re.DOTALL)
    return [sys.executable, "-ISc", code.replace("\\\n", "").replace("\\\\", "\\")]


async def status(url: str) -> int:
    async with httpx.AsyncClient(trust_env=False, timeout=TIMEOUT) as client:
        return (await client.get(url)).status_code


@pytest.mark.parametrize(
    ("host", "told", "ipv4", "ipv6"),
    [
        ("::", "[::]:{0}: open http://localhost:{0}", True, True),
        ("0:0::", "[::]:{0}: open http://localhost:{0}", True, True),
        ("0.0.0.0", "0.0.0.0:{0}: open http://localhost:{0}", True, False),  # noqa: S104 -- it is the subject
        ("127.0.0.1", "127.0.0.1:{0}: open http://localhost:{0}", True, False),
        ("localhost", "127.0.0.1:{0}: open http://localhost:{0}", True, False),
        ("127.0.0.2", "127.0.0.2:{0}: open http://localhost:{0}", False, False),
    ],
)
async def test_host(host: str, told: str, ipv4: bool, ipv6: bool) -> None:
    """`::` listens for IPv4 and IPv6; the log says where to look, and the image's health check finds the service."""
    port = free_port()
    # Always told to be ready at an address that it has: `spawned` asks 127.0.0.1.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chatproxy"),
        cwd=ROOT / "tests",
        env={"HOST": host, "PORT": str(port), "PYTHONPATH": str(ROOT), **MEASURED},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        assert await listening(process.stderr) == told.format(port)
        for address, reached in {"127.0.0.1": ipv4, "[::1]": ipv6}.items():
            if reached:
                assert await status(f"http://{address}:{port}/openapi.json") == 200
            else:
                with pytest.raises(httpx.ConnectError):
                    await status(f"http://{address}:{port}/openapi.json")
        check = await asyncio.create_subprocess_exec(*health_check(), env={"HOST": host, "PORT": str(port)})
        async with asyncio.timeout(TIMEOUT):
            assert await check.wait() == 0
    finally:
        process.terminate()
        rest = (await process.stderr.read()).decode()
        assert await process.wait() == 0
    assert rest.count("client=127.0.0.1 ") >= ipv4  # not ::ffff:127.0.0.1, which no rule for addresses would know
    assert "::ffff:" not in rest


@pytest.mark.parametrize(
    ("file", "variables", "told"),
    [
        ("", {}, "127.0.0.1"),
        ("HOST=\n", {}, "127.0.0.1"),
        ("", {"HOST": ""}, "127.0.0.1"),
        ("HOST=0.0.0.0\n", {}, "0.0.0.0"),  # noqa: S104 -- it is the subject
        ("HOST=127.0.0.1\n", {"HOST": "0.0.0.0"}, "0.0.0.0"),  # noqa: S104
    ],
)
async def test_make_run_is_local(tmp_path: Path, file: str, variables: dict[str, str], told: str) -> None:
    """What `make run` starts is for this machine only, unless the environment or `.env` says otherwise."""
    makefile = (ROOT / "Makefile").read_text()
    [command] = re.findall(r"^run:.*\n\t\$\(BIN\)/python (.*)$", makefile, re.MULTILINE)
    (tmp_path / ".env").write_text(file)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *command.split()),
        cwd=tmp_path,
        env={"PORT": str(free_port()), "PYTHONPATH": str(ROOT), **variables, **MEASURED},
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stderr is not None
    try:
        line = await listening(process.stderr)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        await process.stderr.read()
        assert await process.wait() == 0
    assert line.startswith(f"{told}:")


# Signals.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_during_the_imports(tmp_path: Path, number: signal.Signals) -> None:
    """A signal that comes while the process still loads its modules ends it with exit code 0 and without a word."""
    (tmp_path / "uvicorn.py").write_text("open('pipe').read()")
    await ends_in_order(tmp_path, number, "pipe")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_while_settings_are_read(tmp_path: Path, number: signal.Signals) -> None:
    """So does one that comes while it reads its settings."""
    await ends_in_order(tmp_path, number, ".env")


async def ends_in_order(directory: Path, number: signal.Signals, name: str) -> None:
    """Start a process that reads the named pipe of this name, and send it a signal once it does."""
    os.mkfifo(directory / name)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "chatproxy"),
        cwd=directory,
        env={"PYTHONPATH": f"{directory}:{ROOT}", "GROK_API_KEY": KEY, **MEASURED},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(30):
            writer = await writing_end(directory / name)
        try:
            process.send_signal(number)
            async with asyncio.timeout(TIMEOUT):
                assert await process.wait() == 0
            assert await process.stderr.read() == b""
        finally:
            os.close(writer)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def writing_end(pipe: Path) -> int:
    """A descriptor of a named pipe, once somebody reads it. Until then it cannot be opened without blocking."""
    while True:
        with suppress(OSError):
            return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        await asyncio.sleep(0.01)  # nobody tells when it is read


async def test_port_of_another_family_in_use() -> None:
    """`::` needs the port for both families; that it is taken is told in one line."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, [line] = await asyncio.to_thread(ended, ROOT / "tests", HOST="::", PORT=port)
    assert code == 1
    assert line.startswith(f"HOST, PORT: cannot listen on :::{port}: Address already in use")
