"""Who gets which pictures: IID, Dirichlet over classes, or disjoint classes (docs/method.md, "Partitions").

Disjoint: the classes are cut into groups of at least two, no class in two groups; clients that outnumber them share a group.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protocol.settings import SettingsError

MIN_SAMPLES = 10
MAX_DRAWS = 10_000
Indices = NDArray[np.int64]


def parse_partition(text: str) -> tuple[Literal["iid", "dirichlet", "disjoint"], float]:
    """Read `iid`, `disjoint` or `dirichlet:ALPHA`; raises SettingsError."""
    if text == "iid":
        return "iid", 0.0
    if text == "disjoint":
        return "disjoint", 0.0
    kind, _, alpha = text.partition(":")
    try:
        value = float(alpha)
    except ValueError:
        value = 0.0
    if kind == "dirichlet" and 0.0 < value < float("inf"):
        return "dirichlet", value
    raise SettingsError(f"partition {text!r}: write iid, disjoint or dirichlet:ALPHA with ALPHA above 0, e.g. dirichlet:0.3")


def split(labels: NDArray[np.int32], clients: int, partition: str, seed: int) -> list[Indices]:
    """Return each client's sorted indices into `labels`; together they cover all, none twice. Raises SettingsError.

    A Dirichlet draw is repeated until every client has at least 10 samples.
    """
    kind, alpha = parse_partition(partition)
    rng = np.random.default_rng(seed)
    if len(labels) < clients * MIN_SAMPLES:
        raise SettingsError(f"{len(labels)} pictures are too few for {clients} clients: each needs {MIN_SAMPLES}")
    if kind == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]
    if kind == "disjoint":
        return _disjoint(labels, clients, rng)
    for _ in range(MAX_DRAWS):
        parts = _dirichlet(labels, clients, alpha, rng)
        if min(map(len, parts)) >= MIN_SAMPLES:
            return parts
    raise SettingsError(f"no Dirichlet({alpha:g}) draw gave each of {clients} clients {MIN_SAMPLES} pictures: raise ALPHA")


def _dirichlet(labels: NDArray[np.int32], clients: int, alpha: float, rng: np.random.Generator) -> list[Indices]:
    parts: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = (np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def _disjoint(labels: NDArray[np.int32], clients: int, rng: np.random.Generator) -> list[Indices]:
    """Share out groups of at least two classes; a group's pictures are dealt out among its clients."""
    classes = rng.permutation(np.unique(labels))
    groups = [
        np.flatnonzero(np.isin(labels, owned)) for owned in np.array_split(classes, max(1, min(clients, len(classes) // 2)))
    ]
    parts: list[Indices] = [np.zeros(0, np.int64)] * clients
    for number, group in enumerate(groups):
        members = range(number, clients, len(groups))
        for client, part in zip(members, np.array_split(rng.permutation(group), len(members)), strict=True):
            parts[client] = np.sort(part)
    if min(map(len, parts)) < MIN_SAMPLES:
        raise SettingsError(f"a client's classes hold fewer than {MIN_SAMPLES} pictures: take fewer clients")
    return parts
