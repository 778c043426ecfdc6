"""The most memory that this process had in use."""

import sys
from pathlib import Path

import torch

LINUX_STATUS = Path("/proc/self/status")


def peak_memory() -> dict[str, int | None]:
    """Largest number of bytes in use since the process began; nothing is reset.

    Returns:
        "process": peak resident set size, None where the system does not tell (Windows). "cuda:0", ...: the peak of
        torch's allocator on each CUDA device that it was used on.
    """
    peaks: dict[str, int | None] = {"process": peak_process_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        on_device = {f"cuda:{i}": torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())}
        peaks |= {device: size for device, size in on_device.items() if size > 0}
    return peaks


def peak_process_bytes() -> int | None:
    """Peak resident set size of this process in bytes; None where the system does not tell."""
    if LINUX_STATUS.is_file():
        # Unlike getrusage it forgets what the process was before exec: a copy of a parent that may have been larger.
        for line in LINUX_STATUS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
