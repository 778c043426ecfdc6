"""How fast this machine multiplies, reads and writes: measured in less than a second, or said by the user."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.optimize import linear_sum_assignment

SECONDS = 0.08  # that each measurement takes, about
FILE_BYTES = 2**25


@dataclass(frozen=True)
class MachineRates:
    """Rates that times are estimated with."""

    flops: float  # per second, of matrix products of the model's dtype
    flops_float32: float  # of those in float32
    read_bytes: float  # per second
    write_bytes: float
    assignment_seconds: float = 0.0  # of matching 256 neurons with 256 others

    def with_said(self, gflops: float | None, disk: float | None) -> "MachineRates":
        """These rates with those that a user gave: GFLOP/s of all products, and MB/s of the disk."""
        of_products = (self.flops, self.flops_float32) if gflops is None else (gflops * 1e9, gflops * 1e9)
        of_disk = (self.read_bytes, self.write_bytes) if disk is None else (disk * 1e6, disk * 1e6)
        return MachineRates(*of_products, *of_disk, self.assignment_seconds)


def measure_machine(
    dtype: torch.dtype, shape: tuple[int, int, int], folder: str | os.PathLike | None = None
) -> MachineRates:
    """The rates of this machine, on its GPU where there is one.

    Args:
        dtype: Of the model.
        shape: (tokens, D, I) of a typical product of an expert: small products are slower than large ones.
        folder: On the disk that is read and written; None for that of temporary files.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    narrow, wide = (product_rate(one, shape, device) for one in (dtype, torch.float32))
    read, write = disk_rates(folder)
    gain = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)).numpy()
    return MachineRates(narrow, wide, read, write, seconds_of(lambda: linear_sum_assignment(gain, maximize=True)))


def product_rate(dtype: torch.dtype, shape: tuple[int, int, int], device: torch.device) -> float:
    """FLOPs per second of products of matrices (tokens, D) and (D, I)."""
    tokens, inner, outer = shape
    left, right = torch.randn(tokens, inner, device=device, dtype=dtype), torch.randn(outer, inner, device=device)
    right = right.to(dtype)

    def run() -> None:
        torch.nn.functional.linear(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * tokens * inner * outer / seconds_of(run)


def seconds_of(run: Callable[[], object]) -> float:
    """Of one run, the first one left out: the mean of as many as `SECONDS` allow."""
    run()
    start, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - start < SECONDS:
        run()
        count += 1
    return (time.perf_counter() - start) / count


def disk_rates(folder: str | os.PathLike | None) -> tuple[float, float]:
    """(read, write) in bytes per second; what was just written is read from the system's cache, the best case."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path, content = Path(temporary) / "rate", os.urandom(FILE_BYTES)
        start = time.perf_counter()
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter()
        path.read_bytes()
        done = time.perf_counter()
    return FILE_BYTES / (done - written), FILE_BYTES / (written - start)
