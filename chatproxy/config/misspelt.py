"""Names of variables that nothing reads, and that are probably meant to be those of settings."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from chatproxy.config import proxies

# What Kubernetes sets for a service named `grok`, and names of another company.
OTHERS = re.compile(r"GROK_(SERVICE_(HOST|PORT)|PORT)(_\w+)?|GROQ_\w+")

# Characters. Shorter names (HOST, PORT) are almost like those of many other programs.
SHORT = 8


def warnings(environ: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """A sentence for each: names that begin with GROK_, and those that are almost one of these that are read."""
    known = [*names, *proxies.VARIABLES]
    warnings = []
    for name in sorted(environ):
        if name in known or name.lower() in map(str.lower, proxies.VARIABLES) or OTHERS.fullmatch(name):
            continue
        likely = _likely(name.upper(), known)
        if likely and not environ.get(likely, "").strip():
            warnings.append(f"{name} is not a setting and counts for nothing: is {likely} meant?")
        elif name.startswith("GROK_"):
            warnings.append(f"{name} is not a setting and counts for nothing")
    return warnings


def _likely(name: str, known: list[str]) -> str | None:
    """The variable that is meant by this name, if it is like one, or would name a file of its value."""
    if name.startswith(("GROK_", "XAI_")):
        ours = [word for word in known if word.startswith(("GROK_", "XAI_"))]
        matches = get_close_matches(name.replace("XAI_", "GROK_", 1), ours, 1, 0.75)
    else:
        long = [word for word in known if len(word) >= SHORT]
        whole = name.removesuffix("_FILE")
        matches = [whole] if whole in long else get_close_matches(name, long, 1, 0.88)
    return matches[0] if matches else None
