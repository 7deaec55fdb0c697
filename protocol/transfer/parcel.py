"""A result packed for the way: its offer, and the blob that the offer is for. What a client keeps until its receipt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from protocol.buckets import bucket, bucketed
from protocol.codec import encode_update, reference
from protocol.errors import WireError
from protocol.messages import Offer, TrainingResult


@dataclass(frozen=True)
class Parcel:
    """An offer and its blob."""

    offer: Offer
    blob: bytes

    def cut(self, chunk_size: int) -> Parcel:
        """Return the same, offered in chunks of this size; raises WireError if that makes too many."""
        return Parcel(self.offer.model_copy(update={"blob": reference(self.blob, chunk_size)}), self.blob)


def pack(result: TrainingResult, run: str | None = None, seal: Callable[[bytes], bytes] | None = None) -> Parcel:
    """Pack a result of a run, its counts in buckets, sealed by `seal`.

    Raises WireError if it is not finite, as after a training that diverged.
    """
    blob = encode_update(bucketed(result.update))
    blob = blob if seal is None else seal(blob)
    try:
        offer = Offer(
            run=run,
            round=result.round,
            base=result.base,
            blob=reference(blob),
            samples=bucket(result.samples),
            loss=result.loss,
            accuracy=result.accuracy,
            train_seconds=result.train_seconds,
            epsilon=result.epsilon,
            bytes_received=0,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise WireError(f"a result whose {problem['loc'][0]} cannot be offered: {problem['msg']}") from error
    return Parcel(offer, blob)
