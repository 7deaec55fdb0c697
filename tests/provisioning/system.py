"""A whole Debian in a folder, of this machine's kind or of arm64 under emulation, with a real sshd in front of it.

Packages are unpacked, not configured: their maintainer scripts would take ten minutes under emulation. What they would have
left behind and our package needs (users, dpkg's status) is written here.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import a_free_port, is_listening, wait_until

PACKAGES = "python3,python3-venv,ca-certificates,libgomp1,libstdc++6,passwd,adduser"
BINFMT, BINFMT_FS = Path("/usr/lib/binfmt.d/qemu-aarch64.conf"), Path("/proc/sys/fs/binfmt_misc")
NEEDED = ("mmdebstrap", "sshd", "ssh", "ssh-keygen", "dpkg-deb", "mount")


def require(arch: str) -> None:
    """Skip the test where it cannot run: not root, or tools are missing."""
    if os.geteuid() != 0:
        pytest.skip("a system in a folder takes root: chroot, mount, sshd")
    missing = [tool for tool in NEEDED if shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (apt-get install mmdebstrap openssh-server)")
    if arch == "arm64" and os.uname().machine != "aarch64":
        if not BINFMT.exists():
            pytest.skip("not installed: qemu-user-static")
        if not (BINFMT_FS / "register").exists():
            subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT_FS)], check=True)
        if not (BINFMT_FS / "qemu-aarch64").exists():
            (BINFMT_FS / "register").write_text(BINFMT.read_text().strip())


@dataclass(frozen=True)
class System:
    """A Debian in the folder `root`, reached by `ssh -F config board`."""

    root: Path
    config: Path

    def run(self, script: str, **how: object) -> subprocess.CompletedProcess[str]:
        """Run a script inside, as root."""
        command = ["chroot", str(self.root), "/bin/sh", "-c", script]
        return subprocess.run(command, capture_output=True, text=True, check=False, **how)  # type: ignore[call-overload,no-any-return]


def unpack(root: Path, arch: str) -> None:
    """Make a Debian in a new folder."""
    include = [f"--include={what}" for what in ("?essential", PACKAGES)]
    command = ["mmdebstrap", "--variant=extract", f"--arch={arch}", "--skip=cleanup/apt", *include, "bookworm", str(root)]
    subprocess.run(command, check=True, capture_output=True)
    masters = root / "usr" / "share" / "base-passwd"
    for name in ("passwd", "group"):
        shutil.copy(masters / f"{name}.master", root / "etc" / name)
    with (root / "etc" / "group").open("a") as groups:
        groups.write("render:x:105:\n")
    (root / "etc" / "shadow").write_text("root:*:19000:0:99999:7:::\n")
    status = []
    for deb in sorted((root / "var" / "cache" / "apt" / "archives").glob("*.deb")):
        told = subprocess.run(["dpkg-deb", "-f", str(deb)], check=True, capture_output=True, text=True).stdout
        first, _, rest = told.partition("\n")
        status.append(f"{first}\nStatus: install ok installed\n{rest.strip()}\n")
        deb.unlink()
    (root / "var" / "lib" / "dpkg" / "status").write_text("\n".join(status))
    if not (root / "usr" / "bin" / "awk").is_symlink():
        (root / "usr" / "bin" / "awk").symlink_to("mawk")
    for folder in ("proc", "dev", "run", "tmp"):
        (root / folder).mkdir(exist_ok=True)


@contextlib.contextmanager
def mounted(root: Path) -> Iterator[None]:
    """Give a system /proc and /dev meanwhile."""
    for kind, where in (("proc", "proc"), ("devtmpfs", "dev")):
        subprocess.run(["mount", "-t", kind, kind, str(root / where)], check=True)
    try:
        yield
    finally:
        for where in ("dev", "proc"):
            subprocess.run(["umount", "-l", str(root / where)], check=False)


@contextlib.contextmanager
def sshd(folder: Path, root: Path) -> Iterator[Path]:
    """Let root log in to the system by a key; yield the configuration of an ssh that reaches it as `board`."""
    port, inside = a_free_port(), folder / "sshd"
    inside.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(inside / name)], check=True)
    (inside / "authorized").write_text((inside / "user.pub").read_text())
    (inside / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {inside}/host\nPidFile {inside}/pid\n"
        f"AuthorizedKeysFile {inside}/authorized\n"
        f"StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPasswordAuthentication no\nChrootDirectory {root}\n"
    )
    host = (inside / "host.pub").read_text().strip()
    (inside / "known").write_text(f"[127.0.0.1]:{port} {host}\n")
    (inside / "ssh_config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {pwd.getpwuid(0).pw_name}\n  IdentityFile {inside}/user\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {inside}/known\n"
    )
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    command = ["/usr/sbin/sshd", "-D", "-e", "-f", str(inside / "sshd_config")]
    with (inside / "log").open("w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            wait_until(lambda: is_listening(port) or process.poll() is not None, what="sshd to listen")
            assert process.poll() is None, (inside / "log").read_text()
            yield inside / "ssh_config"
        finally:
            process.terminate()
