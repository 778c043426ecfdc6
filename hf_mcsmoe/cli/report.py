"""`hf-mcsmoe report`: the page and the plots of a compression, made again from its report."""

from pathlib import Path
from typing import Annotated

import typer

from ..cli import options


def report_command(
    model: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a compressed model.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Folder for page and plots; default: DIR, or NAME-report for a Hub id."),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    as_json: options.Json = False,
) -> None:
    """Show the report of a compressed model, and write it as compression_report.html with plots as PNG.

    Of a model on the Hub only the report is downloaded. Example: hf-mcsmoe report qwen3-half
    """
    import json

    from ..publishing import read_report, write_pages
    from ..publishing.page import report_folder
    from ..publishing.plots import missing_matplotlib
    from ..types import CompressionReport
    from .compress import show

    missing = missing_matplotlib()
    if missing is not None:
        raise ImportError(missing)
    folder = report_folder(model, revision)
    values = read_report(folder)
    if output is None and not Path(model).is_dir():
        output = Path(f"{model.split('/')[-1]}-report")
    written = write_pages(folder, output)
    if as_json:
        typer.echo(json.dumps(values, indent=2, ensure_ascii=False))
    else:
        show(CompressionReport.from_dict(values))
        typer.echo(f"Written: {written[0]} and {len(written) - 1} plots")
    if open_page:
        typer.launch(written[0].resolve().as_uri())
