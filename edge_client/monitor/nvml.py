"""Readings through NVIDIA's management library, where its Python binding is installed and the driver knows it.

On Orin it says next to nothing (its GPU driver is another); on Thor and on servers it does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from edge_client.monitor.readings import Readings


def read_nvml() -> Readings:
    """Return what the first GPU says; without binding, driver or GPU nothing."""
    try:
        import pynvml
    except ImportError:
        return Readings()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return Readings()
    try:
        return _first_gpu(pynvml)
    except pynvml.NVMLError:
        return Readings()
    finally:
        pynvml.nvmlShutdown()


def _first_gpu(nvml: Any) -> Readings:
    gpu = nvml.nvmlDeviceGetHandleByIndex(0)
    asked: dict[str, float] = {}
    questions: dict[str, Callable[[], Any]] = {
        "celsius": lambda: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "milliwatts": lambda: nvml.nvmlDeviceGetPowerUsage(gpu),
        "percent": lambda: nvml.nvmlDeviceGetUtilizationRates(gpu).gpu,
        "mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_GRAPHICS),
    }
    for name, ask in questions.items():
        with contextlib.suppress(nvml.NVMLError):  # "not supported", one by one
            asked[name] = float(ask())
    return Readings(
        temperatures_c={"gpu": asked["celsius"]} if "celsius" in asked else {},
        power_w=asked["milliwatts"] / 1000 if "milliwatts" in asked else None,
        gpu_load=asked["percent"] / 100 if "percent" in asked else None,
        gpu_mhz=asked.get("mhz"),
    )
