"""Who gets which pictures: IID, Dirichlet over classes, disjoint classes, or a domain each (docs/method.md, "Simulation").

Disjoint: the classes are cut into groups of at least two, no class in two groups. Clients that outnumber the groups, or the
domains, share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from protocol.settings import SettingsError

MIN_SAMPLES = 10
MAX_DRAWS = 10_000
Indices = NDArray[np.int64]


def parse_partition(text: str) -> tuple[Literal["iid", "dirichlet", "disjoint", "domains"], float]:
    """Read `iid`, `disjoint`, `domains` or `dirichlet:ALPHA`; raises SettingsError."""
    if text == "iid":
        return "iid", 0.0
    if text == "disjoint":
        return "disjoint", 0.0
    if text == "domains":
        return "domains", 0.0
    kind, _, alpha = text.partition(":")
    try:
        value = float(alpha)
    except ValueError:
        value = 0.0
    if kind == "dirichlet" and 0.0 < value < float("inf"):
        return "dirichlet", value
    raise SettingsError(
        f"partition {text!r}: write iid, disjoint, domains or dirichlet:ALPHA with ALPHA above 0, e.g. dirichlet:0.3"
    )


def split(labels: NDArray[np.int32], clients: int, partition: str, seed: int, domains: Sequence[str] = ()) -> list[Indices]:
    """Return each client's sorted indices into `labels`; together they cover all, none twice. Raises SettingsError.

    A Dirichlet draw is repeated until every client has at least 10 samples. `domains` names each sample's, for `domains`.
    """
    kind, alpha = parse_partition(partition)
    rng = np.random.default_rng(seed)
    if len(labels) < clients * MIN_SAMPLES:
        raise SettingsError(f"{len(labels)} pictures are too few for {clients} clients: each needs {MIN_SAMPLES}")
    if kind == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), clients)]
    if kind == "disjoint":
        return _deal(_class_groups(labels, clients, rng), clients, rng)
    if kind == "domains":
        return _deal(_domain_groups(domains, clients), clients, rng)
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


def _class_groups(labels: NDArray[np.int32], clients: int, rng: np.random.Generator) -> list[Indices]:
    """Return the samples of groups of at least two classes."""
    classes = rng.permutation(np.unique(labels))
    if clients > 1 and len(classes) < 4:
        raise SettingsError(f"partition disjoint: {len(classes)} classes make no two groups of two: take at least 4 classes")
    groups = np.array_split(classes, max(1, min(clients, len(classes) // 2)))
    return [np.flatnonzero(np.isin(labels, owned)) for owned in groups]


def _domain_groups(domains: Sequence[str], clients: int) -> list[Indices]:
    """Return the samples of each domain."""
    names = sorted(set(domains))
    if len(names) < 2 or not names[0]:
        raise SettingsError(
            "partition domains: the pictures name no domains; put them into CLASS/DOMAIN/, two or more domains"
        )
    if clients < len(names):
        raise SettingsError(
            f"partition domains: {len(names)} domains for {clients} clients: take at least {len(names)} clients"
        )
    return [np.flatnonzero(np.array(domains) == name) for name in names]


def _deal(groups: Sequence[Indices], clients: int, rng: np.random.Generator) -> list[Indices]:
    """Give each client a group; a group's samples are dealt out among its clients."""
    parts: list[Indices] = [np.zeros(0, np.int64)] * clients
    for number, group in enumerate(groups):
        members = range(number, clients, len(groups))
        for client, part in zip(members, np.array_split(rng.permutation(group), len(members)), strict=True):
            parts[client] = np.sort(part)
    if min(map(len, parts)) < MIN_SAMPLES:
        raise SettingsError(f"a client would hold fewer than {MIN_SAMPLES} pictures: take fewer clients, or more pictures")
    return parts
