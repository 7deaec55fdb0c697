"""What has to be done on a board, by what is there: pure."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioning.errors import ProvisioningError
from provisioning.provision import LOOK, Found, Step, Wanted, steps
from provisioning.remote import Remote

SETTINGS, CA = Wanted("/etc/clipcast/client.toml", b"data", 0o644), Wanted("/etc/clipcast/ca.pem", b"pem", 0o644)
FILES = (SETTINGS, CA)
BARE = Found("aarch64", "nano", "3.10", True, 9000, False, "", None, None, False, {})
DONE = Found(
    "aarch64", "nano", "3.10", True, 9000, True, "ab", "jetson-1", None, True, {file.path: file.seen_as for file in FILES}
)


def kinds(todo: list[Step]) -> list[str]:
    return [step.kind for step in todo]


def test_a_claim_that_was_used_does_not_stay() -> None:
    left = replace(DONE, files={**DONE.files, "/etc/clipcast/claim.token": "x 640 root:clipcast"})
    assert kinds(steps(left, "jetson-1", "ab", FILES)) == ["clean", "start"]


def test_a_bare_board_gets_everything_in_order() -> None:
    assert kinds(steps(BARE, "jetson-1", "ab", FILES)) == ["package", "file", "file", "enrol", "start"]


def test_a_board_that_is_as_it_should_be_gets_nothing() -> None:
    assert steps(DONE, "jetson-1", "ab", FILES) == []


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"package": "cd"}, ["package", "start"]),
        ({"installed": False}, ["package", "start"]),
        ({"ready": False}, ["package", "start"]),
        ({"enrolled": None}, ["enrol", "start"]),
        ({"files": {SETTINGS.path: SETTINGS.seen_as}}, ["file", "start"]),
        ({"files": {**DONE.files, CA.path: replace(CA, mode=0o600).seen_as}}, ["file", "start"]),
        ({"files": {**DONE.files, "/etc/clipcast/more": "x 644 root:root"}}, []),
    ],
)
def test_what_differs_is_done_and_nothing_else(change: dict[str, object], wanted: list[str]) -> None:
    assert kinds(steps(replace(DONE, **change), "jetson-1", "ab", FILES)) == wanted  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"machine": "armv7l"}, "the board is armv7l"),
        ({"dpkg": False}, "no dpkg"),
        ({"python": "3.8"}, "Python 3.8, clipcast needs 3.10"),
        ({"python": ""}, "no python3"),
        ({"enrolled": "jetson-2"}, "jetson-2 already, not jetson-1"),
    ],
)
def test_a_board_that_cannot_be_is_refused(change: dict[str, object], said: str) -> None:
    with pytest.raises(ProvisioningError, match=said):
        steps(replace(DONE, **change), "jetson-1", "ab", FILES)  # type: ignore[arg-type]


def test_this_machine_can_be_looked_at() -> None:
    said = subprocess.run(["sh", "-c", LOOK], capture_output=True, text=True, check=True).stdout
    found = Found.read(said)
    assert found.machine in ("x86_64", "aarch64")
    assert found.free_mib > 0
    assert tuple(map(int, found.python.split("."))) >= (3, 8)


@given(st.text(max_size=200) | st.sampled_from(["file", "file a b c", "file a b", "machine x\nfile  "]))
def test_whatever_a_shell_says_is_read_or_refused(text: str) -> None:
    with pytest.raises(ProvisioningError, match="no answer"):
        Found.read(text)


SSH = """#!/bin/sh
# Runs the command here, as ssh does there; with CUT it breaks off after so many bytes, which looks like an end.
for last; do :; done
if [ -n "$CUT" ]; then head -c "$CUT" | sh -c "$last"; else sh -c "$last"; fi
"""


@pytest.mark.parametrize("cut", ["", "0", "3"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUT", cut)
    target = tmp_path / "a folder" / "client.toml"
    target.parent.mkdir()
    target.write_text("good")
    remote, owner = Remote("board", ()), f"{os.geteuid()}:{os.getegid()}"
    if cut:
        with pytest.raises(ProvisioningError, match="board failed"):
            remote.put(b"better", str(target), 0o640, owner)
        assert target.read_text() == "good"
    else:
        remote.put(b"better", str(target), 0o640, owner)
        assert target.read_text() == "better"
        assert target.stat().st_mode & 0o777 == 0o640
