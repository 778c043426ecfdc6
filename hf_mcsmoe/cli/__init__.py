"""The command line `hf-mcsmoe`. One file per verb; torch and transformers are imported inside the commands."""

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from tqdm.auto import tqdm
from typer.core import TyperGroup

from .cache_teacher import cache_teacher_command
from .calibrate import calibrate_command
from .compare import compare_command
from .compress import compress_command
from .demo import demo_command
from .evaluate import evaluate_command
from .export import export_command
from .families import families_command
from .inspect import inspect_command
from .methods import methods_command
from .plan import plan_command
from .push import push_command
from .recover import recover_command
from .report import report_command

BAD_INPUT = 2  # exit code
TRACEBACK_VARIABLE = "HF_MCSMOE_TRACEBACK"


class CleanErrors(TyperGroup):
    """Commands whose complaints about the input are one line on stderr and exit code 2, without a traceback."""

    def invoke(self, ctx: typer.Context) -> object:
        """Run the command that `ctx` names."""
        try:
            return super().invoke(ctx)
        except (ValueError, TypeError, OSError, ImportError) as error:
            # Whoever reads the output through a pipe may stop early.
            if ctx.params.get("_traceback") or isinstance(error, BrokenPipeError):
                raise
            sys.stdout.flush()
            # Not on the line of a progress bar that the error has stopped.
            tqdm.write(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(BAD_INPUT) from error


app = typer.Typer(
    cls=CleanErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and end."""
    if wanted:
        typer.echo(version("hf-mcsmoe"))
        raise typer.Exit


@app.callback()
def main(
    _traceback: Annotated[
        bool, typer.Option("--traceback", envvar=TRACEBACK_VARIABLE, help="Show where an error comes from.")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Make sparse Mixture-of-Experts models small enough to run.

    Try `hf-mcsmoe demo`: it works offline and takes less than a minute.
    """


app.command("demo")(demo_command)
app.command("families")(families_command)
app.command("methods")(methods_command)
app.command("inspect")(inspect_command)
app.command("plan")(plan_command)
app.command("calibrate")(calibrate_command)
app.command("compress")(compress_command)
app.command("compare")(compare_command)
app.command("evaluate")(evaluate_command)
app.command("export")(export_command)
app.command("report")(report_command)
app.command("push")(push_command)
app.command("cache-teacher")(cache_teacher_command)
# What it does not know itself are training arguments.
app.command("recover", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(recover_command)

__all__ = ["app"]
