"""The README cannot go stale: its commands exist with their options, its tree is the tree, its files are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import typer
from typer.testing import CliRunner

from benchmarks.faults.table import RESULTS, rows
from clipcast.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """Every `clipcast ...` line of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = [line.split("#")[0].strip().removeprefix(".venv/bin/") for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("clipcast ")]


def test_every_command_and_option_exists() -> None:
    found = commands()
    assert len(found) >= 7
    group = typer.main.get_command(app)
    for words in found:
        command, depth = group, 0
        while hasattr(command, "commands"):
            assert words[depth] in command.commands, words
            command, depth = command.commands[words[depth]], depth + 1
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_the_tree_names_every_folder() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    named: set[str] = set()
    above = ""
    for line in tree.strip().splitlines():
        folder = line.split("/")[0]
        above = above if folder.startswith(" ") else folder
        named.add(f"{above}/{folder.strip()}" if folder.startswith(" ") else folder)
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith((".", "clipcast-"))}
    assert {name for name in named if "/" not in name} == folders - {"dist"}
    inside = {
        str(path.parent.relative_to(ROOT))
        for top in ("protocol", "coordinator", "edge_client")
        for path in (ROOT / top).glob("*/__init__.py")
    }
    assert {name for name in named if "/" in name} == inside


def test_links_and_scripts_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        titles = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}, target
    for script in re.findall(r"python (benchmarks/\S+\.py)", README):
        assert (ROOT / script).exists(), script


def test_the_proofs_are_those_that_were_measured() -> None:
    table = README.split("<!-- proofs -->\n")[1].split("<!-- end -->")[0]
    assert table.splitlines() == rows(json.loads(RESULTS.read_text()))
    assert all(figure["pass"] for figure in json.loads(RESULTS.read_text()).values())


def test_no_figure_is_left_open() -> None:
    assert "FIXME" not in README


def test_the_help_names_all_commands() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(
        name in shown for name in ("coordinator", "client", "export", "infer", "profiles", "demo", "device", "simulate")
    )
