"""The file `.env`: its variables, and what is wrong with its lines.

python-dotenv skips a line that it cannot read and goes on without it. A setting that is silently missing may be the
one that keeps strangers out, so here each such line is a problem. Does not know which variables there are.
"""

import re
from collections.abc import Collection
from io import StringIO
from pathlib import Path

from dotenv.parser import Binding, parse_stream

_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_BARE_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")


def read(path: Path, known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The variables of the file (of none, if there is no file), and one line for each problem, without any content.

    A word without `=` is a problem if it is one of the `known` names, or is not in upper case as names are: it may be
    a value that was moved to a line of its own. Other names are ignored, as by python-dotenv.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        # A link that leads nowhere, as to a secret that is not mounted, was meant to be a file.
        return {}, [f"{path}: is a link to a file that does not exist"] if path.is_symlink() else []
    except (OSError, UnicodeDecodeError) as error:
        return {}, [f"{path}: cannot be read ({type(error).__name__})"]
    values: dict[str, str] = {}
    problems: list[str] = []
    for binding in parse_stream(StringIO(text)):
        if binding.value is not None and binding.key is not None:
            values[binding.key] = binding.value
        if problem := _problem(binding, known):
            problems.append(f"{path}: line {_line(binding)} {problem}")
    return values, problems


def _line(binding: Binding) -> int:
    """Where it begins. (The parser counts from the blank lines before it.)"""
    text = binding.original.string
    blank = text[: len(text) - len(text.lstrip())]
    return binding.original.line + len(re.findall(r"\r\n|\n|\r", blank))


def _problem(binding: Binding, known: Collection[str]) -> str | None:
    if binding.error:
        return "cannot be read: expected NAME=value, with every quote closed"
    if binding.key is None:  # a comment, or blank
        return None
    pattern = _BARE_NAME if binding.value is None else _NAME
    if not pattern.fullmatch(binding.key) or (binding.value is None and binding.key in known):
        return "cannot be read: expected NAME=value"
    _, *more = binding.original.string.strip().splitlines()
    for line in more:
        name = re.match(r"\s*(?:export\s+)?(\w+)\s*=", line)
        if name and name[1] in known:
            return f"begins a quoted value that goes on over {name[1]}: is a quote not closed?"
    return None
