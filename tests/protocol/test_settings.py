"""Settings files: every mistake is named with its place."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict

from protocol.settings import BrokerSettings, SettingsError, load_settings


class Example(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    rounds: int = 1
    broker: BrokerSettings = BrokerSettings()


@pytest.fixture
def read(tmp_path):
    def read(text: str | bytes) -> Example:
        path = tmp_path / "example.toml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_settings(path, Example, "clipcast example init")

    return read


def test_a_good_file_is_read(read):
    settings = read('name = "a"\n[broker]\nurl = "mqtts://example.org"\nusername = "me"\n')
    assert (settings.name, settings.rounds, settings.broker.username) == ("a", 1, "me")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('name = "a"\nnmae = "b"', "unknown key 'nmae'"),
        ('name = "a"\n[broker]\nulr = "mqtt://x"', "unknown key 'broker.ulr'"),
        ("rounds = 2", "key 'name' is missing"),
        ('name = "a"\nrounds = "many"', "rounds: .*integer"),
        ('name = "a"\n[broker]\nkeepalive_s = 1', "broker.keepalive_s: .*5"),
        ('name = "a"\n[broker]\nconnect_timeout_s = 0', "broker.connect_timeout_s"),
        (
            'name = "a"\n[broker]\nurl = "mqtt://x"\nca_file = "ca.pem"',
            "broker: ca_file and cert_file have no effect on mqtt://",
        ),
        ('name = "a"\n[broker]\nurl = "mqtts://x"\ncert_file = "c.pem"', "broker: cert_file and key_file go together"),
        ("name = ", "cannot be read as TOML"),
        ('name = "a"\nname = "b"', "cannot be read as TOML"),
        (b'name = "\xff"', "cannot be read as TOML"),
    ],
)
def test_a_mistake_is_named(read, text, problem):
    with pytest.raises(SettingsError, match=rf"(?s)example\.toml:.*{problem}"):
        read(text)


def test_every_mistake_of_a_file_is_named_at_once(read):
    with pytest.raises(SettingsError) as caught:
        read("nmae = 1\nrounds = 'x'")
    assert len(str(caught.value).splitlines()) == 4


def test_a_missing_file_names_the_command_that_writes_one(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.toml: no such file. `clipcast example init` writes one"):
        load_settings(tmp_path / "none.toml", Example, "clipcast example init")


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path, Example, "clipcast example init")


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "localhost:1883", "http://x", "mqtt://", "mqtt://:1883", "mqtt://x/topic", "mqtt:x", "ws://x"],
)
def test_a_url_that_is_no_brokers_is_refused(url):
    with pytest.raises(ValueError, match="is not mqtt://HOST"):
        BrokerSettings(url=url)


@pytest.mark.parametrize(
    "url", ["mqtt://x:99999", "mqtt://x:port", "mqtt://me:secret@x", "mqtt://x?keepalive=5", "mqtt://x#f"]
)
def test_a_url_with_parts_that_would_be_ignored_is_refused(url):
    with pytest.raises(ValueError, match="is not mqtt://HOST"):
        BrokerSettings(url=url)


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://localhost", "localhost", 1883, False),
        ("mqtt://10.0.0.1:2000/", "10.0.0.1", 2000, False),
        ("mqtts://broker.example.org", "broker.example.org", 8883, True),
        ("mqtts://[::1]:9000", "::1", 9000, True),
    ],
)
def test_a_url_gives_host_port_and_encryption(url, host, port, tls):
    broker = BrokerSettings(url=url)
    assert (broker.host, broker.port, broker.tls) == (host, port, tls)


def test_relative_paths_of_the_brokers_files_are_relative_to_the_settings_file(read, tmp_path):
    broker = read(
        'name = "a"\n[broker]\nurl = "mqtts://x"\npassword_file = "password"\nca_file = "tls/ca.pem"\n'
        'cert_file = "tls/cert.pem"\nkey_file = "/abs/key.pem"\n'
    ).broker
    assert broker.password_file == tmp_path / "password"
    assert broker.ca_file == tmp_path / "tls/ca.pem"
    assert broker.cert_file == tmp_path / "tls/cert.pem"
    assert str(broker.key_file) == "/abs/key.pem"
