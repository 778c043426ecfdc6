"""Figures as PNG files in the folder of a checkpoint."""

import importlib
import importlib.util
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

PLOTS_FOLDER = "plots"


@dataclass(frozen=True)
class Plot:
    """One figure: where the function that draws it is, and what it shows."""

    name: str
    module: str
    function: str
    title: str
    caption: str

    @property
    def file(self) -> str:
        """Its path in the folder of a checkpoint."""
        return f"{PLOTS_FOLDER}/{self.name}.png"


PLOTS = (
    Plot(
        "sizes",
        "model_sizes",
        "draw_sizes",
        "Size before and after",
        "Bytes of all parameters: the experts of the compressed layers, and everything else.",
    ),
    Plot(
        "layers",
        "layer_budget",
        "draw_layers",
        "Budget and error of each layer",
        "What each layer kept, and the relative squared error of its output on held-out calibration tokens.",
    ),
    Plot(
        "usage",
        "usage_heatmap",
        "draw_usage",
        "Usage of the original experts",
        "How often the router chose each expert on the calibration tokens; 1 is an equal share.",
    ),
    Plot(
        "similarity",
        "similarity_heatmap",
        "draw_similarity",
        "Similarity of the original experts",
        "The recipe's similarity of each two experts, ordered by group under their dendrogram (average linkage, "
        "groups first). An orange link above grey ones joined experts that are closer to other groups.",
    ),
    Plot(
        "trials",
        "auto_trials",
        "draw_trials",
        "Recipes that were tried",
        "How far each recipe moved the predictions on held-out calibration tokens; the best was taken.",
    ),
)


def missing_matplotlib() -> str | None:
    """Why figures cannot be drawn and what to do about it; None if they can."""
    if importlib.util.find_spec("matplotlib") is not None:
        return None
    return "The plots of a report need matplotlib, which is not installed. Install it: pip install matplotlib"


def draw_plots(report: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The figures of a report that have something to show, as PNG, by the path in the folder of a checkpoint.

    Args:
        report: See `CompressionReport.to_dict`; what `read_report` gave.
        statistics: What `read_statistics` gave; may be empty.

    Raises:
        ImportError: matplotlib is not installed.
    """
    missing = missing_matplotlib()
    if missing is not None:
        raise ImportError(missing)
    drawn = {}
    for plot in PLOTS:
        # matplotlib is imported with the first of these, not with the package: it takes a second.
        module = importlib.import_module(f".{plot.module}", __package__)
        figure = getattr(module, plot.function)(report, statistics)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", metadata={"Software": None})
            drawn[plot.file] = buffer.getvalue()
    return drawn


def write_plots(drawn: Mapping[str, bytes], folder: str | Path) -> None:
    """Write figures into the folder of a checkpoint; those of an earlier report that are not among them go."""
    for plot in PLOTS:
        path = Path(folder) / plot.file
        if plot.file in drawn:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(drawn[plot.file])
        else:
            path.unlink(missing_ok=True)


def plots_in(files: Iterable[str]) -> list[Plot]:
    """The plots among the files of a checkpoint, in the order of `PLOTS`."""
    names = set(files)
    return [plot for plot in PLOTS if plot.file in names]
