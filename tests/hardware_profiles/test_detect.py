"""Which board is this? Answered below a root of our making, as the board's own files would."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_profiles.detect import detect
from hardware_profiles.profile import load

ORIN_NANO = "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0"


@pytest.fixture
def board(tmp_path: Path):
    """Write the files of a board; memory in MiB."""

    def make(compatible: str | None, memory: int | None, model: str = "") -> Path:
        tree = tmp_path / "proc" / "device-tree"
        tree.mkdir(parents=True)
        if compatible is not None:
            (tree / "compatible").write_bytes(compatible.encode())
        (tree / "model").write_bytes(model.encode() + b"\0")
        if memory is not None:
            (tmp_path / "proc" / "meminfo").write_text(f"MemTotal:   {memory * 1024 + 512} kB\nMemFree:  1000 kB\n")
        return tmp_path

    return make


@pytest.mark.parametrize("sku", ["p3767-0003", "p3767-0005", "p3767-0003-super", "p3767-0005-super"])
def test_an_orin_nano_8gb_is_recognised_by_its_device_tree_with_the_reason(board, sku):
    found = detect(board(f"nvidia,p3768-0000+{sku}\0nvidia,{sku}\0nvidia,tegra234\0", 7620))
    assert found.profile == load("jetson-orin-nano-8gb")
    assert found.certain
    assert f"nvidia,{sku}" in found.reason
    assert "7620 MiB" in found.reason


def test_an_orin_nano_whose_model_string_says_orin_nx_is_still_an_orin_nano(board):
    found = detect(board(ORIN_NANO, 7620, model="NVIDIA Jetson Orin NX Engineering Reference Developer Kit"))
    assert found.profile.name == "jetson-orin-nano-8gb"


def test_a_model_string_alone_makes_no_jetson(board):
    found = detect(board("raspberrypi,4-model-b\0brcm,bcm2711\0", 7620, model="NVIDIA Jetson Orin Nano Developer Kit"))
    assert found.profile.name == "generic-cpu"
    assert found.certain


@pytest.mark.parametrize(("memory", "name"), [(6600, "jetson-orin-nano-8gb"), (8200, "jetson-orin-nano-8gb")])
def test_the_ends_of_the_memory_range_belong_to_the_board(board, memory, name):
    assert detect(board(ORIN_NANO, memory)).profile.name == name


@pytest.mark.parametrize("memory", [3900, 6599, 8201, 15800, None])
def test_the_module_of_an_orin_nano_with_other_memory_is_a_jetson_unknown_to_us(board, memory):
    found = detect(board(ORIN_NANO, memory))
    assert found.profile.name == "generic-cpu"
    assert not found.certain


@pytest.mark.parametrize(
    "compatible",
    ["nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0", "nvidia,jetson-nano\0nvidia,tegra210\0"],
    ids=["agx-orin", "nano"],
)
def test_a_jetson_that_no_profile_describes_falls_back_loudly(board, compatible):
    found = detect(board(compatible, 30_000))
    assert found.profile == load("generic-cpu")
    assert not found.certain
    for word in ("this is a Jetson", "30000 MiB", compatible.split("\0", maxsplit=1)[0], "clipcast profiles list"):
        assert word in found.reason


def test_a_compatible_that_only_begins_like_the_boards_is_not_the_board(board):
    found = detect(board("nvidia,p3767-0005x\0nvidia,tegra234\0", 7620))
    assert (found.profile.name, found.certain) == ("generic-cpu", False)


def test_a_machine_without_a_device_tree_is_any_cpu_and_that_is_certain(board):
    found = detect(board(None, 16_000))
    assert found.profile == load("generic-cpu")
    assert found.certain
    assert "no Jetson device tree" in found.reason
    assert "16000 MiB" in found.reason


def test_a_root_with_nothing_in_it_is_any_cpu(tmp_path):
    found = detect(tmp_path)
    assert (found.profile.name, found.certain) == ("generic-cpu", True)


def test_this_very_machine_gets_a_profile_and_a_reason():
    found = detect()
    assert found.reason
    assert found.profile == load(found.profile.name)
