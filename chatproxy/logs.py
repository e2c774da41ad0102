"""What log lines look like: text or JSON, one line each, to stderr.

Of an exception a line names types and places, never the text: it may quote what clients and Grok have said, or a key.
"""

import json
import logging
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import TextIO

# The request that is being served, or whose answer is being read: each line written meanwhile names it.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

log = logging.getLogger(__name__)

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}

# So many exceptions of a chain or group are named, and so many of the innermost frames of each.
MAX_EXCEPTIONS = 20
MAX_FRAMES = 50

# How the messages of asyncio and uvloop begin. What follows may be the repr of an exception or of an argument.
_EVENT_LOOP_MESSAGES = (
    "Task exception was never retrieved",
    "Future exception was never retrieved",
    "Task was destroyed but it is pending!",
    "Exception in callback",
    "Unhandled exception in event loop",
    "Unhandled exception in client_connected_cb",
    "Unhandled error in exception handler",
    "Exception in default exception handler",
    "Fatal error",
    "Fatal read error",
    "Fatal write error",
    "Error on transport creation",
    "SSL error",
    "SSL handshake failed",
    "an error occurred during closing of asynchronous generator",
    "unhandled exception during asyncio.run() shutdown",
    "An open stream was garbage collected",
    "Task group",
    "socket.send() raised exception.",
    "socket.accept() out of system resource",
)

# The traceback of a failed start comes from Starlette as a text: what is indented is code, and the type comes next.
_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ ].*\n)*(?P<type>[\w.]+)")
_FRAME = re.compile(r'  File "(.+)", line (\d+), in (.+)')

_SPECIAL = re.compile(r'[ "=\\]')


def _named(error: BaseException, seen: set[int]) -> str:
    """Type and places of an exception, of those in its group, and of the ones that it came from."""
    seen.add(id(error))
    frames = [*traceback.walk_tb(error.__traceback__)][-MAX_FRAMES:]
    places = (f"{frame.f_code.co_filename}:{line} {frame.f_code.co_name}" for frame, line in frames)
    text = f"{type(error).__name__}: {' > '.join(places)}"
    for link, other in _related(error):
        if id(other) not in seen and len(seen) < MAX_EXCEPTIONS:
            text += f" [{link} {_named(other, seen)}]"
    return text


def _related(error: BaseException) -> Iterator[tuple[str, BaseException]]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield "with", each
    if error.__cause__ is not None:
        yield "because of", error.__cause__
    elif error.__context__ is not None and not error.__suppress_context__:
        yield "while handling", error.__context__


def _message(record: logging.LogRecord) -> str:
    """The message without texts of exceptions."""
    if isinstance(record.msg, BaseException):
        return type(record.msg).__name__
    if record.name == "asyncio" and not record.args:
        text = str(record.msg)
        return next((known for known in _EVENT_LOOP_MESSAGES if text.startswith(known)), "an error in the event loop")
    plain = _without_reprs if record.name == "asyncio" else _without_exceptions
    arguments = record.args or ()
    if isinstance(arguments, Mapping):
        arguments = {name: plain(value) for name, value in arguments.items()}
    else:
        arguments = tuple(map(plain, arguments))
    message = str(record.msg) % arguments if arguments else str(record.msg)
    if record.name.startswith("chatproxy"):
        return message
    if match := _TRACEBACK.match(message):
        places = (f"{filename}:{line} {name}" for filename, line, name in _FRAME.findall(match[0]))
        return f"{match['type']}: {' > '.join(places)}"
    return message.partition("\n")[0]


def _without_exceptions(value: object) -> object:
    return type(value).__name__ if isinstance(value, BaseException) else value


def _without_reprs(value: object) -> object:
    """For asyncio, whose arguments are numbers, tasks and callbacks, and reprs of these."""
    return value if isinstance(value, int | float) else _Hidden()


class _Hidden:
    def __repr__(self) -> str:
        return "…"


class _Formatter(logging.Formatter):
    def formatException(  # noqa: N802 -- logging's name
        self,
        ei: tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None],
    ) -> str:
        return "" if ei[1] is None else _named(ei[1], set())

    def fields(self, record: logging.LogRecord) -> dict[str, object]:
        fields: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        extra = {"request_id": request_id.get(), **vars(record)}
        for name, value in extra.items():
            if name not in _STANDARD and value is not None:
                # Anything else has a repr that may quote an exception.
                fields[name] = value if isinstance(value, str | int | float) else type(value).__name__
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return fields


class TextFormatter(_Formatter):
    """`2026-01-31T12:00:00.000Z info request route=/api/chat status=200 ...`: time, level, message, and logfmt."""

    def format(self, record: logging.LogRecord) -> str:
        fields = self.fields(record)
        moment, level, message = (str(fields.pop(name)) for name in ("time", "level", "message"))
        del fields["logger"]
        # The words of a message need no quotes; what looks like another field does.
        words = [moment, level, _quoted(message) if '"' in message or "=" in message else _escaped(message)]
        words += [f"{name}={_logfmt(str(value))}" for name, value in fields.items()]
        return " ".join(words)


def _logfmt(value: str) -> str:
    return value if value and value.isprintable() and not _SPECIAL.search(value) else _quoted(value)


def _quoted(text: str) -> str:
    return '"' + _escaped(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _escaped(text: str) -> str:
    """With escapes for line breaks of all kinds, ANSI sequences, controls and half surrogates."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


class JSONFormatter(_Formatter):
    """One JSON object a line, with the same fields; in ASCII, as some readers take U+2028 for the end of a line."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(self.fields(record))


def configure(level: str, format: str) -> None:
    """Set up logging for the process: ours at `level`, the libraries' from warnings on; and Python's own complaints."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter() if format == "json" else TextFormatter())
    logging.basicConfig(level=max(logging.WARNING, logging.getLevelName(level.upper())), handlers=[handler], force=True)
    logging.getLogger("chatproxy").setLevel(level.upper())
    warnings.showwarning = _log_warning
    sys.excepthook = _log_uncaught
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_thread


def _log_warning(
    message: Warning | str,  # noqa: ARG001 -- it may hold the repr of anything
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,  # noqa: ARG001
    line: str | None = None,  # noqa: ARG001
) -> None:
    log.warning("a warning of Python's", extra={"category": category.__name__, "place": f"{filename}:{lineno}"})


def _log_uncaught(kind: type[BaseException], error: BaseException, tb: TracebackType | None) -> None:
    log.critical("an exception that nobody caught", exc_info=(kind, error, tb))


def _log_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    log.error("an exception that could not be raised", exc_info=unraisable.exc_value)


def _log_thread(args: threading.ExceptHookArgs) -> None:
    log.error("an exception that ended a thread", exc_info=args.exc_value)
