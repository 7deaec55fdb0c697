"""A device's whole identity, made on the lab server: for boards that cannot ask (`clipcast device add --offline`).

The files are those that enrolment leaves in a device's state folder (edge_client/enrolment.py); the keys were here, so
whoever may copy this folder can be the device.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.broker.authority import Authority
from protocol.settings import SettingsError
from protocol.storage.files import make_folder, write_atomic
from protocol.trust.claims import COORDINATOR_KEY, STAMP, TLS_CERTIFICATE, TLS_KEY, stamp
from protocol.trust.signing import Signer


def write_identity(folder: Path, name: str, authority: Authority, coordinator_key: str) -> str:
    """Write keys, certificate and stamp of the device `name` into a new folder; return its key that signs.

    Raises SettingsError, KeyFileError.
    """
    if folder.exists():
        raise SettingsError(f"{folder} exists: name a new folder, an identity is never written over another")
    certificate = authority.issue(name)
    try:
        make_folder(folder)
        folder.chmod(0o700)
        key = Signer.open(folder).public
        write_atomic(folder / TLS_KEY, certificate.with_suffix(".key").read_bytes())
        certificate.with_suffix(".key").unlink()
        write_atomic(folder / TLS_CERTIFICATE, certificate.read_bytes())
        write_atomic(folder / COORDINATOR_KEY, coordinator_key.encode())
        write_atomic(folder / STAMP, stamp(name))
    except OSError as error:
        raise SettingsError(
            f"{folder} cannot be written: {error}. `clipcast ca revoke {name}` before another try"
        ) from error
    return key
