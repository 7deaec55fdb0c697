"""Updates that end while no round is open: the next one answers them, so that they do not travel twice."""

from __future__ import annotations

from protocol.events import CoordinatorEvent, UpdateArrived, UpdateUnreadable

MOST = 8


class Between:
    """The newest update of each client that waits for the next round; of more than `MOST` the rest travel again."""

    def __init__(self) -> None:
        self._waiting: dict[str, UpdateArrived | UpdateUnreadable] = {}

    def keep(self, event: CoordinatorEvent) -> None:
        """Keep an update; other events are none of its business."""
        if isinstance(event, UpdateArrived | UpdateUnreadable) and (
            event.client in self._waiting or len(self._waiting) < MOST
        ):
            self._waiting[event.client] = event

    def drop(self, client: str) -> None:
        """Forget the update of a client that was cut off."""
        self._waiting.pop(client, None)

    def take(self) -> list[UpdateArrived | UpdateUnreadable]:
        """Return what waits, and forget it."""
        waiting, self._waiting = self._waiting, {}
        return list(waiting.values())
