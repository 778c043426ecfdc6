"""Pictures of a compression report. One file a figure: (report, statistics) -> Figure, or None if nothing is to draw.

They use matplotlib's objects, never pyplot, so that no state of the user's own plots is touched and no display needed.
"""

from .files import PLOTS, PLOTS_FOLDER, Plot, draw_plots, missing_matplotlib, plots_in, write_plots

__all__ = ["PLOTS", "PLOTS_FOLDER", "Plot", "draw_plots", "missing_matplotlib", "plots_in", "write_plots"]
