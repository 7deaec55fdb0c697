"""The commands that renew keys, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipcast.cli import app


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    clipcast("coordinator", "init", "--classes", "cat,dog")
    clipcast("client", "init", "--id", "ann")
    return tmp_path


def clipcast(*arguments: str) -> tuple[str, str]:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    "key", ["-SwgcTVT7IwPuGrDcAUMUTnIIvEXFNVJ3ChomtCkK1E", "--wgcTVT7IwPuGrDcAUMUTnIIvEXFNVJ3ChomtCkK1E"]
)
def test_a_key_that_begins_with_a_dash_is_no_option(here: Path, key: str) -> None:
    clipcast("device", "add", "odd", key, "--coordinator", "coordinator.toml")
    assert clipcast("device", "list")[0] == f"odd {key} active"


def test_a_device_gets_another_key_and_keeps_its_numbers(here: Path) -> None:
    old, _ = clipcast("client", "key")
    (here / "ann-state" / "sequence").write_text("4000")
    new, said = clipcast("client", "key", "--new")
    assert new == clipcast("client", "key")[0] != old
    assert "clipcast device add ann KEY" in said
    assert int((here / "ann-state" / "sequence").read_text()) >= 4000
    assert (here / "ann-state" / "key.pem").stat().st_mode & 0o077 == 0


def test_a_coordinator_gets_another_key_that_the_old_one_has_signed(here: Path) -> None:
    old, _ = clipcast("coordinator", "key")
    new, said = clipcast("coordinator", "key", "--new")
    assert new == clipcast("coordinator", "key")[0] != old
    assert "restart the coordinator" in said
    assert (here / "state" / "succession").exists()
