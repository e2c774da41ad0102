"""Proxies come from the environment by the rules of urllib and httpx, and a wrong one is told without its value."""

import pytest

from chatproxy.config import SettingsError, load, proxies

EXPECTED = "expected a proxy such as http://proxy.example:3128, by http, https, socks5 or socks5h"


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("proxy.example:3128", "http://proxy.example:3128"),
        ("proxy", "http://proxy:80"),
        ("HTTP://Proxy.Example:3128/", "http://proxy.example:3128"),
        ("https://proxy.example", "https://proxy.example:443"),
        ("socks5://10.0.0.1", "socks5://10.0.0.1:1080"),
        ("socks5h://localhost:9050", "socks5h://localhost:9050"),
        ("[::1]:3128", "http://[::1]:3128"),
        ("user:password@proxy:1", "http://user:password@proxy:1"),
        ("http://user:p%40ss:w@rd%@proxy:1", "http://user:p%40ss%3Aw%40rd%25@proxy:1"),
        ("http://token@proxy:1", "http://token@proxy:1"),
    ],
)
def test_proxy(value: str, url: str) -> None:
    """A proxy is an address, with a scheme or without, and may have a name and a password, encoded or not."""
    settings = load({"GROK_API_KEY": "k", "HTTPS_PROXY": f" {value} "})
    assert settings.proxy == url
    assert url not in repr(settings)


@pytest.mark.parametrize(
    "value",
    [
        *("socks://canary:1080", "socks4://canary:1080", "socks5:///canary", "ftp://canary", "file:///canary"),
        *(
            "http://canary:port",
            "canary:port",
            "http://canary:99999",
            "http://canary:0",
            "http://[canary",
            "[::canary]",
        ),
        *("http://proxy:1/canary", "http://proxy:1?canary", "http://proxy#canary", "http://user:canary/a@proxy:1"),
        *("http://pr oxy.canary:1", "http://canary.ex\nample:1", '"http://canary:1"', "http://", "http://:canary@:1"),
        *("http://canary\u00e9:1", "user:can\udcffary@proxy:1", "http://canary\x00:1"),
    ],
)
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_wrong_proxy(variable: str, value: str) -> None:
    """What cannot be used is a wrong value, told with the variable and without the value; the demo does not look."""
    with pytest.raises(SettingsError) as problems:
        load({"GROK_API_KEY": "k", variable: value, "PORT": "x"})
    assert str(problems.value) == f"PORT: expected int, not 'x'\n{variable}: {EXPECTED}"
    assert load({variable: value}).proxy is None


URL = "https://api.x.ai/v1"


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "a"}, ("HTTPS_PROXY", "a")),
        ({"HTTPS_PROXY": "a", "https_proxy": "b"}, ("https_proxy", "b")),
        ({"HTTPS_PROXY": "a", "https_proxy": ""}, None),
        ({"HTTP_PROXY": "a"}, None),
        ({"ALL_PROXY": "a"}, ("ALL_PROXY", "a")),
        ({"ALL_PROXY": "a", "all_proxy": "b"}, ("all_proxy", "b")),
        ({"all_proxy": "socks://a", "HTTPS_PROXY": "b"}, ("HTTPS_PROXY", "b")),  # as GNOME sets them
        ({"ALL_PROXY": "a", "HTTPS_PROXY": " "}, ("ALL_PROXY", "a")),
        ({"HTTPS_PROXY": "a", "REQUEST_METHOD": "GET"}, ("HTTPS_PROXY", "a")),
        ({"HTTPS_PROXY": "a", "NO_PROXY": "x.ai"}, None),
        ({"HTTPS_PROXY": "a", "NO_PROXY": "x.ai", "no_proxy": "y.ai"}, ("HTTPS_PROXY", "a")),
        ({"ALL_PROXY": "a", "no_proxy": "*"}, None),
    ],
)
def test_which_proxy(environ: dict[str, str], found: tuple[str, str] | None) -> None:
    """The scheme's own variable goes before ALL_PROXY, lower case before upper case, and NO_PROXY before all."""
    assert proxies.find(URL, environ) == found


def test_cgi() -> None:
    """Where HTTP_PROXY may be a request's header `Proxy`, it does not count; in lower case it does."""
    url = "http://gateway/v1"
    assert proxies.find(url, {"HTTP_PROXY": "a"}) == ("HTTP_PROXY", "a")
    assert proxies.find(url, {"HTTP_PROXY": "a", "REQUEST_METHOD": ""}) is None
    assert proxies.find(url, {"http_proxy": "a", "REQUEST_METHOD": ""}) == ("http_proxy", "a")
    assert proxies.find(url, {"HTTP_PROXY": "a", "REQUEST_METHOD": "", "ALL_PROXY": "b"}) == ("ALL_PROXY", "b")


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("", URL, False),
        (",, ,", URL, False),
        ("*", URL, True),
        ("localhost,*", URL, True),
        ("api.x.ai", URL, True),
        ("X.AI", URL, True),
        (".x.ai", URL, True),
        ("*.x.ai", URL, True),
        ("pi.x.ai", URL, False),
        ("example.com x.ai", URL, True),
        ("api.x.ai:443", URL, True),
        ("api.x.ai:8443", URL, False),
        ("x.ai:8443", "https://api.x.ai:8443/v1", True),
        ("x.ai:80", "http://api.x.ai/v1", True),
        ("10.1.2.3", "http://10.1.2.3:8080/v1", True),
        ("10.1.2.3:8080", "http://10.1.2.3:8080/v1", True),
        ("10.1.2.3:8081", "http://10.1.2.3:8080/v1", False),
        ("10.0.0.0/8", "http://10.1.2.3:8080/v1", True),
        ("10.1.2.3/8", "http://10.1.2.3:8080/v1", True),
        ("11.0.0.0/8", "http://10.1.2.3:8080/v1", False),
        ("10.0.0.0/99", "http://10.1.2.3:8080/v1", False),
        ("2.3", "http://10.1.2.3:8080/v1", False),
        ("::1", "http://[::1]:8080/v1", True),
        ("[::1]", "http://[::1]:8080/v1", True),
        ("[::1]:8080", "http://[::1]:8080/v1", True),
        ("[::1]:8081", "http://[::1]:8080/v1", False),
        ("0:0::1", "http://[::1]:8080/v1", True),
        ("fd00::/8", "http://[fd00::7]/v1", True),
        ("10.0.0.0/8", "http://[fd00::7]/v1", False),
    ],
)
def test_no_proxy(no_proxy: str, url: str, direct: bool) -> None:
    """NO_PROXY takes hosts and all below them, addresses, networks, and ports."""
    environ = {"ALL_PROXY": "http://proxy", "NO_PROXY": no_proxy}
    assert (proxies.find(url, environ) is None) == direct


@pytest.mark.parametrize("variable", ["NO_PROXY", "no_proxy"])
def test_no_proxy_in_quotes(variable: str) -> None:
    """NO_PROXY in quotes would match other hosts than are meant, so where there is a proxy it is a wrong value."""
    quoted = {"GROK_API_KEY": "k", variable: '"canary,api.x.ai"'}
    with pytest.raises(SettingsError) as problems:
        load({**quoted, "HTTPS_PROXY": "proxy"})
    assert str(problems.value) == f"{variable}: is in quotes; leave them out"
    assert load(quoted).proxy is None


def test_file_and_environment() -> None:
    """A file's proxy does not come before a real variable by being in lower case."""
    values = {"https_proxy": "a", "no_proxy": "b", "GROK_MODEL": "c", "ALL_PROXY": "d"}
    left = proxies.without_other_case(values, {"HTTPS_PROXY": "", "all_proxy": "", "grok_model": ""})
    assert left == {"no_proxy": "b", "GROK_MODEL": "c"}
