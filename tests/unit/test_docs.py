"""README.md and .env.example tell the settings, errors and files that there are, with the defaults that they have."""

import re
from collections.abc import Callable

import pytest

from chatproxy import errors
from chatproxy.config import ALIASES, FILES, Settings, load, variable_names
from tests.conftest import ROOT


def rows(first: str) -> dict[str, str]:
    """The first two cells of each row of the README's table whose head begins with this word."""
    text = (ROOT / "README.md").read_text()
    [table] = re.findall(rf"^\| {first} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    pairs = re.findall(r"^\| *(.*?) *\| *(.*?) *\|", table, re.MULTILINE)
    assert len(dict(pairs)) == len(pairs) == table.count("\n")
    return dict(pairs)


def example() -> dict[str, str]:
    """What `.env.example` sets, or would set if the `# ` were taken away."""
    text = (ROOT / ".env.example").read_text()
    pairs = re.findall(r"^(?:# )?([A-Z_]+)=(.*)$", text, re.MULTILINE)
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def readme() -> dict[str, str]:
    """A row is for one variable, or for several with as many defaults, or with none."""
    told: dict[str, str] = {}
    for cell, defaults in rows("variable").items():
        names = re.findall("`([A-Z_]+)`", cell)
        assert cell == ", ".join(f"`{name}`" for name in names)
        values = defaults.replace("`", "").split(", ") if defaults else [""] * len(names)
        assert not told.keys() & set(names)
        told.update(zip(names, values, strict=True))
    return told


@pytest.mark.parametrize("told", [readme, example])
def test_settings(told: Callable[[], dict[str, str]]) -> None:
    """Both list every variable, none besides, and each with the default that it has."""
    settings = told()
    assert sorted(settings) == sorted(variable_names())
    assert load(settings) == Settings()
    for name in set(settings) - {*ALIASES, *FILES}:
        default = getattr(Settings(), name.lower())
        assert bool(settings[name]) == (default not in (None, "", ()))


def test_six_settings_that_matter() -> None:
    """What a newcomer has to know comes first, in the README's table as in `.env.example`."""
    [sentence] = re.findall(r"Six\smatter first: (.*?)\.", (ROOT / "README.md").read_text(), re.DOTALL)
    six = re.findall("`([A-Z_]+)`", sentence)
    assert len(six) == 6
    assert [cell.split("`")[1] for cell in rows("variable")][:6] == six
    assert list(example())[:6] == six


def test_errors() -> None:
    """The README lists every code, beside its status or as one of the stream."""

    def leaves(kind: type[errors.ChatError]) -> list[type[errors.ChatError]]:
        return [leaf for child in kind.__subclasses__() for leaf in leaves(child)] or [kind]

    table = rows("status")
    told = {
        (status, code)
        for cell, text in table.items()
        for status in cell.split(", ")
        for code in re.findall(r"`([a-z_]+)`", text)
    }
    codes = {code for _, code in told}
    assert codes - {"param"} == {kind.code for kind in leaves(errors.ChatError)}
    for kind in leaves(errors.ChatError):
        assert {(str(kind.status), kind.code), ("stream", kind.code)} & told


def test_files_that_the_readme_names() -> None:
    """Whatever the README and the table of promises link to is there; of each promise a test."""
    for file in (ROOT / "README.md", ROOT / "tests" / "README.md"):
        linked = [target for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text()) if ":" not in target]
        assert [target for target in linked if not (file.parent / target).exists()] == []
    promises = re.findall(r"^\| .* \| (\[.*) \|$", (ROOT / "tests" / "README.md").read_text(), re.MULTILINE)
    assert len(promises) >= 12


def test_length_of_the_readme() -> None:
    """It is read in one go, in any window."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 300
    assert [line for line in lines if len(line) > 120] == []


def test_first_lines_of_the_readme() -> None:
    """Who reads it for the first time sees the page, and finds the command and the code, within forty lines."""
    first = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    for shown in ("](.github/page.png)", "```sh\nmake run\n```", "curl -N ", 'import { ask } from "'):
        assert shown in first
    assert (ROOT / ".github" / "page.png").stat().st_size < 100_000


def test_contents_of_the_readme() -> None:
    """Each link to a section leads to one."""
    text = (ROOT / "README.md").read_text()
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    linked = set(re.findall(r"\]\(#(.+?)\)", text))
    assert linked == anchors
