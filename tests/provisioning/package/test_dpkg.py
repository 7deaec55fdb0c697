"""The package in dpkg's hands: installed, upgraded, removed and purged in a copy of this system that is thrown away.

The copy is an overlay over the root of this machine, in namespaces of its own: nothing here is touched, there is no network,
and no systemd runs. Needs root.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from importlib import resources
from pathlib import Path

import pytest

from provisioning.package.deb import UNITS, build_package
from tests.provisioning.package.wheels import own_wheel, wheelhouse

LAY = """\
set -e
mount -t tmpfs -o mode=755 none {work}
mkdir {work}/upper {work}/inner {work}/root
mount -t overlay -o lowerdir=/,upperdir={work}/upper,workdir={work}/inner none {work}/root
cp {debs}/*.deb {work}/root/
mount -t proc proc {work}/root/proc
mount --bind /dev {work}/root/dev
mkdir -p {work}/root/run/empty && mount -t tmpfs none {work}/root/run
"""


def in_a_copy(tmp_path: Path, script: str) -> str:
    """Run a script as root of a copy of this system, and return what it says."""
    work = tmp_path / "copy"
    work.mkdir(exist_ok=True)
    text = LAY.format(work=work, debs=tmp_path) + f"exec chroot {work}/root /bin/sh -c '{script}'"
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    command = ["unshare", "--mount", "--net", "--pid", "--fork", "/bin/sh", "-c", text]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, env=environment, timeout=120, check=False, **piped)
    if "mount:" in done.stdout or "unshare" in done.stdout:
        pytest.skip(f"no overlay can be mounted here: {done.stdout.strip()}")
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def debs(tmp_path: Path) -> Path:
    """Two versions of the package with their wheels, as /one.deb and /two.deb of the copy."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    for version, name in (("0.1.0", "one.deb"), ("0.2.0", "two.deb")):
        made = build_package(
            tmp_path / "built", "infer", own_wheel(tmp_path / "own", version), wheelhouse(tmp_path / "wheels")
        )
        made.rename(tmp_path / name)
    return tmp_path


def test_dpkg_installs_upgrades_and_purges_without_systemd_and_without_a_network(debs: Path) -> None:
    said = in_a_copy(
        debs,
        """
        set -e
        dpkg -i /one.deb
        clipcast --version
        id clipcast
        stat -c "%U %G %a %n" /var/lib/clipcast /etc/clipcast
        ls /etc/systemd/system/multi-user.target.wants/
        dpkg -V clipcast-client && echo verified
        echo "# mine" >> /etc/clipcast/client.toml
        rm /etc/systemd/system/multi-user.target.wants/clipcast-enrol.service
        touch /var/lib/clipcast/enrolled
        dpkg -i /two.deb
        clipcast --version
        tail -n 1 /etc/clipcast/client.toml
        ls /etc/systemd/system/multi-user.target.wants/ | grep -c clipcast-enrol || true
        dpkg -r clipcast-client
        ls /opt/clipcast 2>&1 || true
        ls /var/lib/clipcast
        dpkg -P clipcast-client
        ls -d /var/lib/clipcast /etc/clipcast /opt/clipcast 2>&1 || true
        ls /etc/systemd/system/multi-user.target.wants/ | grep -c clipcast || true
        """,
    )
    assert "clipcast 0.1.0\n" in said
    assert "clipcast 0.2.0\n" in said
    (groups,) = [line for line in said.splitlines() if line.startswith("uid=")]
    assert all(f"({name})" in groups for name in ("clipcast", "video", "render"))
    assert "clipcast clipcast 750 /var/lib/clipcast\nroot clipcast 750 /etc/clipcast\n" in said
    enabled = [line for line in said.splitlines() if line in UNITS]
    # It answers only: no client to be started.
    assert enabled == ["clipcast-enrol.service", "clipcast-serve.service", "clipcast-setup.service"]
    assert "verified\n" in said
    lines = said.splitlines()
    assert lines[lines.index("# mine") + 1] == "0"  # what the administrator took away stays away
    assert "cannot access '/opt/clipcast'" in said  # removed: the programs are gone, the device is not
    assert "enrolled" in lines
    assert all(f"cannot access '{path}'" in said for path in ("/var/lib/clipcast", "/etc/clipcast"))
    assert lines[-1] == "0"


def test_without_sysusers_the_user_is_made_by_hand(debs: Path) -> None:
    said = in_a_copy(debs, "rm -f /usr/bin/systemd-sysusers /bin/systemd-sysusers; dpkg -i /one.deb && id clipcast")
    (groups,) = [line for line in said.splitlines() if line.startswith("uid=")]
    assert all(f"({name})" in groups for name in ("clipcast", "video", "render"))


def test_an_image_that_cannot_install_yet_is_left_to_its_first_boot(debs: Path) -> None:
    said = in_a_copy(
        debs,
        """
        mount -t tmpfs -o size=1m none /opt
        dpkg -i /one.deb && dpkg-query -W -f "\\${db:Status-Status}" clipcast-client
        """,
    )
    assert "no room" in said
    assert "clipcast is set up at the next boot" in said
    assert said.endswith("at the next boot, or now by /usr/lib/clipcast/install\ninstalled")


def test_the_package_of_a_flashed_image_is_installed_at_its_first_boot_and_the_labs_settings_stay(debs: Path) -> None:
    script = resources.files("provisioning") / "firstboot" / "install"
    (debs / "firstboot.deb").write_bytes(script.read_bytes())  # what is named so is copied
    said = in_a_copy(
        debs,
        """
        set -e
        mkdir -p /usr/lib/clipcast-firstboot /etc/clipcast
        cp /one.deb /usr/lib/clipcast-firstboot/clipcast-client.deb
        cp /firstboot.deb /usr/lib/clipcast-firstboot/install
        echo "# of the lab" > /etc/clipcast/client.toml
        sh /usr/lib/clipcast-firstboot/install
        dpkg-query -W -f "\\${db:Status-Status}\\n" clipcast-client
        cat /etc/clipcast/client.toml
        ls /usr/lib/clipcast-firstboot
        cat /var/lib/clipcast-package.sha256
        sh /usr/lib/clipcast-firstboot/install && echo again
        clipcast --version
        """,
    )
    lines = said.splitlines()
    assert "installed" in lines
    assert lines[lines.index("# of the lab") + 1] == "install"  # the package's file is gone
    assert hashlib.sha256((debs / "one.deb").read_bytes()).hexdigest() in lines
    assert lines[-2:] == ["again", "clipcast 0.1.0"]
