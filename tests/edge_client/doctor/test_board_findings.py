"""What a doctor says of a board, from files of our making."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from datetime import datetime, timezone
from types import SimpleNamespace

import pytest

from edge_client.doctor.board import examine_board
from edge_client.doctor.training import source
from edge_client.monitor.readings import Readings
from hardware_profiles.detect import detect
from tests.hardware_profiles import roots

NOW = datetime(2026, 12, 1, 12, 0, tzinfo=timezone.utc)
WELL = Readings(
    {"cpu": 50.0}, 5.0, memory_available_mib=5000, memory_total_mib=7620, over_current_events=0, power_mode="25W"
)
GIB = 1024**3


@pytest.fixture
def findings(tmp_path, monkeypatch):
    def examine(root=roots.ORIN_NANO_SUPER, readings=WELL, now=NOW, swaps="", free=100 * GIB):
        where = root.write(tmp_path)
        (where / "proc" / "swaps").write_text("Filename Type Size Used Priority\n" + swaps)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        monkeypatch.setattr(sys, "version_info", SimpleNamespace(major=3, minor=10))
        found = examine_board(detect(where), readings, tmp_path / "state", now, where)
        return {finding.name: finding for finding in found}

    return examine


def test_a_board_that_is_well_has_nothing_to_mend(findings):
    found = findings()
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["platform"].measured == "JetPack 6.2 (L4T 36.4 and 36.5), L4T 36.4.3"
    assert found["power mode"].measured == "25W"


@pytest.mark.parametrize(
    ("changed", "name", "state", "words"),
    [
        ({"root": roots.NANO}, "board", "fail", "Orin"),
        ({"root": roots.NANO}, "platform", "fail", "Python is 3.6"),
        ({"root": roots.XAVIER_NX}, "board", "warn", "clipcast infer"),
        ({"root": roots.XAVIER_NX}, "platform", "warn", "Python 3.10 of your own"),
        ({"root": replace(roots.ORIN_NX_16, compatible="nvidia,tegra234\0")}, "board", "warn", "profile"),
        ({"root": replace(roots.ORIN_NX_16, tegra_release=roots.release(36, "2.0"))}, "platform", "warn", "JetPack 6.2"),
        ({"root": roots.ORIN_NANO_JP7}, "Python", "warn", "system's 3.12"),
        ({"readings": replace(WELL, power_mode=None)}, "power mode", "warn", "nvpmodel"),
        ({"readings": replace(WELL, temperatures_c={"tj": 90.0})}, "temperature", "warn", "above 85 C"),
        ({"readings": replace(WELL, temperatures_c={})}, "temperature", "unknown", ""),
        ({"readings": replace(WELL, over_current_events=2)}, "over-current", "warn", "stronger supply"),
        ({"readings": replace(WELL, over_current_events=None)}, "over-current", "unknown", ""),
        ({"readings": replace(WELL, memory_available_mib=1400)}, "memory", "warn", "multi-user.target"),
        ({"readings": replace(WELL, memory_available_mib=600)}, "memory", "fail", "multi-user.target"),
        ({"readings": replace(WELL, memory_available_mib=None)}, "memory", "unknown", ""),
        ({"swaps": "/dev/zram0 partition 1 0 5\n"}, "swap", "warn", "nvzramconfig"),
        ({"free": 2 * GIB}, "disk", "warn", "make room"),
        ({"free": GIB // 4}, "disk", "fail", "make room"),
        ({"now": datetime(1970, 1, 1, tzinfo=timezone.utc)}, "clock", "warn", "set-ntp"),
    ],
)
def test_what_is_wrong_is_named_with_its_cure(findings, changed, name, state, words):
    finding = findings(**changed)[name]
    assert finding.state == state
    assert words in finding.cure


@pytest.mark.parametrize(("root", "device"), [(roots.ORIN_NANO_SUPER, "/swapfile"), (roots.WORKSTATION, "/dev/zram0")])
def test_swap_on_a_disk_and_zram_on_a_workstation_are_fine(findings, root, device):
    assert findings(root=root, swaps=f"{device} file 1 0 5\n")["swap"].state == "ok"


def test_where_a_package_comes_from_depends_on_the_platform(tmp_path):
    orin = detect(roots.ORIN_NANO_SUPER.write(tmp_path / "6"))
    assert "jp6/cu126 bitsandbytes" in source(orin, "bitsandbytes")
    newer = detect(roots.ORIN_NANO_JP7.write(tmp_path / "7"))
    assert source(newer, "torch") == "pip install 'torch>=2.15'"
    assert "CMAKE_CUDA_ARCHITECTURES=87" in source(newer, "onnxruntime-gpu")
    assert "no torch" in source(detect(roots.NANO.write(tmp_path / "4")), "torch")
    other = replace(roots.ORIN_NANO_JP7, tegra_release=None).write(tmp_path / "x")
    assert "clipcast profiles show" in source(detect(other), "torch")


def test_a_client_on_a_board_that_only_answers_cannot_do_its_part(tmp_path):
    found = detect(roots.XAVIER_NX.write(tmp_path))
    board = next(examine_board(found, WELL, tmp_path, NOW, tmp_path, is_client=True))
    assert (board.name, board.state) == ("board", "fail")
