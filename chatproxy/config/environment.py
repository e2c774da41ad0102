"""The one place that reads the process's environment, and `.env` in the working directory."""

import os
from pathlib import Path

from chatproxy.config import Settings, envfile, load, proxies, variable_names


def load_environment(*, local: bool = False) -> Settings:
    """Settings from the environment and `.env`; a real variable wins. Raises SettingsError with every problem found.

    `local`: HOST is 127.0.0.1 where neither sets it.
    """
    values, problems = envfile.read(Path(".env"), {*variable_names(), *proxies.VARIABLES})
    given = proxies.without_other_case(values, os.environ) | os.environ
    if local and not given.get("HOST", "").strip():
        given["HOST"] = "127.0.0.1"
    return load(given, problems)
