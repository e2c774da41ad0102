"""The try-out page: one file, which may run its own script and style and talk to this service only."""

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from chatproxy.routes.state import AppState


class Page:
    """The page and its headers, made once."""

    def __init__(self) -> None:
        self._html = files("chatproxy.routes").joinpath("page.html").read_text("utf-8")
        script, style = (_inline_hash(tag, self._html) for tag in ("script", "style"))
        self._headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "Cache-Control": "no-cache",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    async def show(self, _: Request[AppState]) -> Response:
        """Give the try-out page."""
        return HTMLResponse(self._html, headers=self._headers)


def _inline_hash(tag: str, html: str) -> str:
    """The CSP source of the page's one element with that tag."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
