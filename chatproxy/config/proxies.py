"""Which proxy leads to an address: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

The rules are those of urllib.request and httpx. The variable for the address's scheme comes before ALL_PROXY, and a
name in lower case before the same in upper case, even if it is empty. Where REQUEST_METHOD is set, HTTP_PROXY may be
a header of some request to a CGI program and is not believed. NO_PROXY may name ports and networks besides.
"""

import re
from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from urllib.parse import quote, unquote, urlsplit

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")

PORTS = {"http": 80, "https": 443}

# What a host's name looks like as it is sent. Or an IPv6 address.
HOSTNAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*|[0-9a-f:.]+")

EXPECTED = "expected a proxy such as http://proxy.example:3128, by http, https, socks5 or socks5h"


def find(url: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The variable that names the proxy for this http or https address, and its value; None if there is none."""
    parts = urlsplit(url)
    port = parts.port or PORTS[parts.scheme]
    if bypassed(parts.hostname or "", port, exceptions(environ)[1]):
        return None
    for kind in (parts.scheme, "all"):
        name, value = _value(f"{kind}_proxy", environ)
        if value and not (name == "HTTP_PROXY" and "REQUEST_METHOD" in environ):
            return name, value
    return None


def exceptions(environ: Mapping[str, str]) -> tuple[str, str]:
    """The variable that names the hosts that no proxy is for, and its value."""
    return _value("no_proxy", environ)


def without_other_case(values: Mapping[str, str], real: Mapping[str, str]) -> dict[str, str]:
    """`values` of a file without those that would come before a real variable because they are in lower case."""
    return {
        name: value
        for name, value in values.items()
        if not (name.upper() in VARIABLES and (name.upper() in real or name.lower() in real))
    }


def _value(name: str, environ: Mapping[str, str]) -> tuple[str, str]:
    name = name if name in environ else name.upper()
    return name, environ.get(name, "").strip()


def parse(value: str) -> str:
    """The proxy's URL, its password percent-encoded; without a scheme it is an HTTP proxy. Raises ValueError."""
    has_scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value)
    try:
        url = urlsplit(value if has_scheme else f"http://{value}")
        host, port = url.hostname or "", url.port
    except ValueError:  # its text quotes the value
        raise ValueError(EXPECTED) from None
    plain = url.path in ("", "/") and not (url.query or url.fragment or re.search(r"[\s\x00-\x1f\x7f]", value))
    if not plain or not HOSTNAME.fullmatch(host) or port == 0 or url.scheme not in (*PORTS, "socks5", "socks5h"):
        raise ValueError(EXPECTED)
    login, at, _ = url.netloc.rpartition("@")
    login = ":".join(quote(unquote(part), safe="") for part in login.split(":", 1))
    port = port or PORTS.get(url.scheme, 1080)
    return f"{url.scheme}://{login}{at}{f'[{host}]' if ':' in host else host}:{port}"


def bypassed(host: str, port: int, no_proxy: str) -> bool:
    """Whether NO_PROXY names this host: `*`, a domain and all below it, an address or a network; with a port or not."""
    host = host.lower().rstrip(".")
    address = _address(host)
    for entry in re.split(r"[\s,]+", no_proxy.lower()):
        name, entry_port = entry, ""
        if match := re.fullmatch(r"\[([0-9a-f:.]+)\](?::(\d+))?|([^:]+):(\d+)", entry):
            name, entry_port = match[1] or match[3], match[2] or match[4] or ""
        if entry_port and int(entry_port) != port:
            continue
        domain = name.removeprefix("*").strip(".")
        if name == "*" or (address is None and domain and (host == domain or host.endswith(f".{domain}"))):
            return True
        if address is not None and _in_network(address, name):
            return True
    return False


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _in_network(address: IPv4Address | IPv6Address, name: str) -> bool:
    try:
        return address in ip_network(name, strict=False)
    except ValueError:
        return False
