"""One line each, whose fields nobody can forge, and which tell of an exception where it was and not what it said."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from chatproxy import logs
from tests.conftest import MEASURED, ROOT

FORMATTERS = pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JSONFormatter()], ids=["text", "json"])

ENDS_OF_LINES = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
HOSTILE = [
    "",
    " ",
    "8.8.8.8 status=200 end=done",
    "a=b",
    '"',
    '" status="200',
    "\\",
    '\\" status=200',
    *ENDS_OF_LINES,
    "a\r\n2026-01-31T12:00:00.000Z info request status=200",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b31m",
    "\0\b\x7f",
    "\u202etxt.exe",
    "\ud83d",
]


def record(message: object, *args: object, name: str = "chatproxy.x", **extra: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": name, "levelname": "INFO", "msg": message, **extra})
    made.args = args
    return made


def parsed(line: str) -> dict[str, str]:
    """The fields of a line as a reader of logfmt sees them."""
    _, _, rest = line.split(" ", 2)
    pairs = re.findall(r'(?:^| )([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ "=]*)(?= |$)', rest)
    return {name: value[1:-1] if value.startswith('"') else value for name, value in pairs}


@pytest.mark.parametrize("value", HOSTILE)
def test_values_in_text(value: str) -> None:
    """Whatever a value is, it adds no field and no line, and nothing that a terminal obeys."""
    line = logs.TextFormatter().format(record("request", client=value, status=431))
    assert line.isprintable()
    assert parsed(line).keys() == {"client", "status"}
    assert parsed(line)["status"] == "431"
    assert f'client="{parsed(line)["client"]}" ' in line


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("/api/chat/{id}", "/api/chat/{id}"),
        ("caf\u00e9", "caf\u00e9"),
        (1.5, "1.5"),
        ("", '""'),
        ("a b", '"a b"'),
        ('say "a=b\\c"', r'"say \"a=b\\c\""'),
        ("a\r\nb\x1b\u2028\x85", r'"a\r\nb\x1b\u2028\x85"'),
    ],
)
def test_quotes(value: object, written: str) -> None:
    """A value is in quotes where it needs them, and nowhere else."""
    line = logs.TextFormatter().format(record("request", client=value, status=200))
    assert line.endswith(f" info request client={written} status=200")


@pytest.mark.parametrize("message", HOSTILE)
def test_messages_in_text(message: str) -> None:
    """Nor does a message add a field or a line."""
    line = logs.TextFormatter().format(record("%s", message, status=431))
    assert line.isprintable()
    assert line.endswith(" status=431")
    if "=" in message or '"' in message:
        assert re.fullmatch(r'\S+ info "(?:[^"\\]|\\.)*" status=431', line)


@pytest.mark.parametrize("value", HOSTILE)
def test_json(value: str) -> None:
    """A line of JSON is one line for every reader, and says what was given."""
    line = logs.JSONFormatter().format(record("%s", value, client=value, status=431))
    assert line.isascii()
    assert len(line.splitlines()) == 1
    fields = json.loads(line)
    assert (fields["message"], fields["client"], fields["status"]) == (value, value, 431)


# Exceptions.


def raised(make: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011 -- any
        make()
    return caught.value


def caused() -> None:
    try:
        raise KeyError("canary")
    except KeyError as error:
        raise ValueError("canary\ncanary") from error


def in_context() -> None:
    try:
        caused()
    finally:
        raise TypeError("canary")


def grouped() -> None:
    raise ExceptionGroup("canary", [raised(caused), ExceptionGroup("canary", [OSError(5, "canary")])])


def suppressed() -> None:
    try:
        caused()
    except ValueError:
        raise TypeError("canary") from None


def in_a_circle() -> None:
    one, other = ValueError("canary"), TypeError("canary")
    one.__cause__, other.__cause__ = other, one
    raise one


def endless() -> None:
    raise ExceptionGroup("canary", [ValueError("canary")] * 50 + [ValueError(f"canary {n}") for n in range(50)])


def deep(depth: int = 400) -> None:
    if depth:
        deep(depth - 1)
    raise RecursionError("canary")


EXCEPTIONS: dict[Callable[[], object], list[str]] = {
    caused: ["ValueError", "because of KeyError"],
    in_context: ["TypeError", "while handling ValueError", "because of KeyError"],
    grouped: ["ExceptionGroup", "with ValueError", "because of KeyError", "with ExceptionGroup", "with OSError"],
    suppressed: ["TypeError"],
    in_a_circle: ["ValueError", "because of TypeError"],
    endless: ["ExceptionGroup", *["with ValueError"] * (logs.MAX_EXCEPTIONS - 1)],
    deep: ["RecursionError"],
}


@FORMATTERS
@pytest.mark.parametrize(("make", "named"), EXCEPTIONS.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_exceptions(formatter: logging.Formatter, make: Callable[[], object], named: list[str]) -> None:
    """Of an exception, its causes, contexts and groups a line has types and places, without a word, up to a bound."""
    error = raised(make)
    line = formatter.format(record("%s: %r", error, error, exc_info=(type(error), error, error.__traceback__)))
    assert "canary" not in line
    assert re.findall(r"(?:\w+ \w+ |with )?\b\w+(?:Error|Group)(?=: )", line.partition("exception")[2]) == named
    assert re.search(rf"test_logs\.py:\d+ {make.__name__}", line)
    assert len(line) < 10_000


@FORMATTERS
@pytest.mark.parametrize(
    "given",
    [
        record(ValueError("canary")),
        record("%s", ValueError("canary")),
        record("%(x)s", {"x": ValueError("canary")}),
        record("x", problem=ValueError("canary"), problems=[ValueError("canary")]),
        record("x", exc_info=(None, None, None)),
        record("Traceback (most recent call last):\n  g('')\nx: canary", name="uvicorn.error"),
        record("failed\ncanary", name="uvicorn.error"),
        record("canary", name="asyncio"),
        record("Exception in callback canary()\nhandle: <canary>", name="asyncio"),
        record("%r: %d", "canary", 1, name="asyncio"),
        record("%(x)r", {"x": "canary"}, name="asyncio"),
    ],
)
def test_exceptions_in_messages(formatter: logging.Formatter, given: logging.LogRecord) -> None:
    """An exception that is an argument, a field or a part of a library's message is not quoted either."""
    if isinstance(given.args, tuple) and len(given.args) == 1 and isinstance(given.args[0], dict):
        given.args = given.args[0]  # as logging does itself
    assert "canary" not in formatter.format(given)


def test_messages_of_libraries() -> None:
    """What a library's message says without quoting anything is kept."""
    slow = record("Executing %s took %.3f seconds", "<Task canary>", 0.25, name="asyncio")
    lost = record("Task exception was never retrieved\nfuture: <canary>", name="asyncio")
    traceback = (
        'Traceback (most recent call last):\n  File "/a b/c.py", line 7, in f\n    g("canary")\nx.Error: canary\n'
    )
    failed = record(traceback, name="uvicorn.error")
    stopped = record("Application startup failed. Exiting.", name="uvicorn.error")
    assert [json.loads(logs.JSONFormatter().format(each))["message"] for each in (slow, lost, failed, stopped)] == [
        "Executing … took 0.250 seconds",
        "Task exception was never retrieved",
        "x.Error: /a b/c.py:7 f",
        "Application startup failed. Exiting.",
    ]


PROGRAM = """
import asyncio, gc, sys, threading, warnings
from chatproxy import logs

def fail(*_):
    raise ValueError("canary")

class Unraisable:
    __del__ = fail

async def task():
    fail()

async def main():
    loop = asyncio.get_running_loop()
    loop.call_soon(fail, "canary")
    lost = asyncio.create_task(task(), name="canary")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del lost
    gc.collect()
    loop.call_exception_handler({"message": "canary", "exception": ValueError("canary")})

logs.configure("info", sys.argv[1])
with asyncio.Runner(loop_factory=__import__(sys.argv[2]).new_event_loop) as runner:
    runner.run(main())
warnings.warn("canary")
Unraisable()
thread = threading.Thread(target=fail, name="canary")
thread.start()
thread.join()
fail()
"""


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_what_python_complains_of(log_format: str, loop: str) -> None:
    """What nobody catches, in a task, a callback, a thread or anywhere, and warnings are lines without a word of it."""
    ran = subprocess.run(  # noqa: S603
        [sys.executable, "-W", "always", "-c", PROGRAM, log_format, loop],
        env={"PYTHONPATH": str(ROOT), **MEASURED},
        stderr=subprocess.PIPE,
        check=False,
        text=True,
    )
    lines = ran.stderr.splitlines()
    assert ran.returncode == 1
    assert "canary" not in ran.stderr
    begin = r'\{"time": ' if log_format == "json" else r"\d{4}-\d\d-\d\dT[\d:.]+Z (?:warning|error|critical) "
    assert [line for line in lines if not re.match(begin, line)] == []
    said: list[Any] = [
        *("Exception in callback", "Task exception was never retrieved", "an error in the event loop"),
        *("a warning of Python's", "an exception that could not be raised", "an exception that ended a thread"),
        "an exception that nobody caught",
    ]
    assert [next((message for message in said if message in line), line) for line in lines] == said
    assert sum("ValueError" in line for line in lines) == len(said) - 1
    assert sum("UserWarning" in line for line in lines) == 1
