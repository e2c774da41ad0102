"""Who may know whom. To change the architecture, change this table in the same commit."""

import ast
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "chatproxy"

# From top to bottom: each module imports only from further down, and of other packages only those named.
LAYERS = {
    "__main__": "doctor.command server config logs | dotenv uvicorn",
    "doctor.command": "doctor.answer doctor.survey doctor.advice doctor.visit doctor.client | anyio httpx",
    "doctor.answer": "doctor.advice doctor.arrivals doctor.visit doctor.client |",
    "doctor.survey": "doctor.advice doctor.visit doctor.client | httpx",
    "doctor.visit": "doctor.advice doctor.client | httpx",
    "doctor.client": "config | anyio httpx",
    "doctor.arrivals": "|",
    "doctor.advice": "| httpx",
    "doctor.__init__": "|",
    "server": "app connection config errors | uvicorn",
    "app": "middleware routes limits config metrics services.demo services.grok services.streams | starlette",
    "connection": "middleware errors schemas | uvicorn",
    "middleware": "responses config errors logs metrics | starlette",
    "routes": (
        "responses openapi limits config errors metrics schemas "
        "services.grok services.relay services.streams | starlette"
    ),
    "responses": "config errors interrupt metrics schemas services.relay sse | starlette",
    "openapi": "__init__ errors schemas | msgspec",
    "limits": "config errors |",
    "services.grok": "services.transport config errors interrupt metrics schemas sse | httpx",
    "services.transport": "| httpx httptools",
    "services.streams": "services.relay errors metrics sse |",
    "services.relay": "errors metrics schemas sse | msgspec",
    "services.demo": "|",
    "services.__init__": "|",
    "interrupt": "|",
    "schemas": "errors | msgspec",
    "config": "| msgspec",
    "metrics": "| prometheus_client",
    "logs": "|",
    "sse": "|",
    "errors": "|",
    "__init__": "|",
}


def imports(module: str) -> Iterator[str]:
    """What it imports that is not of the standard library: ours without the package's name, others by their first."""
    tree = ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree):
        names = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(level=level, module=origin):
                assert level == 0, "imports are absolute"
                # `from chatproxy import x` is a module, or a name of __init__; below it may be a module of a package.
                whole = [f"{origin}.{alias.name}" for alias in node.names]
                names = [
                    name if origin == "chatproxy" or name.removeprefix("chatproxy.") in LAYERS else origin or ""
                    for name in whole
                ]
        for name in names:
            first, _, rest = name.partition(".")
            if first == "chatproxy":
                yield rest if rest in LAYERS else "__init__"
            elif first not in sys.stdlib_module_names:
                yield first


@pytest.mark.parametrize("module", LAYERS)
def test_imports(module: str) -> None:
    """It imports what the table says, and nothing of ours that stands above it."""
    ours, _, others = LAYERS[module].partition("|")
    assert {*imports(module)} == {*ours.split(), *others.split()}
    order = list(LAYERS)
    assert all(order.index(module) < order.index(name) for name in ours.split())


def test_every_module_has_a_place() -> None:
    """Nothing is outside of the table."""
    paths = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    assert paths == set(LAYERS)


def test_environment() -> None:
    """Only the start of the process reads the environment, so that a setting has one way in."""
    reading = {
        path.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert reading == {"__main__.py"}
