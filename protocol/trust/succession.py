"""One coordinator's keys after each other: each signs a statement that names the next, and is then destroyed.

A client that trusts the first key follows the statements to the newest, whenever it comes back. They are `Successor`
manifests, signed as any other; they travel together, the oldest first, on the retained topic `key`.
"""

from __future__ import annotations

from pathlib import Path

from protocol.envelope import COORDINATOR, decode, expect
from protocol.errors import KeyFileError, WireError
from protocol.messages import Successor
from protocol.storage.files import sync_folder, write_atomic
from protocol.trust.signing import MemorySequence, Signer, new_key, opened, private_key, public_key, signer_of

FILE, NEXT_KEY = "succession", "key.next.pem"
MOST = 32
MAX_CHAIN = 16 * 1024


def newest(chain: bytes, federation: str, key: str) -> str:
    """Return the newest key that `key` leads to. What is not signed by the key before it is passed over."""
    for statement in _statements(chain):
        key = read(statement, federation, key) or key
    return key


def leads_to(chain: bytes, federation: str, key: str) -> bool:
    """Whether the last of the statements names `key`."""
    statements = _statements(chain)
    return not statements or _names(statements[-1], federation, key)


def read(statement: bytes, federation: str, key: str) -> str | None:
    """Return whom a statement by `key` names, None if it is not by `key`, or not for this federation."""
    try:
        if signer_of(statement) != key:
            return None
        envelope = decode(opened(statement, key))
        successor = expect(envelope, Successor).next
        public_key(successor)
    except (WireError, ValueError):
        return None
    return successor if (envelope.federation, envelope.sender) == (federation, COORDINATOR) else None


def load(folder: Path, federation: str, public: str) -> bytes:
    """Return the statements that lead to the key `public`: what a rotation that was cut off has left does not count.

    Raises KeyFileError.
    """
    statements = _kept(folder)
    ends = [number for number, statement in enumerate(statements) if _names(statement, federation, public)]
    return _joined(statements[: ends[-1] + 1]) if ends else b""


def rotate(folder: Path, federation: str) -> str:
    """Give the coordinator in a state folder another key, which its next start uses; return it. Raises KeyFileError.

    Cut off at any point it has happened or not, and can be repeated: the new key, then the statement, then the new key in
    the old one's place.
    """
    old = Signer(private_key(folder / "key.pem"), MemorySequence())
    chain = load(folder, federation, old.public)
    try:
        (folder / NEXT_KEY).unlink(missing_ok=True)
        new = Signer(new_key(folder / NEXT_KEY), MemorySequence())
        statement = old.seal(federation, COORDINATOR, Successor(next=new.public))
        write_atomic(folder / FILE, _joined([*_statements(chain), statement]))
        (folder / NEXT_KEY).replace(folder / "key.pem")
        sync_folder(folder)
    except OSError as error:
        raise KeyFileError(f"{folder} cannot be written: {error}. The old key is still in force") from error
    return new.public


def _kept(folder: Path) -> list[bytes]:
    try:
        return _statements((folder / FILE).read_bytes())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KeyFileError(f"{folder / FILE} cannot be read: {error}. Clients need it to follow to this key") from error


def _names(statement: bytes, federation: str, public: str) -> bool:
    try:
        return read(statement, federation, signer_of(statement)) == public
    except WireError:
        return False


def _joined(statements: list[bytes]) -> bytes:
    return b"\n".join(statements[-MOST:])


def _statements(chain: bytes) -> list[bytes]:
    return [statement for statement in chain[:MAX_CHAIN].split(b"\n") if statement]
