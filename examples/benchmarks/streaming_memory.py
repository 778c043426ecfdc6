"""What streaming costs against compressing in memory: peak memory for more and more layers, wall time, bytes.

Every run is a process of its own, because the peak of a process never falls. On the CPU, oneDNN and PyTorch each keep
their 1024 latest bfloat16 kernels, up to 1.5 GB with any executor; the runs let them keep 8. Takes some ten
minutes on 2 CPU cores.

    python examples/benchmarks/streaming_memory.py --folder /tmp/streaming --layers 4 8 16 32
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
ENVIRONMENT = {**os.environ, **FEW_KERNELS}
MAKE = Path(__file__).with_name("make_large_moe.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming"))
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--in-memory-up-to", type=int, default=16, help="layers; more are only streamed")
    parser.add_argument("--allocation", default="uniform", help="'global_usage' needs a second pass over the weights")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows of 256 tokens")
    parser.add_argument("--run", nargs=3, metavar=("MODEL", "OUTPUT", "EXECUTOR"), help="one run, in this process")
    args = parser.parse_args()
    if args.run:
        run(*args.run, allocation=args.allocation, rows=args.rows)
        return
    columns = ("layers", "GB", "executor", "seconds", "CPU s", "peak MB", "read GB", "written GB")
    print(" ".join(f"{column:>10}" for column in columns))
    for layers in args.layers:
        model, output = args.folder / f"model-{layers}", args.folder / "output"
        subprocess.run(
            [sys.executable, MAKE, "--output", model, "--layers", str(layers)], check=True, capture_output=True
        )
        size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        for executor in ["streaming"] + ["in_memory"] * (layers <= args.in_memory_up_to):
            options = ["--allocation", args.allocation, "--rows", str(args.rows)]
            command = [sys.executable, __file__, *options, "--run", model, output, executor]
            printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout
            row = json.loads(printed.splitlines()[-1])
            gigabytes = [f"{row[name] / 1e9:.2f}" for name in ("read", "written")]
            times = [f"{row[name]:.1f}" for name in ("seconds", "cpu", "peak_mb")]
            values = (layers, f"{size / 1e9:.2f}", executor, *times, *gigabytes)
            print(" ".join(f"{value:>10}" for value in values), flush=True)
            shutil.rmtree(output)
        shutil.rmtree(model)


def run(model: str, output: str, executor: str, *, allocation: str, rows: int) -> None:
    """Compress once and print what it took as JSON."""
    import torch

    from hf_mcsmoe import MergedSparseMoeConfig, compress_moe

    tokens = torch.randint(0, 32_000, (rows, 256), generator=torch.Generator().manual_seed(0))
    recipe = MergedSparseMoeConfig.from_preset("m-smoe", keep=0.5, allocation=allocation)
    # What it takes to import torch and transformers is not the executor's.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start, cpu_start = time.perf_counter(), time.process_time()
    result = compress_moe(
        model, recipe, calibration=tokens, batch_size=4, output_dir=output, executor=executor, progress=False
    )
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary = getattr(result, "streaming_summary", None)
    sizes = [sum(file.stat().st_size for file in Path(path).glob("*.safetensors")) for path in (model, output)]
    read, written = (summary.bytes_read, summary.bytes_written) if summary else sizes
    steps = summary.seconds_of_step if summary else {}
    row = {
        "seconds": seconds,
        "cpu": cpu,
        "peak_mb": peak / 1024,
        "import_mb": before / 1024,
        "read": read,
        "written": written,
    }
    print(json.dumps({**row, "steps": steps}))


if __name__ == "__main__":
    main()
