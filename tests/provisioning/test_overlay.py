"""What is laid into an image, and what never leaves it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clipcast.cli import app
from protocol.settings import SettingsError
from protocol.trust.claims import Claim
from provisioning.errors import ProvisioningError
from provisioning.linux_for_tegra import Image
from provisioning.overlay import Overlay, Package, lay, plan_overlay
from provisioning.rootfs import Entry, RootFs
from provisioning.site import Site
from provisioning.telling import overlay_lines
from tests.provisioning.tegra import ARM64_PROGRAM, BROKER, lab, package, tegra
from tests.provisioning.test_flash_plan import golden

TOKEN = "jetson-1." + "A" * 43
X86_PROGRAM = ARM64_PROGRAM[:18] + (62).to_bytes(2, "little")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package.read(package(tmp_path_factory.mktemp("package")))


def files_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir() or path.is_symlink():
            told = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
            found[str(path.relative_to(folder))] = (path.lstat().st_mtime_ns, told)
    return found


def told(overlay: Overlay) -> str:
    """The overlay's lines, without what differs from lab to lab: bytes, and this machine's folders."""
    text = "\n".join(overlay_lines(overlay)) + "\n"
    return re.sub(r"(\b0[0-7]{3}\b|link) +\d+ ", r"\1 SIZE ", text.replace(str(overlay.image.folder), "Linux_for_Tegra"))


@pytest.mark.parametrize("l4t", ["36.4.3", "39.2.0"])
@pytest.mark.parametrize("kind", ["one", "many"])
def test_an_overlay_is_what_was_agreed(tmp_path: Path, site: Site, deb: Package, l4t: str, kind: str) -> None:
    image = Image.open(tegra(tmp_path / "Linux_for_Tegra", l4t))
    overlay = plan_overlay(image, site, deb, TOKEN if kind == "one" else None, massflash=kind == "many")
    golden(f"overlay-{l4t}-{kind}", told(overlay))


def test_looking_writes_nothing_laying_does_once(tmp_path: Path, site: Site, deb: Package) -> None:
    image = Image.open(tegra(tmp_path / "tools", "36.4.3"))
    before = files_below(image.rootfs)
    overlay = plan_overlay(image, site, deb, TOKEN)
    assert files_below(image.rootfs) == before
    assert len(list(lay(overlay))) == len(overlay.found) == 9
    after = files_below(image.rootfs)
    assert {name: after[name] for name in before} == before
    assert after["etc/clipcast/claim.token"][1] == f"{TOKEN}\n".encode()
    modes = {name: (image.rootfs / name).stat().st_mode & 0o777 for name in after if name.startswith("etc/clipcast")}
    assert modes == {
        "etc/clipcast/client.toml": 0o644,
        "etc/clipcast/ca.pem": 0o644,
        "etc/clipcast/enrol.pem": 0o644,
        "etc/clipcast/enrol.key": 0o600,
        "etc/clipcast/claim.token": 0o600,
    }
    assert after["usr/lib/clipcast-firstboot/clipcast-client.deb"][1] == deb.path.read_bytes()
    again = plan_overlay(image, site, deb, TOKEN)
    assert again.changes == ()
    assert list(lay(again)) == []
    assert files_below(image.rootfs) == after


def test_the_command_shows_then_writes_then_has_nothing_to_do(tmp_path: Path, deb: Package) -> None:
    lab(tmp_path)
    tools = tegra(tmp_path / "tools", "36.4.3")
    (tmp_path / "token").write_text(TOKEN)
    files = ("--coordinator", tmp_path / "coordinator.toml", "--ca", tmp_path / "ca", "--token-file", tmp_path / "token")
    command = ["device", "overlay", "--l4t-dir", tools, "--package", deb.path, "--broker", BROKER, *files]
    before = files_below(tools)
    told = []
    for more in ([], ["--run"], ["--run"]):
        done = CliRunner().invoke(app, [str(part) for part in (*command, *more)])
        assert done.exit_code == 0, done.exception
        told.append(done.output)
        assert (files_below(tools) == before) == (more == [])
    assert "nothing was written: --run does it" in told[0]
    assert "wrote 9 of 9 files" in told[1]
    assert "nothing to do: all is there" in told[2]
    assert TOKEN.partition(".")[2] not in "".join(told)


def test_one_changed_file_is_the_one_that_is_written(tmp_path: Path, site: Site, deb: Package) -> None:
    image = Image.open(tegra(tmp_path / "tools", "36.4.3"))
    list(lay(plan_overlay(image, site, deb)))
    (image.rootfs / "etc/clipcast/ca.pem").write_text("another")
    assert [entry.path for entry in lay(plan_overlay(image, site, deb))] == ["etc/clipcast/ca.pem"]


def test_settings_hold_no_id_and_no_secret_of_one_board(site: Site) -> None:
    text = "".join(file.data.decode(errors="replace") for file in site.files())
    assert "\nid =" not in text
    assert f'url = "{BROKER}"' in text
    assert "claim.token" not in [file.path.rpartition("/")[2] for file in site.files()]


@pytest.mark.parametrize("where", ["etc/clipcast", "etc", "usr/lib/clipcast-firstboot"])
def test_a_link_in_the_image_leads_nobody_out_of_it(tmp_path: Path, site: Site, deb: Package, where: str) -> None:
    image = Image.open(tegra(tmp_path / "tools", "36.4.3"))
    victim = tmp_path / "host"
    victim.mkdir()
    link = image.rootfs / where
    if link.exists():
        link.rename(image.rootfs / "kept")
        (image.rootfs / "kept" / "nv_tegra_release").rename(victim / "nv_tegra_release")
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(victim)
    before = files_below(victim)
    with pytest.raises(ProvisioningError):
        list(lay(plan_overlay(image, site, deb)))
    assert files_below(victim) == before


def test_a_link_in_a_files_place_is_replaced_not_followed(tmp_path: Path) -> None:
    root, victim = tmp_path / "rootfs", tmp_path / "victim"
    root.mkdir()
    victim.write_text("mine")
    (root / "file").symlink_to(victim)
    RootFs(root).lay(Entry("file", b"theirs"))
    assert victim.read_text() == "mine"
    assert (root / "file").read_bytes() == b"theirs"
    assert not (root / "file").is_symlink()


def test_many_boards_get_nothing_that_is_one_boards(tmp_path: Path, site: Site, deb: Package) -> None:
    image = Image.open(tegra(tmp_path / "tools", "36.4.3"))
    with pytest.raises(ProvisioningError, match="one token for many boards"):
        plan_overlay(image, site, deb, TOKEN, massflash=True)
    list(lay(plan_overlay(image, site, deb, TOKEN)))
    with pytest.raises(ProvisioningError, match="belongs to one board"):
        plan_overlay(image, site, deb, massflash=True)
    (image.rootfs / "etc/clipcast/claim.token").unlink()
    (image.rootfs / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    assert any("machine-id" in warning for warning in plan_overlay(image, site, deb, massflash=True).warnings)


def test_an_image_that_is_none_is_refused_with_what_comes_first(tmp_path: Path, site: Site, deb: Package) -> None:
    with pytest.raises(ProvisioningError, match=r"no Linux_for_Tegra .*tar xpf Jetson_Linux_R"):
        Image.open(tmp_path)
    empty = tegra(tmp_path / "empty", "36.4.3")
    (empty / "rootfs").rename(empty / "elsewhere")
    with pytest.raises(ProvisioningError, match="Sample-Root-Filesystem"):
        Image.open(empty)
    for name, l4t, program, said in (
        ("x86", "36.4.3", X86_PROGRAM, "is x86-64, and a Jetson is arm64"),
        ("nothing", "36.4.3", b"#!/bin/sh", "no system that can be told"),
        ("old", "35.4.1", ARM64_PROGRAM, "where no client runs"),
        ("unknown", "99.1.0", ARM64_PROGRAM, "knows nothing of"),
    ):
        with pytest.raises(ProvisioningError, match=said):
            plan_overlay(Image.open(tegra(tmp_path / name, l4t, program=program)), site, deb)


@pytest.mark.parametrize("text", ["", "jetson-1", "jetson-1.short", "a b." + "A" * 43])
def test_what_is_no_token_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(SettingsError) as refused:
        Claim.load(tmp_path / "token")
    assert "AAAA" not in str(refused.value)


def test_a_broker_that_boards_cannot_reach_is_refused(tmp_path: Path) -> None:
    lab(tmp_path)
    with pytest.raises(SettingsError, match="--broker"):
        Site.read(tmp_path / "coordinator.toml", tmp_path / "ca")
    (tmp_path / "ca" / "enrol.pem").unlink()
    with pytest.raises(SettingsError, match="clipcast ca issue enrol"):
        Site.read(tmp_path / "coordinator.toml", tmp_path / "ca", BROKER)
