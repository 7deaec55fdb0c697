"""What a federation left behind, read by somebody else than the coordinator: its journal, its clients' notes."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from coordinator.state.store import KEEP_ROUNDS
from tests.faults.actors import read_notes

MEASURED = ("seconds", "bytes_up", "bytes_down")


def rows(state: Path, query: str) -> list[tuple[Any, ...]]:
    """Return the rows of a query on the journal, none while there is no journal."""
    file = state / "journal.db"
    if not file.exists():
        return []
    connection = sqlite3.connect(file, timeout=30)
    try:
        return list(connection.execute(query))
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
    finally:
        connection.close()


def records(state: Path) -> list[dict[str, Any]]:
    """Return the finished rounds' records, without what a clock or a counter of bytes says."""
    found = rows(state, "SELECT record FROM rounds WHERE record IS NOT NULL ORDER BY number")
    return [{key: value for key, value in json.loads(text).items() if key not in MEASURED} for (text,) in found]


def differing(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the pairs of records of the same round that are not the same, of the rounds that both have.

    A journal forgets who listened to whom in rounds long past, and two of different lengths do so in different rounds.
    """
    remembered = max(len(one), len(other)) - KEEP_ROUNDS

    def told(record: dict[str, Any]) -> dict[str, Any]:
        return record if record["round"] > remembered else {**record, "attention": None}

    return [(a, b) for a, b in zip(one, other, strict=False) if told(a) != told(b)]


def seconds_of_rounds(state: Path) -> list[float]:
    """Return how long each finished round took."""
    found = rows(state, "SELECT record FROM rounds WHERE record IS NOT NULL ORDER BY number")
    return [float(json.loads(text)["seconds"]) for (text,) in found]


def made(state: Path, after: int, up_to: int) -> set[tuple[Any, ...]]:
    """Return what the rounds after `after` and up to `up_to` made, and what it began with: (round, kind, name, hash)."""
    found = rows(state, "SELECT number, kind, name, sha256 FROM kept")
    return {row for row in found if row[0] == 0 or after < row[0] <= up_to}


def receipts(folder: Path, clients: Iterable[str]) -> set[tuple[str, int, str, bool]]:
    """Return the receipts that clients got: (client, round, hash, accepted)."""
    return {
        (client, note["round"], note["sha256"], note["accepted"])
        for client in clients
        for note in read_notes(folder / f"{client}.notes")
        if note["what"] == "receipt"
    }


def lost(folder: Path, state: Path, clients: Iterable[str]) -> set[tuple[str, int, str]]:
    """Return the accepted receipts that the journal knows nothing of."""
    told = {receipt[:3] for receipt in receipts(folder, clients) if receipt[3]}
    return told - {tuple(row) for row in rows(state, "SELECT client, number, sha256 FROM updates WHERE accepted")}


def fleet_notes(path: Path, what: str) -> list[dict[str, Any]]:
    """Return a fleet's notes of a kind; the last line may be half written."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    wanted = f'{{"what": "{what}"'
    return [json.loads(line) for line in lines if line.startswith(wanted)]


def fleet_lost(folder: Path, state: Path, fleets: int) -> tuple[set[tuple[str, int, str]], int]:
    """Return the accepted receipts of fleets that the journal knows nothing of, and how many there are in all."""
    notes = [note for number in range(fleets) for note in fleet_notes(folder / f"fleet-{number}.notes", "receipt")]
    told = {(note["client"], note["round"], note["sha256"]) for note in notes if note["accepted"]}
    known = {tuple(row) for row in rows(state, "SELECT client, number, sha256 FROM updates WHERE accepted")}
    return told - known, len(told)


def counted_twice(state: Path) -> list[tuple[Any, ...]]:
    """Return the clients that count more than once in a round."""
    twice = rows(state, "SELECT number, client FROM updates WHERE accepted GROUP BY number, client HAVING COUNT(*) > 1")
    for record in records(state):
        accepted = record["accepted"]
        twice += [(record["round"], client) for client in set(accepted) if accepted.count(client) > 1]
    return twice
