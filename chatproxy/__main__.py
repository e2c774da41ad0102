"""Start the process: environment, settings, server. `python -m chatproxy [--reload] [--local]`, or `… doctor URL`"""

import os
import signal

# Before the imports, which take most of the start. As process 1 of a container we have no default handlers: without
# these a signal would be lost, and the process be killed once the grace period is over. (The reloader's child runs
# this module as `__mp_main__`.)
if __name__ in ("__main__", "__mp_main__"):
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))

import argparse
import asyncio
import functools
import importlib
import logging
import socket
import sys
from contextlib import suppress
from pathlib import Path

import uvicorn
from uvicorn.supervisors import ChangeReload

from chatproxy import logs
from chatproxy.config import Settings, SettingsError
from chatproxy.config.environment import load_environment
from chatproxy.server import listen, serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="chatproxy", description="Grok on a web page, as server-sent events.")
    parser.add_argument("--reload", action="store_true", help="restart when the code changes (development)")
    parser.add_argument("--local", action="store_true", help="without a HOST listen on 127.0.0.1 only")
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
    arguments = parser.parse_args()
    if arguments.command == "doctor":
        from chatproxy.doctor.command import run as examine  # noqa: PLC0415 -- the service has no use for it

        signal.signal(signal.SIGINT, signal.default_int_handler)  # interrupted is not the same as all well
        sys.exit(examine(arguments.url, arguments.origin, arguments.token, arguments.json))
    settings = configure(local=arguments.local)
    _allow_many_files()
    try:
        sock = listen(settings)
    except OSError as error:
        sys.exit(f"HOST, PORT: cannot listen on {settings.host}:{settings.port}: {error.strerror}")
    if arguments.reload:
        package = str(Path(__file__).parent)
        config = uvicorn.Config("chatproxy", reload=True, reload_dirs=[package], log_config=None)
        # By its importable name: the child process has a `__main__` of its own.
        target = functools.partial(
            importlib.import_module("chatproxy.__main__").run_in_reload_child, local=arguments.local
        )
        ChangeReload(config, target=target, sockets=[sock]).run()
    else:
        run(settings, sock)


def run_in_reload_child(sockets: list[socket.socket] | None, *, local: bool) -> None:
    """What the reloader runs in a child process: settings are read anew, the socket is the same."""
    assert sockets
    run(configure(local=local), sockets[0], reloading=True)


def run(settings: Settings, sock: socket.socket, *, reloading: bool = False) -> None:
    """Serve until told to stop, on the fastest event loop there is."""
    loop_factory = uvicorn.Config("chatproxy", log_config=None).get_loop_factory()
    asyncio.Runner(loop_factory=loop_factory).run(serve(settings, sock, reloading=reloading))
    # Nothing is left to lose, but a look-up of a name cannot be cancelled, and would be waited for.
    logging.shutdown()
    os._exit(0)


def configure(*, local: bool = False) -> Settings:
    """Settings from the environment and `.env`, and logging as they say. Exits with 2 if they are wrong.

    `local`: HOST is 127.0.0.1 where neither sets it.
    """
    try:
        settings = load_environment(local=local)
    except SettingsError as error:
        print(error, file=sys.stderr)  # noqa: T201 -- there is no log yet
        sys.exit(2)
    logs.configure(settings.log_level, settings.log_format)
    return settings


def _allow_many_files() -> None:
    """An answer takes two files, and MAX_STREAMS of them more than the 1,024 that a process is usually given."""
    if sys.platform != "win32":  # pragma: no branch -- Windows has neither the module nor such a limit
        import resource  # noqa: PLC0415

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError):  # macOS takes less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
