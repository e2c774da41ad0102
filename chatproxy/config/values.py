"""From the text of one variable to its value. What it is not raises ValueError with the rule, never with the text.

Does not know which variables there are, nor their defaults.
"""

import os
import re
import ssl
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address, ip_network
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, urlsplit

from chatproxy.config.proxies import HOSTNAME, PORTS

# Straight ones, and those that a word processor makes of them.
QUOTES = "\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"

# The resources of xAI's API, one of which is easily copied along with the address.
ENDPOINT = re.compile(
    r"/((chat/)?completions|responses|embeddings|messages|models|api-key|images/generations)$", re.IGNORECASE
)

# How OpenSSL names the files of a directory of certificates (`openssl rehash`).
HASHED = re.compile(r"[0-9a-f]{8}\.\d+")

# Nobody's key is larger; a device that never ends is.
MAX_KEY_FILE = 65_536


def api_key(value: str) -> str:
    if any(quote in value for quote in QUOTES):
        raise ValueError("is in quotes; leave them out")
    # It becomes a header's value; RFC 6750 allows less, but nothing outside of this.
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError("expected visible ASCII characters without spaces")
    return value


def api_key_file(path: str) -> str:
    text = secret_file(path)
    if not text:
        raise ValueError("holds no key")
    return api_key(text)


def secret_file(path: str) -> str:
    if path[0] in QUOTES:
        raise ValueError("is in quotes; leave them out")
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_KEY_FILE).decode("utf-8-sig").strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be read ({type(error).__name__})") from None


def redis_url(value: str) -> str:
    """An address without options, but for the certificates to trust: others would undo what this service sets."""
    rule = "expected an address such as redis://:password@redis.example:6379/0, rediss://… for TLS, or unix:///path"
    if not re.fullmatch(r"[\x21-\x7e]+", value):
        raise ValueError(rule)
    url = urlsplit(value)
    options = parse_qs(url.query, keep_blank_values=True)
    try:
        port_is_one = url.port is None or url.port > 0
    except ValueError:
        port_is_one = False
    place = url.path.startswith("/") if url.scheme == "unix" else re.fullmatch(r"(/\d{0,5})?", url.path)
    host = not url.hostname if url.scheme == "unix" else HOSTNAME.fullmatch(url.hostname or "")
    if url.scheme not in ("redis", "rediss", "unix") or url.fragment or not (port_is_one and place and host):
        raise ValueError(rule)
    if set(options) - ({"ssl_ca_certs"} if url.scheme == "rediss" else {"db"} if url.scheme == "unix" else set()):
        raise ValueError("expected no options in the address, other than ssl_ca_certs with rediss and db with unix")
    if "ssl_ca_certs" in options:
        certificates(options["ssl_ca_certs"][-1])
    return value


def jwks_url(value: str) -> str:
    """Where keys are fetched: not in clear over the internet, for whoever answers decides who may call."""
    rule = "expected an address such as https://auth.example.com/.well-known/jwks.json"
    url = _split_url(value, rule)
    if url.scheme != "https" and ((leaves_in_clear(value) and "." in (url.hostname or "")) or url.scheme != "http"):
        raise ValueError(rule)
    return value


def jwt_secret(value: str) -> str:
    if not re.fullmatch(r"[\x21-\x7e]{32,}", value):  # as many bytes as the digest, RFC 7518, section 3.2
        raise ValueError("expected 32 or more visible ASCII characters")
    return value


def header_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]+", value):  # no "_": some proxies take it for "-", and others do not
        raise ValueError("expected the name of a header field, such as X-Forwarded-User")
    if value.lower() in ("authorization", "cookie", "host", "x-forwarded-for"):
        raise ValueError("expected a header field that nothing but the proxy sets")
    return value.lower()


def redis_prefix(value: str) -> str:
    # No braces, which mean something to a cluster, and no patterns.
    if not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", value):
        raise ValueError("expected 1 to 64 letters, digits and ._:- such as chatproxy:")
    return value


def model(value: str) -> str:
    if any(quote in value for quote in QUOTES):
        raise ValueError("is in quotes; leave them out")
    # Docker's --env-file takes a comment behind a value for a part of it.
    if not re.fullmatch(r"\S+", value):
        raise ValueError("expected a name without spaces")
    return value


def number(value: str) -> str:
    """As msgspec reads it, which takes no `.5`."""
    return re.sub(r"^(-?)\.(?=\d)", r"\g<1>0.", value)


def base_url(value: str) -> str:
    if any(quote in value for quote in QUOTES):
        raise ValueError("is in quotes; leave them out")
    url = _split_url(value, "expected an http or https address such as https://api.x.ai/v1")
    if url.scheme not in PORTS:
        raise ValueError("expected an http or https address such as https://api.x.ai/v1")
    path = url.path.rstrip("/")
    if match := ENDPOINT.search(path):
        raise ValueError(f"expected the address without {match[0]}, which is added to it")
    if url.hostname and re.fullmatch(r"(.+\.)?api\.x\.ai", url.hostname) and not re.fullmatch(r"/v\d+", path):
        raise ValueError("expected an address that ends in the version of the API, such as https://api.x.ai/v1")
    return value.rstrip("/")


def leaves_in_clear(url: str) -> bool:
    """Whether what is sent to this address can be read on the network."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost" or host.endswith(".localhost")
    return parts.scheme == "http" and not local


def origins(value: str) -> Iterator[str]:
    rule = "expected origins such as https://example.com, separated by commas"
    for item in items(value):
        if item == "*":
            yield item
        elif _split_url(item, rule).path not in ("", "/"):
            raise ValueError(rule)
        else:
            yield origin(item)


def origin(url: str) -> str:
    """An address as a browser writes its origin: lower case, without the default port. Raises ValueError."""
    parts = urlsplit(url.lower())
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    port = "" if parts.port in (None, PORTS.get(parts.scheme)) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}"


def _split_url(value: str, rule: str) -> SplitResult:
    """The parts of a URL that is a scheme and a host, or a path there, and nothing more."""
    try:
        url = urlsplit(value)
        port = url.port
    except ValueError:  # its text quotes the value, and a password that is in it
        raise ValueError(rule) from None
    plain = re.fullmatch(r"[\x21-\x7e]+", value) and not re.search(r"[?#@]", value)
    if not plain or not url.scheme or not HOSTNAME.fullmatch(url.hostname or "") or port == 0:
        raise ValueError(rule)
    return url


def host(value: str) -> str:
    try:
        ip_address(value)
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?", value):
            raise ValueError("expected an address such as 127.0.0.1 or ::, or a host name, without port") from None
    return value


def hosts(value: str) -> Iterator[str]:
    for item in items(value):
        if not re.fullmatch(r"\*|\.?[a-z0-9_-]+(\.[a-z0-9_-]+)*", item.lower()):
            raise ValueError("expected host names without port, such as chat.example.com or .example.com, or *")
        yield item.lower()


def rate_limit(value: str) -> dict[str, int]:
    return _rate(value, 9, "expected a number per second, minute, hour or day, such as 20/minute")


def token_budget(value: str) -> dict[str, int]:
    return _rate(value, 12, "expected tokens per second, minute, hour or day, such as 2000000/day")


def _rate(value: str, digits: int, rule: str) -> dict[str, int]:
    match = re.fullmatch(r"([1-9]\d*)/(second|minute|hour|day)", value)
    if not match or len(match[1]) > digits:
        raise ValueError(rule)
    return {"count": int(match[1]), "seconds": {"second": 1, "minute": 60, "hour": 3600, "day": 86400}[match[2]]}


def root_path(value: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*/?", value):
        raise ValueError("expected a path such as /grok")
    return value.rstrip("/")


def tools(value: str) -> list[str]:
    """Searches that the operator allows, each once."""
    names = list(dict.fromkeys(items(value.lower())))
    if not set(names) <= {"web_search", "x_search"}:
        raise ValueError("expected web_search, x_search or both, separated by a comma")
    return names


def tokens(value: str) -> list[str]:
    tokens = items(value)
    # None at all would let everybody in.
    if not tokens or any(not re.fullmatch(r"[A-Za-z0-9._~+/-]{16,}=*", token) for token in tokens):
        raise ValueError("expected tokens of 16 or more letters, digits and ._~+/- separated by commas")
    return tokens


def addresses(value: str) -> str:
    if value == "*":
        return value
    addresses = items(value)
    try:
        for address in addresses:
            ip_network(address)
    except ValueError:
        raise ValueError("expected IP addresses or networks such as 10.0.0.0/8, separated by commas, or *") from None
    return ",".join(addresses)


def items(value: str) -> list[str]:
    return [item.strip() for item in value.split(",") if item.strip()]


def certificates(path: str) -> str:
    """A file of certificates that OpenSSL takes."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with suppress(OSError, ValueError):
        context.load_verify_locations(cafile=path)
    if not context.cert_store_stats()["x509"]:
        raise ValueError("expected a readable file of certificates in PEM format")
    return path


def certificate_directories(paths: str) -> str:
    """Directories, one of which has certificates by the names that OpenSSL looks for; separated as in PATH."""
    names: list[str] = []
    for path in filter(None, paths.split(os.pathsep)):
        with suppress(OSError, ValueError):
            names += (file.name for file in Path(path).iterdir())
    if not any(map(HASHED.fullmatch, names)):
        raise ValueError("expected a directory of certificates, prepared by `openssl rehash`")
    return paths


def writable(path: str) -> None:
    """A file that can be appended to, as Python does with SSLKEYLOGFILE for each SSL context."""
    try:
        with Path(path).open("a"):
            pass
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot be written ({type(error).__name__})") from None
