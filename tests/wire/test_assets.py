"""The files that browsers load: what they are, who may read them, and that an upgrade reaches everybody."""

import gzip

import pytest

from tests.conftest import ROOT, InProcessService, serving
from tests.upstream import Upstream

pytestmark = pytest.mark.anyio

FILES = [
    ("/client.js", "client.js", "text/javascript; charset=utf-8"),
    ("/client.d.ts", "client.d.ts", "text/plain; charset=utf-8"),
    ("/", "page.html", "text/html; charset=utf-8"),
]


@pytest.mark.parametrize(("path", "name", "media_type"), FILES)
async def test_file(service: InProcessService, path: str, name: str, media_type: str) -> None:
    """Each is the package's file, of the right type, and no cache gives it away without asking us."""
    whole = await service.client.get(path)
    assert (whole.status_code, whole.headers["Content-Type"]) == (200, media_type)
    assert whole.content == (ROOT / "chatproxy/browser" / name).read_bytes()
    assert whole.headers["Cache-Control"] == "no-cache"
    assert whole.headers["X-Content-Type-Options"] == "nosniff"
    head = await service.client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    for header in ("Content-Type", "Content-Length", "ETag"):
        assert head.headers[header] == whole.headers[header]


@pytest.mark.parametrize("path", [path for path, _, _ in FILES])
async def test_not_modified(service: InProcessService, path: str) -> None:
    """Who has the file is told so, in every way that HTTP has of asking, and who has another one gets it."""
    etag = (await service.client.get(path)).headers["ETag"]
    assert etag.startswith('"')
    assert etag.endswith('"')
    for same in (etag, f"W/{etag}", f'"other", W/"older",{etag}', "*", f'"a, b" , {etag}'):
        response = await service.client.get(path, headers={"If-None-Match": same})
        assert (response.status_code, response.content, same) == (304, b"", same)
        assert response.headers["ETag"] == etag
        assert response.headers["Cache-Control"] == "no-cache"
        assert "Content-Type" not in response.headers
    response = await service.client.get(path, headers=[("If-None-Match", '"other"'), ("If-None-Match", etag)])
    assert response.status_code == 304
    for other in ('"other"', etag.strip('"'), etag[:-2] + '"', f'"{etag}"', ""):
        response = await service.client.get(path, headers={"If-None-Match": other})
        assert (response.status_code, other) == (200, other)


async def test_readable_from_allowed_origins() -> None:
    """A page of an allowed origin may load the module, changed or not; copies for two origins are told apart."""
    page = "https://www.example.com"
    async with Upstream() as grok, serving(grok.url, allowed_origins=page, try_page=False) as service:
        whole = await service.client.get("/client.js", headers={"Origin": page})
        unchanged = await service.client.get(
            "/client.js", headers={"Origin": page, "If-None-Match": whole.headers["ETag"]}
        )
        for response, status in ((whole, 200), (unchanged, 304)):
            assert response.status_code == status
            assert response.headers["Access-Control-Allow-Origin"] == page
            assert response.headers["Vary"] == "Origin"
        stranger = await service.client.get("/client.js", headers={"Origin": "https://elsewhere.example"})
        assert "Access-Control-Allow-Origin" not in stranger.headers
        assert (await service.client.get("/")).status_code == 404


def test_small() -> None:
    """The client is less than 4 KB on the wire of a proxy that compresses."""
    assert len(gzip.compress((ROOT / "chatproxy/browser/client.js").read_bytes(), 9)) < 4096
