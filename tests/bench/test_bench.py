"""A bench that does not notice a wrong answer measures nothing."""

import re

import pytest

from chatproxy.events import Done, Event, Finished, Started, TextDelta
from chatproxy.formats.openai import Chunks
from chatproxy.formats.ui_messages import UIMessages
from tests.bench.load import FORMATS, Caller
from tests.bench.plan import PROGRAMS, missing
from tests.bench.processes import Target
from tests.bench.replicas import behind
from tests.bench.report import Limit, tables
from tests.bench.script import HEAD, TAIL, TOKENS, WrongAnswerError, check, frames, piece

COUNT = 2 * len(TOKENS) + 5
ASKED = [TOKENS[number % len(TOKENS)] for number in range(COUNT)]


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


def numbered(*numbers: int) -> bytes:
    """An answer with numbered events: the first without a text, then the script's tokens."""
    events = [f"retry: 2000\nid: stream-{numbers[0]}\n\n"]
    texts = zip(ASKED, numbers[1:], strict=False)
    events += ["data: " + text.replace("\n", "\ndata: ") + f"\nid: stream-{number}\n\n" for text, number in texts]
    return HEAD + b"".join(piece(event.encode()) for event in events)


@pytest.mark.parametrize("numbers", [[0, 1, 2, 4], [0, 1, 2, 2], [1, 2, 3], [0, 11, 2]], ids=repr)
def test_wrong_numbers(numbers: list[int]) -> None:
    """Numbered events are right without a gap, a repetition or another beginning only."""
    read = FORMATS["resumable"].read
    assert check(numbered(*range(8)), raw=False, read=read) == 7
    with pytest.raises(WrongAnswerError, match="has the number"):
        check(numbered(*numbers), raw=False, read=read)
    with pytest.raises(WrongAnswerError, match="differs"):
        check(numbered(*range(8)).replace(b"relay", b"Relay"), raw=False, read=read)


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
    measured: dict[str, list[float]] = {
        "nginx": [1, 0.5, 0.4],
        "caddy": [1.0],
        "chatproxy": [5, 6, 40],
        "httpx": [60, 60, 50],
    }
    head, _, row = cells(tables({"flood": measured}))
    assert head == ["", "nginx", "Caddy", "chatproxy", "on httpx", "x nginx", "x Caddy", "x httpx", "target"]
    assert row == [
        "CPU per token, flood (µs)",
        "0.5 (0.4-1.0)",
        "1.0 (1.0-1.0)",
        "6.0 (5.0-40.0)",
        "60.0 (50.0-60.0)",
        "12.00",
        "6.00",
        "0.10",
        "≤ 8 x nginx (MISSED)",
    ]


def cells(text: str) -> list[list[str]]:
    """The rows of all tables in a text."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def test_table_without_peers() -> None:
    """Who was not measured has no column, and gives nothing to judge by."""
    head, _, row = cells(tables({"flood": {"chatproxy": [5]}}))
    assert head == ["", "chatproxy", "target"]
    assert row == ["CPU per token, flood (µs)", "5.0 (5.0-5.0)", "≤ 8 x nginx (not judged)"]


def test_tables_in_order() -> None:
    """What is over TLS comes first, and plain TCP is named as such."""
    told = tables({measure: {"chatproxy": [1]} for measure in ("paced", "far_burst_1_p50", "tls_paced")})
    assert re.findall(r"^\*\*(.*)\*\*$", told, re.MULTILINE) == [
        "Over TLS to Grok",
        "Over plain TCP to a Grok 80 ms away, after a pause",
        "Over plain TCP to Grok",
    ]
    with pytest.raises(ValueError, match="in no table: unheard_of"):
        tables({"unheard_of": {"chatproxy": [1]}})


def test_missing_programs() -> None:
    """Each program that is not installed is named, with what cannot be measured without it."""
    assert missing({"nginx": None, "caddy": "/usr/bin/caddy", "redis-server": None}) == [
        "nginx is not installed: no figures beside it, no processes",
        "redis-server is not installed: no replicas, no shared",
    ]
    assert missing(dict.fromkeys(PROGRAMS, "/here")) == []


def test_behind() -> None:
    """An event's delay elsewhere is that to its own arrival here, and those from before are left out."""
    here, there = [Caller(Target("", 0, 0, raw=False), FORMATS["resumable"]) for _ in range(2)]
    here.received = there.received = bytearray(b"a\n\nb\n\nc\n\nd\n\n")
    here.arrivals = [(1.0, 3), (2.0, 6), (3.0, 9), (4.0, 12)]
    there.arrivals = [(1.5, 4), (3.25, 11)]
    assert behind(here, there, since=1.5) == [1.25, 0.25]
