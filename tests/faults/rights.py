"""Who may say and hear what in the federation `lab`, said again naively: what the brokers' rules are held against."""

from __future__ import annotations

from protocol.topics import Topics

LAB, OTHER, SHA = Topics("lab"), Topics("other"), "ab" * 32
DEVICES = ("jetson-1", "jetson-2")
ENROL, NONCE = "enrol", "0f" * 16
ROLES = ("coordinator", *DEVICES, ENROL)
BROADCASTS = ("classes", "round", "release", "key")
FROM_KINDS, TO_KINDS = ("offer", "need", "status", "receipt", "want", "report"), ("need", "receipt", "adapter", "status")
TOPICS = [
    *(topics.broadcast(kind) for topics in (LAB, OTHER) for kind in BROADCASTS),
    *(topics.blob(SHA, 0) for topics in (LAB, OTHER)),
    *(topics.from_(device, kind) for topics in (LAB, OTHER) for device in DEVICES for kind in FROM_KINDS),
    *(topics.to(device, kind) for topics in (LAB, OTHER) for device in DEVICES for kind in TO_KINDS),
    *(topics.upload(device, SHA, 0) for topics in (LAB, OTHER) for device in DEVICES),
    *(topics.enrolment(NONCE, kind) for topics in (LAB, OTHER) for kind in ("request", "answer")),
    *(LAB.from_(ENROL, "status"), LAB.to(ENROL, "receipt")),
    *(
        f"clipcast/1/lab/{rest}"
        for rest in ("unknown", "from", "from/jetson-1", "to/jetson-1/a/b", "blob/x", "from/jetson-10/x")
    ),
    "clipcast",
    "somewhere/else",
    "$SYS/broker/version",
    "$SYS/broker/clients/total",
    "$CONTROL/dynamic-security/v1",
]
WILDCARDS = [
    "#",
    "+/#",
    "clipcast/#",
    "clipcast/+/lab/#",
    "clipcast/1/+/round",
    "clipcast/1/lab/#",
    "clipcast/1/lab/+",
    "clipcast/1/lab/to/#",
    "clipcast/1/lab/to/+/+",
    "clipcast/1/lab/from/#",
    "clipcast/1/lab/from/+/+",
    "clipcast/1/lab/from/+/want",
    "clipcast/1/lab/from/jetson-1/#",
    "clipcast/1/lab/enrol/#",
    "clipcast/1/lab/enrol/+/answer",
    "clipcast/1/lab/blob/#",
    "clipcast/1/lab/blob/+/+",
    "+/+/+/+/+/+",
    "$SYS/#",
    "$SYS/broker/+",
    "$CONTROL/#",
]
FILTERS = [
    *WILDCARDS,
    *(f"$share/thieves/{wanted}" for wanted in WILDCARDS),
    f"$share/thieves/{LAB.to('jetson-1', 'receipt')}",
]


def may_write(role: str, topic: str) -> bool:
    """The coordinator all but `from`, a device below its own name, a board without one its request; nothing elsewhere."""
    if not topic.startswith("clipcast/1/lab/"):
        return False
    rest = topic.removeprefix("clipcast/1/lab/").split("/")
    if rest[0] == "enrol":
        return role == {"request": ENROL, "answer": "coordinator"}[rest[2]]
    if role == ENROL:
        return False
    if rest[0] == "from":
        return rest[1:2] == [role]
    if role == "coordinator":
        return (len(rest) == 1 and rest[0] in BROADCASTS) or (rest[0] in ("blob", "to") and len(rest) == 3)
    return False


def may_read(role: str, topic: str) -> bool:
    """Every device the broadcasts and what is for it, the coordinator what comes from clients, a board its answer."""
    if not topic.startswith("clipcast/1/lab/"):
        return False
    rest = topic.removeprefix("clipcast/1/lab/").split("/")
    if rest[0] == "enrol":
        return role == {"request": "coordinator", "answer": ENROL}[rest[2]]
    if role == ENROL:
        return False
    if rest[0] == "from":
        return role == "coordinator"
    broadcast = (len(rest) == 1 and rest[0] in BROADCASTS) or (rest[0] == "blob" and len(rest) == 3)
    return broadcast or (rest[0] == "to" and rest[1:2] == [role] and len(rest) == 3)
