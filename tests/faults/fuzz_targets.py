"""What bytes from the wire meet first: each reader with the only errors that it may raise, and true messages to start from.

Run as a script, it lets atheris look for others: `python -m tests.faults.fuzz_targets TARGET CORPUS -runs=N`.
"""

from __future__ import annotations

import random
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:  # there is no wheel for every machine; the quick tier does without
    atheris = None

import contextlib

with atheris.instrument_imports(include=["protocol"]) if atheris and __name__ == "__main__" else contextlib.nullcontext():
    from protocol.codec import (
        decode_adapter,
        decode_bank,
        decode_update,
        encode_adapter,
        encode_bank,
        encode_update,
        reference,
    )
    from protocol.envelope import MAX_MANIFEST, decode
    from protocol.errors import WireError
    from protocol.messages import MAX_BLOB_SIZE, MIN_CHUNK_SIZE, BlobRef, Need, Offer, Status
    from protocol.storage.partial import RECORD, _crc, _records
    from protocol.topics import Topics, parse
    from protocol.transfer.exchange import Fetch, Repeat, from_bitmap, to_bitmap
    from protocol.trust.gate import FirstUse, Gate
    from protocol.trust.signing import MAX_TOKEN, Signer, opened, signer_of

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from jwt.api_jws import PyJWS

from protocol.messages import TextBank, Update

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
SIGNER = Signer(KEY)
TOPICS = Topics("fed")
BLOB = bytes(range(256)) * 20
REF = reference(BLOB, MIN_CHUNK_SIZE)
JWS = PyJWS(algorithms=["EdDSA"])
ADDRESSES = [parse(TOPICS.from_("a", kind)) for kind in ("offer", "need", "status")]


def signed(data: bytes) -> bytes:
    """Return bytes as the content of a token that is truly signed."""
    return JWS.encode(data, KEY, "EdDSA", {"kid": SIGNER.public, "typ": None}).encode()


def envelope(data: bytes) -> None:
    """A token as it comes, and the same bytes as the content of one that is truly signed."""
    if len(data) <= MAX_TOKEN:  # the gate looks no further
        with contextlib.suppress(WireError):
            decode(opened(data, signer_of(data)))
    with contextlib.suppress(WireError):
        decode(data)
    gate = Gate("fed", FirstUse())
    for address in ADDRESSES[len(data) % 3 :][:1]:
        with contextlib.suppress(WireError):
            gate.open(address, data)
        with contextlib.suppress(WireError):
            gate.open(address, signed(data[: MAX_MANIFEST + 1]))


def chunk(data: bytes) -> None:
    """A topic, and bytes on it: a chunk, or a bitmap. The first two bytes say how long the topic is."""
    length = int.from_bytes(data[:2], "big") % 256
    topic, payload = data[2 : 2 + length].decode("utf-8", "replace"), data[2 + length :]
    fetch = Fetch(REF, Repeat(random.Random(0)))
    with contextlib.suppress(WireError):
        address = parse(topic)
        if address.index is not None:
            fetch.chunk(address.index, payload, 1.0)
            fetch.blob()
    with contextlib.suppress(WireError):
        # what a manifest's schema lets through: an even number of hex digits
        assert all(0 <= index < 999 for index in from_bitmap(payload.hex(), int.from_bytes(data[:2], "big") % 999))


def blob(data: bytes) -> None:
    """A blob of each kind."""
    for read in (decode_update, decode_adapter, decode_bank):
        with contextlib.suppress(WireError):
            read(data)


def partial(data: bytes) -> None:
    """The log of a half-finished transfer, as a crash or a bad disk leaves it."""
    size = int.from_bytes(data[:4], "big") % MAX_BLOB_SIZE + 1
    end = 0
    for offset, start, length in _records(data, size):
        assert end < start
        assert 0 < length <= size - offset
        end = start + length
    assert end <= len(data)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "envelope": envelope,
    "chunk": chunk,
    "blob": blob,
    "partial": partial,
}


def seeds() -> dict[str, list[bytes]]:
    """Return true input for each target."""
    factors = {"x.lora_A": np.ones((2, 6), np.float32), "x.lora_B": np.zeros((6, 2), np.float32)}
    rows, indices = np.eye(2, 8, dtype=np.float32), np.arange(2, dtype=np.int32)
    update = encode_update(Update(factors, rows, indices, indices + 1, indices, rows, indices))
    bank = encode_bank(TextBank(1, ("cat", "dog"), ("a {}",), rows, 10.0, "clip", "d" * 64))
    ref = BlobRef(sha256="ab" * 32, size=5000)
    manifests = [
        Status(state="online"),
        Need(sha256="ab" * 32, missing="c0"),
        Offer(round=1, base="ab" * 32, blob=ref, samples=1, loss=0.5, accuracy=0.5, train_seconds=1.0, bytes_received=0),
    ]
    tokens = [SIGNER.seal("fed", "a", manifest) for manifest in manifests]
    topics = [TOPICS.upload("a", REF.sha256, 0), TOPICS.blob(REF.sha256, 4), *(TOPICS.from_("a", m.kind) for m in manifests)]
    chunks = [
        struct.pack(">H", len(topic)) + topic.encode() + payload
        for topic in topics
        for payload in (BLOB[: REF.length(0)], bytes.fromhex(to_bitmap({0, 3}, REF.chunks)))
    ]
    log = b"".join(RECORD.pack(at, 64, _crc(at, BLOB[at : at + 64])) + BLOB[at : at + 64] for at in range(0, 512, 64))
    return {
        "envelope": [*tokens, *(opened(token, SIGNER.public) for token in tokens)],
        "chunk": chunks,
        "blob": [update, bank, encode_adapter(factors)],
        "partial": [log, log[:-7]],
    }


def main() -> None:
    """Let atheris run a target."""
    name, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds()[name]):
            (Path(folder) / str(number)).write_bytes(data)
        atheris.Setup([name, folder, *arguments], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
