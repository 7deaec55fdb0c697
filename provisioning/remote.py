"""A board over ssh: OpenSSH's client does it, with the operator's keys, agent and ~/.ssh/config."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from provisioning.errors import ProvisioningError

UNREACHED = 255  # ssh's own exit code; all others are the command's
CONNECT_S = 15


class Remote:
    """One board, as root: by login, or by sudo without a password. `Remote.open` makes one."""

    def __init__(self, host: str, options: Sequence[str], sudo: Sequence[str] = ()) -> None:
        self.host = host
        self._options = options
        self._sudo = sudo

    @classmethod
    @contextlib.contextmanager
    def open(cls, host: str, options: Sequence[str] = ()) -> Iterator[Remote]:
        """Connect, and see that we may do what root may; `options` are ssh's own. Raises ProvisioningError.

        All commands share one connection, so that a password or a touch of a key is asked for once.
        """
        with tempfile.TemporaryDirectory(prefix="clipcast-ssh-") as folder:
            shared = ["-o", "ControlMaster=auto", "-o", f"ControlPath={folder}/%C", "-o", "ControlPersist=60"]
            every = [*shared, "-o", f"ConnectTimeout={CONNECT_S}", *options]
            remote = cls(host, every)
            try:
                if remote.run("id -u").strip() != "0":
                    remote = cls(host, every, ("sudo", "-n"))
                    try:
                        remote.run("true")
                    except ProvisioningError as error:
                        raise ProvisioningError(
                            f"{host} lets us in, not as root: log in as root, or allow this user `sudo` without a password "
                            f"for the time of the installation"
                        ) from error
                yield remote
            finally:
                subprocess.run(["ssh", *every, "-O", "exit", "--", host], check=False, capture_output=True)

    def run(self, script: str, data: bytes = b"", *, told: bool = False) -> str:
        """Run a shell script as root, with `data` as its input; return what it prints, or (`told`) let it print here.

        Raises ProvisioningError with the end of what it said on stderr.
        """
        code, out, err = self._run(script, data, told=told)
        if code == UNREACHED:
            raise ProvisioningError(f"ssh cannot reach {self.host}: {_end(err)}. Try `ssh {self.host} true`")
        if code:
            raise ProvisioningError(f"{self.host} failed with {code}: {_end(err or out)}")
        return out

    def code(self, script: str) -> int:
        """Run a script that prints here; return its exit code. Raises ProvisioningError if ssh breaks off."""
        code, _, err = self._run(script, b"", told=True)
        if code == UNREACHED:
            raise ProvisioningError(f"lost {self.host}: {_end(err)}. Run the same command again: it goes on")
        return code

    def put(self, data: bytes, path: str, mode: int, owner: str = "root:root") -> None:
        """Write a file there, whole or not at all."""
        target, fresh = shlex.quote(path), shlex.quote(f"{path}.new")
        folder = shlex.quote(str(Path(path).parent))
        self.run(
            f"set -e; umask 077; mkdir -p -m 755 {folder}; cat > {fresh}; {whole(data, fresh)}; "
            f"chown {owner} {fresh}; chmod {mode:o} {fresh}; sync {fresh}; mv {fresh} {target}",
            data,
        )

    def _run(self, script: str, data: bytes, *, told: bool) -> tuple[int, str, str]:
        command = shlex.join([*self._sudo, "sh", "-c", script])
        out = None if told else subprocess.PIPE
        try:
            done = subprocess.run(
                ["ssh", *self._options, "--", self.host, command],
                input=data,
                stdout=out,
                stderr=subprocess.PIPE,
                check=False,
            )
        except FileNotFoundError as error:
            raise ProvisioningError("there is no ssh here: apt-get install openssh-client") from error
        return done.returncode, (done.stdout or b"").decode(errors="replace"), done.stderr.decode(errors="replace")


def whole(data: bytes, path: str) -> str:
    """Return a command that fails unless a file there holds this: a connection that breaks off looks like an end."""
    return f"echo {hashlib.sha256(data).hexdigest()} {path} | sha256sum -c --status"


def _end(text: str) -> str:
    """Return the last lines of what was said, on one line."""
    return " / ".join(line for line in text.strip().splitlines()[-4:] if line) or "it said nothing"
