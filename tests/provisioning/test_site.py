"""What goes out to all boards is the claim certificate, and none that would let every board in as somebody."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.broker.authority import Authority
from hardware_profiles.profile import load
from protocol.settings import SettingsError
from provisioning.flash_choice import Wanted
from provisioning.flash_plan import FlashPlan, plan_flash
from provisioning.flash_run import run
from provisioning.site import Site


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """Settings of a coordinator, and an authority with the claim certificate and two others."""
    (tmp_path / "coordinator.toml").write_text('federation = "lab"\n[broker]\nurl = "mqtts://labserver"\n')
    authority = Authority.create(tmp_path / "ca", "lab")
    for name in ("enrol", "jetson-1", "spare"):
        authority.issue(name)
    return tmp_path


def read(lab: Path) -> Site:
    return Site.read(lab / "coordinator.toml", lab / "ca")


def put(lab: Path, source: str, target: str) -> None:
    (lab / "ca" / target).write_bytes((lab / "ca" / source).read_bytes())


def test_the_claim_certificate_is_taken(lab: Path) -> None:
    assert read(lab).claim == (lab / "ca/enrol.pem").read_bytes()


def test_a_devices_certificate_under_the_claims_name_goes_to_nobody(lab: Path) -> None:
    put(lab, "jetson-1.pem", "enrol.pem")
    put(lab, "jetson-1.key", "enrol.key")
    with pytest.raises(SettingsError, match="certificate of jetson-1, not the claim certificate"):
        read(lab)


def test_a_key_of_another_certificate_is_found(lab: Path) -> None:
    put(lab, "spare.key", "enrol.key")
    with pytest.raises(SettingsError, match="do not belong together"):
        read(lab)


def test_a_claim_by_another_authority_is_found(lab: Path) -> None:
    Authority.create(lab / "other", "other").issue("enrol")
    for name in ("enrol.pem", "enrol.key"):
        (lab / "ca" / name).write_bytes((lab / "other" / name).read_bytes())
    with pytest.raises(SettingsError, match="clipcast ca issue enrol"):
        read(lab)


def test_without_a_claim_certificate_the_command_that_makes_it_is_said(lab: Path) -> None:
    (lab / "ca/enrol.pem").unlink()
    with pytest.raises(SettingsError, match=f"clipcast ca issue enrol {lab / 'ca'}"):
        read(lab)


def test_nothing_follows_a_step_that_failed(tmp_path: Path) -> None:
    tools = tmp_path / "Linux_for_Tegra"
    flash = tools / "flash.sh"
    tools.mkdir()
    flash.write_text("#!/bin/sh\nexit 7\n")
    flash.chmod(0o755)
    plan: FlashPlan = plan_flash(load("jetson-agx-orin-64gb"), Wanted("6.2", "emmc"), str(tools))
    assert [done.code for done in run(plan)] == [7]
