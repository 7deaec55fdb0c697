"""What the docs say is what the code does: the wire's examples and topics, and every verdict and exit code.

Each example of docs/wire.md is read, one of each kind; docs/operations.md lists whatever verdict stands in the code.
"""

from __future__ import annotations

import ast
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import typer

from clipcast import exit_codes
from clipcast.cli import app
from protocol.envelope import COORDINATOR, KINDS, decode, encode
from protocol.release.manifests import Phase
from protocol.topics import Topics, parse
from protocol.trust.signing import Signer, opened, signer_of

ROOT = Path(__file__).parent.parent
WIRE = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
OPERATIONS = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
VERDICTS_FIRST = ("rejected", "Refused")  # functions whose first argument is a verdict
UNEXPLAINED = {"--note", "--adapter", "--classes-from"}  # of `release`: their help says all
EXAMPLES = re.findall(r"```json\n(.*?)```", WIRE, re.DOTALL)


def test_there_is_an_example_of_every_kind_under_its_name() -> None:
    assert sorted(decode(text.encode()).manifest.kind for text in EXAMPLES) == sorted(KINDS)
    named = re.findall(r"\*\*`(\w+)`\*\*", WIRE)
    assert named == [decode(text.encode()).manifest.kind for text in EXAMPLES]


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_is_what_would_travel(text: str) -> None:
    envelope = decode(text.encode())
    compact = text.strip().replace("\n", " ").replace(", ", ",").replace(": ", ":")
    assert encode(envelope).decode() == compact
    token = Signer().seal(envelope.federation, envelope.sender, envelope.manifest, envelope.to)
    assert decode(opened(token, signer_of(token))).manifest == envelope.manifest


def test_the_topics_of_the_table_are_the_topics() -> None:
    topics, sha = Topics("lab"), "ab" * 32
    filled = [
        re.sub("FEDERATION", "lab", topic)
        .replace("SHA256", sha)
        .replace("ID", "jetson-1")
        .replace("/I", "/0")
        .replace("NONCE", sha[:32])
        .replace("REQUEST", "request")
        for topic in re.findall(r"\| `(clipcast/1/[^`]+)` \|", WIRE)
    ]
    assert [topic.replace("KIND", "need") for topic in filled] == [
        topics.broadcast("classes"),
        topics.broadcast("round"),
        topics.broadcast("release"),
        topics.broadcast("key"),
        topics.blob(sha, 0),
        topics.to("jetson-1", "need"),
        topics.from_("jetson-1", "need"),
        topics.upload("jetson-1", sha, 0),
        topics.enrolment(sha[:32], "request"),
    ]
    assert all(parse(topic.replace("KIND", "need")).federation == "lab" for topic in filled)
    assert COORDINATOR in WIRE


def verdicts() -> set[str]:
    """The verdicts that the code can give: literals, or constants of their module."""
    found = set()
    for path in (*(ROOT / "protocol").rglob("*.py"), *(ROOT / "coordinator").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in VERDICTS_FIRST:
                first = node.args[0]
                if isinstance(first, ast.Constant):
                    found.add(first.value)
                elif isinstance(first, ast.Name) and first.id in constants:
                    found.add(constants[first.id])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UpdateUnreadable":
                found |= {argument.value for argument in node.args[3:] if isinstance(argument, ast.Constant)}
    return found


def test_every_verdict_has_its_cause_and_cure() -> None:
    assert {"not-finite", "replayed", "not-sealed", "stale-round", "revoked"} <= verdicts()
    for verdict in verdicts():
        assert f"`{verdict}`" in OPERATIONS, f"docs/operations.md lacks {verdict}"


def test_every_exit_code_has_its_meaning() -> None:
    for code in {*exit_codes.CODES.values(), exit_codes.MISSING, exit_codes.INTERRUPTED, exit_codes.BUG, exit_codes.USAGE}:
        assert f"\n| {code} |" in OPERATIONS, f"docs/operations.md lacks exit code {code}"


def options_of(command: Any) -> set[str]:
    """All options of a command and of those below it."""
    own = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    return own.union(*map(options_of, getattr(command, "commands", {}).values()))


def test_the_page_on_releases_names_commands_and_options_that_exist() -> None:
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    everything: Any = typer.main.get_command(app)
    release = everything.commands["release"]
    cells = re.findall(r"^\| (`[a-z]+[^|]*) \|", page, re.MULTILINE)
    assert release.commands.keys() <= {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    named = set(re.findall(r"--[a-z][a-z-]+", page))
    assert named <= options_of(everything)
    assert options_of(release) - {"--help"} - named == UNEXPLAINED


def test_the_page_on_releases_knows_every_phase() -> None:
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    assert all(f"`{phase}`" in page for phase in typing.get_args(Phase))
