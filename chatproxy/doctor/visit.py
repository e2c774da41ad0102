"""One examination of one service: what all checks share, and what they come to.

Does not know which checks there are.
"""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httpx

from chatproxy.doctor import advice, client
from chatproxy.doctor.client import PROMPT, Reply, Target

# A key of xAI's, or the header that carries one.
_KEY = re.compile(r"xai-[A-Za-z0-9]{8,}|\bbearer [^ ,;]{8,}", re.IGNORECASE)


@dataclass(frozen=True)
class Check:
    """What one check came to. `ok` is None where it does not apply or nothing can be told.

    `fixes`: for each reverse proxy the line to change.
    """

    name: str
    ok: bool | None
    message: str
    fixes: Mapping[str, str] = field(default_factory=dict)


class Visit:
    """Asks as a page of `origin` would, remembers what everybody may see, and tells each check as it is done.

    `seconds` is for everything. A page without another origin is one of the service's own. `announce` is told whose
    answer it will be before there is one.
    """

    def __init__(
        self,
        target: Target,
        tell: Callable[[Check], None],
        announce: Callable[[str], None],
        *,
        origin: str | None = None,
        token: str | None = None,
        seconds: float = 30.0,
        silence: float = 16.5,
        window: float = 17.5,
    ) -> None:
        self.target = target
        self.announce = announce
        self.origin = None if origin == target.origin else origin
        self.page: str | None = self.origin or target.origin
        """The Origin that is sent, None once it is known to be refused."""
        self.token = token
        self.silence = silence
        self.window = window
        self.proxy: str | None = None
        self.demo: bool | None = None
        """Whether the built-in demo answers; None while nobody knows."""
        self.http: httpx.AsyncClient
        self.leaks: set[str] = set()
        """Names of headers that hold what looks like a key."""
        self.replies = 0
        self._tell = tell
        self._until = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """The seconds that are left."""
        return max(0.1, self._until - time.monotonic())

    def tell(self, name: str, ok: bool | None, message: str, fixes: Mapping[str, str] | None = None) -> None:
        """One line of the report. `fixes` is a table of `advice`, cut down to the proxy that was recognised."""
        lines = advice.lines(fixes or {}, self.proxy, self.target.prefix)
        self._tell(Check(name, ok, message, lines))

    async def ask(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: object = None,
        *,
        within: float = PROMPT,
        silence: float = 600.0,
        until: Callable[[Reply], bool] = lambda _: False,
    ) -> Reply:
        """As `client.ask`, with a path below the service's address or a whole address, and within what time is left."""
        url = path if path.startswith("http") else self.target.url + path
        reply = await client.ask(
            self.http, method, url, headers, body, within=min(within, self.left), silence=silence, until=until
        )
        self.replies += 1
        for name, value in reply.headers.items():
            if _KEY.search(value) or name in ("authorization", "proxy-authorization", "x-api-key"):
                self.leaks.add(name)
        return reply

    async def start(self, content: str, within: float, until: Callable[[Reply], bool], silence: float = 600.0) -> Reply:
        """Start one resumable answer to this message, as a page does."""
        headers = {"Accept": "text/event-stream", **({"Origin": self.page} if self.page else {})}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        body = {"messages": [{"role": "user", "content": content}], "resumable": True, "include": ["finish"]}
        return await self.ask("POST", "/api/chat", headers, body, within=within, silence=silence, until=until)

    def explain(self, reply: Reply) -> tuple[str, Mapping[str, str]]:
        """Why this is no answer of the service, or which of its refusals, and the lines that may be wrong."""
        status, code, target = reply.status, reply.code, self.target
        kind = "an HTML page" if reply.media_type == "text/html" else reply.media_type or "no content type"
        if not status:
            return f"no answer: {reply.problem}", advice.GATEWAY
        if code == "host_not_allowed":
            text = f"{status}: set ALLOWED_HOSTS={target.host}; if it is set, the proxy does not pass Host on"
            return text, advice.HOST
        if code == "origin_not_allowed" and self.page == target.origin:
            text = f"{status} for its own page {self.page}: the proxy does not pass the Host header on"
            return text, advice.HOST
        if code == "origin_not_allowed":
            return f"{status}: set ALLOWED_ORIGINS={self.page}", {}
        if code == "unauthorized":
            return "401: give a token, as CHATPROXY_TOKEN or --token", {}
        if code == "not_found":
            return f"404: the service sees another path; {target.prefix or 'a prefix'} is not taken off", advice.PREFIX
        if code:
            return f"{status} {code}: {reply.json['error'].get('message', '')}", {}
        if 300 <= status < 400:
            return f"{status}, redirected to {reply.headers.get('location', 'nowhere')}: give that address", {}
        if status in (401, 403):
            return f"{status} from the proxy, not from the service: it wants a login, or a rule there forbids it", {}
        if status == 405:
            return "405 from the proxy, not from the service", advice.METHODS
        if status >= 500:
            text = f"{status} from the proxy ({kind}): the service is down, or the proxy has a wrong address for it"
            return text, advice.GATEWAY
        return f"{status} and {kind}: not chatproxy; is it under another path?", advice.GATEWAY
