"""Input that is small and means to be dear, each read in a process of its own: what a refusal costs in time and memory.

Run as a script it prints one JSON line each: `python -m tests.faults.bombs`.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Iterator

from protocol.codec import MAX_BANK_HEADER, MAX_HEADER
from protocol.envelope import MAX_MANIFEST
from protocol.storage.partial import RECORD, _crc
from protocol.trust.signing import MAX_TOKEN
from tests.faults.fuzz_targets import SIGNER, TARGETS, TOPICS, seeds

LIMIT_BYTES = 64 * 1024 * 1024
BAD_END = 99


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """Return a file with this header."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def many(count: int, shape: list[int], kind: str = "update") -> bytes:
    """Return the header of so many tensors of one shape, none with a byte to it."""
    tensors = {f"{i:x}": {"dtype": "F16", "shape": shape, "data_offsets": [0, 0]} for i in range(count)}
    return json.dumps({"__metadata__": {"type": kind}, **tensors}, separators=(",", ":")).encode()


def nested(opening: bytes, closing: bytes, most: int) -> bytes:
    """Return JSON as deep as fits."""
    depth = most // (len(opening) + len(closing)) - 1
    return opening * depth + b"1" + closing * depth


def framed(body: bytes) -> bytes:
    """Return a manifest with this body."""
    start = b'{"v":1,"federation":"fed","sender":"a","instance":"0000000000000000","kind":"need","sequence":9,"body":'
    return start + body[: MAX_MANIFEST - len(start) - 1] + b"}"


def bombs() -> Iterator[tuple[str, str, bytes]]:
    """Yield (target, name, input)."""
    for most, kind in ((MAX_HEADER, "update"), (MAX_BANK_HEADER, "bank")):
        count = (most - 100) // 62
        yield "blob", f"empty tensors, as many as the header of a {kind} holds", safetensors(many(count, [0], kind))
        yield "blob", f"twice as many for a {kind}", safetensors(many(2 * count, [0], kind))
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            yield (
                "blob",
                f"{opening.decode()} as deep as the header of a {kind} goes",
                safetensors(nested(opening, closing, most)),
            )
    yield "blob", "a million empty tensors", safetensors(many(1_000_000, [0]))
    yield "blob", "a header of 2^63 bytes", safetensors(b"{}", length=2**63)
    yield "blob", "a header of 2^64 - 1 bytes", safetensors(b"{}", length=2**64 - 1)
    yield "blob", "a tensor of 2^40 values", safetensors(many(1, [2**20, 2**20]))
    yield "blob", "a tensor whose size overflows", safetensors(many(1, [2**32, 2**32, 2**32]))
    yield "blob", "a shape of ten thousand ones", safetensors(many(1, [1] * 10_000))
    yield "blob", "metadata in metadata", safetensors(json.dumps({"__metadata__": {"clipcast": "[" * 50_000}}).encode())
    yield "blob", "long numbers", safetensors(b'{"a":{"shape":[' + b"9" * 100_000 + b"]}}")
    yield "blob", "keys twice", safetensors(b"{" + b",".join([b'"a":1'] * 20_000) + b"}")
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        yield "envelope", f"a manifest of {opening.decode()}", framed(nested(opening, closing, MAX_MANIFEST))
        yield "envelope", f"a header of {opening.decode()}", nested(opening, closing, MAX_TOKEN)
    yield "envelope", "a manifest of one number", framed(b"9" * MAX_MANIFEST)
    yield "envelope", "a manifest of many fields", framed(json.dumps({f"{i:x}": 0 for i in range(1500)}).encode())
    yield "envelope", "a manifest of one long list", framed(b"[" + b"0," * 4000 + b"0]")
    yield "envelope", "the longest bitmap", framed(json.dumps({"sha256": "a" * 64, "missing": "ff" * 4096}).encode())
    yield "envelope", "dots", b"." * MAX_TOKEN
    yield "envelope", "ten megabytes", bytes(10_000_000)
    yield "chunk", "a long topic", b"\x00\xff" + b"/" * 100_000
    topic = TOPICS.blob("a" * 64, 9).encode()
    yield "chunk", "ten megabytes", struct.pack(">H", len(topic)) + topic + bytes(10_000_000)
    record = RECORD.pack(0, 1, _crc(0, b"x")) + b"x"
    yield "partial", "records of one byte, half a megabyte", b"\0\0\0\xff" + record * (512 * 1024 // len(record))
    yield "partial", "a record of 4 GB", RECORD.pack(0, 2**32 - 1, 0)
    for target, true in seeds().items():
        yield target, "what is true", true[0]


def cost(target: str, data: bytes) -> tuple[float, float]:
    """Return CPU milliseconds, the least of three, and megabytes of a reading; (inf, inf) if the process died of it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with open("/proc/self/statm") as file:  # noqa: PTH123 - no more objects than needed
                size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + LIMIT_BYTES, size + LIMIT_BYTES))
            before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
            for _ in range(3):
                started = time.process_time()
                TARGETS[target](data)
                times.append(time.process_time() - started)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(write_end, json.dumps([min(times) * 1000, (after - before) / 1024]).encode())
            os._exit(0)
        except BaseException:  # noqa: BLE001 - whatever it was, the parent says so
            os._exit(BAD_END)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    ms, megabytes = json.loads(said) if said else (float("inf"), float("inf"))
    return ms, megabytes


if __name__ == "__main__":
    SIGNER.public  # noqa: B018 - what is loaded at first use is no refusal's cost
    for target, true in seeds().items():
        for data in true:
            TARGETS[target](data)
    for target, name, data in bombs():
        ms, megabytes = cost(target, data)
        sys.stdout.write(json.dumps({"what": f"{target}: {name}", "ms": ms, "mb": megabytes, "bytes": len(data)}) + "\n")
