"""Where a result came from: chip, cores, versions, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks import products
from molex_kernels import env

ROOT = Path(__file__).parents[1]


def describe(device: torch.device) -> dict[str, Any]:
    """Facts for the report's header, as plain values."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "device": device.type,
        "chip": chip(device),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "memory_gib": round(_memory_bytes() / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cpu":
        facts |= {
            "fp32_instructions": products.instructions(torch.float32),
            "bf16_instructions": products.instructions(torch.bfloat16),
            "fp16_instructions": products.instructions(torch.float16),
        }
        if path := products.path(env.facts()):
            facts["products"] = path
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "capability": f"sm_{card.major}{card.minor}",
            "gpu_memory_gib": round(card.total_memory / 2**30),
            "matmul_precision": torch.get_float32_matmul_precision(),
        }
    return facts


def chip(device: torch.device) -> str:
    """The name of the GPU, or of the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()


def machine_slug(facts: dict[str, Any]) -> str:
    """A folder name for the machine: "nvidia-h100-80gb-hbm3", "intel-xeon-...-2-cores"."""
    name = facts["chip"] if facts["device"] == "cuda" else f"{facts['chip']} {facts['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_slug(facts: dict[str, Any]) -> str:
    """ "<date>-<commit>", for files and folders."""
    return f"{facts['date'][:10]}-{facts['commit']}"


def commit() -> str:
    """The short commit, with "-dirty" where the tree differs from it; "nocommit" outside git.

    MOLEX_COMMIT names it for a copy of the tree.
    """
    if named := os.environ.get("MOLEX_COMMIT"):
        return named
    head = _git("rev-parse", "--short=10", "HEAD")
    if not head:
        return "nocommit"
    return f"{head}-dirty" if _git("status", "--porcelain", "--untracked-files=no") else head


def available_bytes(device: torch.device) -> int:
    """Memory that a benchmark may count on."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return _memory_bytes() // 2


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        if found:
            return found.group(1).strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 8 * 2**30


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
