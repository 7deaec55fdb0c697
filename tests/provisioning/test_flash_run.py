"""What is looked for on the machine that flashes, and what `--run` does there: with stand-ins for NVIDIA's tools."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipcast.cli import app
from clipcast.commands import flashing
from clipcast.exit_codes import INTERRUPTED, PROVISION
from hardware_profiles.profile import load
from protocol.findings import Finding
from provisioning.flash_choice import Wanted, choose
from provisioning.flash_plan import plan_flash
from provisioning.flash_run import run
from provisioning.preflight import boards, preflight
from tests.provisioning.tegra import tegra

NANO, NX, RUNNING = "7523", "7323", "7020"
UBUNTU = 'ID=ubuntu\nVERSION_ID="22.04"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n'
PLAN = ("device", "flash-plan", "--profile", "jetson-orin-nano-8gb", "--jetpack", "6.2", "--storage", "nvme")


def machine(root: Path, *boards: str, system: str = UBUNTU, **more: str) -> Path:
    """Write what is read of a machine: NVIDIA's devices on USB, the system, and other files by their path."""
    files = {"etc/os-release": system, "proc/sys/net/ipv6/conf/all/disable_ipv6": "0\n"}
    files |= {name.replace("__", "/"): text for name, text in more.items()}
    for number, product in enumerate(boards):
        files[f"sys/bus/usb/devices/1-{number}/idVendor"] = "0955\n"
        files[f"sys/bus/usb/devices/1-{number}/idProduct"] = f"{product}\n"
    files["sys/bus/usb/devices/2-1/idVendor"] = "046d\n"  # somebody's mouse
    files["sys/bus/usb/devices/2-1/idProduct"] = f"{NANO}\n"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def found(root: Path, tmp_path: Path, wanted: Wanted | None = None, processor: str = "x86_64") -> dict[str, Finding]:
    choice = choose(load("jetson-orin-nano-8gb"), wanted or Wanted("6.2", "nvme"))
    return {finding.name: finding for finding in preflight(choice, tmp_path, root, processor)}


def test_a_machine_that_is_ready_has_nothing_to_mend(tmp_path: Path) -> None:
    states = {name: one.state for name, one in found(machine(tmp_path / "root", NANO), tmp_path).items()}
    assert {name: state for name, state in states.items() if state not in ("ok", "unknown") and name != "disk"} == {}
    assert states["other firewalls"] == "unknown"


@pytest.mark.parametrize(
    ("boards", "state", "cure"),
    [
        ((), "fail", "put the board into recovery mode"),
        ((NX,), "fail", "name its profile to be sure"),
        ((NANO, NX), "fail", "unplug the others"),
        ((NANO, NANO), "fail", "--massflash"),
        ((RUNNING,), "fail", "recovery mode"),
    ],
)
def test_other_boards_than_the_one_that_is_planned(tmp_path: Path, boards: tuple[str, ...], state: str, cure: str) -> None:
    finding = found(machine(tmp_path / "root", *boards), tmp_path)["board in recovery mode"]
    assert finding.state == state
    assert cure in finding.cure


def test_an_image_for_many_is_made_with_one_board_and_flashed_to_no_more_than_it_is_for(tmp_path: Path) -> None:
    wanted = Wanted("6.2", "nvme", boards=3)
    choice = choose(load("jetson-orin-nano-8gb"), wanted)
    one, three = machine(tmp_path / "one", NANO), machine(tmp_path / "three", NANO, NANO, NANO)
    assert found(one, tmp_path, wanted)["board in recovery mode"].state == "ok"
    assert "one board attached alone" in found(three, tmp_path, wanted)["board in recovery mode"].cure
    assert boards(choice, one, 3).state == boards(choice, three, 3).state == "ok"
    assert "3 x" in boards(choice, three, 3).measured
    assert "the image is for no more" in boards(choice, three, 2).cure
    assert boards(choice, machine(tmp_path / "none"), 3).state == "fail"


@pytest.mark.parametrize(
    ("more", "name", "state", "cure"),
    [
        ({"proc__812__comm": "ModemManager\n"}, "ModemManager", "warn", "systemctl stop ModemManager"),
        ({"sys__class__net__wg0__flags": "0x1\n"}, "VPN", "warn", "end it meanwhile"),
        ({"sys__class__net__wg0__flags": "0x0\n"}, "VPN", "ok", ""),
        (
            {"sys__class__net__office__flags": "0x1\n", "sys__class__net__office__tun_flags": "0x1001\n"},
            "VPN",
            "warn",
            "end",
        ),
        ({"sys__class__net__eth0__flags": "0x1003\n"}, "VPN", "ok", ""),
        ({"etc__ufw__ufw.conf": "ENABLED=yes\n", "etc__ufw__user.rules": ""}, "firewall (ufw)", "fail", "ufw allow 2049"),
        ({"etc__ufw__ufw.conf": "ENABLED=no\n"}, "firewall (ufw)", "ok", ""),
        ({"proc__sys__net__ipv6__conf__all__disable_ipv6": "1\n"}, "IPv6", "fail", "disable_ipv6=0"),
        (
            {"etc__ufw__ufw.conf": "ENABLED=yes\n", "etc__ufw__user.rules": "-A in -p tcp --dport 2049 -j ACCEPT\n"},
            "firewall (ufw)",
            "ok",
            "",
        ),
    ],
)
def test_known_blockers_are_found(tmp_path: Path, more: dict[str, str], name: str, state: str, cure: str) -> None:
    finding = found(machine(tmp_path / "root", NANO, **more), tmp_path)[name]
    assert finding.state == state, finding
    assert cure in finding.cure


def test_a_thor_fetches_nothing_so_no_firewall_is_in_its_way(tmp_path: Path) -> None:
    more = {"etc__ufw__ufw.conf": "ENABLED=yes\n", "etc__ufw__user.rules": ""}
    root = machine(tmp_path / "root", "7026", **more)
    for wanted in (Wanted("7.2", "nvme"), Wanted("7.2", "nvme", boards=2)):
        choice = choose(load("jetson-thor-t5000"), wanted)
        states = {one.name: one.state for one in preflight(choice, tmp_path, root, "x86_64")}
        assert states["firewall"] == "ok"
        assert "firewall (ufw)" not in states


def test_an_image_that_is_there_is_looked_at(tmp_path: Path) -> None:
    root, tools = machine(tmp_path / "root", NANO), tegra(tmp_path / "tools", "36.4.3")
    before = found(root, tools)
    assert before["client in the image"].state == "warn"
    assert before["first user"].state == "ok"
    (tools / "rootfs/usr/lib/clipcast-firstboot").mkdir(parents=True)
    (tools / "rootfs/usr/lib/clipcast-firstboot/clipcast-client.deb").touch()
    (tools / "rootfs/etc/systemd/system").mkdir(parents=True)
    (tools / "rootfs/etc/systemd/system/default.target").symlink_to("nv-oem-config.target")
    after = found(root, tools)
    assert after["client in the image"].state == "ok"
    assert "l4t_create_default_user.sh" in after["first user"].cure
    assert "what is one board's own" not in after


def test_a_machine_that_the_tools_are_not_for(tmp_path: Path) -> None:
    root = machine(tmp_path / "root", NANO, system='ID=debian\nVERSION_ID="12"\nPRETTY_NAME="Debian 12"\n')
    assert found(root, tmp_path, processor="aarch64")["processor"].state == "fail"
    assert found(root, tmp_path)["system"].state == "warn"


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one board in recovery mode, on which disks are large enough."""
    monkeypatch.setattr(flashing, "ROOT", machine(tmp_path / "root", NANO))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 500e9})())
    return tmp_path


def ran(tools: Path) -> list[str]:
    return (tools / "ran").read_text().splitlines() if (tools / "ran").exists() else []


def flash(tools: Path, answer: str, *more: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*PLAN, "--l4t-dir", str(tools), "--run", *more], input=answer)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def test_run_shows_the_plan_asks_and_flashes(ready: Path) -> None:
    tools = tegra(ready / "tools", "36.4.3")
    code, told = flash(tools, "y\n")
    assert code == 0, told
    assert told.index("8. Flash") < told.index("Flash now?")
    (line,) = ran(tools)
    assert line.startswith("l4t_initrd_flash.sh --external-device nvme0n1p1 ")
    assert line.endswith("jetson-orin-nano-devkit internal")


@pytest.mark.parametrize("answer", ["n\n", "\n", ""])
def test_without_a_yes_nothing_is_done(ready: Path, answer: str) -> None:
    tools = tegra(ready / "tools", "36.4.3")
    code, told = flash(tools, answer)
    assert code == INTERRUPTED
    assert "nothing was flashed" in told
    assert ran(tools) == []


def test_a_flash_that_fails_is_not_tried_again_and_its_code_is_ours(ready: Path) -> None:
    tools = tegra(ready / "tools", "36.4.3", flash_ends_with=7)
    code, told = flash(tools, "y\n")
    assert code == 7
    assert "It is not tried again" in told
    assert len(ran(tools)) == 1


def test_a_machine_that_is_not_ready_flashes_nothing(ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashing, "ROOT", machine(ready / "other", NX))
    tools = tegra(ready / "tools", "36.4.3")
    assert flash(tools, "y\n")[0] == PROVISION
    assert ran(tools) == []


def test_tools_of_another_release_flash_nothing(ready: Path) -> None:
    tools = tegra(ready / "tools", "36.4.4")
    with pytest.raises(Exception, match=r"are L4T 36\.4\.4, planned is 36\.4\.3"):
        flash(tools, "y\n")
    assert ran(tools) == []
    assert flash(tools, "y\n", "--l4t", "36.4.4")[0] == 0


def test_run_needs_to_know_where(ready: Path) -> None:
    done = CliRunner().invoke(app, [*PLAN, "--run"])
    assert "--run needs --l4t-dir" in str(done.exception)


def test_many_boards_are_flashed_from_one_image_after_a_second_question(ready: Path) -> None:
    tools = tegra(ready / "tools", "36.4.3")
    code, told = flash(tools, "y\ny\n", "--massflash", "3")
    assert code == 0, told
    build, write = ran(tools)
    assert build.startswith("l4t_initrd_flash.sh --no-flash --massflash 3 --external-device nvme0n1p1 ")
    assert write == "l4t_initrd_flash.sh --flash-only --massflash 3 --network usb0 --showlogs"
    assert (
        told.index("Make the image now?")
        < told.index("board in recovery mode: 1 x 0955:7523")
        < told.index("next. Start the boards")
    )


def test_boards_that_are_not_there_yet_are_asked_for_again_and_the_image_is_not_lost(ready: Path) -> None:
    tools = tegra(ready / "tools", "36.4.3")
    tool = tools / "tools/kernel_flash/l4t_initrd_flash.sh"
    tool.write_text(tool.read_text().replace("exit 0", f"rm -r {flashing.ROOT}/sys/bus/usb/devices/1-*"))
    code, told = flash(tools, "y\ny\nn\n", "--massflash", "3")
    assert code == INTERRUPTED
    assert "none is 0955:7523" in told
    assert told.count("Flash these boards now?") == 2
    assert f"in {tools}: sudo ./tools/kernel_flash/l4t_initrd_flash.sh --flash-only --massflash 3" in told
    assert [line.split()[1] for line in ran(tools)] == ["--no-flash"]


def test_an_image_that_cannot_be_made_is_not_written(ready: Path) -> None:
    tools = tegra(ready / "tools", "36.4.3", flash_ends_with=5)
    assert flash(tools, "y\ny\n", "--massflash", "3")[0] == 5
    assert len(ran(tools)) == 1
    plan = plan_flash(load("jetson-orin-nano-8gb"), Wanted("6.2", "nvme", boards=3), str(tools))
    assert [done.code for done in run(plan)] == [5]  # whoever does not look at the codes flashes nothing either
    assert len(ran(tools)) == 2


@pytest.mark.parametrize("own", ["etc/clipcast/claim.token", "var/lib/clipcast/key.pem"])
def test_one_boards_claim_or_key_goes_to_no_other_board(ready: Path, own: str) -> None:
    tools = tegra(ready / "tools", "36.4.3")
    (tools / "rootfs" / own).parent.mkdir(parents=True)
    (tools / "rootfs" / own).write_text("its own")
    assert flash(tools, "y\ny\n", "--massflash", "3")[0] == PROVISION
    assert ran(tools) == []
    assert flash(tools, "y\n")[0] == 0
