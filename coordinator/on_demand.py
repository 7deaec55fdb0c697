"""Adapters that are made when they are asked for: all clients' own at once would not fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from protocol.messages import Adapter


class OnDemand(Mapping[str, Adapter]):
    """Adapters by client, in sorted order, made `together` at a time: the newest ones are kept, all others are made anew.

    `make` returns the adapters of the clients that it is given, in their order, each time of the same bits.
    """

    def __init__(
        self, clients: Iterable[str], make: Callable[[Sequence[str]], Sequence[Adapter]], together: int = 1
    ) -> None:
        names = sorted(clients)
        self._groups = {name: names[i - i % together :][:together] for i, name in enumerate(names)}
        self._make = make
        self._newest: dict[str, Adapter] = {}

    def __getitem__(self, client: str) -> Adapter:
        group = self._groups[client]
        if len(group) == 1:
            return self._make(group)[0]
        if client not in self._newest:
            self._newest = {}  # before the next ones are made, not after
            self._newest = dict(zip(group, self._make(group), strict=True))
        return self._newest[client]

    def __contains__(self, client: object) -> bool:
        return client in self._groups

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups)

    def __len__(self) -> int:
        return len(self._groups)


def each(make: Callable[[str], Adapter]) -> Callable[[Sequence[str]], list[Adapter]]:
    """Return what makes several adapters one after another."""
    return lambda clients: [make(client) for client in clients]
