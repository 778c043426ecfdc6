"""What streaming costs against compressing in memory: peak memory for more and more layers, wall time, bytes.

Every run is a process of its own, because the peak of a process never falls. On the CPU, oneDNN and PyTorch each keep
their 1024 latest bfloat16 kernels, up to 1.5 GB with any executor; the runs let them keep 8. The columns "x" are
streaming over in memory, of the fastest of `--repeats` runs that alternate. Takes some ten minutes on 2 CPU cores.

    python examples/benchmarks/streaming_memory.py --folder /tmp/streaming --layers 4 8 16 32
    python examples/benchmarks/streaming_memory.py --layers 8 --repeats 3
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
from typing import Any

FEW_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8", "LRU_CACHE_CAPACITY": "8"}
ENVIRONMENT = {**os.environ, **FEW_KERNELS}
MAKE = Path(__file__).with_name("make_large_moe.py")
SHAPE = ("hidden_size", "width", "experts", "vocabulary")
COLUMNS = (
    "layers",
    "GB",
    "executor",
    "seconds",
    "CPU s",
    "peak MB",
    "of it new",
    "read GB",
    "written GB",
    "x",
    "x CPU",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/streaming"))
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--in-memory-up-to", type=int, default=16, help="layers; more are only streamed")
    parser.add_argument("--allocation", default="uniform", help="'global_usage' needs a second pass over the weights")
    parser.add_argument("--rows", type=int, default=16, help="calibration rows")
    parser.add_argument("--sequence-length", type=int, default=256, help="their tokens")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each executor")
    for name, default in zip(SHAPE, (1024, 384, 64, 32_000), strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="of the model")
    parser.add_argument("--run", nargs=3, metavar=("MODEL", "OUTPUT", "EXECUTOR"), help="one run, in this process")
    args = parser.parse_args()
    if args.run:
        run(*args.run, args)
        return
    print(" ".join(f"{column:>10}" for column in COLUMNS))
    for layers in args.layers:
        measure(layers, args)


def measure(layers: int, args: argparse.Namespace) -> None:
    """Make a model, compress it with one or both executors, print a line for each, delete it."""
    model, output = args.folder / f"model-{layers}", args.folder / "output"
    shape = [text for name in SHAPE for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command = [sys.executable, MAKE, "--output", model, "--layers", str(layers), *shape]
    subprocess.run(command, check=True, capture_output=True)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    executors = ["in_memory"] * (layers <= args.in_memory_up_to) + ["streaming"]
    best: dict[str, dict[str, Any]] = {}
    for _ in range(args.repeats):
        for executor in executors:
            found = run_alone(model, output, executor, args)
            if executor not in best or found["seconds"] < best[executor]["seconds"]:
                best[executor] = found
            shutil.rmtree(output)
    shutil.rmtree(model)
    for executor in executors:
        row, beside = best[executor], best.get("in_memory") if executor == "streaming" else None
        numbers = [row["seconds"], row["cpu"], row["peak_mb"], row["peak_mb"] - row["import_mb"]]
        ratios = [f"{row[name] / beside[name]:.2f}" if beside else "" for name in ("seconds", "cpu")]
        gigabytes = [f"{row[name] / 1e9:.2f}" for name in ("read", "written")]
        values = (layers, f"{size / 1e9:.2f}", executor, *(f"{x:.1f}" for x in numbers), *gigabytes, *ratios)
        print(" ".join(f"{value:>10}" for value in values), flush=True)


def run_alone(model: Path, output: Path, executor: str, args: argparse.Namespace) -> dict[str, Any]:
    """One run in a process of its own."""
    names = ("allocation", "rows", "sequence_length", "vocabulary")
    options = [text for name in names for text in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    command = [sys.executable, __file__, *options, "--run", model, output, executor]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout
    return json.loads(printed.splitlines()[-1])


def run(model: str, output: str, executor: str, args: argparse.Namespace) -> None:
    """Compress once and print what it took as JSON."""
    import torch

    from hf_mcsmoe import MergedSparseMoeConfig, compress_moe

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, args.vocabulary, (args.rows, args.sequence_length), generator=generator)
    recipe = MergedSparseMoeConfig.from_preset("m-smoe", keep=0.5, allocation=args.allocation)
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
