"""Which board is this? Answered below a root of our making, as the board's own files would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_profiles.detect import detect
from hardware_profiles.profile import load, names
from tests.hardware_profiles import roots
from tests.hardware_profiles.roots import Root


@pytest.fixture
def found(tmp_path: Path):
    return lambda root: detect(root.write(tmp_path))


@pytest.mark.parametrize(
    ("root", "profile", "platform"),
    [
        (roots.NANO, "jetson-nano-4gb", "jetpack-4.6"),
        (roots.TX2, "jetson-tx2", "jetpack-4.6"),
        (roots.XAVIER_NX, "jetson-xavier-nx-8gb", "jetpack-5.1"),
        (roots.AGX_XAVIER, "jetson-agx-xavier", "jetpack-4.6"),
        (roots.ORIN_NANO_4, "jetson-orin-nano-4gb", "jetpack-6.2"),
        (roots.ORIN_NANO_SUPER, "jetson-orin-nano-8gb", "jetpack-6.2"),
        (roots.ORIN_NANO_JP7, "jetson-orin-nano-8gb", "jetpack-7.2"),
        (roots.LIAR, "jetson-orin-nano-8gb", "jetpack-6.2"),
        (roots.ORIN_NX_16, "jetson-orin-nx-16gb", "jetpack-6.2"),
        (roots.AGX_ORIN_64, "jetson-agx-orin-64gb", "jetpack-5.1"),
        (roots.THOR, "jetson-thor-t5000", "jetpack-7.0"),
        (roots.T4000, "jetson-thor-t4000", "jetpack-7.2"),
        (roots.RASPBERRY, "raspberry-pi-5", "linux"),
        (roots.WORKSTATION, "generic-cuda", "linux"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_board_is_recognised_with_its_platform(found, root, profile, platform):
    detection = found(root)
    assert (detection.profile, detection.platform.name) == (load(profile), platform)
    assert detection.certain
    assert str(root.memory_mib) in detection.reason


@pytest.mark.parametrize("sku", ["p3767-0003", "p3767-0005", "p3767-0003-super", "p3767-0005-super"])
def test_an_orin_nano_8gb_is_recognised_by_its_module_however_it_was_flashed(found, sku):
    detection = found(Root(f"nvidia,p3768-0000+{sku}\0nvidia,{sku}\0nvidia,tegra234\0", 7620))
    assert detection.profile == load("jetson-orin-nano-8gb")
    assert detection.board.is_super == sku.endswith("super")
    assert sku[:10] in detection.reason


def test_a_model_string_that_lies_is_named_and_not_believed(found):
    detection = found(roots.LIAR)
    assert "'NVIDIA Jetson Orin NX Engineering Reference Developer Kit Super'" in detection.reason
    assert "not believed" in detection.reason


def test_a_module_that_the_device_tree_does_not_name_is_known_from_what_was_flashed(found):
    assert "/etc/nv_boot_control.conf says p3834-0000" in found(roots.T4000).reason


def test_where_only_the_model_string_speaks_that_is_said(found):
    detection = found(replace(roots.ORIN_NX_16, compatible="nvidia,tegra234\0"))
    assert detection.profile.name == "jetson-orin-nx-16gb"
    assert not detection.certain
    assert "only its model string" in detection.reason


@pytest.mark.parametrize(
    "changed",
    [{"memory_mib": 30_000}, {"compatible": "nvidia,tegra194\0"}, {"model": "NVIDIA Jetson"}, {"model": None}],
    ids=["memory", "processor", "model", "no-model"],
)
def test_a_model_string_that_memory_or_processor_contradict_is_not_followed(found, changed):
    detection = found(replace(roots.ORIN_NX_16, **{"compatible": "nvidia,tegra234\0", **changed}))
    assert (detection.profile.name, detection.certain) == ("generic-cpu", False)


def test_a_model_string_alone_makes_no_jetson(found):
    detection = found(Root("raspberrypi,4-model-b\0brcm,bcm2711\0", 7620, "NVIDIA Jetson Orin Nano Developer Kit"))
    assert (detection.profile.name, detection.certain) == ("generic-cpu", True)


@pytest.mark.parametrize("memory", [6600, 8200])
def test_the_ends_of_the_memory_range_belong_to_the_board(found, memory):
    assert found(replace(roots.ORIN_NANO_JP7, memory_mib=memory)).profile.name == "jetson-orin-nano-8gb"


@pytest.mark.parametrize("memory", [3900, 6599, 8201, 15800, None])
def test_the_module_of_an_orin_nano_with_other_memory_is_a_jetson_unknown_to_us(found, memory):
    detection = found(replace(roots.ORIN_NANO_JP7, memory_mib=memory))
    assert (detection.profile.name, detection.certain) == ("generic-cpu", False)


@pytest.mark.parametrize(
    "compatible",
    ["nvidia,p3737-0000+p3701-0099\0nvidia,p3701-0099\0nvidia,tegra234\0", "nvidia,p9999-0000\0nvidia,tegra300\0"],
    ids=["other-orin", "newer"],
)
def test_a_jetson_that_no_profile_describes_falls_back_loudly(found, compatible):
    detection = found(Root(compatible, 30_000))
    assert (detection.profile.name, detection.certain) == ("generic-cpu", False)
    for word in ("this is a Jetson", "30000 MiB", compatible.split("\0", maxsplit=1)[0], "clipcast profiles list"):
        assert word in detection.reason


def test_a_compatible_that_only_begins_like_the_boards_is_not_the_board(found):
    detection = found(Root("nvidia,p3767-00059\0nvidia,tegra234\0", 7620))
    assert (detection.profile.name, detection.certain) == ("generic-cpu", False)


@pytest.mark.parametrize(
    ("root", "l4t", "mode"),
    [
        (roots.NANO, "32.7.1", ""),
        (roots.ORIN_NANO_SUPER, "36.4.3", "MAXN_SUPER"),
        (roots.ORIN_NX_16, "36.5.0", "25W"),
        (roots.THOR, "38.4.0", "120W"),
        (replace(roots.THOR, tegra_release=None, dpkg_status=(
            "Package: nvidia-l4t-cuda\nVersion: 1.0\n\nPackage: nvidia-l4t-core\nStatus: install ok installed\n"
            "Version: 38.2.1-20250910123945\n\nPackage: zlib\nVersion: 3\n")), "38.2.1", "120W"),
        (replace(roots.THOR, power_modes=None), "38.4.0", ""),
        (replace(roots.THOR, power_status="pmode:0007\n"), "38.4.0", ""),
        (replace(roots.THOR, tegra_release="gibberish"), "", "120W"),
    ],
    ids=["nano", "super", "nx", "thor", "from-packages", "no-conf", "unknown-mode", "gibberish"],
)  # fmt: skip
def test_l4t_and_the_power_modes_name_are_read(found, root, l4t, mode):
    board = found(root).board
    assert (board.l4t, board.power_mode) == (l4t, mode)


@pytest.mark.parametrize("text", [None, "", roots.release(36, "2.0"), roots.release(40, "1.0")])
def test_a_jetson_with_an_l4t_that_no_platform_describes_has_none(found, text):
    detection = found(replace(roots.ORIN_NANO_JP7, tegra_release=text))
    assert detection.profile.name == "jetson-orin-nano-8gb"
    assert detection.platform is None


def test_a_machine_without_a_device_tree_is_any_cpu_and_that_is_certain(found):
    detection = found(Root(None, 16_000))
    assert (detection.profile.name, detection.certain) == ("generic-cpu", True)
    assert "no Jetson device tree" in detection.reason


def test_a_root_with_nothing_in_it_is_any_cpu(tmp_path):
    detection = detect(tmp_path)
    assert (detection.profile.name, detection.certain) == ("generic-cpu", True)


def test_this_very_machine_gets_a_profile_and_a_reason():
    detection = detect()
    assert detection.reason
    assert detection.profile == load(detection.profile.name)


@given(
    st.fixed_dictionaries(
        {name: st.none() | st.text(max_size=80) for name in Root.__dataclass_fields__ if name != "memory_mib"}
    )
)
def test_whatever_the_files_hold_there_is_a_profile(tmp_path_factory, texts):
    detection = detect(Root(**{"memory_mib": 100, **texts}).write(tmp_path_factory.mktemp("root")))
    assert detection.profile.name in names()
