"""Callers whom an identity provider, a shared secret, or a reverse proxy names."""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import os
import shutil
import ssl
import time
import warnings
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from chatproxy.config.timing import Timing
from tests.conftest import HI, KEY, ROOT, TIMEOUT, InProcessService, Service, refusal, serving
from tests.operations import make_token
from tests.upstream import HANG, Gate, Upstream, stream
from tests.wire.test_access import limited
from tests.wire.test_resume import rest
from tests.wire.test_upstream_proxy import Proxy, tunnel

pytestmark = pytest.mark.anyio

ISSUER = "https://auth.example.com/"
AUDIENCE = "chat"
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

SECRET = "0123456789abcdef0123456789abcdef"  # noqa: S105 -- of these tests only

RSA = rsa.generate_private_key(65537, 2048)
OTHER = rsa.generate_private_key(65537, 2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()


def claims(**changes: object) -> dict[str, object]:
    """Of a token that is good; None takes a claim away."""
    usual = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "exp": int(time.time()) + 300}
    return {name: value for name, value in {**usual, **changes}.items() if value is not None}


def token(key: Any = RSA, algorithm: str = "RS256", id: object = "rsa", /, **changes: object) -> str:
    """A token; `id` None leaves it out."""
    return jwt.encode(claims(**changes), key, algorithm, headers={"kid": id} if id is not None else None)


def forged(header: object, body: object, signature: bytes = b"x") -> str:
    """A token that no library would make."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, body, signature)]
    return ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def jwk(key: PrivateKeyTypes, id: str | None, **changes: object) -> dict[str, object]:
    """The public half, as a provider publishes it."""
    public = key.public_key()
    algorithm = {RSA: "RS256", OTHER: "RS256", EC: "ES256", ED: "EdDSA"}.get(key, "RS256")
    data = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(public))
    return {**data, "use": "sig", **({"kid": id} if id else {}), **changes}


class Provider:
    """An identity provider's address of keys: answers with `keys`, or with `reply` as it is."""

    def __init__(self) -> None:
        self.keys = [jwk(RSA, "rsa"), jwk(EC, "ec"), jwk(ED, "ed")]
        self.reply: bytes | None = None
        self.gate: Gate | None = None
        self.fetched = 0
        self.paths: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.paths.append(head.split(b" ")[1])
        self.fetched += 1
        if self.gate is not None:
            await self.gate.pass_through()
        body = json.dumps({"keys": self.keys}).encode()
        writer.write(self.reply or b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()


@asynccontextmanager
async def provided(provider: Provider, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Its address of keys."""
    server = await asyncio.start_server(provider.serve, "127.0.0.1", ssl=tls)
    try:
        yield f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"
    finally:
        server.close()


def settings(url: str, **changes: object) -> dict[str, object]:
    return {"auth_jwks_url": url, "auth_issuer": ISSUER, "auth_audience": AUDIENCE, **changes}


@pytest.fixture(scope="module")
async def provider() -> Provider:
    return Provider()


@pytest.fixture(scope="module")
async def service(grok: Upstream, provider: Provider) -> AsyncIterator[InProcessService]:
    async with provided(provider) as url, serving(grok.url, **settings(url)) as service:
        yield service


async def unauthorized(service: Service, headers: Mapping[str, str]) -> str:
    """Checks that it is a 401 of ours; gives what it asks for."""
    response = await service.ask(headers=headers)
    assert (response.status_code, refusal(response)["code"]) == (401, "unauthorized")
    return response.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    "good",
    [
        pytest.param(token, id="RS256"),
        pytest.param(lambda: token(RSA, "RS512"), id="RS512"),
        pytest.param(lambda: token(RSA, "PS256"), id="PS256"),
        pytest.param(lambda: token(EC, "ES256", "ec"), id="ES256"),
        pytest.param(lambda: token(ED, "EdDSA", "ed"), id="EdDSA"),
        pytest.param(lambda: token(RSA, "RS256", None), id="no key id, one fits"),
        pytest.param(lambda: token(aud=["other", AUDIENCE]), id="one of two audiences"),
        pytest.param(lambda: token(exp=int(time.time()) - 20), id="expired by our clock only"),
        pytest.param(lambda: token(nbf=int(time.time()) + 20, iat=int(time.time()) + 20), id="a clock that is fast"),
        pytest.param(lambda: token(sub="x" * 255), id="a long name"),
        pytest.param(lambda: token(sub="\u00e4 \U0001f600"), id="any alphabet"),
    ],
)
async def test_good_tokens(grok: Upstream, service: InProcessService, good: Any) -> None:
    """What the provider has signed for us lets in, by whatever algorithm its keys are for."""
    grok.set_scripts()
    assert (await service.ask(headers=bearer(good()))).status_code == 200
    assert len(grok.calls) == 1


def confused() -> str:
    """Signed with the public key as if it were a shared secret."""
    public = RSA.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    signed = forged({"alg": "HS256", "typ": "JWT", "kid": "rsa"}, claims()).rpartition(".")[0]
    signature = base64.urlsafe_b64encode(hmac.digest(public, signed.encode(), hashlib.sha256)).decode().rstrip("=")
    return f"{signed}.{signature}"


BAD: dict[str, Callable[[], str]] = {
    "no JWT": lambda: "0123456789abcdef",
    "two parts": lambda: token().rpartition(".")[0],
    "five parts": lambda: token() + ".a.b",
    "not base64": lambda: "%.%.%",
    "no JSON": lambda: forged(b"x", b"y"),
    "a list": lambda: forged([], []),
    "deep JSON": lambda: forged(b"[" * 3000, claims()),
    "no algorithm": lambda: forged({"kid": "rsa"}, claims()),
    "alg none": lambda: forged({"alg": "none", "kid": "rsa"}, claims(), b""),
    "alg None": lambda: forged({"alg": "None"}, claims(), b""),
    "a number for an algorithm": lambda: forged({"alg": 1, "kid": "rsa"}, claims()),
    "another key's signature": lambda: token(OTHER),
    "a changed name": lambda: ".".join(
        [*token().split(".")[:1], token(sub="eve").split(".")[1], token().split(".")[2]]
    ),
    "the public key as a secret": confused,
    "a shared secret": lambda: token(SECRET, "HS256"),
    "another kind of key": lambda: token(EC, "ES256", "rsa"),
    "an unknown key": lambda: token(OTHER, "RS256", "unknown"),
    "a key id that is a path": lambda: token(OTHER, "RS256", "../../keys"),
    "a key id that is an address": lambda: token(OTHER, "RS256", "http://127.0.0.1/keys"),
    "a key id that is a number": lambda: forged({"alg": "RS256", "kid": 1}, claims()),
    "a key of its own": lambda: jwt.encode(claims(), OTHER, "RS256", headers={"jwk": jwk(OTHER, "rsa")}),
    "an address of keys": lambda: jwt.encode(
        claims(), OTHER, "RS256", headers={"jku": "http://127.0.0.1/keys", "x5u": "http://127.0.0.1/keys", "kid": "own"}
    ),
    "an unknown extension": lambda: jwt.encode(claims(), RSA, "RS256", headers={"kid": "rsa", "crit": ["x"], "x": 1}),
    "expired": lambda: token(exp=int(time.time()) - 60),
    "without an end": lambda: token(exp=None),
    "an end that is no time": lambda: token(exp="soon"),
    "not valid yet": lambda: token(nbf=int(time.time()) + 60),
    "made in the future": lambda: token(iat=int(time.time()) + 60),
    "another issuer": lambda: token(iss="https://auth.example.com"),
    "no issuer": lambda: token(iss=None),
    "another audience": lambda: token(aud="other"),
    "no audience": lambda: token(aud=None),
    "no name": lambda: token(sub=None),
    "an empty name": lambda: token(sub=""),
    "a name that is a number": lambda: forged({"alg": "RS256", "kid": "rsa"}, claims(sub=1)),
    "a name with a line break": lambda: token(sub="a\nb"),
    "a name that is too long": lambda: token(sub="x" * 256),
    "10 KB": lambda: token(x="x" * 10_000),
}


@pytest.mark.parametrize("kind", BAD)
async def test_bad_tokens(
    grok: Upstream, service: InProcessService, provider: Provider, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Any other token is refused in the same words; no part of it is logged, and it makes nobody fetch anything."""
    grok.set_scripts()
    given = BAD[kind]()
    with caplog.at_level(logging.DEBUG):
        asked = await unauthorized(service, bearer(given))
    assert asked == 'Bearer error="invalid_token"'
    assert grok.calls == []
    for part in filter(lambda part: len(part) > 8, given.split(".")):
        assert part not in caplog.text
    assert set(provider.paths) == {b"/keys"}


WORDS = {
    "two parts": "malformed",
    "deep JSON": "malformed",
    "alg none": "algorithm",
    "the public key as a secret": "algorithm",
    "another key's signature": "signature",
    "another kind of key": "key",
    "an unknown key": "key",
    "expired": "expired",
    "not valid yet": "not valid yet",
    "made in the future": "not valid yet",
    "another issuer": "issuer",
    "another audience": "audience",
    "no name": "claim",
    "a name that is a number": "signature",  # which is looked at first
}


@pytest.mark.parametrize("kind", WORDS)
async def test_reasons_in_the_log(service: InProcessService, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """What is wrong with a refused token is told to the operator, in a word of ours."""
    with caplog.at_level(logging.INFO):
        await unauthorized(service, bearer(BAD[kind]()))
    told = [record.getMessage() for record in caplog.records if record.name.startswith("chatproxy.services.identity")]
    assert told == [f"a token was refused: {WORDS[kind]}"]


async def test_huge_token(service: InProcessService) -> None:
    """A token of a megabyte is refused before it is looked at."""
    async with service.caller() as caller:
        status = 431
        with suppress(ConnectionError, asyncio.IncompleteReadError):  # closed while it is still being sent
            await caller.post({"messages": HI}, Authorization=f"Bearer {'a' * 500_000}.{'b' * 500_000}.c")
            status, _ = await caller.head()
        assert status == 431
    assert (await service.ask(headers=bearer(token()))).status_code == 200


async def test_unauthorized_everywhere(grok: Upstream, service: InProcessService) -> None:
    """All that starts an answer or tells of the service asks for the token; to read on, the answer's id is enough."""
    grok.set_scripts()
    good, json_ = bearer(token()), {"Accept": "application/json"}
    chat: dict[str, Any] = {"messages": HI, "model": "grok-4.3"}
    assert (await service.client.get("/v1/models")).status_code == 401
    assert (await service.client.get("/v1/models", headers=good)).status_code == 200
    refused = await service.client.post("/v1/chat/completions", json=chat)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "unauthorized")
    whole = await service.client.post("/v1/chat/completions", json=chat, headers=good)
    assert whole.json()["choices"][0]["message"]["content"] == "Hello, world"
    created = await service.ask(headers={**good, **json_})
    assert (await rest(service, created.json()["url"])).status_code == 200
    assert len(grok.calls) == 2


async def test_same_caller(grok: Upstream) -> None:
    """Limits and idempotency keys belong to whom the token names, wherever it is sent from and by whichever token."""
    async with (
        Upstream(stream("a")) as grok,
        serving(
            grok.url, auth_jwt_secret=SECRET, rate_limit="2/day", forwarded_allow_ips="127.0.0.1", auth_claim="uid"
        ) as service,
    ):

        async def ask(name: str, of: str, **headers: str) -> Any:
            made = jwt.encode({"uid": name, "exp": int(time.time()) + 60, "jti": of}, SECRET, "HS256")
            return await service.ask(headers={**bearer(made), "X-Forwarded-For": of, **headers})

        key = {"Idempotency-Key": "k"}
        first = await ask("ada", "192.0.2.1", **key)
        again = await ask("ada", "192.0.2.2", **key)
        assert (first.content, len(grok.calls)) == (again.content, 1)
        assert (await ask("eve", "192.0.2.1", **key)).content != first.content
        assert (await ask("ada", "192.0.2.3")).headers["RateLimit"].startswith('"chats";r=0;')
        limited(await ask("ada", "192.0.2.4"))
        assert (await ask("eve", "192.0.2.4")).status_code == 200


async def test_shared_secret(grok: Upstream) -> None:
    """With a shared secret only HS256 counts; without AUTH_AUDIENCE any audience does."""
    async with serving(grok.url, auth_jwt_secret=SECRET) as service:
        for good in (token(SECRET, "HS256", None), token(SECRET, "HS256", "any", aud=None, iss=None)):
            assert (await service.ask(headers=bearer(good))).status_code == 200
        for bad in (
            token(SECRET + "x", "HS256"),
            token(SECRET * 2, "HS384"),
            token(SECRET * 2, "HS512"),
            token(RSA),
            forged({"alg": "none"}, claims()),
        ):
            await unauthorized(service, bearer(bad))


async def test_beside_access_tokens(grok: Upstream) -> None:
    """A static token and a provider's may both be set; either lets in."""
    static = "0123456789.abcde.f"
    async with serving(grok.url, auth_jwt_secret=SECRET, access_tokens=static) as service:
        assert (await service.ask(headers=bearer(static))).status_code == 200
        assert (await service.ask(headers=bearer(token(SECRET, "HS256")))).status_code == 200
        assert await unauthorized(service, bearer(static[:-1])) == 'Bearer error="invalid_token"'
        assert await unauthorized(service, {}) == "Bearer"


async def test_rotation(grok: Upstream) -> None:
    """A new key is fetched when a token names it, and one that is gone is no good from then on."""
    provider, gate = Provider(), Gate()
    grok.set_scripts(stream("a", gate, "b"), stream("c"))
    async with (
        provided(provider) as url,
        serving(grok.url, Timing(jwks_interval=0.1), **settings(url)) as service,
        service.asking(headers=bearer(token())) as live,
    ):
        await live.event()
        provider.keys = [jwk(OTHER, "new")]
        assert (await service.ask(headers=bearer(token()))).status_code == 200  # nobody knows yet
        await asyncio.sleep(0.15)
        assert (await service.ask(headers=bearer(token(OTHER, "RS256", "new")))).status_code == 200
        await unauthorized(service, bearer(token()))
        gate.open()
        assert [event.data for event in await live.rest()] == ["b", "[DONE]"]


async def test_unknown_keys(grok: Upstream) -> None:
    """A hundred tokens with invented keys make the service fetch once, and not at all for a while after."""
    provider = Provider()
    async with provided(provider) as url, serving(grok.url, Timing(jwks_interval=1.0), **settings(url)) as service:
        await asyncio.sleep(1.05)
        assert (await service.ask(headers=bearer(token()))).status_code == 200
        assert provider.fetched == 1
        provider.gate = Gate()
        tokens = [token(OTHER, "RS256", f"key {number}") for number in range(100)]
        asking = [asyncio.create_task(unauthorized(service, bearer(each))) for each in tokens]
        await provider.gate.reached.wait()
        asking[0].cancel()  # whoever asked first may leave
        opened = asyncio.get_running_loop().time()
        provider.gate.open()
        for task in asking[1:]:
            await task
        await unauthorized(service, bearer(token(OTHER, "RS256", "one more")))
        # On a machine that is busy all this may take longer than a second, and one more fetch is right after each.
        assert 2 <= provider.fetched <= 2 + (asyncio.get_running_loop().time() - opened) // 1.0


BROKEN = {
    "error": b"HTTP/1.1 500 Error\r\nContent-Length: 0\r\n\r\n",
    "HTML": b"HTTP/1.1 200 OK\r\n\r\n<html>",
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: /keys\r\nContent-Length: 0\r\n\r\n",
    "nothing": b"HTTP/1.1 200 OK\r\n\r\n",
    "no keys": b'HTTP/1.1 200 OK\r\n\r\n{"keys": []}',
    "deep": b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
    "too large": b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 300_000,
    "hangs up": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
    "of no use": b"HTTP/1.1 200 OK\r\n\r\n"
    + json.dumps(
        {
            "keys": [
                jwk(RSA, "rsa", use="enc"),
                jwk(RSA, "rsa", alg="RSA-OAEP"),
                {"kty": "oct", "k": "c2VjcmV0", "kid": "rsa"},
                {"kty": "RSA", "n": 1, "e": [], "kid": "rsa"},
                {"kty": "EC", "crv": {}, "kid": "rsa"},
                {"kty": "RSA", "kid": 1},
            ]
        }
    ).encode(),
}


@pytest.mark.parametrize("kind", BROKEN)
async def test_provider_away(grok: Upstream, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """Before the first keys are there nobody is let in nor logged out; later an outage takes nothing away."""
    provider = Provider()
    provider.reply = BROKEN[kind]
    async with provided(provider) as url, serving(grok.url, Timing(jwks_interval=0.05), **settings(url)) as service:
        response = await service.ask(headers=bearer(token()))
        assert (response.status_code, refusal(response)["code"]) == (503, "auth_unavailable")
        assert int(response.headers["Retry-After"]) > 0
        ready = await service.client.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "auth_unavailable")
        assert "AUTH_JWKS_URL" in caplog.text
        assert "<html>" not in caplog.text
        provider.reply = None
        async with asyncio.timeout(5):
            while (await service.client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 -- nobody tells when
                await asyncio.sleep(0.02)
        assert (await service.ask(headers=bearer(token()))).status_code == 200
        provider.reply = BROKEN[kind]
        await asyncio.sleep(0.1)
        fetched = provider.fetched
        await unauthorized(service, bearer(token(OTHER, "RS256", "unknown")))
        assert provider.fetched == fetched + 1
        assert (await service.ask(headers=bearer(token()))).status_code == 200
        assert (await service.client.get("/readyz")).status_code == 200


async def test_provider_that_says_nothing(grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """Nobody waits for the keys for longer than one fetch may take."""
    provider = Provider()
    provider.gate = Gate()
    async with (
        provided(provider) as url,
        serving(grok.url, Timing(jwks_timeout=0.2), **settings(url)) as service,
        asyncio.timeout(TIMEOUT),
    ):
        response = await service.ask(headers=bearer(token()))
        provider.gate.open()
    assert (response.status_code, refusal(response)["code"]) == (503, "auth_unavailable")
    assert "there are no new keys: " in caplog.text


async def test_stop_while_keys_are_fetched(grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """A service that stops does not wait for the provider, leaves no fetch behind, and complains of nothing."""
    provider = Provider()
    provider.gate = Gate()
    async with provided(provider) as url, asyncio.timeout(TIMEOUT):
        async with serving(grok.url, Timing(jwks_timeout=3600), **settings(url)):
            await provider.gate.reached.wait()
        assert [task for task in asyncio.all_tasks() if "_fetch_keys" in repr(task.get_coro())] == []
        provider.gate.open()
    assert "AUTH_JWKS_URL" not in caplog.text


async def test_long_outage_of_the_provider(grok: Upstream) -> None:
    """Keys are not used for ever: when their time is over nobody knows whether the provider still signs with them."""
    provider = Provider()
    timing = Timing(jwks_interval=0.05, jwks_lifetime=1.0)
    async with provided(provider) as url, serving(grok.url, timing, **settings(url)) as service:
        assert (await service.ask(headers=bearer(token()))).status_code == 200
        provider.reply = BROKEN["error"]
        async with asyncio.timeout(TIMEOUT):
            while (response := await service.ask(headers=bearer(token()))).status_code == 200:
                pass
        assert (response.status_code, refusal(response)["code"]) == (503, "auth_unavailable")
        assert (await service.client.get("/readyz")).status_code == 200  # all replicas would leave at once
        provider.reply = None
        async with asyncio.timeout(TIMEOUT):
            while (await service.ask(headers=bearer(token()))).status_code != 200:
                pass


async def test_short_key(grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """A key that is short enough to be broken is not believed, even if the provider publishes it."""
    short = rsa.generate_private_key(65537, 1024)  # noqa: S505 -- on purpose
    with warnings.catch_warnings(action="ignore"):
        signed = token(short, "RS256", "short")
    provider = Provider()
    provider.keys.append(jwk(short, "short"))
    with caplog.at_level(logging.INFO):
        async with provided(provider) as url, serving(grok.url, **settings(url)) as service:
            await unauthorized(service, bearer(signed))
            assert (await service.ask(headers=bearer(token()))).status_code == 200
    assert "a token was refused: key" in caplog.text


@pytest.mark.parametrize("key", [None, KEY])
async def test_keys_over_tls_and_through_a_proxy(key: str | None, tmp_path: Path) -> None:
    """The keys are fetched as Grok is asked: through the proxy, with the certificates that are set; in the demo too."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    changes = {"grok_api_key": key, "ssl_cert_file": tmp_path / "ca.pem"}
    async with Upstream() as grok, provided(Provider(), tls) as url:
        async with serving(grok.url, **settings(url, **changes)) as service:
            assert (await service.client.get("/v1/models", headers=bearer(token()))).status_code == 200
        async with Proxy(tunnel) as proxy:
            async with serving(grok.url, **settings(url, **changes, https_proxy=proxy.url)) as service:
                assert (await service.client.get("/v1/models", headers=bearer(token()))).status_code == 200
            assert [head.split()[1] for head in proxy.heads] == [urlsplit(url).netloc]
            await proxy.closed()
        async with serving(grok.url, **settings(url, **changes | {"ssl_cert_file": None})) as service:
            response = await service.client.get("/v1/models", headers=bearer(token()))
            assert (response.status_code, refusal(response)["code"]) == (503, "auth_unavailable")


async def test_slow_provider(grok: Upstream) -> None:
    """Whoever comes while the first keys are on their way waits for them."""
    provider = Provider()
    provider.gate = Gate()
    async with provided(provider) as url, serving(grok.url, **settings(url)) as service:
        asking = asyncio.create_task(service.ask(headers=bearer(token())))
        await provider.gate.reached.wait()
        provider.gate.open()
        assert (await asking).status_code == 200
        assert provider.fetched == 1


async def test_ready_with_another_way_in(grok: Upstream) -> None:
    """Where somebody is let in without the provider, its absence does not take the service out of its balancer."""
    provider = Provider()
    provider.reply = BROKEN["error"]
    static = "0123456789abcdef"
    async with provided(provider) as url, serving(grok.url, **settings(url, access_tokens=static)) as service:
        assert (await service.client.get("/readyz")).status_code == 200
        assert (await service.ask(headers=bearer(static))).status_code == 200


async def test_keys_without_ids(grok: Upstream) -> None:
    """A token that names no key is good where one key fits, and not where two do."""
    provider = Provider()
    provider.keys = [jwk(EC, None), jwk(RSA, "a"), jwk(OTHER, "b")]
    async with provided(provider) as url, serving(grok.url, **settings(url)) as service:
        assert (await service.ask(headers=bearer(token(EC, "ES256", None)))).status_code == 200
        await unauthorized(service, bearer(token(RSA, "RS256", None)))
        assert (await service.ask(headers=bearer(token(RSA, "RS256", "a")))).status_code == 200


@pytest.mark.parametrize("shown", [False, True])
async def test_names_in_the_log(grok: Upstream, shown: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The log has one short digest for one caller, its name only where that is allowed, and the token never."""
    grok.set_scripts(stream("a"))
    made = [
        token(SECRET, "HS256", sub=name, jti=str(number)) for number, name in enumerate(["canary", "canary", "eve"])
    ]
    with caplog.at_level(logging.DEBUG):
        async with serving(grok.url, auth_jwt_secret=SECRET, log_clients=shown) as service:
            for each in made:
                await service.ask(headers=bearer(each))
    clients = [record.client for record in caplog.records if record.getMessage() == "request"]  # type: ignore[attr-defined]
    assert clients[0] == clients[1] != clients[2]
    assert (clients[0] == "canary") == shown
    assert shown or (clients[0].startswith("user:") and len(clients[0]) == 13)
    text = "\n".join(str(vars(record)) for record in caplog.records)
    assert ("canary" in text) == shown
    assert all(part not in text for each in made for part in each.split("."))


# AUTH_HEADER.

FORWARDED = "X-Forwarded-User"


async def test_header_of_a_proxy(grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """A trusted proxy names the caller; without a name nobody is let in, and two names are none."""
    grok.set_scripts(stream("a"))
    with caplog.at_level(logging.INFO):
        async with serving(grok.url, auth_header=FORWARDED, rate_limit="1/day", log_clients=True) as service:
            for number, name in enumerate(["ada", "eve"]):  # from one address, which the proxy tells, too
                given = {FORWARDED: name, "X-Forwarded-For": "203.0.113.9"}
                assert (await service.ask(headers=given)).status_code == 200
                limited(await service.ask(headers={**given, "X-Forwarded-For": f"203.0.113.{number}"}))
            for headers in ({}, {FORWARDED: ""}, {FORWARDED: "x" * 256}, {"X_Forwarded_User": "mallory"}):
                assert await unauthorized(service, headers) == "Bearer"
            twice = [(FORWARDED.encode(), b"ada"), (FORWARDED.lower().encode(), b"eve")]
            response = await service.client.post("/api/chat", json={"messages": HI}, headers=twice)
            assert response.status_code == 401
    assert [record.client for record in caplog.records if record.getMessage() == "request"][0] == "ada"  # type: ignore[attr-defined] # noqa: RUF015


async def test_header_of_somebody_else(grok: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    """From any other peer the field counts for nothing, whatever address it speaks for; the log says why."""
    grok.set_scripts(stream("a"))
    with caplog.at_level(logging.INFO):
        async with serving(grok.url, auth_header=FORWARDED, forwarded_allow_ips="192.0.2.1") as service:
            for headers in ({FORWARDED: "canary"}, {FORWARDED: "canary", "X-Forwarded-For": "192.0.2.1"}):
                await unauthorized(service, headers)
            assert caplog.text.count("not in FORWARDED_ALLOW_IPS") == 2
            await unauthorized(service, {})
    assert caplog.text.count("AUTH_HEADER") == 2
    assert "canary" not in caplog.text
    assert grok.calls == []


async def test_header_beside_a_token(grok: Upstream) -> None:
    """Both may be set: the proxy's name counts first, and a token lets in who has none."""
    grok.set_scripts(stream("a"))
    async with serving(grok.url, auth_header=FORWARDED, auth_jwt_secret=SECRET, rate_limit="1/day") as service:
        good = bearer(token(SECRET, "HS256", sub="ada"))
        assert (await service.ask(headers=good)).status_code == 200
        limited(await service.ask(headers=good))
        assert (await service.ask(headers={**good, FORWARDED: "ada"})).status_code == 200  # another one's ada
        await unauthorized(service, bearer("a.b.c"))


async def test_answer_outlives_its_token(grok: Upstream) -> None:
    """A resumable answer of a named caller is read on by whoever has its id, after the token has expired."""
    gate = Gate()
    grok.set_scripts(stream("a", gate, "b", HANG))
    async with serving(grok.url, auth_jwt_secret=SECRET) as service:
        made = jwt.encode({"sub": "ada", "exp": int(time.time()) - 29}, SECRET, "HS256")
        created = await service.ask(headers={**bearer(made), "Accept": "application/json"})
        await asyncio.sleep(1.1)
        await unauthorized(service, bearer(made))
        gate.open()
        async with service.client.stream("GET", created.json()["url"]) as response:
            assert response.status_code == 200
        assert (await service.client.delete(f"/api/chat/{created.json()['id']}")).status_code == 204


# What a backend of one's own needs.


@pytest.mark.parametrize("language", ["python", pytest.param("node", marks=needs_node)])
async def test_recipes(grok: Upstream, language: str) -> None:
    """The ten lines that the README links to make tokens that let in, and name the user."""
    grok.set_scripts(stream("a"))
    if language == "python":
        made = make_token.token("ada", SECRET)
    else:
        code = "import(process.argv[1]).then(({ token }) => console.log(token('ada')))"
        process = await asyncio.create_subprocess_exec(
            *("node", "--eval", code, str(ROOT / "tests/operations/token.mjs")),
            env={"AUTH_JWT_SECRET": SECRET, "PATH": os.environ["PATH"]},
            stdout=asyncio.subprocess.PIPE,
        )
        made = (await process.communicate())[0].decode().strip()
    async with serving(grok.url, auth_jwt_secret=SECRET, rate_limit="1/day") as service:
        assert (await service.ask(headers=bearer(made))).status_code == 200
        limited(await service.ask(headers=bearer(token(SECRET, "HS256", sub="ada"))))
        await unauthorized(service, bearer(made[:-2]))
