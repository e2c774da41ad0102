"""The event-stream format: what comes in is read by the standard, what goes out is read alike by everyone."""

import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatproxy import sse
from tests import readers

LIMIT = sse.MAX_EVENT_BYTES


def decoded(*pieces: bytes) -> list[bytes]:
    decoder = sse.Decoder()
    return [data for piece in pieces for data in decoder.feed(piece)]


# The checks that browsers are put to, by their names under eventsource/ in web-platform-tests.
STREAMS = [
    pytest.param(b"data: a\n\n", [b"a"], id="one event"),
    pytest.param(b"\xef\xbb\xbfdata: a\n\ndata: b\n\n", [b"a", b"b"], id="format-bom"),
    pytest.param(b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\ndata: b\n\n", [b"b"], id="format-bom-2: only one is dropped"),
    pytest.param(b"data: \xef\xbb\xbf\n\n", [b"\xef\xbb\xbf"], id="a byte order mark inside is text"),
    pytest.param(b": a\n:\n:b: c\ndata: 1\n: data: 2\n\n", [b"1"], id="format-comments"),
    pytest.param(b": ping\n\n: ping\n\ndata: a\n\n", [b"a"], id="comments alone are no event"),
    pytest.param(b"data: a\n", [], id="format-data-before-final-empty-line"),
    pytest.param(b"data:\n\ndata\ndata\n\ndata: a\n\n", [b"", b"\n", b"a"], id="format-field-data"),
    pytest.param(b"data:\ndata:  b \n\n", [b"\n b "], id="format-leading-space"),
    pytest.param(b"data:\ta\n\n", [b"\ta"], id="only a space is dropped"),
    pytest.param(b"data: a\ndata: b\n\n", [b"a\nb"], id="two lines"),
    pytest.param(b"event: x\nid: 1\nretry: 5\ndata: a\n\n", [b"a"], id="other fields"),
    pytest.param(b"event: x\nid: 1\n\n", [], id="format-field-event-empty: no data, no event"),
    pytest.param(b"Data: a\n data: b\ndata : c\ndat: d\ndata2: e\n\n", [], id="format-field-parsing: other names"),
    pytest.param(b"data: a\r\rdata: b\n\ndata: c\r\n\r\ndata: d\r\n\n", [b"a", b"b", b"c", b"d"], id="format-newlines"),
    pytest.param(b"data: a\rdata: b\r\ndata: c\n\n", [b"a\nb\nc"], id="three line breaks in one event"),
    pytest.param(b"data: a\0b\n\n", [b"a\0b"], id="format-null-character"),
    pytest.param("data: ok…\n\n".encode(), ["ok…".encode()], id="format-utf-8"),
    pytest.param("data: a\u2028b\u0085c\x0c\x0b\x1cd\n\n".encode(), ["a\u2028b\u0085c\x0c\x0b\x1cd".encode()], id="LF"),
    pytest.param(b"\n\n\n\ndata: a\n\n\n\n", [b"a"], id="blank lines"),
    pytest.param(b"", [], id="nothing"),
]


@pytest.mark.parametrize(("stream", "events"), STREAMS)
def test_reads_by_the_standard(stream: bytes, events: list[bytes]) -> None:
    """The data of every complete event comes out, whole or cut into single bytes."""
    assert decoded(stream) == events
    assert decoded(*(stream[i : i + 1] for i in range(len(stream)))) == events


# Made of what matters to the format, so that random streams hit its corners.
TOKENS = [
    b"data",
    b"data:",
    b"data: ",
    b"id: 1",
    b"event: e",
    b": c",
    b":",
    b" ",
    b"x",
    b"\0",
    b"\xef\xbb\xbf",
    b"\xc3",
]
streams = st.lists(st.sampled_from([*TOKENS, b"\n", b"\n", b"\r", b"\r\n"]), max_size=40).map(b"".join)


@given(streams, st.lists(st.integers(0, 100)))
@example(b"data: a\r\n\r\n", [8, 9, 10])
@example(b"\xef\xbb\xbfdata: a\n\n", [1, 2])
def test_any_cut_reads_like_the_standard(stream: bytes, cuts: list[int]) -> None:
    """However the network cuts a stream, its events are those that the standard's own steps find."""
    stream += b":"  # whether a last CR is a whole line break is known with the next byte
    edges = [0, *sorted(cut for cut in cuts if cut < len(stream)), len(stream)]
    pieces = [stream[a:b] for a, b in pairwise(edges)]
    expected = [event.data for event in readers.standard(stream)]
    assert [data.decode(errors="replace") for data in decoded(*pieces)] == expected


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(lambda: [b"data: " + b"x" * LIMIT], id="a line without an end"),
        pytest.param(lambda: [b"data: " + b"x" * LIMIT + b"\n\n"], id="a line"),
        pytest.param(lambda: [b"x" * 1000] * (LIMIT // 1000 + 1), id="a line in pieces"),
        pytest.param(lambda: [b":" + b"x" * LIMIT + b"\n"], id="a comment"),
        pytest.param(lambda: [b":" + b"x" * (LIMIT - 1), b"x\n"], id="a comment that grows too long as it ends"),
        pytest.param(lambda: [b"data: " + b"x" * 994 + b"\n"] * (LIMIT // 994 + 1), id="many data lines"),
        pytest.param(lambda: [b"data\n" * 1000] * (LIMIT // 1000 * 5), id="many empty data lines"),
    ],
)
def test_too_long_in_the_decoder(flood: Callable[[], list[bytes]]) -> None:
    """A line or an event over the limit is refused, not collected."""
    with pytest.raises(sse.TooLong):
        decoded(*flood())
    assert issubclass(sse.TooLong, ValueError)


def test_long_is_not_too_long() -> None:
    """An event just below the limit is read, and so is any number of comments and of events in one piece."""
    data = b"x" * (LIMIT - 100)
    assert decoded(b"data: " + data, b"\n\n") == [data]
    comments = b": ping\n" * (LIMIT // 2)
    assert decoded(b"data: a\n", comments, b"data: b\n\n") == [b"a\nb"]
    assert decoded(b"data: a\n\n" * LIMIT) == [b"a"] * LIMIT


def test_grows_with_the_size_and_no_faster() -> None:
    """A line in twice as many pieces takes about twice the time."""

    def cost(pieces: int) -> float:
        started = time.perf_counter()
        assert decoded(b"data: ", *[b"xx"] * pieces, b"\n\n") == [b"xx" * pieces]
        return time.perf_counter() - started

    assert min(cost(80_000) for _ in range(5)) < 3.5 * min(cost(40_000) for _ in range(5))


@pytest.mark.parametrize(
    ("frame", "sent"),
    [
        (sse.encode("a"), b"data: a\n\n"),
        (sse.encode(" a "), b"data:  a \n\n"),
        (sse.encode("a\n\nb\n"), b"data: a\ndata: \ndata: b\ndata: \n\n"),
        (sse.encode("[DONE]"), b"data: [DONE]\n\n"),
        (sse.encode("a", id="s-1"), b"data: a\nid: s-1\n\n"),
        (sse.encode("a\nb", id="s-1"), b"data: a\ndata: b\nid: s-1\n\n"),
        (sse.encode("a\u2028b\0😀"), "data: a\u2028b\0😀\n\n".encode()),
    ],
)
def test_frames(frame: bytes, sent: bytes) -> None:
    """One `data: ` line for each line of the text, the id after them, then a blank line."""
    assert frame == sent


@pytest.mark.parametrize("reader", readers.READERS)
def test_typed_frames(reader: Callable[[bytes], list[readers.Event]]) -> None:
    """An event with a type and an id is read as that by every reader."""
    assert reader(sse.encode("a\nb", "error", "s-1")) == [readers.Event("a\nb", "error", "s-1")]


texts = st.lists(
    st.one_of(st.sampled_from(["\r", "\n", "\r\n", "[DONE]", "\u2028", "\u0085", "\0", " ", "😀"]), st.text(max_size=5))
).map("".join)


@given(texts)
def test_encode_is_read_back(text: str) -> None:
    """What is encoded is what each reader gets."""
    data = text.replace("\r\n", "\n").replace("\r", "\n")
    for reader in readers.READERS:
        assert reader(sse.encode(data)) == [readers.Event(data)]


@pytest.mark.parametrize(
    ("deltas", "events"),
    [
        (["a", "b"], [["a"], ["b"]]),
        (["", "a", ""], [[], ["a"], []]),
        ([" a\u2028\u0085\x0c\0 "], [[" a\u2028\u0085\x0c\0 "]]),
        (["a\rb\r\nc\n\rd"], [["a\nb\nc\n\nd"]]),
        (["a\r", "\n", "b"], [["a\n"], [], ["b"]]),
        (["a\r", "", "\nb"], [["a\n"], [], ["b"]]),
        (["a\r", "\n\n"], [["a\n"], ["\n"]]),
        (["\r", "\r", "\n"], [["\n"], ["\n"], []]),
        (["\r", "\n\r", "\n"], [["\n"], ["\n"], []]),
        (["[DONE]"], [["[DO", "NE]"]]),
        (["[DONE]\n"], [["[DO", "NE]\n"]]),
        (["a\r\n[DONE]\rb"], [["a\n[DO", "NE]\nb"]]),
        (["x\r", "\n[DONE]"], [["x\n"], ["[DO", "NE]"]]),
        (["[DONE]\n[DONE]"], [["[DO", "NE]\n[DO", "NE]"]]),
        (["[DONE] ", " [DONE]", "[DONE]."], [["[DONE] "], [" [DONE]"], ["[DONE]."]]),
        (["[DO", "NE]"], [["[DO"], ["NE]"]]),
        (["[DONE]\u2028"], [["[DONE]\u2028"]]),
    ],
)
def test_text(deltas: list[str], events: list[list[str]]) -> None:
    """Deltas become events: line breaks are LF, and a line that looks like the end marker is cut in two."""
    text = sse.DeltaSplitter()
    assert [text.feed(delta) for delta in deltas] == events
