"""What a compression did to each layer, read from its report and the statistics beside it. Seconds.

    python examples/reading_a_report.py                       # compresses the tiny model that ships, offline
    python examples/reading_a_report.py --folder my-result    # a result of yours; no weights are loaded

`hf-mcsmoe report FOLDER` shows the same as a page with plots.
"""

import argparse
import tempfile
from pathlib import Path

import hf_mcsmoe
from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.publishing import read_report, read_statistics
from hf_mcsmoe.types import CompressionReport, LayerReport

ASSETS = Path(hf_mcsmoe.__file__).parent / "assets"


def show(folder: Path) -> None:
    report = CompressionReport.from_dict(read_report(folder))
    statistics = read_statistics(folder)
    share = report.total_bytes_after / report.total_bytes_before
    print(f"{report.total_bytes_before:,} -> {report.total_bytes_after:,} bytes ({share:.1%})")
    for layer in report.layers:
        error = "not measured" if layer.relative_error is None else f"{layer.relative_error:.3f}"
        count = statistics[f"{layer.layer}.selection_count"]
        print(
            f"{layer.layer}: {layer.num_experts_before} -> {layer.num_experts_after} experts, output error {error}; "
            f"expert {count.argmax()} was chosen {count.max():,} times, {(count == 0).sum()} experts never"
        )
        similarity = statistics.get(f"{layer.layer}.similarity")  # of the recipes that look at it
        if similarity is not None:
            show_groups(layer, similarity.tolist())


def show_groups(layer: LayerReport, similarity: list[list[float]]) -> None:
    """The group whose members are least alike its dominant expert: the first to look at if a layer got bad."""
    least = []
    for expert, group in enumerate(layer.group_of_expert):
        dominant = layer.dominant_of_group[group]
        if group >= 0 and expert != dominant:
            least.append((similarity[expert][dominant], expert, dominant))
    if least:
        value, expert, dominant = min(least)
        print(f"    least alike that were merged: expert {expert} into {dominant}, similarity {value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="of a compressed model")
    args = parser.parse_args()
    if args.folder is not None:
        show(args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        how = {"calibration": ASSETS / "calibration.jsonl", "num_samples": 32}
        compress_moe(ASSETS / "tiny-qwen3-moe", Recipe(keep=0.5), output_dir=Path(temporary) / "half", **how)
        show(Path(temporary) / "half")


if __name__ == "__main__":
    main()
