"""Whose key counts: registration at first sight or by hand, revocation while a coordinator is at work."""

from __future__ import annotations

import pytest

from coordinator.state.devices import KEEP_S, REFRESH_S, Devices
from coordinator.state.registry import Device
from coordinator.state.store import Store
from protocol.errors import Refused

ONE, OTHER = "1" * 43, "2" * 43


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "state")
    store.prepare()
    yield store
    store.close()


def verdict(devices, sender, key):
    with pytest.raises(Refused) as caught:
        devices.check(sender, key)
    return caught.value.verdict


def test_an_open_federation_registers_a_new_device_once(store):
    devices = Devices(store, "open")
    devices.check("ann", ONE)
    devices.admit("ann", ONE)
    devices.admit("ann", OTHER)
    assert store.registry.devices() == {"ann": Device(ONE, revoked=False)}
    assert verdict(devices, "ann", OTHER) == "wrong-key"
    assert verdict(Devices(store, "open"), "ann", OTHER) == "wrong-key"  # after a restart, too


def test_a_new_device_costs_no_look_at_all_the_others(store, monkeypatch):
    devices = Devices(store, "open")
    monkeypatch.setattr(store.registry, "devices", lambda: pytest.fail("read the whole table"))
    for number in range(3):
        devices.admit(f"device-{number}", ONE)
    assert verdict(devices, "device-1", OTHER) == "wrong-key"


def test_devices_that_come_at_once_are_written_together(store, monkeypatch):
    clock, written = Clock(), []
    devices = Devices(store, "open", clock)
    register = store.registry.register
    monkeypatch.setattr(store.registry, "register", lambda found: written.append(len(found)) or register(found))
    for number in range(100):
        devices.admit(f"device-{number}", ONE)
        assert verdict(devices, f"device-{number}", OTHER) == "wrong-key"
    clock.now += KEEP_S
    assert devices.refresh() == set()
    assert written == [1, 99]
    devices.admit("late", ONE)
    devices.keep()
    devices.keep()
    assert written == [1, 99, 1]
    assert len(store.registry.devices()) == 101


def test_a_name_that_was_registered_beside_a_working_coordinator_keeps_its_key(store, tmp_path):
    devices = Devices(store, "open")
    Store(tmp_path / "state").registry.add("ann", ONE)
    devices.admit("ann", OTHER)
    devices.check("ann", ONE)
    assert verdict(devices, "ann", OTHER) == "wrong-key"
    assert store.registry.devices() == {"ann": Device(ONE, revoked=False)}


def test_with_registration_only_those_who_were_added_come_in(store, tmp_path):
    devices = Devices(store, "registered")
    assert verdict(devices, "ann", ONE) == "unknown-device"
    Store(tmp_path / "state").registry.add("ann", ONE)
    Devices(store, "registered").check("ann", ONE)


def test_a_device_that_is_revoked_beside_a_working_coordinator_is_cut_off(store, tmp_path):
    clock = Clock()
    devices = Devices(store, "open", clock)
    for name in ("ann", "bob"):
        devices.admit(name, ONE)
    operator = Store(tmp_path / "state")
    assert operator.registry.revoke("ann")
    assert not operator.registry.revoke("eve")
    assert devices.refresh() == set()  # not yet
    clock.now += REFRESH_S
    assert devices.refresh() == {"ann"}
    assert devices.refresh() == set()
    assert verdict(devices, "ann", ONE) == "revoked"
    devices.check("bob", ONE)
    operator.registry.add("ann", OTHER)
    clock.now += REFRESH_S
    assert devices.refresh() == {"ann"}
    devices.check("ann", OTHER)
    assert verdict(devices, "ann", ONE) == "wrong-key"


def test_a_quarantined_device_is_shut_out_over_restarts_until_it_is_added_again(store, tmp_path):
    clock = Clock()
    devices = Devices(store, "open", clock)
    devices.admit("ann", ONE)
    devices.quarantine("ann")
    assert store.registry.devices() == {"ann": Device(ONE, revoked=False, quarantined=True)}
    assert verdict(devices, "ann", ONE) == verdict(Devices(store, "open"), "ann", ONE) == "quarantined"
    Store(tmp_path / "state").registry.add("ann", ONE)
    clock.now += REFRESH_S
    assert devices.refresh() == {"ann"}
    devices.check("ann", ONE)
