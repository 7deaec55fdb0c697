"""What has to be done on a board, by what is there: pure."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from provisioning.errors import ProvisioningError
from provisioning.provision import LOOK, Found, Step, Wanted, steps

SETTINGS, CA = Wanted("/etc/clipcast/client.toml", b"data", 0o644), Wanted("/etc/clipcast/ca.pem", b"pem", 0o644)
FILES = (SETTINGS, CA)
BARE = Found("aarch64", "nano", "3.10", True, 9000, False, "", None, None, False, {})
DONE = Found(
    "aarch64", "nano", "3.10", True, 9000, True, "ab", "jetson-1", None, True, {file.path: file.seen_as for file in FILES}
)


def kinds(todo: list[Step]) -> list[str]:
    return [step.kind for step in todo]


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
