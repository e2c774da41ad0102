"""What browsers load: client.js, its types, and the try-out page. Does not know chats or settings."""

import base64
import hashlib
import re
from collections.abc import Iterable
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response


class Assets:
    """The files, read once, and one endpoint for each. `tools` are the searches that clients may ask for."""

    def __init__(self, tools: Iterable[str]) -> None:
        self._client = _File("client.js", "text/javascript")
        # By its ending a browser would take TypeScript for a video; nobody but people and tools reads it.
        self._types = _File("client.d.ts", "text/plain")
        # The page offers the searches that the operator allows.
        offered = ('data-tools=""', f'data-tools="{",".join(tools)}"')
        self._page = _File("page.html", "text/html", {"Referrer-Policy": "no-referrer"}, offered)
        html = self._page.body.decode()
        # The page may run its own script, which imports client.js, and talk to this service only.
        self._page.headers["Content-Security-Policy"] = (
            f"default-src 'none'; script-src 'self' {_inline_hash('script', html)}; "
            f"style-src {_inline_hash('style', html)}; img-src data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    async def client(self, request: Request) -> Response:
        """Give the client for browsers and other JavaScript: one module without dependencies."""
        return self._client.response(request)

    async def types(self, request: Request) -> Response:
        """Give the TypeScript types of client.js."""
        return self._types.response(request)

    async def page(self, request: Request) -> Response:
        """Give the try-out page."""
        return self._page.response(request)


class _File:
    """A file of the package. Browsers keep a copy, and ask each time whether it is still the right one."""

    def __init__(
        self,
        name: str,
        media_type: str,
        headers: dict[str, str] | None = None,
        replaced: tuple[str, str] = ("", ""),
    ) -> None:
        text = files("chatproxy").joinpath("browser", name).read_text("utf-8")
        self.body = text.replace(*replaced, 1).encode()
        self._media_type = media_type
        self._etag = f'"{hashlib.sha256(self.body).hexdigest()[:32]}"'
        self.headers = {
            "Cache-Control": "no-cache",
            "ETag": self._etag,
            "X-Content-Type-Options": "nosniff",
            **(headers or {}),
        }

    def response(self, request: Request) -> Response:
        if self._is_current(",".join(request.headers.getlist("if-none-match"))):
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers, media_type=self._media_type)

    def _is_current(self, if_none_match: str) -> bool:
        """RFC 9110, section 13.1.2: `*`, or a list of entity tags, which compare weakly."""
        return if_none_match.strip() == "*" or self._etag in re.findall(r'"[^"]*"', if_none_match)


def _inline_hash(tag: str, html: str) -> str:
    """The CSP source of the page's one element with that tag."""
    [content] = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
