"""`python -m hf_mcsmoe`: the command line."""

from .cli import app

app(prog_name="hf-mcsmoe")
