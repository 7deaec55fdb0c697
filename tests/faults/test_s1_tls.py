"""S1: who is let in by the broker's configuration that we ship, and which broker our clients trust.

Every refusal has to name its cause: `MqttBus.open` raises a BusError that the operator can act on.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from coordinator.broker.authority import Authority
from protocol.bus import Connected
from protocol.errors import BusError
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings
from tests.conftest import a_free_port, is_listening, wait_until
from tests.faults.lab import Lab, mosquitto_binary, new_authority, secured_mosquitto
from tests.faults.pki import CLIENT, DAY, NOW, SERVER, Issued, issue

# paho drops the socket of a failed TLS handshake without closing it; the garbage collector does.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)

EXPIRED = (NOW - 30 * DAY, NOW - DAY)
FUTURE = (NOW + 30 * DAY, NOW + 60 * DAY)
BOTH_HOSTS = ("127.0.0.1", "localhost")
LET_IN = None
HOST = "mqtts://127.0.0.1:{port}"
outcomes: dict[str, tuple[str | None, str]] = {}


def attempt(**settings: Any) -> str | None:
    """Try to connect; return why not."""
    try:
        bus = MqttBus.open(BrokerSettings(connect_timeout_s=4.0, **settings), "s1:client")
    except BusError as error:
        return str(error)
    taken_in = isinstance(bus.receive(5.0), Connected)
    bus.close()
    return None if taken_in else "open, but not connected"


def judge(case: str, expected: str | None, said: str | None) -> None:
    """Note the outcome, for the score; and check it."""
    right = said is None if expected is None else said is not None and expected in said
    outcomes[case] = (expected, "right" if right else ("wrong accept" if said is None else f"wrong refusal: {said}"))
    assert right, f"{case}: expected {expected or 'to be let in'!r}, got {said!r}"


# The broker judges us ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """A broker as we ship it, its authority, and a folder for credentials."""

    lab: Lab
    root: Issued
    folder: Path

    def files(self, issued: Issued, *chain: Issued) -> dict[str, Path]:
        folder = Path(issued.write(self.folder, "own", *chain))
        return {"cert_file": folder / "own.pem", "key_file": folder / "own.key"}

    def named(self, name: str) -> dict[str, Path]:
        return {"cert_file": self.lab.ca / f"{name}.pem", "key_file": self.lab.ca / f"{name}.key"}


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's authority: it has issued, taken back and issued again the certificate of jetson-2."""
    folder = tmp_path_factory.mktemp("s1") / "ca"
    authority = new_authority(folder)
    for ending in ("pem", "key"):
        (folder / f"revoked.{ending}").write_bytes((folder / f"jetson-2.{ending}").read_bytes())
    authority.revoke("jetson-2")
    authority.issue("jetson-2")
    return folder


@pytest.fixture(scope="module")
def lab(ca: Path) -> Iterator[Lab]:
    with secured_mosquitto(ca.parent / "broker", ca) as running:
        yield running


@pytest.fixture
def bench(lab: Lab, tmp_path: Path) -> Bench:
    return Bench(lab, Issued.read(lab.ca, "ca"), tmp_path)


def another_authority(bench: Bench, name: str) -> dict[str, Path]:
    return bench.files(issue("jetson-1", issue(name, ca=True), usage=[CLIENT]))


def by_a_device(bench: Bench) -> dict[str, Path]:
    """A thief of a device's key issues itself the coordinator's certificate."""
    device = Issued.read(bench.lab.ca, "jetson-1")
    return bench.files(issue("coordinator", device, usage=[CLIENT]), device)


def by_an_intermediate(bench: Bench) -> dict[str, Path]:
    """Our authority issues no authorities: its certificate says so."""
    middle = issue("middle", bench.root, ca=True)
    return bench.files(issue("jetson-1", middle, usage=[CLIENT]), middle)


def sha1(bench: Bench) -> dict[str, Path]:
    """A certificate with a signature by SHA-1, which only openssl's command still makes."""
    bench.root.write(bench.folder, "root")
    request = ["openssl", "req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=jetson-1"]
    sign = ["openssl", "x509", "-req", "-sha1", "-days", "30", "-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial"]
    for command in ([*request, "-keyout", "own.key", "-out", "own.csr"], [*sign, "-in", "own.csr", "-out", "own.pem"]):
        subprocess.run(command, cwd=bench.folder, check=True, capture_output=True)
    return {"cert_file": bench.folder / "own.pem", "key_file": bench.folder / "own.key"}


def swapped_key(bench: Bench) -> dict[str, Path]:
    return {**bench.named("jetson-1"), "key_file": bench.lab.ca / "jetson-2.key"}


def truncated(bench: Bench) -> dict[str, Path]:
    (bench.folder / "half.pem").write_bytes((bench.lab.ca / "jetson-1.pem").read_bytes()[:200])
    return {**bench.named("jetson-1"), "cert_file": bench.folder / "half.pem"}


def encrypted(bench: Bench) -> dict[str, Path]:
    how = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret"))
    key = Issued.read(bench.lab.ca, "jetson-1").key
    (bench.folder / "own.key").write_bytes(key.private_bytes(*how))
    return {**bench.named("jetson-1"), "key_file": bench.folder / "own.key"}


def missing(bench: Bench) -> dict[str, Path]:
    return {**bench.named("jetson-1"), "key_file": bench.folder / "none.key"}


def weak(bench: Bench) -> dict[str, Path]:
    key = rsa.generate_private_key(65537, 1024)
    return bench.files(issue("jetson-1", bench.root, usage=[CLIENT], key=key))


Credentials = Callable[[Bench], dict[str, Path]]
OURS: dict[str, tuple[str | None, Credentials]] = {
    "a device's certificate": (LET_IN, lambda bench: bench.named("jetson-1")),
    "the coordinator's certificate": (LET_IN, lambda bench: bench.named("coordinator")),
    "a certificate issued anew after the revocation of another": (LET_IN, lambda bench: bench.named("jetson-2")),
    "a certificate for any purpose": (LET_IN, lambda bench: bench.files(issue("jetson-1", bench.root))),
    "no certificate": ("asks for a client's certificate", lambda _: {}),
    "a revoked certificate": ("was revoked", lambda bench: bench.named("revoked")),
    "a certificate of another authority": ("does not know the authority", lambda bench: another_authority(bench, "other")),
    "a certificate of another authority of the same name": ("(`cert_file`)", lambda bench: another_authority(bench, "lab")),
    "a certificate signed by itself": ("(`cert_file`)", lambda bench: bench.files(issue("jetson-1", usage=[CLIENT]))),
    "an expired certificate": (
        "(`cert_file`) has expired",
        lambda bench: bench.files(issue("jetson-1", bench.root, usage=[CLIENT], valid=EXPIRED)),
    ),
    "a certificate that is not valid yet": (
        "perhaps its clock is behind",
        lambda bench: bench.files(issue("jetson-1", bench.root, usage=[CLIENT], valid=FUTURE)),
    ),
    "a server's certificate": ("is no client's", lambda bench: bench.named("broker")),
    "the authority's certificate": ("(`cert_file`)", lambda bench: bench.named("ca")),
    "a certificate issued by a device": ("(`cert_file`)", by_a_device),
    "a certificate issued by an authority between": ("(`cert_file`)", by_an_intermediate),
    "a certificate without a name": ("cannot reach the broker", lambda bench: bench.files(issue(None, bench.root))),
    "a key of 1024 bits": ("too", weak),
    "a signature by SHA-1": ("too weak", sha1),
    "a certificate with another one's key": ("do not belong together", swapped_key),
    "half a file": ("Both have to be whole files in PEM", truncated),
    "an encrypted key": ("the key not encrypted", encrypted),
    "a key that is not there": ("none.key cannot be read: No such file", missing),
}


@pytest.mark.parametrize("case", OURS)
def test_s1_the_broker_lets_in_who_may_and_nobody_else(case: str, bench: Bench) -> None:
    expected, credentials = OURS[case]
    judge(case, expected, attempt(url=bench.lab.url, ca_file=bench.lab.ca / "ca.pem", **credentials(bench)))


def test_s1_a_revocation_counts_without_a_restart(bench: Bench) -> None:
    """SIGHUP makes Mosquitto read the list again; who is connected stays so, and all others come in as before."""
    authority = new_authority(bench.folder / "ca")
    with secured_mosquitto(bench.folder / "broker", bench.folder / "ca") as lab:
        own = Bench(lab, Issued.read(lab.ca, "ca"), bench.folder)
        thief = own.files(Issued.read(lab.ca, "jetson-1"))
        connected = lab.open("jetson-2")
        authority.revoke("jetson-1")
        lab.reload()

        def refused() -> bool:
            said = attempt(url=lab.url, ca_file=lab.ca / "ca.pem", **thief)
            return said is not None and "was revoked" in said

        wait_until(refused, what="the revocation to count")
        outcomes["a certificate revoked while the broker runs"] = ("was revoked", "right")
        said = attempt(url=lab.url, ca_file=lab.ca / "ca.pem", **own.named("jetson-2"))
        judge("another one's, after a revocation", LET_IN, said)
        assert connected.receive(0.0) is None  # it was not disconnected
        connected.close()


def test_s1_older_tls_does_not_get_in(bench: Bench) -> None:
    """A client that speaks TLS 1.2 at most; and one of ours that would speak it if the broker did."""
    context = ssl.create_default_context(cafile=str(bench.lab.ca / "ca.pem"))
    context.load_cert_chain(bench.lab.ca / "jetson-1.pem", bench.lab.ca / "jetson-1.key")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    port = int(bench.lab.url.rpartition(":")[2])
    try:
        with socket.create_connection(("127.0.0.1", port)) as sock:
            context.wrap_socket(sock, server_hostname="127.0.0.1").close()
        said = None
    except ssl.SSLError as error:
        said = str(error).lower().replace("_", " ")
    judge("TLS 1.2", "protocol version", said)
    credentials = {"ca_file": bench.lab.ca / "ca.pem", **bench.named("jetson-1")}
    judge("a client that would speak TLS 1.2", LET_IN, attempt(url=bench.lab.url, tls_version="1.2", **credentials))


def test_s1_who_speaks_no_tls_stays_outside(bench: Bench) -> None:
    said = attempt(url=bench.lab.url.replace("mqtts", "mqtt"))
    judge("no TLS to the port of TLS", "speaks TLS on that port (mqtts://)", said)


# We judge the broker ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def mosquitto_with(folder: Path) -> Iterator[int]:
    """Run a Mosquitto with server.pem and server.key of a folder; yield its port."""
    port = a_free_port()
    lines = [f"listener {port} 127.0.0.1", f"certfile {folder}/server.pem", f"keyfile {folder}/server.key"]
    (folder / "mosquitto.conf").write_text("\n".join([*lines, "allow_anonymous true", "user root", ""]))
    process = subprocess.Popen([mosquitto_binary(), "-c", str(folder / "mosquitto.conf")], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: is_listening(port) or process.poll() is not None, what="mosquitto to listen")
        assert process.poll() is None, "mosquitto refuses the certificate"
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def server_with(context: ssl.SSLContext) -> Iterator[int]:
    """Answer CONNECT on TLS that no Mosquitto speaks; yield the port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.settimeout(10)
            with connection, contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as secured:
                secured.recv(4096)
                secured.sendall(b"\x20\x03\x00\x00\x00")  # CONNACK of MQTT 5: success, no properties
                while secured.recv(4096):
                    pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(20)


@dataclass(frozen=True)
class Root:
    """An authority of a lab that does not use ours, and a folder to work in."""

    issued: Issued
    folder: Path

    def write(self, server: Issued, *chain: Issued) -> None:
        server.write(self.folder, "server", *chain)
        self.issued.write(self.folder, "root")

    def server(self, **fields: Any) -> None:
        self.write(issue("localhost", self.issued, **{"hosts": BOTH_HOSTS, "usage": [SERVER], **fields}))


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(issue("lab", ca=True), tmp_path)


def our_own(root: Root) -> None:
    """As `clipcast ca issue` makes it."""
    Authority.create(root.folder / "ca", "lab").issue("server", BOTH_HOSTS)
    for name in ("server.pem", "server.key"):
        (root.folder / name).write_bytes((root.folder / "ca" / name).read_bytes())
    (root.folder / "root.pem").write_bytes((root.folder / "ca" / "ca.pem").read_bytes())


def of_another(root: Root, name: str) -> None:
    server = issue("localhost", issue(name, ca=True), hosts=BOTH_HOSTS, usage=[SERVER])
    root.write(server)


def with_a_chain(root: Root, *, complete: bool = True, ca: bool = True) -> None:
    middle = issue("middle", root.issued, ca=ca)
    server = issue("localhost", middle, hosts=BOTH_HOSTS, usage=[SERVER])
    root.write(server, *([middle] if complete else []))


def of_an_expired_authority(root: Root) -> None:
    old = Root(issue("lab", ca=True, valid=EXPIRED), root.folder)
    old.server()


NOT_FROM = "is not from the authority in `ca_file`"
OTHER_NAMES = "is for other names"
THEIRS: dict[str, tuple[str | None, str, Callable[[Root], None]]] = {
    "a broker's certificate of ours, by address": (LET_IN, HOST, our_own),
    "a broker's certificate of ours, by name": (LET_IN, "mqtts://localhost:{port}", our_own),
    "a broker's certificate of another kind of authority": (LET_IN, HOST, lambda root: root.server()),
    "a broker with the certificates between": (LET_IN, HOST, with_a_chain),
    "a broker without the certificates between": (NOT_FROM, HOST, lambda root: with_a_chain(root, complete=False)),
    "a broker's certificate issued by who is no authority": (
        "cannot be trusted",
        HOST,
        lambda root: with_a_chain(root, ca=False),
    ),
    "a broker's expired certificate": ("has expired: set the clock", HOST, lambda root: root.server(valid=EXPIRED)),
    "a broker's certificate of an expired authority": ("has expired: set the clock", HOST, of_an_expired_authority),
    "a broker's certificate that is not valid yet": ("begins in the future", HOST, lambda root: root.server(valid=FUTURE)),
    "a broker's certificate of another authority": (NOT_FROM, HOST, lambda root: of_another(root, "other")),
    "a broker's certificate of another one of the same name": (NOT_FROM, HOST, lambda root: of_another(root, "lab")),
    "a broker's certificate signed by itself": (
        NOT_FROM,
        HOST,
        lambda root: root.write(issue("localhost", hosts=BOTH_HOSTS, usage=[SERVER])),
    ),
    "a broker's certificate for another host": (OTHER_NAMES, HOST, lambda root: root.server(hosts=["labserver"])),
    "a broker's certificate for the name, by address": (OTHER_NAMES, HOST, lambda root: root.server(hosts=["localhost"])),
    "a broker's certificate for the address, by name": (
        OTHER_NAMES,
        "mqtts://localhost:{port}",
        lambda root: root.server(hosts=["127.0.0.1"]),
    ),
    "a broker's certificate with its host in the common name alone": (
        OTHER_NAMES,
        "mqtts://localhost:{port}",
        lambda root: root.server(hosts=()),
    ),
    "a client's certificate as the broker's": ("is no server's", HOST, lambda root: root.server(usage=[CLIENT])),
}


@pytest.mark.parametrize("case", THEIRS)
def test_s1_a_client_trusts_its_broker_and_no_other(case: str, root: Root) -> None:
    expected, url, prepare = THEIRS[case]
    prepare(root)
    with mosquitto_with(root.folder) as port:
        judge(case, expected, attempt(url=url.format(port=port), ca_file=root.folder / "root.pem"))


def test_s1_a_broker_of_no_named_authority_is_not_trusted(root: Root) -> None:
    root.server()
    with mosquitto_with(root.folder) as port:
        judge("no ca_file", NOT_FROM, attempt(url=HOST.format(port=port)))
        (root.folder / "half.pem").write_bytes((root.folder / "root.pem").read_bytes()[:200])
        said = attempt(url=HOST.format(port=port), ca_file=root.folder / "half.pem")
        judge("half a file as ca_file", "half.pem cannot be read", said)
        said = attempt(url=HOST.format(port=port), ca_file=root.folder / "none.pem")
        judge("a ca_file that is not there", "none.pem cannot be read", said)


WEAK = "@SECLEVEL=0:ALL:aNULL"
OLD: dict[str, tuple[str | None, str, str, Any]] = {
    "a broker that speaks TLS 1.2 at most": ("speaks only older versions of TLS", "1.3", "DEFAULT", None),
    "the same, allowed by the settings": (LET_IN, "1.2", "DEFAULT", None),
    "a broker without forward secrecy": ("no cipher in common", "1.2", "AES128-GCM-SHA256:@SECLEVEL=0", 2048),
    "a broker with ciphers of SHA-1": ("no cipher in common", "1.2", "ECDHE-RSA-AES128-SHA:@SECLEVEL=0", 2048),
    "a broker without a certificate": ("no cipher in common", "1.2", "aNULL:@SECLEVEL=0", None),
    "a broker's key of 1024 bits": ("too weak", "1.2", WEAK, 1024),
}


@pytest.mark.parametrize("case", OLD)
def test_s1_a_client_speaks_to_no_broker_whose_tls_is_weak(case: str, root: Root) -> None:
    expected, version, ciphers, bits = OLD[case]
    root.server(**({"key": rsa.generate_private_key(65537, bits)} if bits else {}))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_ciphers(ciphers)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(root.folder / "server.pem", root.folder / "server.key")
    with server_with(context) as port:
        said = attempt(url=HOST.format(port=port), ca_file=root.folder / "root.pem", tls_version=version)
        judge(case, expected, said)


def test_s1_tls_to_a_port_without_it_says_so(mosquitto: Callable[..., str], root: Root) -> None:
    root.server()
    url = mosquitto().replace("mqtt://", "mqtts://")
    judge("TLS to a port without it", "does not speak TLS", attempt(url=url, ca_file=root.folder / "root.pem"))


def test_s1_nobody_at_the_port(root: Root) -> None:
    root.server()
    said = attempt(url=f"mqtts://127.0.0.1:{a_free_port()}", ca_file=root.folder / "root.pem")
    judge("nobody at the port", "Check that it runs there", said)


def test_s1_the_score(score: Callable[..., None]) -> None:
    """Comes last, and counts what the cases above have found."""
    if not outcomes:
        pytest.skip("the cases were not run")
    wrong = {case: said for case, (_, said) in outcomes.items() if said != "right"}
    score("S1", "cases of TLS and certificates", len(outcomes), "cases", ">= 24", passed=len(outcomes) >= 24)
    accepts = sum(said == "wrong accept" for said in wrong.values())
    score("S1", "wrong accepts", accepts, "", "0", passed=not accepts)
    score("S1", "wrong refusals, or without their cause", len(wrong) - accepts, "", "0", passed=len(wrong) == accepts)
