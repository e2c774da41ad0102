"""`.env` is read whole or not at all: each line that cannot be read is told by its number, and nothing of it is."""

from pathlib import Path

import pytest

from chatproxy.config import envfile

KNOWN = {"GROK_API_KEY", "ACCESS_TOKENS", "SYSTEM_PROMPT", "RATE_LIMIT"}

LINE = "cannot be read: expected NAME=value"
QUOTE = f"{LINE}, with every quote closed"


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ('GROK_API_KEY=k\nACCESS_TOKENS="canary\n', [f"line 2 {QUOTE}"]),
        ("SYSTEM_PROMPT='Don't tell canary'\n", [f"line 1 {QUOTE}"]),
        ("\n# one\n\n\r\nACCESS_TOKENS: canary\n", [f"line 5 {QUOTE}"]),
        ("ACCESS_TOKENS:canary\n", [f"line 1 {LINE}"]),
        ("ACCESS_TOKENS:https://canary?a=b\n", [f"line 1 {LINE}"]),
        ("ACCESS_TOKENS canary\n", [f"line 1 {QUOTE}"]),
        ("ACCESS_TOKENS\n", [f"line 1 {LINE}"]),
        ("export RATE_LIMIT\n", [f"line 1 {LINE}"]),
        ("ACCESS_TOKENS=\n  canary-Canary_canary\n", [f"line 2 {LINE}"]),
        ("https_proxy\n", [f"line 1 {LINE}"]),
        ("=canary\n", [f"line 1 {QUOTE}"]),
        ('"ACCESS_TOKENS"=canary\n', [f"line 1 {LINE}"]),
        ("can ary=1\n\n\ncan'ary\nA=1\n", [f"line 1 {QUOTE}", f"line 4 {LINE}"]),
        (
            'SYSTEM_PROMPT="Be brief\nACCESS_TOKENS=canary\nRATE_LIMIT="\n',
            ["line 1 begins a quoted value that goes on over ACCESS_TOKENS: is a quote not closed?"],
        ),
        (
            "SYSTEM_PROMPT='Be brief\n export RATE_LIMIT = canary'\n",
            ["line 1 begins a quoted value that goes on over RATE_LIMIT: is a quote not closed?"],
        ),
    ],
)
def test_lines_that_cannot_be_read(tmp_path: Path, text: str, problems: list[str]) -> None:
    """What is no NAME=value, or has a quote that is not closed, is a problem; the other lines are told as well."""
    path = tmp_path / ".env"
    path.write_text(text)
    assert envfile.read(path, KNOWN)[1] == [f"{path}: {problem}" for problem in problems]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("\n \n# A=1\nexport A = 1 # one\n", {"A": "1"}),
        ("A=\nB=''\n", {"A": "", "B": ""}),
        ("\ufeffA=1\r\nB='$A ${B}'\r\n", {"A": "1", "B": "$A ${B}"}),
        ("EDITOR\nlog.level=1\nmy-name=2\n", {"log.level": "1", "my-name": "2"}),
        ("SYSTEM_PROMPT=\"Don't.\nAnswer A = 1: with\nACCESS to 'all'.\"\n", None),
        ("A=1\nA=2", {"A": "2"}),
    ],
)
def test_lines_that_can_be_read(tmp_path: Path, text: str, values: dict[str, str] | None) -> None:
    """Everything else is read as python-dotenv does, without replacing anything; values may have several lines."""
    path = tmp_path / ".env"
    path.write_text(text, encoding="utf-8")
    prompt = "Don't.\nAnswer A = 1: with\nACCESS to 'all'."
    assert envfile.read(path, KNOWN) == ({"SYSTEM_PROMPT": prompt} if values is None else values, [])


def test_no_file(tmp_path: Path) -> None:
    """There need not be one; but what has its name and is no text is a problem, as Docker's empty directory is."""
    assert envfile.read(tmp_path / ".env", KNOWN) == ({}, [])
    assert envfile.read(tmp_path, KNOWN) == ({}, [f"{tmp_path}: cannot be read (IsADirectoryError)"])
    (tmp_path / "utf-16").write_bytes("A=canary".encode("utf-16"))
    problem = f"{tmp_path / 'utf-16'}: cannot be read (UnicodeDecodeError)"
    assert envfile.read(tmp_path / "utf-16", KNOWN) == ({}, [problem])
    (tmp_path / "link").symlink_to("canary")
    problem = f"{tmp_path / 'link'}: is a link to a file that does not exist"
    assert envfile.read(tmp_path / "link", KNOWN) == ({}, [problem])
