"""What is written of an answer, and read by other replicas: its entries, and the error of one that was refused."""

import contextlib
from typing import Literal

import msgspec

from chatproxy.errors import ChatError, StoreUnavailable, by_code

FORMAT = b"1"
"""Of all of it. What another version has written is not found."""

encode = msgspec.msgpack.encode


class Entry(msgspec.Struct, array_like=True):
    """What one entry of an answer's Redis stream consists of, and what is published of it.

    `first` is the number of the first frame. `end` is empty while more follows. `by_proxy`: the end is not the owner's
    own, who may have told its readers more; so whatever number a reader has, this comes after it.
    """

    first: int
    frames: list[bytes]
    end: Literal["", "done", "failed", "left"] = ""
    code: str | None = None
    by_proxy: bool = False


_decode = msgspec.msgpack.Decoder(Entry).decode


def decode_entry(content: bytes) -> Entry | None:
    """What is in an entry; None where it is not ours."""
    try:
        return _decode(content)
    except (msgspec.DecodeError, RecursionError):
        return None


def decode_error(content: bytes | None) -> ChatError:
    """The error of an answer that was refused before its status."""
    with contextlib.suppress(msgspec.DecodeError):
        code, message, retry_after = msgspec.msgpack.decode(content or b"", type=tuple[str, str, int | None])
        return by_code(code)(message, retry_after=retry_after)
    return StoreUnavailable()


def encode_error(error: ChatError) -> bytes:
    """An error for those who wait for the same answer elsewhere."""
    return encode((error.code, error.message, error.retry_after))
