"""The checks that take an answer: how its tokens arrive, whether it ends and resumes, and what silence does to it."""

import asyncio
import re
from collections.abc import Sequence
from urllib.parse import urljoin, urlsplit

from chatproxy.doctor import advice
from chatproxy.doctor.arrivals import Arrivals, judge
from chatproxy.doctor.client import Event, Reply
from chatproxy.doctor.visit import Visit

# About a hundred tokens of Grok's. (The demo always says the same.)
QUESTION = "Count from one to forty, in words, with spaces between them and nothing else."

# After so many tokens the connection is dropped on purpose.
DROP_AFTER = 30

# So often a lost connection is made anew.
TRIES = 5


async def examine(visit: Visit) -> None:
    """One answer, and two more of the demo's if it is the demo that answers."""
    reply = await visit.start(QUESTION, visit.left - 2, lambda reply: len(reply.texts) >= DROP_AFTER)
    if reply.status != 200 or reply.media_type != "text/event-stream":
        visit.tell("answer", False, *visit.explain(reply))
        return
    headers_well = _headers(visit, reply)
    arrivals = judge([event.at for event in reply.texts])
    well = _tokens(visit, reply, arrivals, compressed=not headers_well and "content-encoding" in reply.headers)
    location = reply.headers.get("content-location")
    if not well:
        if location:
            await _stop(visit, location)
        return
    whole = await _resume(visit, reply, location)
    if not visit.demo:
        _silences(visit, reply)
        visit.tell("leaving", None, "cannot be seen with one short answer of Grok's, only with the demo's")
    elif arrivals.kind == "held" or not whole:
        for name in ("keep-alive", "leaving"):
            visit.tell(name, None, "cannot be seen while answers do not arrive as they should")
    else:
        checks = await asyncio.gather(_silence(visit), _leave(visit))
        for name, (ok, message, fixes) in zip(("keep-alive", "leaving"), checks, strict=True):
            visit.tell(name, ok, message, fixes)


def _headers(visit: Visit, reply: Reply) -> bool:
    """The headers of an answer as they arrive."""
    encoding = reply.headers.get("content-encoding")
    problems = [
        (encoding not in (None, "identity"), f"compressed ({encoding}): tokens may be held back", advice.COMPRESSION),
        (
            "no-transform" not in reply.headers.get("cache-control", ""),
            "Cache-Control: no-transform does not arrive",
            advice.HEADERS,
        ),
        ("x-request-id" not in reply.headers, "X-Request-ID does not arrive", advice.HEADERS),
    ]
    found = [(message, fixes) for wrong, message, fixes in problems if wrong]
    for message, fixes in found:
        visit.tell("headers", False, message, fixes)
    if not found:
        visit.tell("headers", True, "200, an event stream, not compressed")
    return not found


def _tokens(visit: Visit, reply: Reply, arrivals: Arrivals, compressed: bool) -> bool:
    """How the tokens arrive. False if there were none."""
    if not reply.texts:
        if reply.ended == "failed":
            error = f"the answer failed: {reply.code}"
        else:
            error = f"no token within {reply.ended_at - reply.asked_at:.0f} s"
        visit.tell("first token", False, error, {} if reply.ended == "failed" else advice.BUFFERING)
        return False
    first = f"after {reply.texts[0].at - reply.asked_at:.2f} s"
    tokens, each = arrivals.tokens, arrivals.tokens / arrivals.pieces
    visit.tell("first token", True if arrivals.kind != "held" else None, first)
    if arrivals.kind == "held":
        who = "compression or buffering holds" if compressed else "a buffer holds"
        visit.tell("tokens", False, f"all {tokens} at once: {who} the answer back", advice.BUFFERING)
    elif arrivals.delayed:
        text = f"in lumps of about {each:.0f}, every {arrivals.gap * 1000:.0f} ms: Linux waits for more to send"
        visit.tell("tokens", False, text, advice.LUMPS)
    elif arrivals.kind == "lumps":
        text = f"in lumps of about {each:.0f}, every {arrivals.gap * 1000:.0f} ms"
        if visit.demo:
            visit.tell("tokens", False, f"{text}: a buffer holds them back", advice.BUFFERING)
        else:
            visit.tell("tokens", None, f"{text}: Grok's own pace, or a buffer; the demo would show it")
    elif arrivals.kind == "few":
        visit.tell("tokens", None, f"{tokens} are too few to tell")
    else:
        visit.tell("tokens", True, f"one by one, {tokens} in {arrivals.pieces} pieces")
    return True


def _last_id(events: Sequence[Event]) -> str:
    return events[-1].id if events else ""


async def _resume(visit: Visit, first: Reply, location: str | None) -> bool:
    """The rest of the answer over other connections, once ours is dropped. Whether none of them broke off."""
    if location is None:
        visit.tell("resume", False, "Content-Location does not arrive", advice.HEADERS)
        return False
    url = urljoin(visit.target.url + "/", location)
    prefix = visit.target.prefix
    if not urlsplit(url).path.startswith(f"{prefix}/api/"):
        visit.tell("resume", False, f"the service does not know its prefix: set ROOT_PATH={prefix}")
        return False
    known = first.texts if first.ended != "done" else first.texts[: len(first.texts) // 2]
    replies, texts, id = [first], list(known), _last_id(known)
    while replies[-1] is first or (replies[-1].ended == "cut" and replies[-1].status == 200 and len(replies) <= TRIES):
        replies.append(await visit.ask("GET", url, _reading(visit, id), within=visit.left))
        texts += replies[-1].texts
        id = _last_id(replies[-1].events) or id
    last = replies[-1]
    if visit.demo is None:
        visit.demo = any('"model":"demo"' in event.data for event in last.events if event.type == "finish")
    cut = next((reply for reply in replies if reply.status == 200 and reply.ended == "cut"), None)
    if cut:
        text = f"broken off after {cut.ended_at - cut.asked_at:.1f} s, without [DONE] or an error"
        visit.tell("ending", False, text, advice.CUT)
    elif last.status == 200:
        failed = f"the answer failed: {last.code}" if last.ended == "failed" else f"none: {last.problem}"
        visit.tell("ending", last.ended == "done", "[DONE]" if last.ended == "done" else failed)
    if last.code == "stream_not_found":
        visit.tell("resume", False, "404: another replica has the answer? Set REDIS_URL")
    elif last.status != 200:
        visit.tell("resume", False, *visit.explain(last))
    elif last.ended == "done":
        await _compare(visit, url, known, texts)
    await _stop(visit, location, tell=last.ended == "done")
    return cut is None


async def _compare(visit: Visit, url: str, known: Sequence[Event], texts: Sequence[Event]) -> None:
    """What came before and after the drop, with all of it in one piece."""
    again = await visit.ask("GET", url, _reading(visit), within=visit.left)
    exact = [(event.id, event.data) for event in texts] == [(event.id, event.data) for event in again.texts]
    if exact or again.ended != "done":
        visit.tell("resume", True, f"dropped after {len(known)} tokens, and nothing is missing")
    else:
        text = f"{len(texts)} tokens around the drop, {len(again.texts)} in one piece: is something cached?"
        visit.tell("resume", False, text, advice.HEADERS)


def _reading(visit: Visit, id: str = "") -> dict[str, str]:
    """The headers with which an EventSource comes back."""
    return {
        "Accept": "text/event-stream",
        **({"Origin": visit.page} if visit.page else {}),
        **({"Last-Event-ID": id} if id else {}),
    }


async def _stop(visit: Visit, location: str, tell: bool = False) -> None:
    """DELETE the answer: nothing that we started goes on, whatever else was wrong."""
    path = re.sub(r"/stream$", "", location)
    headers = {"Origin": visit.page} if visit.page else {}
    reply = await visit.ask("DELETE", urljoin(visit.target.url + "/", path), headers)
    if tell and reply.status == 204:
        visit.tell("stop", True, "DELETE arrives")
    elif tell:
        message, fixes = visit.explain(reply)
        visit.tell("stop", False, f"DELETE: {message}", fixes or advice.METHODS)


def _silences(visit: Visit, reply: Reply) -> None:
    """What a real answer shows of keep-alives: nobody can ask Grok to be silent."""
    if reply.comments:
        visit.tell("keep-alive", True, f"after {reply.comments[0] - reply.asked_at:.1f} s")
    else:
        visit.tell("keep-alive", None, "not seen, Grok was never silent for KEEP_ALIVE seconds")


Verdict = tuple[bool | None, str, dict[str, str]]


async def _silence(visit: Visit) -> Verdict:
    """Whether a stream survives silence, and its keep-alive comments arrive."""
    pace = f"one word every {visit.silence + 2:.1f} s"
    reply = await visit.start(pace, visit.left, _kept_alive, silence=visit.silence)
    if location := reply.headers.get("content-location"):
        await _stop(visit, location)
    if reply.status != 200 or not reply.texts:
        return None, f"not seen: {visit.explain(reply)[0]}", {}
    since = reply.texts[-1].at
    if reply.ended == "left":
        return True, f"after {reply.comments[-1] - since:.1f} s of silence", {}
    if reply.ended == "cut":
        seconds = reply.ended_at - since
        text = f"cut off after {seconds:.1f} s of silence: let the proxy wait longer, or set KEEP_ALIVE below that"
        return False, text, advice.IDLE
    return None, f"none within {visit.silence:.0f} s; proxies must wait for longer than KEEP_ALIVE", {}


def _kept_alive(reply: Reply) -> bool:
    """Whether a comment has come after a token. (Before the first one the demo is silent only as it happens.)"""
    return bool(reply.texts and reply.comments) and reply.comments[-1] > reply.texts[-1].at


async def _leave(visit: Visit) -> Verdict:
    """Whether the service notices that its reader has gone: it then gives the answer up after RESUME_WINDOW."""
    pace = visit.window / 35
    reply = await visit.start(f"one word every {pace:.2f} s", visit.left, lambda reply: bool(reply.texts))
    location = reply.headers.get("content-location")
    if reply.ended != "left" or location is None:
        return None, f"not seen: {visit.explain(reply)[0]}", {}
    await asyncio.sleep(min(visit.window, visit.left - 1))
    url = urljoin(visit.target.url + "/", location)
    reply = await visit.ask("GET", url, _reading(visit), within=max(1.0, 3 * pace))
    await _stop(visit, location)
    if reply.code == "abandoned":
        return True, "noticed, and Grok hung up after RESUME_WINDOW", {}
    if reply.status == 200 and reply.ended in ("late", "cut", "done"):
        text = f"not noticed within {visit.window:.0f} s, or RESUME_WINDOW is longer: Grok goes on for nobody"
        return False, text, advice.LEAVING
    return None, f"not seen: {visit.explain(reply)[0]}", {}
