"""An already flashed board, from nothing to a client that takes part, over ssh. Pure: what is there, what is wanted, steps.

A second run finds everything as it should be, and changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from protocol.trust.claims import STAMP, stamped
from provisioning import site
from provisioning.errors import ProvisioningError
from provisioning.site import PACKAGE, STATE, Site

ETC = f"/{site.ETC}"
AS_CLIPCAST = f"setpriv --reuid=clipcast --regid=clipcast --init-groups env HOME={STATE}"
NOTE = "/var/lib/clipcast-package.sha256"  # which file it was: the same version may be built again
TOKEN, TOKEN_MODE = f"/{site.TOKEN}", (0o640, "root:clipcast")
MACHINES = ("aarch64", "x86_64")

# Prints `KEY VALUE` lines: nothing here needs more than a shell.
LOOK = f"""\
echo "machine $(uname -m)"
echo "hostname $(uname -n)"
echo "dpkg $(command -v dpkg || true)"
echo "python $(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)"
echo "free $(df -Pk /opt / 2>/dev/null | awk 'NR==2 {{print $4}}' || true)"
echo "installed $(dpkg-query -W -f='${{db:Status-Status}} ${{Version}}' {PACKAGE} 2>/dev/null || true)"
echo "package $(cat {NOTE} 2>/dev/null || true)"
echo "enrolled $(cat {STATE}/{STAMP} 2>/dev/null || true)"
echo "proof $(test -f {TOKEN} && {{ printf 'clipcast enrolment 1\\000'; tr -d '\\n' < {TOKEN}; }} | sha256sum | cut -c1-64)"
echo "ready $(test -x /opt/clipcast/venv/bin/clipcast && echo yes || true)"
for file in {ETC}/*; do
    test ! -f "$file" || echo "file $(sha256sum "$file" | cut -c1-64) $(stat -c '%a %U:%G' "$file") $file"
done
"""


@dataclass(frozen=True)
class Wanted:
    """A file that the board should have: content, mode and owner."""

    path: str
    data: bytes
    mode: int
    owner: str = "root:root"

    @property
    def seen_as(self) -> str:
        """Return what `Found.files` says of it where it is as it should be."""
        return f"{hashlib.sha256(self.data).hexdigest()} {self.mode:o} {self.owner}"


@dataclass(frozen=True)
class Found:
    """What is on a board: `enrolled` is the id it has, `package` the SHA-256 of the package that was installed.

    `proof` is that of the claim which lies there (protocol/trust/claims.py), None without one.
    """

    machine: str
    hostname: str
    python: str
    dpkg: bool
    free_mib: int
    installed: bool
    package: str
    enrolled: str | None
    proof: str | None
    ready: bool
    files: dict[str, str]

    @classmethod
    def read(cls, text: str) -> Found:
        """Read what LOOK prints; raises ProvisioningError."""
        lines = [line.partition(" ") for line in text.splitlines()]
        said = {key: value.strip() for key, _, value in lines if key != "file"}
        try:
            seen = [value.split(" ", 3) for key, _, value in lines if key == "file"]
            files = {path: f"{digest} {mode} {owner}" for digest, mode, owner, path in seen}
            name = stamped(said["enrolled"]) if said["enrolled"] else None
            return cls(
                machine=said["machine"],
                hostname=said["hostname"],
                python=said["python"],
                dpkg=bool(said["dpkg"]),
                free_mib=int(said["free"] or 0) // 1024,
                installed=said["installed"].startswith("installed "),
                package=said["package"],
                enrolled=name,
                proof=said["proof"] or None,
                ready=said["ready"] == "yes",
                files=files,
            )
        except (KeyError, ValueError, TypeError) as error:
            raise ProvisioningError(f"the board's shell answered with what is no answer: {text[:200]!r}") from error

    def check(self) -> None:
        """Raise ProvisioningError if nothing can be installed there."""
        if self.machine not in MACHINES:
            raise ProvisioningError(f"the board is {self.machine}: clipcast runs on {' and '.join(MACHINES)}")
        if not self.dpkg:
            raise ProvisioningError("the board has no dpkg: clipcast's package is for Debian, Ubuntu and JetPack")
        version = tuple(int(part) for part in self.python.split(".")) if self.python else ()
        if version < (3, 10):
            told = f"Python {self.python}" if self.python else "no python3"
            raise ProvisioningError(
                f"the board has {told}, clipcast needs 3.10 or newer: JetPack 6 or newer, or Ubuntu 22.04"
            )


def files_of(lab: Site) -> list[Wanted]:
    """Return what a lab gives this board, as it lies there once the package has made its user: keys are readable to that."""
    return [
        Wanted(f"/{file.path}", file.data, 0o640, "root:clipcast")
        if file.mode & 0o077 == 0
        else Wanted(f"/{file.path}", file.data, file.mode)
        for file in lab.files()
    ]


Kind = Literal["package", "file", "enrol", "clean", "start"]


@dataclass(frozen=True)
class Step:
    """Something to be done on a board: which file, for `file`; `why` says it to the operator."""

    kind: Kind
    why: str
    file: Wanted | None = None


def steps(found: Found, name: str, package: str, files: Iterable[Wanted]) -> list[Step]:
    """Return what has to be done to make the board the device `name`; `package` is the SHA-256 of the one to be installed.

    Raises ProvisioningError if it is another device.
    """
    found.check()
    if found.enrolled not in (None, name):
        raise ProvisioningError(
            f"this board is {found.enrolled} already, not {name}: name that, or `--uninstall` first to give it another id"
        )
    todo = []
    if not found.installed or found.package != package or not found.ready:
        what = "other than this one" if found.installed and found.package != package else "not there, or not whole"
        todo.append(Step("package", f"the package is {what}: install it"))
    for file in files:
        if found.files.get(file.path) != file.seen_as:
            todo.append(
                Step("file", f"{file.path} {'differs' if file.path in found.files else 'is not there'}: write it", file)
            )
    if found.enrolled is None:
        todo.append(Step("enrol", f"it is nobody yet: let it ask for the certificate of {name}"))
    elif TOKEN in found.files:
        todo.append(Step("clean", "its claim was used and still lies there: remove it"))
    if todo:
        todo.append(Step("start", "start its service"))
    return todo


INSTALL = f"""\
set -e
umask 022
file=$(mktemp /var/tmp/clipcast-XXXXXX.deb)
trap 'rm -f "$file"' EXIT
cat > "$file"
echo "$SHA256 $file" | sha256sum -c --status
export DEBIAN_FRONTEND=noninteractive
if ! dpkg --force-confold --force-confdef -i "$file"; then
    apt-get -y -o Dpkg::Options::=--force-confold --fix-broken install
fi
# What dpkg says of itself is not enough: after a failure it may say that the version before is well.
dpkg-deb --fsys-tarfile "$file" | tar -xO ./usr/lib/clipcast/build | cmp -s - /usr/lib/clipcast/build
/usr/lib/clipcast/install
echo "$SHA256" > {NOTE}
"""
ENROL = f"""\
set -e
if [ -d /run/systemd/system ]; then systemctl start clipcast-enrol.service; else
    install -d -o clipcast -g clipcast -m 700 {STATE}
    {AS_CLIPCAST} clipcast client enrol {ETC}/client.toml
fi
rm -f {TOKEN}
"""
CLEAN = f"rm -f {TOKEN}"
# What the package enabled, and the operator left so: the client, or what answers, or both.
START = """\
for unit in clipcast-client clipcast-serve; do
    [ -e /etc/systemd/system/multi-user.target.wants/$unit.service ] || continue
    if [ -d /run/systemd/system ]; then systemctl restart $unit.service && echo "$unit runs"
    else echo "no systemd is running: $unit starts at the next boot"; fi
done
"""
DOCTOR = f"""\
cd {STATE}
grep -q '^for to train' /usr/lib/clipcast/build && part= || part=--answers-only
{AS_CLIPCAST} clipcast doctor {ETC}/client.toml $part
"""
UNINSTALL = f"""\
set -e
if dpkg-query -W {PACKAGE} > /dev/null 2>&1; then dpkg --purge {PACKAGE}; fi
rm -rf {ETC} {STATE} {NOTE} /opt/clipcast
"""
