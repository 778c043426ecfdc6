"""Running a function in several gloo processes, and what became of a model in each of them."""

import json
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

TIMEOUT = 120  # seconds after which processes that wait for each other are ended


def run_in_processes(count, folder, function):
    """Call `function(rank)` in forked processes with a group; returns the error of each, None for none."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(rank, count, folder, function)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(TIMEOUT)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hung:
        processes[rank].kill()
    assert not hung, f"processes {hung} did not end"
    errors = [folder / f"error-{rank}.txt" for rank in range(count)]
    return [path.read_text() if path.exists() else None for path in errors]


def _work(rank, count, folder, function):
    os.environ.pop("WORLD_SIZE", None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder.absolute()}/store", rank=rank, world_size=count)
    try:
        function(rank)
    except Exception as error:
        (folder / f"error-{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        if os.environ.get("SHOW_ERRORS"):
            traceback.print_exc(file=sys.__stderr__)
    finally:
        dist.destroy_process_group()


def write_result(model, folder, name):
    """What compression made of a model: its tensors, and of its report what does not depend on the time it took."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous().clone() for key, value in model.state_dict().items()}
    save_file(tensors, folder / f"{name}.safetensors")
    report = model.compression_report.to_dict()
    kept = {key: report[key] for key in ("recipe", "calibration", "total_parameters_after", "total_bytes_after")}
    kept["layers"] = [{k: v for k, v in layer.items() if k != "seconds"} for layer in report["layers"]]
    kept["statistics"] = {key: value.tolist() for key, value in model.compression_report.statistics.items()}
    (folder / f"{name}.json").write_text(json.dumps(kept))


def read_result(folder, name):
    """(tensors, report) that `write_result` wrote."""
    return load_file(Path(folder) / f"{name}.safetensors"), json.loads((Path(folder) / f"{name}.json").read_text())
