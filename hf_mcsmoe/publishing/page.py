"""compression_report.html: all of a report on one page that needs nothing else, and its plots as PNG files."""

import base64
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from transformers.utils import cached_file

from ..local_paths import hub_id, without_paths
from .page_values import page_values
from .plots import PLOTS, draw_plots, missing_matplotlib, write_plots
from .report import REPORT_FILE, read_report
from .statistics_file import STATISTICS_FILE, read_statistics

PAGE_FILE = "compression_report.html"
TEMPLATE = Path(__file__).with_name("report_page.html")
logger = logging.getLogger(__name__)


def write_pages(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Make `compression_report.html` and `plots/*.png` from the report and the statistics in a folder.

    Nothing in them tells about the machine: paths in the report are cut to their last part. Pages and plots that are
    there are replaced. Without matplotlib the page has no plots, and a warning says so.

    Args:
        folder: Of the checkpoint; it holds `compression_report.json`.
        output: Where to write; None for `folder`. It is made if it does not exist.

    Returns:
        The files that were written, the page first.

    Raises:
        FileNotFoundError: There is no report.
        ValueError: The report or the statistics beside it cannot be read.
    """
    report, statistics = without_paths(read_report(folder)), read_statistics(folder)
    output = Path(folder if output is None else output)
    output.mkdir(parents=True, exist_ok=True)
    missing = missing_matplotlib()
    if missing is not None:
        logger.warning(missing)
    drawn = draw_plots(report, statistics) if missing is None else {}
    write_plots(drawn, output)
    (output / PAGE_FILE).write_text(report_page(report, drawn, missing), encoding="utf-8")
    return [output / PAGE_FILE, *(output / name for name in drawn)]


def report_folder(name: str | Path, revision: str | None = None) -> Path:
    """Where the report of a compressed model is: its folder, or one with the files of a report from the Hub.

    Args:
        name: Folder or Hub id.
        revision: Branch, tag or commit on the Hub.

    Raises:
        FileNotFoundError: There is no such folder.
        OSError: There is no such repository, no report in it, or no connection.
    """
    if Path(name).is_dir():
        return Path(name)
    if hub_id(str(name)) is None:
        raise FileNotFoundError(f"There is no folder {str(name)!r}. Give the folder or Hub id of a compressed model.")
    cached_file(name, STATISTICS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(cached_file(name, REPORT_FILE, revision=revision)).parent


def report_page(report: Mapping[str, Any], drawn: Mapping[str, bytes], no_plots: str | None = None) -> str:
    """The page: one file of HTML with its style and pictures in it, without scripts, that loads nothing.

    Every text of the report is escaped.

    Args:
        report: What `read_report` gave, without paths of this machine.
        drawn: What `draw_plots` gave.
        no_plots: Why there are no plots, if it is not that there is nothing to draw.
    """
    plots = {
        plot.name: {
            "title": plot.title,
            "caption": plot.caption,
            "data": base64.b64encode(drawn[plot.file]).decode("ascii"),
        }
        for plot in PLOTS
        if plot.file in drawn
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(plots=plots, no_plots=no_plots, **page_values(report))
