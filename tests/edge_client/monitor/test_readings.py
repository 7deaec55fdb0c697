"""What boards say of themselves, from files and lines in the shapes that are documented for JetPack 4 to 7."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.monitor.monitor import Monitor, read_jtop
from edge_client.monitor.nvml import read_nvml
from edge_client.monitor.readings import Readings
from edge_client.monitor.sysfs import read_sysfs
from edge_client.monitor.tegrastats import parse_tegrastats, read_tegrastats

ORIN = {
    "proc/meminfo": "MemTotal:  7802880 kB\nMemAvailable:  4194304 kB\nSwapTotal: 3901440 kB\nSwapFree: 3801440 kB\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "51250\n",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",
    "sys/class/thermal/thermal_zone1/temp": "-256000\n",
    "sys/class/thermal/thermal_zone8/type": "tj-thermal\n",
    "sys/class/thermal/thermal_zone8/temp": "52500\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/in1_label": "VDD_IN\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/in1_input": "4968\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/curr1_input": "1000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/in2_label": "VDD_CPU_GPU_CV\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/in2_input": "4968\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/curr2_input": "500\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/in7_label": "NC\n",
    "sys/class/devfreq/17000000.gpu/device/of_node/name": "gpu\0",
    "sys/class/devfreq/17000000.gpu/device/load": "350\n",
    "sys/class/devfreq/17000000.gpu/cur_freq": "612000000\n",
    "sys/class/hwmon/hwmon2/name": "soctherm_oc\n",
    "sys/class/hwmon/hwmon2/oc1_event_cnt": "3\n",
    "sys/class/hwmon/hwmon2/oc3_event_cnt": "4\n",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=25W >\n",
    "var/lib/nvpmodel/status": "pmode:0001\n",
}
NANO = {
    "sys/class/thermal/thermal_zone0/type": "CPU-therm\n",
    "sys/class/thermal/thermal_zone0/temp": "40500\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/rail_name_0": "POM_5V_IN\n",
    "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input": "2345\n",
    "sys/devices/gpu.0/load": "990\n",
}
AGX = {
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/in1_label": "VDD_GPU_SOC\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/in1_input": "20000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon4/curr1_input": "100\n",
    "sys/bus/i2c/devices/1-0041/hwmon/hwmon5/in2_label": "VDDQ_VDD2_1V8AO\n",
    "sys/bus/i2c/devices/1-0041/hwmon/hwmon5/in2_input": "20000\n",
    "sys/bus/i2c/devices/1-0041/hwmon/hwmon5/curr2_input": "50\n",
}
ORIN_LINE = (
    "RAM 4011/8138MB (lfb 8x4MB) SWAP 12/4068MB (cached 0MB) CPU [12%@1190,0%@1190,off,off] EMC_FREQ 0% GR3D_FREQ 35% "
    "CV0@-256C CPU@52C GPU@49.5C VDD_IN 5012mW/4998mW VDD_CPU_GPU_CV 700mW/700mW"
)
THOR_LINE = (
    "04-21-2026 15:50:52 RAM 105265/125772MB (lfb 34x4MB) CPU [0%@972,1%@972] EMC_FREQ 0%@2750 GR3D_FREQ @[314,314,314] "
    "cpu@37.343C tj@38.875C VDD_GPU 1962mW/1962mW VIN 19780mW/19780mW"
)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_an_orins_files(tmp_path):
    found = read_sysfs(write(tmp_path, ORIN))
    assert found.temperatures_c == {"cpu-thermal": 51.25, "tj-thermal": 52.5}
    assert found.hottest_c == 52.5
    assert found.power_w == pytest.approx(4.968)
    assert (found.gpu_load, found.gpu_mhz) == (0.35, 612.0)
    assert (found.memory_total_mib, found.memory_available_mib, found.swap_used_mib) == (7620, 4096, 98)
    assert found.over_current_events == 7
    assert found.power_mode == "25W"


def test_a_nanos_files(tmp_path):
    found = read_sysfs(write(tmp_path, NANO))
    assert (found.power_w, found.gpu_load, found.temperatures_c) == (2.345, 0.99, {"CPU-therm": 40.5})


def test_without_a_rail_of_the_whole_board_the_rails_are_summed(tmp_path):
    assert read_sysfs(write(tmp_path, AGX)).power_w == pytest.approx(3.0)


def test_a_root_with_nothing_in_it_says_nothing(tmp_path):
    found = read_sysfs(tmp_path)
    assert found == Readings()
    assert found.hottest_c is None


@given(st.dictionaries(st.sampled_from(sorted(ORIN | NANO | AGX)), st.text(max_size=20)))
def test_files_with_gibberish_are_no_error(tmp_path_factory, texts):
    read_sysfs(write(tmp_path_factory.mktemp("root"), texts))


def test_this_very_machine_says_how_much_memory_it_has():
    found = read_sysfs()
    assert 0 < found.memory_available_mib <= found.memory_total_mib


def test_an_orins_line():
    found = parse_tegrastats(ORIN_LINE)
    assert found.temperatures_c == {"CPU": 52.0, "GPU": 49.5}
    assert (found.power_w, found.gpu_load) == (5.012, 0.35)
    assert (found.memory_available_mib, found.memory_total_mib, found.swap_used_mib) == (4127, 8138, 12)


def test_a_thors_line_has_no_percentage_of_the_gpu():
    found = parse_tegrastats(THOR_LINE)
    assert found.temperatures_c == {"cpu": 37.343, "tj": 38.875}
    assert (found.power_w, found.gpu_load) == (19.78, None)


@given(st.text() | st.lists(st.sampled_from([*ORIN_LINE.split(), *THOR_LINE.split(), "@", "C"])).map(" ".join))
def test_any_line_can_be_parsed(line):
    parse_tegrastats(line)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_tegrastats_is_run_for_one_line_and_ended(tmp_path):
    tool = script(tmp_path / "tegrastats", f"while echo '{ORIN_LINE}'; do sleep 0.01; done")
    assert read_tegrastats(tool) == parse_tegrastats(ORIN_LINE)


@pytest.mark.parametrize("text", ["exec sleep 100", "exit 1", "echo gibberish"])
def test_a_tegrastats_that_says_nothing_gives_nothing(tmp_path, monkeypatch, text):
    monkeypatch.setattr("edge_client.monitor.tegrastats.TIMEOUT_S", 0.2)
    assert read_tegrastats(script(tmp_path / "tegrastats", text)) == Readings()


def test_without_tegrastats_there_is_nothing(tmp_path):
    assert read_tegrastats(str(tmp_path / "tegrastats")) == Readings()


def test_what_comes_first_is_believed_and_others_are_asked_for_the_rest_only():
    asked = []

    def reader(name, readings):
        def read():
            asked.append(name)
            return readings

        return read

    first = Readings({"cpu": 50.0}, memory_total_mib=8000)
    knows = Readings({"gpu": 60.0}, 5.0, memory_total_mib=9000)
    monitor = Monitor(reader("first", first), [reader("nothing", Readings()), reader("knows", knows), reader("last", knows)])
    assert monitor.read() == Readings({"cpu": 50.0}, 5.0, memory_total_mib=8000)
    assert asked == ["first", "nothing", "knows"]
    monitor.read()
    assert asked[3:] == ["first", "knows"]


def driver(works: bool) -> SimpleNamespace:
    """A driver that knows of temperature and clock, and of nothing else: what Thor's is reported to be like."""

    class NVMLError(Exception):
        pass

    def unsupported(*_: object):
        raise NVMLError

    ended: list[bool] = []
    return SimpleNamespace(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_GRAPHICS=0, ended=ended,
        nvmlInit=(lambda: None) if works else unsupported,
        nvmlShutdown=lambda: ended.append(works),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTemperature=lambda _gpu, _kind: 41,
        nvmlDeviceGetClockInfo=lambda _gpu, _kind: 1575,
        nvmlDeviceGetPowerUsage=unsupported,
        nvmlDeviceGetUtilizationRates=unsupported,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("module", "found"),
    [(None, Readings()), (driver(works=False), Readings()), (driver(works=True), Readings({"gpu": 41.0}, gpu_mhz=1575.0))],
    ids=["not-installed", "no-driver", "half-a-driver"],
)
def test_nvml_is_asked_tolerantly(monkeypatch, module, found):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert read_nvml() == found
    if module is not None:
        assert module.ended == ([True] if found != Readings() else [])


def test_without_jetson_stats_there_is_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "jtop", None)
    assert read_jtop() == Readings()
