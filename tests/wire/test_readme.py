"""Every block of the README is run: here, or by the test that is named here."""

import asyncio
import itertools
import json
import os
import re
import shlex
import shutil
import sys

import pytest

from chatproxy.config import load, variable_names
from chatproxy.formats.plain import decode_request
from tests.conftest import ROOT, InProcessService, serving
from tests.readers import standard
from tests.upstream import Upstream, stream

pytestmark = pytest.mark.anyio

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)

# What begins so is run by a test of its own: the first one in Chromium.
STARTS = {
    "import { ask }": "tests/browser/test_client.py",
    "const say": "tests/wire/test_readme.py",
    "client = OpenAI": "tests/wire/test_readme.py",
    "sequenceDiagram": "tests/wire/test_readme.py",
}


def read(name: str) -> str:
    return (ROOT / name).read_text()


def of(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def test_each_block_is_run() -> None:
    """There is no block of which nobody knows whether it works."""
    assert (ROOT / "README.md").read_text().count("```") == 2 * len(BLOCKS)
    for language, text in BLOCKS:
        if language not in ("sh", "ini", "json"):
            [place] = [place for start, place in STARTS.items() if text.startswith(start)]
            assert "README.md" in (ROOT / place).read_text()


@pytest.mark.parametrize("text", of("ini"))
def test_settings_of_the_readme(text: str) -> None:
    """They are taken as they stand."""
    values = dict(line.split("=", 1) for line in text.splitlines())
    assert load(values).warnings == ()


@pytest.mark.parametrize("text", of("json"))
async def test_body_of_the_readme(text: str) -> None:
    """It is a whole request, and nothing in it is ignored."""
    assert json.loads(text).keys() == {"messages", "sessionId", "include", "tools", "resumable"}
    asked = decode_request(text.encode(), "id")
    assert (asked.resumable, asked.chat.tools, asked.chat.session_id) == (True, ("web_search",), "a1")


def test_diagram() -> None:
    """Each line of the diagram is a message or a note between those that take part."""
    [text] = of("mermaid")
    first, *lines = text.splitlines()
    assert first == "sequenceDiagram"
    who = "(Browser|Proxy|chatproxy|Replica|Grok)"
    for line in lines:
        assert re.fullmatch(rf"    ({who}--?>>{who}|Note over {who},{who}): [^;#]+", line)  # these two mean more


COMMANDS = [line for text in of("sh") for line in text.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
async def test_commands_of_the_readme(command: str) -> None:
    """make knows its targets, curl gets the answer, and docker is told options and files that there are."""
    program, *arguments = shlex.split(command)
    if program == "make":
        process = await asyncio.create_subprocess_exec(
            *("make", "--dry-run", *arguments), cwd=ROOT, stdout=asyncio.subprocess.PIPE
        )
        output = (await process.communicate())[0].decode()
        assert process.returncode == 0
        assert "-m chatproxy" in output
    elif program == "curl":
        if shutil.which("curl") is None:
            pytest.skip("curl is not installed")
        async with Upstream(stream("Hello")) as grok, serving(grok.url) as service:
            shown = command.replace("http://localhost:8000", service.url)
            process = await asyncio.create_subprocess_exec(
                *shlex.split(shown), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
            )
            events = standard((await process.communicate())[0])
            assert [event.data for event in events] == ["Hello", "[DONE]"]
    else:
        assert program == "docker"
        files = [value for option, value in itertools.pairwise(arguments) if option == "-f"]
        assert all((ROOT / file).exists() for file in files)
        # Not every machine has docker, so the options are compared with those that the real one has taken.
        told = {word for word in arguments if word.startswith("-") and word != "-m"}
        assert told <= {"-t", "--rm", "-p", "-e", "--read-only", "-f", "--profile", "--build", "--wait"}
        for option, value in itertools.pairwise(arguments):
            assert option != "-e" or value in variable_names()
            assert option != "--profile" or any(f"profiles: !override [proxy, {value}]" in read(file) for file in files)
        if "python" in arguments:
            module = arguments[arguments.index("python") + 1 :][:3]
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, *module, "--help"), cwd=ROOT, stdout=asyncio.subprocess.PIPE, env={**os.environ}
            )
            assert b"usage" in (await process.communicate())[0]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
async def test_sentence_for_use_chat() -> None:
    """The line for useChat() finds our sentence in an error's message, and leaves any other as it is."""
    [line] = [text for text in of("js") if text.startswith("const say")]
    ours = json.dumps({"error": {"message": "Send a shorter conversation."}})
    for message, shown in ((ours, "Send a shorter conversation."), ("Failed to fetch", "Failed to fetch")):
        process = await asyncio.create_subprocess_exec(
            *("node", "--eval", f"{line}; console.log(say({{ message: {json.dumps(message)} }}))"),
            stdout=asyncio.subprocess.PIPE,
        )
        assert (await process.communicate())[0].decode().strip() == shown


async def test_lines_for_openai(grok: Upstream, service: InProcessService) -> None:
    """The lines for the openai SDK stream an answer."""
    grok.set_scripts(stream("Hel", "lo"))
    [text] = of("python")
    client_line, call = text.replace("https://chat.example.com", service.url).splitlines()
    code = f"from openai import OpenAI\n{client_line}\nprint([c.choices[0].delta.content for c in {call} if c.choices])"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code), stdout=asyncio.subprocess.PIPE, env={"PATH": os.environ["PATH"]}
    )
    assert "'Hel', 'lo'" in (await process.communicate())[0].decode()
