"""How boards become devices: the board's side and the registrar's together, over a bus in memory."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from coordinator.broker.authority import Authority
from coordinator.enrolment import Registrar
from coordinator.state.journal import Journal
from coordinator.state.registry import Registry
from edge_client.enrolment import Newcomer, enrol, enrolled_id, locked
from edge_client.errors import EnrolmentError, StateError
from protocol.bus import Connected, Delivery, MemoryBroker, Publish, Subscribe
from protocol.settings import SettingsError
from protocol.trust import succession
from protocol.trust.claims import Claim, EnrolRequest, seal
from protocol.trust.signing import Signer, public_key_of

NOW = 1_000_000.0
KEY = Signer().public


class Office:
    """The lab server: an authority, a journal and a registrar, by a clock that the test sets."""

    def __init__(self, folder: Path, journal: str | None = None) -> None:
        self.now = NOW
        self.authority = Authority.create(folder / "ca", "lab")
        self.journal = Journal(folder / "state", journal)
        self.registry = Registry(self.journal)
        self.registrar = Registrar("lab", self.authority, self.registry, KEY, b"", lambda: self.now)

    def claim(self, name: str, seconds: float = 60.0) -> Claim:
        claim = Claim.make(name)
        self.registry.claim(name, claim.proof, int(NOW + seconds), None)
        return claim

    def answers(self, request: Publish) -> list[Publish]:
        assert not request.retain
        found = self.registrar.handle(Delivery(request.topic, request.payload))
        assert all(isinstance(action, Publish) for action in found)
        return found  # type: ignore[return-value]

    def enrol(self, newcomer: Newcomer) -> None:
        (answer,) = self.answers(newcomer.request())
        assert answer.topic == newcomer.topics.enrolment(newcomer.nonce, "answer")
        newcomer.answered(answer.payload)


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path)
    yield made
    made.journal.close()


def common_name(path: Path) -> str:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    return str(certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def test_a_board_with_a_claim_becomes_the_device(office: Office, tmp_path: Path) -> None:
    claim, state = office.claim("jetson-1"), tmp_path / "board"
    assert enrolled_id(state) is None
    newcomer = Newcomer("lab", claim, state)
    office.enrol(newcomer)
    assert enrolled_id(state) == "jetson-1"
    assert (state / "coordinator.key").read_text() == KEY
    assert common_name(state / "device.pem") == "jetson-1"
    assert (state / "device.pem").read_text() == (office.authority.folder / "jetson-1.pem").read_text()
    assert (state / "device.key").stat().st_mode & 0o077 == 0
    assert office.registry.devices()["jetson-1"].key == Signer.open(state).public


def test_on_postgresql_too(tmp_path: Path, postgres: Callable[[], str]) -> None:
    office = Office(tmp_path, postgres())
    claim = office.claim("jetson-1", seconds=2.0**33)  # beyond 2038
    office.enrol(Newcomer("lab", claim, tmp_path / "board"))
    with pytest.raises(EnrolmentError, match="another board has used"):
        office.enrol(Newcomer("lab", claim, tmp_path / "thief"))
    office.journal.close()


def test_an_answer_that_is_lost_is_given_again_to_the_same_board_alone(office: Office, tmp_path: Path) -> None:
    claim = office.claim("jetson-1")
    (lost,) = office.answers(Newcomer("lab", claim, tmp_path / "board").request())
    office.now += 3600  # the claim has expired meanwhile: it was used in time
    again = Newcomer("lab", claim, tmp_path / "board")  # after a power cut: another nonce, the same keys
    office.enrol(again)
    assert len(list(office.authority.folder.glob("jetson-1*.pem"))) == 1
    with pytest.raises(EnrolmentError, match="another board has used the claim of jetson-1"):
        office.enrol(Newcomer("lab", claim, tmp_path / "thief"))
    assert office.registry.devices()["jetson-1"].key == Signer.open(tmp_path / "board").public
    with pytest.raises(Exception, match="on a topic of others"):
        again.answered(lost.payload)


@pytest.mark.parametrize("ending", ["revoked", "replaced"])
def test_a_void_claim_is_answered_with_nothing(
    office: Office, tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    claim = office.claim("jetson-1")
    if ending == "revoked":
        assert office.registry.revoke("jetson-1")
    else:
        office.claim("jetson-1")
    assert office.answers(Newcomer("lab", claim, tmp_path / "board").request()) == []
    assert sum(office.registrar.counts.values()) == 1
    assert "no enrolment" in caplog.text
    assert "jetson-1" not in office.registry.devices()


def test_an_expired_claim_is_refused_and_nothing_is_made(office: Office, tmp_path: Path) -> None:
    claim = office.claim("jetson-1")
    office.now += 60
    newcomer = Newcomer("lab", claim, tmp_path / "board")
    with pytest.raises(EnrolmentError, match="has expired: `clipcast device add jetson-1` makes another"):
        office.enrol(newcomer)
    assert enrolled_id(tmp_path / "board") is None
    assert not office.registry.devices()
    assert not (office.authority.folder / "jetson-1.pem").exists()


def test_a_second_claim_replaces_the_board_and_takes_the_first_ones_certificate_back(office: Office, tmp_path: Path) -> None:
    office.enrol(Newcomer("lab", office.claim("jetson-1"), tmp_path / "old"))
    first = x509.load_pem_x509_certificate((tmp_path / "old" / "device.pem").read_bytes())
    office.enrol(Newcomer("lab", office.claim("jetson-1"), tmp_path / "new"))
    revoked = x509.load_pem_x509_crl((office.authority.folder / "crl.pem").read_bytes())
    assert [entry.serial_number for entry in revoked] == [first.serial_number]
    assert office.registry.devices()["jetson-1"].key == Signer.open(tmp_path / "new").public


def test_what_a_device_is_stays_known_when_it_gets_another_key(office: Office) -> None:
    office.registry.claim("jetson-1", Claim.make("jetson-1").proof, int(NOW), "raspberry-pi-5")
    office.registry.add("jetson-1", KEY)
    office.claim("jetson-1")
    enrolment = office.registry.enrolment("jetson-1")
    assert enrolment is not None
    assert enrolment.profile == "raspberry-pi-5"


def test_a_certificate_that_was_taken_back_does_not_stand_up_again(office: Office, tmp_path: Path) -> None:
    claim = office.claim("jetson-1")
    office.enrol(Newcomer("lab", claim, tmp_path / "board"))
    office.authority.revoke("jetson-1")
    office.answers(Newcomer("lab", claim, tmp_path / "board").request())
    assert not (office.authority.folder / "jetson-1.pem").exists()


def test_a_crash_between_journal_and_folder_is_mended_by_the_next_request(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = office.claim("jetson-1")

    def full(*_: object) -> None:
        raise SettingsError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(office.authority, "keep", full)
        assert office.answers(Newcomer("lab", claim, tmp_path / "board").request()) == []
    office.enrol(Newcomer("lab", claim, tmp_path / "board"))
    assert (tmp_path / "board" / "device.pem").read_text() == (office.authority.folder / "jetson-1.pem").read_text()


def test_a_power_cut_at_any_write_leaves_no_stamp_and_the_next_try_is_whole(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, cuts = os.replace, 0
    for writes in range(20):
        claim, state, left = office.claim(f"jetson-{writes}"), tmp_path / f"board-{writes}", [writes]

        def cut(*arguments: str, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", cut)
            try:
                office.enrol(Newcomer("lab", claim, state))
            except KeyboardInterrupt:
                cuts += 1
                assert enrolled_id(state) is None
        office.enrol(Newcomer("lab", claim, state))
        assert enrolled_id(state) == claim.id
        assert office.registry.devices()[claim.id].key == Signer.open(state).public
        assert (state / "device.pem").read_text() == (office.authority.folder / f"{claim.id}.pem").read_text()
    assert 7 <= cuts < 20  # three keys and numbers, the authority's copy, certificate, coordinator's key, stamp


def csr(key: Any, *, broken: bool = False) -> str:
    """A certificate request; a broken one is signed by nobody."""
    how = None if isinstance(key, Ed25519PrivateKey) else hashes.SHA256()
    asked = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, how)
    der = asked.public_bytes(Encoding.DER)
    if broken:
        der = der[:-1] + bytes([der[-1] ^ 1])
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM).decode()


NO_REQUESTS = {
    "no request": "-----BEGIN CERTIFICATE REQUEST-----\nMAo=\n-----END CERTIFICATE REQUEST-----\n",
    "another kind of key": csr(Ed25519PrivateKey.generate()),
    "another curve": csr(ec.generate_private_key(ec.SECP384R1())),
    "signed by nobody": csr(ec.generate_private_key(ec.SECP256R1()), broken=True),
}


@pytest.mark.parametrize("text", NO_REQUESTS.values(), ids=NO_REQUESTS)
def test_what_is_no_certificate_request_gets_a_refusal(office: Office, tmp_path: Path, text: str) -> None:
    claim = office.claim("jetson-1")
    newcomer = Newcomer("lab", claim, tmp_path / "board")
    message = EnrolRequest(federation="lab", id="jetson-1", nonce=newcomer.nonce, csr=text, key=KEY)
    (answer,) = office.answers(Publish(newcomer.topics.enrolment(newcomer.nonce, "request"), seal(message, claim.proof)))
    with pytest.raises(EnrolmentError, match="no certificate for jetson-1"):
        newcomer.answered(answer.payload)
    assert not office.registry.devices()
    office.enrol(newcomer)  # the claim is still good


def test_a_board_that_is_told_whom_to_believe_believes_nobody_else(office: Office, tmp_path: Path) -> None:
    newcomer = Newcomer("lab", office.claim("jetson-1"), tmp_path / "board", Signer().public)
    with pytest.raises(EnrolmentError, match="`coordinator_key` in the settings"):
        office.enrol(newcomer)
    assert enrolled_id(tmp_path / "board") is None


def test_a_board_that_knows_an_earlier_key_is_led_to_the_newest(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    old = public_key_of(folder)
    new = succession.rotate(folder, "lab")
    office = Office(tmp_path)
    office.registrar = Registrar(
        "lab", office.authority, office.registry, new, succession.load(folder, "lab", new), lambda: NOW
    )
    office.enrol(Newcomer("lab", office.claim("jetson-1"), tmp_path / "board", old))
    assert (tmp_path / "board" / "coordinator.key").read_text() == new
    office.journal.close()


@pytest.mark.parametrize("name", ["broker", "ca", "crl"])
def test_no_device_takes_the_name_of_a_server_or_of_the_authority(office: Office, tmp_path: Path, name: str) -> None:
    office.authority.issue("broker", ["labserver"])
    before = {path.name: path.read_bytes() for path in office.authority.folder.iterdir()}
    with pytest.raises(EnrolmentError, match="name"):
        office.enrol(Newcomer("lab", office.claim(name), tmp_path / "board"))
    assert {path.name: path.read_bytes() for path in office.authority.folder.iterdir()} == {**before, ".lock": b""}
    assert not office.registry.devices()


def test_revocations_by_several_processes_are_all_on_the_list(office: Office) -> None:
    names = [f"jetson-{number}" for number in range(12)]
    for name in names:
        office.authority.issue(name)
    code = (
        "import sys, pathlib, coordinator.broker.authority as a\n"
        "for name in sys.argv[2:]: a.Authority.open(pathlib.Path(sys.argv[1])).revoke(name)"
    )
    folder, environment = str(office.authority.folder), {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    running = [subprocess.Popen([sys.executable, "-c", code, folder, *names[part::3]], env=environment) for part in range(3)]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    revoked = x509.load_pem_x509_crl((office.authority.folder / "crl.pem").read_bytes())
    assert len(list(revoked)) == len(names)


def test_only_one_process_enrols_a_board_at_a_time(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "board"),
        pytest.raises(StateError, match="another clipcast is at work"),
        locked(tmp_path / "board"),
    ):
        pass


def test_the_journals_folder_is_its_owners_alone(office: Office, tmp_path: Path) -> None:
    office.claim("jetson-1")
    assert (tmp_path / "state").stat().st_mode & 0o077 == 0


def test_a_broker_that_answers_in_the_coordinators_place_is_not_believed(
    office: Office, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It sees the request, has an authority and a registrar of its own, and no claim."""
    broker, claim = MemoryBroker(), office.claim("jetson-1")
    liar = Office(tmp_path / "liar")
    forged = liar.claim("jetson-1")
    newcomer = Newcomer("lab", claim, tmp_path / "board")
    bus, clock = broker.connect(), iter(range(1000))
    impostor = Newcomer("lab", forged, tmp_path / "shadow")
    impostor.nonce = newcomer.nonce
    (lie,) = liar.answers(impostor.request())

    def ticking() -> float:
        broker.route(lie)
        return float(next(clock))

    with caplog.at_level(logging.WARNING), pytest.raises(EnrolmentError, match="no answer within 5 s"):
        enrol(bus, newcomer, 5.0, ticking)
    assert "an answer that is not the coordinator's" in caplog.text
    assert enrolled_id(tmp_path / "board") is None
    liar.journal.close()


def test_the_registrar_listens_to_requests_alone(office: Office) -> None:
    assert office.registrar.handle(Connected()) == [Subscribe("clipcast/1/lab/enrol/+/request")]
    assert office.registrar.handle(Delivery("clipcast/1/lab/from/jetson-1/status", b"{}")) == []
    assert office.registrar.handle(Delivery("somewhere/else", json.dumps({}).encode())) == []
