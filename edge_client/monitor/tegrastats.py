"""Readings from a line of NVIDIA's `tegrastats`, word by word: its shape differs from release to release."""

from __future__ import annotations

import re
import subprocess

from edge_client.monitor.readings import Readings

RAM = re.compile(r"\bRAM (\d+)/(\d+)MB")
SWAP = re.compile(r"\bSWAP (\d+)/\d+MB")
GPU = re.compile(r"\bGR3D_FREQ (\d+)%")
TEMPERATURE = re.compile(r"\b([A-Za-z]\w*)@(-?\d+(?:\.\d+)?)C\b")
POWER = re.compile(r"\b(VDD_IN|POM_5V_IN|VIN) (\d+)(?:mW)?/\d+(?:mW)?")
TIMEOUT_S = 3.0


def parse_tegrastats(line: str) -> Readings:
    """Return what a line says; what it does not say, or says in another way, is None."""
    ram, swap, gpu, power = (pattern.search(line) for pattern in (RAM, SWAP, GPU, POWER))
    temperatures = {name: float(value) for name, value in TEMPERATURE.findall(line)}
    return Readings(
        temperatures_c={name: value for name, value in temperatures.items() if -40 <= value <= 150},
        power_w=int(power[2]) / 1000 if power else None,
        gpu_load=int(gpu[1]) / 100 if gpu else None,
        memory_available_mib=int(ram[2]) - int(ram[1]) if ram else None,
        memory_total_mib=int(ram[2]) if ram else None,
        swap_used_mib=int(swap[1]) if swap else None,
    )


def read_tegrastats(command: str = "tegrastats") -> Readings:
    """Run it for one line; a machine that has none, or one that says nothing in time, gives empty readings."""
    try:
        process = subprocess.Popen(
            [command, "--interval", "500"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return Readings()
    with process:
        try:
            line = _first_line(process)
        finally:
            process.kill()
    return parse_tegrastats(line)


def _first_line(process: subprocess.Popen[str]) -> str:
    import selectors

    assert process.stdout is not None
    with selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if ready.select(TIMEOUT_S) else ""
