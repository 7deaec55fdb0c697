"""A device's privacy budget: what it has disclosed, how much more it may, and the only way to get noise.

ledger.json    what was disclosed (ledger.py)
privacy.key    the device's secret, from which its noise comes
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from pathlib import Path

from edge_client.errors import LedgerError, PlanRefusedError
from edge_client.privacy.accounting import epsilon_of
from edge_client.privacy.ledger import Disclosure, Ledger, Part
from edge_client.privacy.noise import Noise, Vector
from protocol.messages import Privacy
from protocol.storage.files import write_atomic

SECRET_BYTES = 32


class Budget:
    """What a device may still disclose under a plan, and under its owner's own limit.

    `max_epsilon`, None for no limit, is the owner's: at the plan's delta, or at `max_delta` if that is smaller. A `virtual`
    device's noise depends on how many disclosures came before instead of on the training, whose key is drawn at random.
    """

    def __init__(
        self,
        ledger: Ledger | None = None,
        secret: bytes | None = None,
        key: Path | None = None,
        max_epsilon: float | None = None,
        max_delta: float = 1e-5,
        virtual: bool = False,
    ) -> None:
        self.ledger = Ledger() if ledger is None else ledger
        self._secret = secret
        self._key = key
        self._max_epsilon = max_epsilon
        self._max_delta = max_delta
        self._virtual = virtual

    @classmethod
    def open(cls, folder: Path, max_epsilon: float | None = None, max_delta: float = 1e-5) -> Budget:
        """Read a state folder; raises LedgerError. Nothing is written before the first disclosure."""
        path, key = folder / "ledger.json", folder / "privacy.key"
        secret = _read_secret(key)
        if secret is not None and not path.exists():
            raise LedgerError(
                f"{key} is there and {path} is not: this device has disclosed something, and nobody knows how much. Restore "
                f"{path.name}. To forget all that was disclosed, remove {key.name} too"
            )
        return cls(Ledger(path), secret, key, max_epsilon, max_delta)

    def epsilon(self, delta: float) -> float:
        """Return epsilon of all disclosures so far."""
        return epsilon_of((disclosure.noise_multiplier for disclosure in self.ledger.disclosures), delta)

    def check(self, privacy: Privacy | None, work: str = "", parts: Sequence[Part] = ()) -> None:
        """Raise PlanRefusedError if disclosing `parts` of the training `work` would go beyond a limit.

        What the ledger has of this training already is not counted again: it should be the same to the bit.
        """
        if privacy is None:
            if self._max_epsilon is not None:
                raise PlanRefusedError(
                    f"the plan has no `privacy`, and this device's owner allows an epsilon of {self._max_epsilon:g}: "
                    f"set `privacy` in the coordinator's recipe, or remove `max_epsilon` from this client's settings"
                )
            return
        done = {disclosure.part for disclosure in self.ledger.disclosures if disclosure.work == work}
        self._hold(privacy, [part for part in parts if part not in done])

    def noised(self, privacy: Privacy, work: str, part: Part, clean: Vector, sensitivity: float) -> Vector:
        """Return `clean` with Gaussian noise of `noise_multiplier` * sensitivity, once that is in the ledger.

        The noise depends on the device's secret, the training and `clean` itself: the same result gets the same noise, and
        no two results share theirs, or their difference would be without any. Raises PlanRefusedError beyond a limit, or if
        the ledger cannot be written.
        """
        try:
            secret = self._open_secret()
            place = len(self.ledger.disclosures) if self._virtual else work
            mark = hmac.digest(secret, f"mark:{place}:{part}:".encode() + clean.tobytes(), "sha256")
            disclosure = Disclosure(work=work, part=part, mark=mark.hex(), noise_multiplier=privacy.noise_multiplier)
            if disclosure not in self.ledger.disclosures:
                self._hold(privacy, [part])
                self.ledger.add(disclosure)
        except OSError as error:
            raise PlanRefusedError(
                f"the ledger cannot be kept, so nothing leaves this device: {error}. Make room"
            ) from error
        noise = Noise(hmac.digest(secret, b"noise:" + mark, "sha256"))
        return clean + privacy.noise_multiplier * sensitivity * noise.normal(clean.size).reshape(clean.shape)

    def _hold(self, privacy: Privacy, parts: Sequence[Part]) -> None:
        """Raise PlanRefusedError if these disclosures are more than the plan or the owner allows."""
        spent = [disclosure.noise_multiplier for disclosure in self.ledger.disclosures]
        after = [*spent, *(privacy.noise_multiplier for _ in parts)]
        limits = [(privacy.epsilon, privacy.delta, "the plan")]
        if self._max_epsilon is not None:
            limits.append((self._max_epsilon, min(privacy.delta, self._max_delta), "this device's owner"))
        for limit, delta, who in limits:
            epsilon = epsilon_of(after, delta)
            if not epsilon <= limit:  # should it ever not be a number, it is too much
                raise PlanRefusedError(
                    f"this round would bring the device to an epsilon of {epsilon:.3f} at a delta of {delta:g}, {who} "
                    f"allows {limit:g}: its privacy budget is spent ({len(spent)} disclosures so far), it takes no part"
                )

    def _open_secret(self) -> bytes:
        """Return the device's secret. The ledger's file comes before it: a secret alone means that a ledger was lost."""
        if self._secret is None:
            made = secrets.token_bytes(SECRET_BYTES)
            if self._key is not None:
                self.ledger.keep(self.ledger.disclosures)
                write_atomic(self._key, made.hex().encode())  # mkstemp makes it 0600
            self._secret = made
        return self._secret


def virtual_budget(client: str) -> Budget:
    """Return the budget of a simulated client: in memory, and with noise that is the same in every simulation."""
    return Budget(secret=hashlib.sha256(f"virtual:{client}".encode()).digest(), virtual=True)


def _read_secret(path: Path) -> bytes | None:
    try:
        secret = bytes.fromhex(path.read_text(encoding="ascii"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise LedgerError(f"{path} cannot be read: {error}. Restore it, or remove it: then a new one is made") from error
    if len(secret) != SECRET_BYTES:
        raise LedgerError(f"{path} holds no {SECRET_BYTES} bytes in hex. Restore it, or remove it: then a new one is made")
    return secret
