"""What this machine says of itself: processor, instruction sets, cores, system.

Needs the standard library only: it is part of a bundle's runner, which works where Netwright is not installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

# Instruction sets that decide which kernels a runtime takes; virtual machines share one model name across several.
_INSTRUCTION_SETS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "amx_tile", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def describe_machine() -> dict[str, str | int]:
    """Processor, instruction sets, cores and system, by the names that they have in `Device.describe`."""
    return {
        "cpu": _cpu_model(),
        "instruction_sets": _instruction_sets(),
        "cores": cores(),
        "os": f"{platform.system()} {platform.machine()}",
    }


def fingerprint_of(description: Mapping[str, str | int]) -> str:
    """Hex digest over a description: equal on the same machine with the same runtime and settings."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


@cache
def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _cpuinfo() -> dict[str, str]:
    """Fields of the first processor in Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        block = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu_model() -> str:
    info = _cpuinfo()
    if "model name" in info:
        numbers = [f"{key} {info[key]}" for key in ("cpu family", "model", "stepping") if key in info]
        return f"{info['model name']} ({', '.join(numbers)})"
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        if text:
            return text
    return info.get("CPU part") or platform.processor() or platform.machine()


def _instruction_sets() -> str:
    flags = set((_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split())
    return " ".join(name for name in _INSTRUCTION_SETS if name in flags)
