"""`hf-mcsmoe calibrate`: run the calibration data once, compress many times."""

from typing import Annotated

import typer

from ..cli import options
from .tables import human_bytes
from .together import together


def calibrate_command(
    model: options.Model,
    output: options.Output,
    methods: Annotated[
        str, typer.Option("--for", help="Presets, with commas between them, or YAML recipes: what to collect for.")
    ],
    calibration: options.Calibration = None,
    num_samples: options.NumSamples = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = 8,
    dtype: options.Dtype = "auto",
    device_map: options.DeviceMap = None,
    overwrite: options.Overwrite = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Collect once what several methods need, for compressions at any ratio: `compress --calibration DIR`.

    Example: hf-mcsmoe calibrate Qwen/Qwen3-30B-A3B --for reap,m-smoe --calibration texts.jsonl --output stats
    """
    from ..calibrate import calibrate_moe
    from ..compress import as_recipe

    recipes = [as_recipe(name.strip()) for name in methods.split(",") if name.strip()]
    one_shot = [str(recipe.preset) for recipe in recipes if recipe.sequential]
    with together():
        saved = calibrate_moe(
            model,
            recipes,
            output,
            calibration=calibration,
            num_samples=num_samples,
            sequence_length=sequence_length,
            batch_size=batch_size,
            overwrite=overwrite,
            dtype=dtype,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
        )
        size = sum(file.stat().st_size for file in output.iterdir())
        wanted = saved.header["wanted"]
        names = ", ".join([*wanted["statistics"], *(["kept tokens"] if wanted["keeps_tokens"] else [])])
        typer.echo(f"{output}: {names} of {len(saved)} layers, {human_bytes(size)}")
        if one_shot:
            typer.echo(f"{', '.join(one_shot)}: only with sequential: false in the recipe, or with the data itself.")
        typer.echo(
            f"Next: hf-mcsmoe compress {model} --preset {recipes[0].preset} --calibration {output} --output DIR"
        )
