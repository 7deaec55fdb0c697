"""What is printed for a board and a JetPack, word for word; and what is refused.

`CLIPCAST_GOLDEN=write pytest tests/provisioning` writes the golden files anew: read the difference before committing it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hardware_profiles.facts import ProfileError
from hardware_profiles.profile import load, names
from provisioning.errors import ProvisioningError
from provisioning.flash_choice import Wanted
from provisioning.flash_plan import plan_flash
from provisioning.telling import plan_lines

GOLDEN = Path(__file__).parent / "golden"
PLANS = {
    "orin-nano-8gb-6.2-nvme-super": ("jetson-orin-nano-8gb", Wanted("6.2", "nvme", super=True)),
    "orin-nano-8gb-7.2-nvme": ("jetson-orin-nano-8gb", Wanted("7.2", "nvme")),
    "orin-nano-8gb-6.2-sd": ("jetson-orin-nano-8gb", Wanted("6.2", "sd")),
    "orin-nano-4gb-6.2-nvme": ("jetson-orin-nano-4gb", Wanted("6.2", "nvme")),
    "orin-nano-4gb-7.2-nvme": ("jetson-orin-nano-4gb", Wanted("7.2", "nvme")),
    "orin-nx-16gb-6.2-ten": ("jetson-orin-nx-16gb", Wanted("6.2", "nvme", boards=10)),
    "orin-nx-16gb-7.2-nvme": ("jetson-orin-nx-16gb", Wanted("7.2", "nvme")),
    "agx-orin-64gb-6.2-emmc": ("jetson-agx-orin-64gb", Wanted("6.2", "emmc")),
    "agx-orin-64gb-7.2-emmc": ("jetson-agx-orin-64gb", Wanted("7.2", "emmc")),
    "agx-orin-64gb-7.2-emmc-ten": ("jetson-agx-orin-64gb", Wanted("7.2", "emmc", boards=10)),
    "agx-orin-32gb-6.2-nvme": ("jetson-agx-orin-32gb", Wanted("6.2", "nvme")),
    "agx-orin-32gb-7.2-emmc": ("jetson-agx-orin-32gb", Wanted("7.2", "emmc")),
    "thor-t5000-7.2-nvme": ("jetson-thor-t5000", Wanted("7.2", "nvme")),
    "thor-t5000-7.0-nvme": ("jetson-thor-t5000", Wanted("7.0", "nvme")),
}


def golden(name: str, text: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("CLIPCAST_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text(), f"{path} says something else"


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_what_was_agreed(name: str) -> None:
    profile, wanted = PLANS[name]
    golden(f"flash-{name}", "\n".join(plan_lines(plan_flash(load(profile), wanted))) + "\n")


def test_every_jetson_that_trains_can_be_planned_and_no_plan_holds_a_password() -> None:
    planned = 0
    for name in names():
        profile = load(name)
        if profile.flash is None or profile.tier != "train":
            continue
        for platform in profile.platforms:
            for storage in ("nvme", "sd", "emmc"):
                jetpack = platform.removeprefix("jetpack-")
                try:
                    plan = plan_flash(profile, Wanted(jetpack, storage))
                except ProvisioningError:
                    continue
                planned += 1
                assert all("-p" not in step.argv for step in plan.steps if "default_user" in step.line)
                assert "(from documents, not tried)" in "\n".join(plan_lines(plan))
    assert planned >= 14


@pytest.mark.parametrize(
    ("profile", "wanted", "said"),
    [
        ("jetson-orin-nano-8gb", Wanted("5.1", "nvme"), "does not run JetPack 5.1: it runs 6.2"),
        ("jetson-orin-nano-8gb", Wanted("7.2", "sd"), "cannot be flashed to sd: .*It can be flashed to nvme"),
        ("jetson-orin-nano-8gb", Wanted("6.2", "emmc"), "no eMMC"),
        ("jetson-orin-nano-8gb", Wanted("6.2", "nvme", l4t="39.2"), "L4T 39.2 is not of JetPack 6.2"),
        ("jetson-orin-nano-8gb", Wanted("6.2", "nvme", l4t="new"), "--l4t"),
        ("jetson-agx-orin-64gb", Wanted("6.2", "emmc", super=True), "Super"),
        ("jetson-thor-t5000", Wanted("7.2", "emmc"), "cannot be flashed to emmc"),
        ("raspberry-pi-5", Wanted("6.2", "sd"), "not flashed by NVIDIA's tools"),
    ],
)
def test_what_does_not_exist_is_refused_with_what_does(profile: str, wanted: Wanted, said: str) -> None:
    with pytest.raises(ProvisioningError, match=said):
        plan_flash(load(profile), wanted)


@pytest.mark.parametrize("profile", ["jetson-nano-4gb", "jetson-agx-xavier"])
def test_a_board_that_does_not_train_is_not_flashed_for_it(profile: str) -> None:
    with pytest.raises(ProfileError, match="cannot train"):
        plan_flash(load(profile), Wanted("6.2", "sd"))


def test_l4t_of_another_release_changes_archive_and_command() -> None:
    old, new = (plan_flash(load("jetson-orin-nano-8gb"), Wanted("6.2", "nvme", l4t=l4t)) for l4t in ("36.4.4", "36.5"))
    assert "Jetson_Linux_R36.4.4_aarch64.tbz2" in old.steps[0].argv
    assert "Jetson_Linux_R36.5.0_aarch64.tbz2" in new.steps[0].argv
    assert ["--erase-all" in step.line for plan in (old, new) for step in plan.steps if step.run] == [False, True]


def test_one_image_for_many_is_made_with_one_board_and_written_where_it_was_made() -> None:
    for name, jetpack, storage in (("orin-nx-16gb", "6.2", "nvme"), ("agx-orin-64gb", "7.2", "emmc")):
        plan = plan_flash(load(f"jetson-{name}"), Wanted(jetpack, storage, boards=10), "tools")
        one, build, several, write = plan.steps[6:10]
        assert (one.argv, several.argv) == ((), ())
        assert "one of the boards" in one.title
        assert build.folder == write.folder == "tools"
        assert build.argv[1:4] == ("--no-flash", "--massflash", "10")
        assert write.argv[1:4] == ("--flash-only", "--massflash", "10")
        assert [step.argv.count("--network") for step in (build, write)] == [1, 1]
