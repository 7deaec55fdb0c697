"""The flavours of an artefact: what each is for, and how close it has to stay to torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Flavour = Literal["fp32", "fp16", "int8", "int8-qdq", "int4", "fused", "adapter"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
MAX_ACCURACY_LOST = 0.005


@dataclass(frozen=True)
class Gate:
    """The smallest cosine to torch's embedding that any picture may have, and the accuracy (0 to 1) that may be lost."""

    cosine: float
    accuracy: float = MAX_ACCURACY_LOST


GATES: dict[Flavour, Gate] = {
    "fp32": Gate(0.999),
    "fp16": Gate(0.999),
    "fused": Gate(0.999),
    "adapter": Gate(0.999),
    "int8": Gate(0.995),
    "int8-qdq": Gate(0.995),
    "int4": Gate(0.99),
}
