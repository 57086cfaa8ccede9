"""What a record says of the machine and the code: versions, device, git, memory."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import sysconfig
import tomllib
import traceback
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hadamard_toolkit.paths import CHECKOUT, in_checkout

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy", "pandas")


def toolkit_version() -> str:
    """The version of this library, also when it runs from a checkout that was never installed."""
    try:
        return metadata.version("hadamard_toolkit")
    except metadata.PackageNotFoundError:
        project = CHECKOUT / "pyproject.toml"
        if not project.is_file():
            return "unknown"
        return str(tomllib.loads(project.read_text("utf-8"))["project"]["version"])


__version__ = toolkit_version()


def versions() -> dict[str, str]:
    """Versions of Python, of this library and of the packages that decide a result; read without importing them."""
    installed = {"python": platform.python_version(), "hadamard_toolkit": toolkit_version()}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "missing"
    return installed


@cache
def git_state() -> dict[str, Any] | None:
    """Commit of the checkout and whether tracked files differ from it; None for an installed package."""
    if not in_checkout():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CHECKOUT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def system() -> dict[str, Any]:
    """Operating system, machine and the cores that this process may use."""
    return {"platform": platform.platform(), "machine": platform.machine(), "cores": usable_cores()}


def usable_cores() -> int:
    """Cores this process may run on, which in a container or under taskset are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_device(device: torch.device) -> dict[str, Any]:
    """Type and product name of a torch device, and the threads torch computes with on a CPU."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {"device": device.type, "device_name": name, "threads": torch.get_num_threads()}


@cache
def cpu_name() -> str:
    """Product name of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def reset_peak_memory() -> None:
    """Start a new measurement of accelerator memory."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """Peak bytes: `accelerator_bytes` since `reset_peak_memory`, `process_bytes` (resident) since the process began."""
    import torch

    peak: dict[str, int] = {}
    if torch.cuda.is_available():
        peak["accelerator_bytes"] = torch.cuda.max_memory_allocated()
    if sys.platform != "win32":
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
        peak["process_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def describe_error(error: BaseException) -> dict[str, str]:
    """Class, message and traceback of an error, with no absolute path of this machine in them."""
    frames = [
        f"{_portable(f.filename)}:{f.lineno} in {f.name}" for f in traceback.extract_tb(error.__traceback__)
    ]
    return {"error": type(error).__name__, "message": _portable(str(error)), "traceback": "\n".join(frames)}


def _portable(text: str) -> str:
    """`text` with the folders of the checkout, the environment and the user's home cut off the paths in it."""
    roots = {str(CHECKOUT), *(sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))}
    for root in sorted(roots, key=len, reverse=True):
        text = text.replace(f"{root}{os.sep}", "")
    text = text.replace(str(Path.home()), "~")
    return Path(text).name if os.path.isabs(text) and os.path.exists(text) else text
