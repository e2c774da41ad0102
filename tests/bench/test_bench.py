"""A bench that does not notice a wrong answer measures nothing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatproxy.events import Done, Event, Finished, Started, TextDelta
from chatproxy.formats.openai import Chunks
from chatproxy.formats.ui_messages import UIMessages
from tests.bench import processes
from tests.bench.load import FORMATS
from tests.bench.report import Limit, table
from tests.bench.scenarios import exactness
from tests.bench.script import HEAD, TAIL, TOKENS, WrongAnswerError, check, frames, piece

COUNT = 2 * len(TOKENS) + 5
ASKED = [TOKENS[number % len(TOKENS)] for number in range(COUNT)]

linux = pytest.mark.skipif(sys.platform != "linux", reason="cores and CPU time are read as Linux has them")


def served(*tokens: str) -> bytes:
    """An answer as the service writes it, without its end."""
    events = ("data: " + token.replace("\n", "\ndata: ") + "\n\n" for token in tokens)
    return HEAD + b"".join(piece(event.encode()) for event in events)


END = piece(b"data: [DONE]\n\n") + b"0\r\n\r\n"
RAW = HEAD + frames(0, COUNT) + TAIL
SERVED = served(*ASKED) + END


def test_exact_answers() -> None:
    """What the script says is right, in the upstream's format and in the service's."""
    assert check(RAW, raw=True, tokens=COUNT) == COUNT
    assert check(SERVED, raw=False, tokens=COUNT) == COUNT


@pytest.mark.parametrize(
    "wrong",
    [
        served(*ASKED[:7], ASKED[7] + " ", *ASKED[8:]) + END,
        served(*ASKED[:7], *ASKED[8:]) + END,
        served(*ASKED[:7], ASKED[7], *ASKED[7:]) + END,
        served(*ASKED[:8], ASKED[7], *ASKED[9:]) + END,
        served(*ASKED[:-1]) + END,
        served(*ASKED) + b"0\r\n\r\n",
        served(*ASKED) + piece(b"data: [DONE]\n\n"),
        served(*ASKED, "[DONE]") + END,
        SERVED.replace(b"data: ", b"data:", 1),
        SERVED.replace(b"\r\n\r\n", b"\r\n\r\nx", 1),
        SERVED.replace(b"data: [DONE]\n\n", b": keep-alive\n\n"),
        SERVED.replace(b"200 OK", b"500 No"),
        served(*ASKED[:-1]) + piece(b'event: error\ndata: {"error":{}}\n\n') + b"0\r\n\r\n",
    ],
    ids=[
        "a space",
        "a token less",
        "a token more",
        "another token",
        "the last token",
        "no done marker",
        "no tidy end",
        "two done markers",
        "no space",
        "broken coding",
        "a comment for the end",
        "no 200",
        "an error",
    ],
)
def test_wrong_answers(wrong: bytes) -> None:
    """Whatever differs is noticed."""
    with pytest.raises(WrongAnswerError):
        check(wrong, raw=False, tokens=COUNT)


def test_other_formats() -> None:
    """The service's other formats are read as well as its own."""
    texts: list[Event] = [Started(), *map(TextDelta, ASKED), Finished(), Done()]
    for format, encoder in (
        ("ui", UIMessages("m")),
        ("openai", Chunks("r", "m", 0, include_usage=False)),
    ):
        events = HEAD + b"".join(piece(frame) for frame in encoder.encode(texts)) + b"0\r\n\r\n"
        assert check(events, raw=False, tokens=COUNT, read=FORMATS[format].read) == COUNT
        with pytest.raises(WrongAnswerError):
            check(events.replace(b"relay", b"Relay", 1), raw=False, tokens=COUNT, read=FORMATS[format].read)


def test_wrong_byte() -> None:
    """So is one bit of a text in the upstream's own format."""
    at = RAW.index(b"relay")
    with pytest.raises(WrongAnswerError):
        check(RAW[:at] + b"R" + RAW[at + 1 :], raw=True, tokens=COUNT)


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "served"])
def test_cut_answers(raw: bool) -> None:
    """An answer that the bench cut off itself is right as far as it goes, wherever that is."""
    whole = RAW if raw else SERVED
    counts = [check(whole[:size], raw=raw) for size in range(0, len(whole), 61 if raw else 1)]
    assert sorted(set(counts)) == list(range(COUNT + 1))
    assert counts == sorted(counts)


def test_limits() -> None:
    """Targets are judged by the medians, and not at all without their yardstick."""
    assert Limit("", "nginx", times=2).met({"chatproxy": 9, "nginx": 5}) is True
    assert Limit("", "nginx", times=2).met({"chatproxy": 11, "nginx": 5}) is False
    assert Limit("", "nginx", times=2).met({"chatproxy": 9}) is None
    assert Limit("", "nginx", times=1, plus=1).met({"chatproxy": 6, "nginx": 5}) is True
    assert Limit("", plus=10).met({"chatproxy": 11, "nginx": 5}) is False
    assert Limit("", "nginx", plus=10).met({"chatproxy": 11, "nginx": 5}) is False
    assert Limit("", "nginx", plus=10).met({"chatproxy": 11, "nginx": 12}) is None


def test_table() -> None:
    """Medians with their spread, and the ratios of the medians."""
    row = table({"flood": {"nginx": [1, 0.5, 0.4], "chatproxy": [5, 6, 40], "httpx": [60, 60, 50]}}).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        "0.5 (0.4-1.0)",
        "6.0 (5.0-40.0)",
        "60.0 (50.0-60.0)",
        "12.00",
        "0.10",
        "≤ 8 x nginx (MISSED)",
    ]


@linux
@pytest.mark.anyio
async def test_upstream_and_load(tmp_path: Path) -> None:
    """The scripted upstream plays the script, and the load sees all of it."""
    with processes.upstream(tmp_path, processes.cores().upstream) as upstream:
        assert await exactness(upstream) > 10_000
        assert upstream.cpu() > 0
        assert upstream.resident() > 2**20


@linux
def test_run() -> None:
    """The command runs: every proxy passes the check, on both transports, and is measured."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", "--quick", "--only", "start"],
        cwd=processes.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.search(r"^[\d,]+ tokens checked", done.stdout, re.MULTILINE)
    assert re.search(
        r"^\| start to the first 200 on /healthz \(ms\) +\|.*\| ≤ 500 \(\w+\) +\|$", done.stdout, re.MULTILINE
    )
