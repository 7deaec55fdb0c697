"""Lets boards become devices: checks claims, issues certificates, registers keys (protocol/trust/claims.py).

It has a connection of its own, as the coordinator's user: a run of the federation need not be under way, and what comes
from boards that are nobody yet does not reach the run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from coordinator.broker.authority import Authority, requested_key
from coordinator.config import CoordinatorConfig
from coordinator.errors import FederationError
from coordinator.state.journal import Journal
from coordinator.state.registry import Enrolment, Registry
from protocol.bus import Bus, Connected, Delivery, Event, Publish, Subscribe
from protocol.doublings import worth_telling
from protocol.errors import Refused, WireError
from protocol.mqtt import MqttBus
from protocol.settings import SettingsError
from protocol.topics import Topics, parse
from protocol.trust import succession
from protocol.trust.claims import EnrolAnswer, EnrolRequest, claimed_id, seal, unseal
from protocol.trust.signing import key_bytes, public_key_of

log = logging.getLogger(__name__)

ANSWER_EXPIRY_S = 60
POLL_S = 0.5


class Registrar:
    """Answers requests to be enrolled, by the claims in the registry."""

    def __init__(
        self,
        federation: str,
        authority: Authority,
        registry: Registry,
        coordinator_key: str,
        succession: bytes = b"",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.topics = Topics(federation)
        self.counts: Counter[str] = Counter()
        self._authority = authority
        self._registry = registry
        self._key = coordinator_key
        self._succession = succession.decode() or None
        self._clock = clock

    def handle(self, event: Event) -> list[Publish | Subscribe]:
        """Take in a bus event. Who cannot prove a claim is told nothing, the operator is."""
        match event:
            case Connected():
                return [Subscribe(self.topics.enrolment("+", "request"))]
            case Delivery(topic=topic, payload=payload):
                try:
                    nonce = parse(topic).nonce
                    if nonce is None:
                        return []
                    answer = self._answer(payload, nonce)
                except WireError as error:
                    self._refused(error)
                except (FederationError, SettingsError) as error:  # the board asks again
                    log.error("no answer to a board: %s", error)  # noqa: TRY400 - no bug, no traceback
                else:
                    return [Publish(self.topics.enrolment(nonce, "answer"), answer, expiry_s=ANSWER_EXPIRY_S)]
        return []

    def _answer(self, token: bytes, nonce: str) -> bytes:
        name = claimed_id(token)
        enrolment = self._registry.enrolment(name)
        if enrolment is None or enrolment.proof is None:
            raise Refused("unknown-claim", f"there is no claim of {name}: `clipcast device add {name}` makes one")
        request = unseal(token, enrolment.proof, EnrolRequest, self.topics.federation, nonce)
        said = partial(EnrolAnswer, federation=request.federation, id=name, nonce=nonce)
        try:
            certificate = self._certificate(request, enrolment, enrolment.proof)
        except Refused as error:
            self._refused(error)
            return seal(said(refused=str(error)[:500]), enrolment.proof)
        return seal(said(certificate=certificate, coordinator_key=self._key, succession=self._succession), enrolment.proof)

    def _certificate(self, request: EnrolRequest, enrolment: Enrolment, proof: str) -> str:
        """Return the certificate of a board whose claim is good; the same again to a board that did not hear of it."""
        name, keys = request.id, _keys(request)
        if enrolment.used_by is None:
            if enrolment.expires is None or self._clock() >= enrolment.expires:
                raise Refused(
                    "claim-expired", f"the claim of {name} has expired: `clipcast device add {name}` makes another"
                )
            try:
                self._authority.check_device(name)
            except SettingsError as error:
                raise Refused("name-taken", str(error)) from error
            made = self._authority.certify(name, request.csr)
            used = self._registry.enrol(name, proof, keys, made, request.key)
            if used is None:
                raise Refused("unknown-claim", f"the claim of {name} is void: `clipcast device add {name}` makes another")
            enrolment = used
            log.info("device %s is enrolled, with key %s", name, request.key)
        if enrolment.used_by != keys or enrolment.certificate is None:
            raise Refused(
                "claim-used",
                f"another board has used the claim of {name}. If that was not yours, `clipcast device revoke {name}`; "
                f"`clipcast device add {name}` makes another claim",
            )
        self._authority.keep(name, enrolment.certificate)
        return enrolment.certificate

    def _refused(self, error: WireError) -> None:
        verdict = error.verdict if isinstance(error, Refused) else "malformed"
        self.counts[verdict] += 1
        if worth_telling(self.counts[verdict]):
            log.warning("no enrolment: %s (%s, %d so far)", error, verdict, self.counts[verdict])


def _keys(request: EnrolRequest) -> str:
    """Return the hash of a board's public keys: who asks again has the same ones; raises Refused for what is no request."""
    try:
        point = requested_key(request.csr).public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
        return hashlib.sha256(point + key_bytes(request.key)).hexdigest()
    except (ValueError, UnsupportedAlgorithm) as error:
        raise Refused("malformed", f"no certificate for {request.id}: {error}") from error


@contextlib.contextmanager
def registrar(config: CoordinatorConfig, folder: Path) -> Iterator[MqttBus]:
    """Answer boards meanwhile, in a thread, with the authority in `folder`; give its connection.

    Others may do so at the same time: whoever writes first counts, and all give the same answer. Raises SettingsError,
    KeyFileError, BusError.
    """
    authority, journal = Authority.open(folder), Journal(config.state, config.journal)
    public = public_key_of(config.state)
    chain = succession.load(config.state, config.federation, public)
    made = Registrar(config.federation, authority, Registry(journal), public, chain)
    bus, stop = MqttBus.open(config.broker, f"{config.federation}:registrar:{secrets.token_hex(4)}"), threading.Event()
    thread = threading.Thread(target=attend, args=(bus, made, stop), name="registrar", daemon=True)
    thread.start()
    try:
        yield bus
    finally:
        stop.set()
        bus.wake()
        thread.join()
        bus.close()
        journal.close()


def attend(bus: Bus, registrar: Registrar, stop: threading.Event) -> None:
    """Answer boards until stopped."""
    while not stop.is_set():
        event = bus.receive(POLL_S)
        if event is None:
            continue
        try:
            for action in registrar.handle(event):
                bus.do(action)
        except Exception:
            # What one board said must not keep the others out.
            log.exception("a request that should have been answered or refused: this is a bug in clipcast")
