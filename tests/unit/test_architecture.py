"""Who may know whom: the sentences of the README's "Development", checked against the imports."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "chatproxy"
PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}

# From top to bottom; what stands in one line does not matter to each other here.
LAYERS = [
    ["__main__", "asgi"],
    ["server", "connection", "doctor"],
    ["app"],
    ["middleware", "routes"],
    ["services"],
    ["formats"],
    ["events", "sse", "errors", "config", "logs", "metrics", "lifecycle", "cancellation", "surrogates", "__init__"],
]


def layer(module: str) -> int:
    [number] = [number for number, names in enumerate(LAYERS) if module.partition(".")[0] in names]
    return number


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """The modules that are imported, and of each the names that are."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                yield from ((alias.name, "") for alias in node.names)
            case ast.ImportFrom(level=level, module=origin):
                assert level == 0, "imports are absolute"
                yield from ((origin or "", alias.name) for alias in node.names)


def own(path: Path) -> Iterator[str]:
    """The modules of ours that are imported."""
    for module, name in imports(path):
        first, _, rest = module.partition(".")
        if first == "chatproxy":
            yield next(
                found
                for found in (f"{rest}.{name}".strip("."), rest, "__init__")
                if found in PATHS or found == "__init__"
            )


@pytest.mark.parametrize("module", PATHS)
def test_imports_point_down(module: str) -> None:
    """Nobody imports what stands above it."""
    assert [name for name in own(PATHS[module]) if layer(name) < layer(module)] == []


def knowing(package: str) -> set[str]:
    """Who imports that package, by the first part of the name."""
    return {
        module if package == "httpx" else module.partition(".")[0]
        for module, path in PATHS.items()
        if any(name.partition(".")[0] == package for name, _ in imports(path))
    }


def test_who_knows_which_package() -> None:
    """httpx is known where others are asked, Starlette where requests are served, uvicorn where it is put together."""
    assert {module.rpartition(".")[0] for module in knowing("httpx")} == {
        "services.grok",
        "services.identity",
        "doctor",
    }
    assert knowing("starlette") == {"middleware", "routes", "app", "asgi"}
    assert knowing("uvicorn") <= {"server", "connection", "app", "__main__"}


def test_two_sides() -> None:
    """What clients read and what Grok says never know each other."""
    for module, path in PATHS.items():
        if module.startswith("formats"):
            assert [name for name in own(path) if name.startswith("services")] == []
        if module.startswith("services.grok"):
            assert [name for name in own(path) if name.startswith("formats")] == []


def test_no_private_names_of_others() -> None:
    """Neither a module nor a name that another package does not promise is imported."""
    private = {
        f"{module}.{name}"
        for path in PATHS.values()
        for module, name in imports(path)
        if module.partition(".")[0] not in {"chatproxy", *sys.stdlib_module_names}
        and any(part.startswith("_") for part in (*module.split("."), name))
    }
    assert private == set()


def test_size() -> None:
    """A file is read in one go."""
    lines = {module: len(path.read_text().splitlines()) for module, path in PATHS.items()}
    assert {module for module, count in lines.items() if count > 300} == set()


def test_environment_has_one_way_in() -> None:
    """Only the start of the process reads the environment."""
    reading = {
        module
        for module, path in PATHS.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert reading <= {"config.environment", "__main__"}  # the doctor's token
