"""What the doctor says of TLS, of certificates and of HTTP/2, before the real nginx."""

import datetime
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from chatproxy.doctor.visit import Check
from tests.conftest import serving
from tests.proxies.proxies import NGINX, running
from tests.proxies.test_doctor import BRIEF, NOBODY, doctor, faults

pytestmark = pytest.mark.anyio

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
AUTHORITY = trustme.CA()


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that nginx may read, with an authority that this process trusts."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        authority = Path(name) / "authority.pem"
        AUTHORITY.cert_pem.write_to_path(authority)
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        yield Path(name)


async def behind_tls(
    place: Path, certificate: trustme.LeafCert, *, parameters: str = "", token: str | None = None
) -> list[Check]:
    """What the doctor tells of the README's nginx with this certificate."""
    pem = place / "site.pem"
    certificate.private_key_and_cert_chain_pem.write_to_path(pem)
    pem.chmod(0o644)
    secured = (
        f"listen @listen@ ssl {parameters}; ssl_protocols TLSv1.3; ssl_certificate {pem}; ssl_certificate_key {pem};"
    )
    site = NGINX.snippet.replace("listen @listen@;", secured)
    async with serving(NOBODY, **BRIEF) as service, running(NGINX, site, service.port) as front:
        return await doctor(front.url.replace("http:", "https:"), token=token)


@pytest.mark.parametrize(
    ("certificate", "says"),
    [
        (AUTHORITY.issue_cert("127.0.0.1", not_before=NOW - 9 * DAY, not_after=NOW - DAY), "expired"),
        (AUTHORITY.issue_cert("chat.example.com"), "mismatch"),
        (trustme.CA().issue_cert("127.0.0.1"), "unable to get local issuer"),
    ],
    ids=["expired", "another name", "unknown authority"],
)
async def test_certificate(place: Path, certificate: trustme.LeafCert, says: str) -> None:
    """A certificate that browsers refuse is told with the reason, and the rest is looked at without the token."""
    checks = await behind_tls(place, certificate, token="t" * 16)
    found = faults(checks)
    assert {*found} == {"TLS"}
    message, lines = found["TLS"]
    assert says in message
    assert message.endswith("(the token is not sent)")
    assert "nginx: ssl_certificate" in lines


@pytest.mark.parametrize(("parameters", "says"), [("", "HTTP/1.1; "), ("http2", "HTTP/2 offered")])
async def test_version(place: Path, parameters: str, says: str) -> None:
    """With a good certificate its days are told, and whether HTTP/2 is offered."""
    certificate = AUTHORITY.issue_cert("127.0.0.1", not_after=NOW + 60 * DAY + DAY / 2)
    checks = await behind_tls(place, certificate, parameters=parameters)
    assert [check for check in checks if not check.ok] == []
    tls, http = (check for check in checks if check.name in ("TLS", "HTTP"))
    assert tls.message == "TLSv1.3, certificate valid for 60 days"
    assert says in http.message.replace(", through nginx", "")


async def test_no_tls_for_the_doctor() -> None:
    """A port that does not speak TLS is told, and nothing else is asked of it."""
    async with serving(NOBODY, **BRIEF) as service:
        checks = await doctor(service.url.replace("http:", "https:"))
    assert [(check.name, check.ok) for check in checks] == [("reachable", True), ("TLS", False)]
    assert "no TLS on port" in checks[1].message
