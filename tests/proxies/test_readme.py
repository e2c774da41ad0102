"""The README links to the configurations that the tests here run."""

from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped] # it has no types

from tests.conftest import ROOT

HERE = Path(__file__).parent


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile", "haproxy.cfg", "apache.conf", "traefik.yaml"])
def test_configurations_are_linked(name: str) -> None:
    """Users find the files: the README links to each."""
    assert f"]({(HERE / name).resolve().relative_to(ROOT)})" in (ROOT / "README.md").read_text()


def test_traefik() -> None:
    """Traefik cannot be installed here; what is shown of it is at least one router and the service that it names."""
    http = yaml.safe_load((HERE / "traefik.yaml").read_text())["http"]
    [router] = http["routers"].values()
    assert "metrics" not in router["rule"]
    assert http["services"][router["service"]] == {"loadBalancer": {"servers": [{"url": "http://127.0.0.1:8000"}]}}
