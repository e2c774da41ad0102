"""Settings that are right each by itself, and wrong beside each other."""

from collections.abc import Collection, Mapping
from ipaddress import ip_network
from typing import Any


def find(read: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """A sentence for each. `given` are the names of the variables that are set, `read` has what was read of them."""
    problems = []
    secret = "AUTH_JWT_SECRET" in given or "AUTH_JWT_SECRET_FILE" in given
    if read.get("grok_tools") and read.get("grok_api") != "responses":
        problems.append("GROK_TOOLS: expected only with GROK_API=responses, for the other API has no tools")
    if "AUTH_JWKS_URL" in given and secret:
        problems.append("AUTH_JWKS_URL and AUTH_JWT_SECRET: expected one of them")
    if "AUTH_JWKS_URL" in given and "AUTH_ISSUER" not in given:
        problems.append("AUTH_ISSUER: expected with AUTH_JWKS_URL, for many providers sign for all with the same keys")
    if "AUTH_JWKS_URL" not in given and not secret:
        problems += [
            f"{name}: expected only with AUTH_JWKS_URL or AUTH_JWT_SECRET"
            for name in ("AUTH_ISSUER", "AUTH_AUDIENCE")
            if name in given
        ]
    if "AUTH_HEADER" in given and not _names_proxies(read.get("forwarded_allow_ips", "127.0.0.1")):
        problems.append("AUTH_HEADER: expected with a proxy's address in FORWARDED_ALLOW_IPS; * would believe anybody")
    return problems


def _names_proxies(trusted: str) -> bool:
    """Whether these are addresses of some machines, and neither of none nor of all."""
    return trusted not in ("", "*") and all(ip_network(item).prefixlen for item in trusted.split(","))
