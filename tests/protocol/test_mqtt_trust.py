"""Who may connect: passwords, certificates, authorities; each refusal says why."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import ssl
import threading
from base64 import b64encode

import pytest
import trustme

from protocol.bus import Connected, Delivery, Publish, Subscribe
from protocol.errors import BusError
from protocol.mqtt import MqttBus
from protocol.settings import BrokerSettings

# paho drops the socket of a failed TLS handshake without closing it; the garbage collector does.
paho_leaves_socket = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <ssl.SSLSocket:pytest.PytestUnraisableExceptionWarning"
)


def mosquitto_password(name: str, password: str) -> str:
    """Return a line as mosquitto_passwd writes it: PBKDF2 of SHA-512."""
    salt = os.urandom(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, 101)
    return f"{name}:$7$101${b64encode(salt).decode()}${b64encode(digest).decode()}\n"


@pytest.fixture
def guarded(mosquitto, tmp_path) -> str:
    """URL of a Mosquitto that knows the user `me` with the password `secret`."""
    (tmp_path / "passwords").write_text(mosquitto_password("me", "secret"))
    return mosquitto(f"password_file {tmp_path / 'passwords'}", "user root")


@pytest.fixture
def certificates(tmp_path):
    """Write an authority, a server's and a client's certificate to files."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, certificate in (("server", authority.issue_cert("127.0.0.1")), ("client", authority.issue_cert("a"))):
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    return tmp_path


@pytest.fixture
def tls(mosquitto, certificates):
    """Start a Mosquitto that speaks TLS."""

    def start(*lines: str) -> str:
        listener = [f"certfile {certificates}/server.pem", f"keyfile {certificates}/server.key", *lines]
        return mosquitto("user root", listener="\n".join(listener)).replace("mqtt://", "mqtts://")

    return start


def open_bus(url: str, **settings) -> MqttBus:
    return MqttBus.open(BrokerSettings(url=url, **{"connect_timeout_s": 5.0} | settings), "a")


def assert_carries(bus: MqttBus) -> None:
    try:
        assert isinstance(bus.receive(10.0), Connected)
        bus.do(Subscribe("t"))
        bus.do(Publish("t", b"x"))
        assert bus.receive(10.0) == Delivery("t", b"x")
    finally:
        bus.close()


def test_the_right_password_is_let_in(guarded, tmp_path):
    (tmp_path / "password").write_text("secret\n")
    assert_carries(open_bus(guarded, username="me", password_file=tmp_path / "password"))


def test_a_wrong_password_is_refused_with_the_brokers_reason(guarded, tmp_path):
    (tmp_path / "password").write_text("guess\n")
    with pytest.raises(BusError, match=r"Not authorized|Bad user name or password"):
        open_bus(guarded, username="me", password_file=tmp_path / "password", connect_timeout_s=2.0)


def test_a_password_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(BusError, match=r"credentials cannot be read: .*no-password"):
        open_bus("mqtt://127.0.0.1", username="me", password_file=tmp_path / "no-password")


def test_a_broker_of_a_known_authority_is_trusted(tls, certificates):
    assert_carries(open_bus(tls(), ca_file=certificates / "ca.pem"))


@paho_leaves_socket
def test_a_broker_of_another_authority_is_not_trusted(tls, tmp_path):
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(BusError, match=r"mqtts://.*certificate verify failed"):
        open_bus(tls(), ca_file=tmp_path / "other.pem", connect_timeout_s=1.0)


@paho_leaves_socket
def test_a_broker_with_a_certificate_for_another_host_is_not_trusted(tls, certificates):
    with pytest.raises(BusError, match=r"certificate verify failed.*localhost"):
        open_bus(tls().replace("127.0.0.1", "localhost"), ca_file=certificates / "ca.pem", connect_timeout_s=1.0)


def test_a_client_certificate_opens_a_broker_that_asks_for_one(tls, certificates):
    url = tls(f"cafile {certificates}/ca.pem", "require_certificate true")
    own = {"cert_file": certificates / "client.pem", "key_file": certificates / "client.key"}
    assert_carries(open_bus(url, ca_file=certificates / "ca.pem", **own))


def test_a_broker_that_asks_for_a_client_certificate_refuses_whoever_has_none(tls, certificates):
    url = tls(f"cafile {certificates}/ca.pem", "require_certificate true")
    with pytest.raises(BusError, match=r"cannot reach the broker at mqtts://"):
        open_bus(url, ca_file=certificates / "ca.pem", connect_timeout_s=2.0)


@pytest.fixture
def old_server(certificates):
    """Port of a server that speaks TLS 1.2 at most, and the versions that were agreed on."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificates / "server.pem", certificates / "server.key")
    agreed: list[str | None] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                secured = context.wrap_socket(connection, server_side=True)
                agreed.append(secured.version())
                secured.close()

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1], agreed
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)


@paho_leaves_socket
def test_a_broker_that_speaks_tls_1_2_at_most_is_refused_unless_the_settings_allow_it(old_server, certificates):
    port, agreed = old_server
    url, how = f"mqtts://127.0.0.1:{port}", {"ca_file": certificates / "ca.pem", "connect_timeout_s": 2.0}
    with pytest.raises(BusError, match=r"(?i)protocol.version"):
        open_bus(url, **how)
    assert agreed == []
    with pytest.raises(BusError):  # it speaks no MQTT
        open_bus(url, **how, tls_version="1.2")
    assert set(agreed) == {"TLSv1.2"}


@pytest.mark.parametrize("content", [None, "this is no certificate"])
def test_an_authority_file_that_cannot_be_read_is_refused_before_connecting(tmp_path, content):
    path = tmp_path / "ca.pem"
    if content:
        path.write_text(content)
    with pytest.raises(BusError, match=r"credentials cannot be read"):
        open_bus("mqtts://127.0.0.1", ca_file=path)
