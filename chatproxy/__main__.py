"""Start the process: environment, settings, server. `python -m chatproxy [--reload]`, or `… doctor URL`"""

import argparse
import asyncio
import importlib
import logging
import os
import resource
import socket
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn
from dotenv import dotenv_values
from uvicorn.supervisors import ChangeReload

from chatproxy import logs
from chatproxy.config import Invalid, Settings, load
from chatproxy.server import listen, serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="chatproxy", description="Grok on a web page, as server-sent events.")
    parser.add_argument("--reload", action="store_true", help="restart when the code changes (development)")
    commands = parser.add_subparsers(dest="command", metavar="doctor URL")
    doctor = commands.add_parser("doctor", help="examine a deployed service; see `doctor --help`")
    doctor.add_argument("url", help="its address, such as https://chat.example.com")
    doctor.add_argument("--origin", metavar="URL", help="another site whose pages are to call it")
    doctor.add_argument(
        "--token",
        default=os.environ.get("CHATPROXY_TOKEN"),
        help="a token that may start answers; better in CHATPROXY_TOKEN",
    )
    doctor.add_argument("--json", action="store_true", help="the report for programs")
    given = parser.parse_args()
    if given.command == "doctor":
        from chatproxy.doctor.command import run as examine  # noqa: PLC0415 -- the service has no use for it

        sys.exit(examine(given.url, given.origin, given.token, given.json))
    reload = given.reload
    settings = configure()
    # An answer takes two files, and MAX_STREAMS of them more than the 1,024 that a process is usually given.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError):  # macOS takes less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        sock = listen(settings)
    except OSError as error:
        sys.exit(f"HOST, PORT: cannot listen on {settings.host}:{settings.port}: {error.strerror}")
    if reload:
        package = str(Path(__file__).parent)
        config = uvicorn.Config("chatproxy", reload=True, reload_dirs=[package], log_config=None)
        # By its importable name: the child process has a `__main__` of its own.
        target = importlib.import_module("chatproxy.__main__").rerun
        ChangeReload(config, target=target, sockets=[sock]).run()
    else:
        run(settings, sock)


def rerun(sockets: list[socket.socket] | None) -> None:
    """What the reloader runs in a child process: settings are read anew, the socket is the same."""
    assert sockets
    run(configure(), sockets[0], reloading=True)


def run(settings: Settings, sock: socket.socket, *, reloading: bool = False) -> None:
    """Serve until told to stop, on the fastest event loop there is."""
    loop_factory = uvicorn.Config("chatproxy", log_config=None).get_loop_factory()
    asyncio.Runner(loop_factory=loop_factory).run(serve(settings, sock, reloading=reloading))
    # Nothing is left to lose, but a look-up of a name cannot be cancelled, and would be waited for.
    logging.shutdown()
    os._exit(0)


def configure() -> Settings:
    """Settings from the environment and `.env`, and logging as they say. Exits with 2 if they are wrong."""
    try:
        given = {name: value for name, value in dotenv_values(".env", interpolate=False).items() if value is not None}
        settings = load({**given, **os.environ})
    except (Invalid, OSError, UnicodeDecodeError) as problem:
        told = problem if isinstance(problem, Invalid) else f".env: cannot be read ({type(problem).__name__})"
        print(told, file=sys.stderr)  # noqa: T201 -- there is no log yet
        sys.exit(2)
    logs.configure(settings.log_level, settings.log_format)
    return settings


if __name__ == "__main__":
    main()
