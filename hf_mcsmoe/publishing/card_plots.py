"""The section of the model card that shows the plots beside it."""

from collections.abc import Collection
from pathlib import Path

from .page import PAGE_FILE
from .plots import PLOTS_FOLDER, plots_in


def card_plots(files: Collection[str]) -> list[str]:
    """Markdown of the section "Plots": a relative link to each picture, which the Hub shows in the card.

    Args:
        files: Names of the files of a checkpoint, see `plots_of_folder`.

    Returns:
        Paragraphs; none without plots.
    """
    paragraphs = [f"![{plot.title}]({plot.file})\n\n{plot.caption}" for plot in plots_in(files)]
    if paragraphs and PAGE_FILE in files:
        paragraphs.append(f"All numbers and plots on one page: download `{PAGE_FILE}` and open it in a browser.")
    return paragraphs


def plots_of_folder(folder: Path) -> list[str]:
    """Names of the plots and the page in the folder of a checkpoint."""
    found = [folder / PAGE_FILE, *sorted((folder / PLOTS_FOLDER).glob("*.png"))]
    return [path.relative_to(folder).as_posix() for path in found if path.is_file()]
