"""Models and calibration data that several test files share, built once a session."""

import copy
import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import CAUSAL_FAMILIES, in_every_run, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from hf_mcsmoe import MergedSparseMoeConfig, Recipe, compress_moe, export_checkpoint
from hf_mcsmoe.publishing.plots import draw_plots

torch.set_num_threads(1)  # sums of a tiny model in one order, whatever the machine


@pytest.fixture(scope="session", autouse=True)
def no_plots():
    """Checkpoints are written without plots, which take longer to draw than a tiny model takes to compress."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_mcsmoe.publishing.page.draw_plots", lambda report, statistics: {})  # noqa: ARG005
        yield


@pytest.fixture
def plots(monkeypatch):
    """Within the test plots are drawn, as they are for users."""
    monkeypatch.setattr("hf_mcsmoe.publishing.page.draw_plots", draw_plots)


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """Calibration data: 24 rows of 20 token ids."""
    return torch.randint(3, 150, (24, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def prompt() -> Tensor:
    """Token ids (4, 14) that calibration never saw."""
    return torch.randint(3, 150, (4, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=in_every_run(CAUSAL_FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Each way of writing a causal MoE model in turn."""
    return request.param


@pytest.fixture(params=["mapped", "native"])
def layout(request: pytest.FixtureRequest) -> str:
    """Each layout in turn."""
    return request.param


@pytest.fixture(scope="session")
def original() -> Callable[..., PreTrainedModel]:
    """`original(model_type)`: a copy of that tiny model, free to be changed."""
    built = functools.cache(tiny_model)
    return lambda *args, **changes: copy.deepcopy(built(*args, **changes))


@pytest.fixture(scope="session")
def compress(original, tokens) -> Callable[..., PreTrainedModel]:
    """`compress(model_type_or_model, **recipe)`: that model after M-SMoE, to be changed at will."""

    def run(model: str | PreTrainedModel, calibration=tokens, preset="m-smoe", **changes) -> PreTrainedModel:
        model = original(model) if isinstance(model, str) else model
        recipe = MergedSparseMoeConfig.from_preset(preset, **changes)
        return compress_moe(model, recipe, calibration=calibration, progress=False)

    return run


@pytest.fixture(scope="session")
def compressed(compress) -> Callable[[str, str], PreTrainedModel]:
    """`compressed(model_type, layout)`: the tiny model with half of its experts. Shared: do not change it."""
    return functools.cache(lambda model_type, layout: compress(model_type, layout=layout))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """`checkpoint(model_type)`: folder of a tiny bfloat16 model in several shards. Shared: do not change it."""

    @functools.cache
    def save(model_type):
        folder = tmp_path_factory.mktemp(model_type)
        tiny_model(model_type).to(torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
        return folder

    return save


@pytest.fixture
def own_checkpoint(checkpoint, tmp_path):
    """A copy of the tiny Qwen3 MoE checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


@pytest.fixture
def stream(tokens, tmp_path):
    """`stream(folder, **recipe)`: what compress_moe makes of a checkpoint in tmp_path / "streamed"."""

    def run(folder, *, output="streamed", data=tokens, **changes):
        recipe = Recipe(**{"allocation": "uniform", **changes})
        where = {"output_dir": tmp_path / output, "executor": "auto"}
        return compress_moe(folder, recipe, calibration=data, **where, progress=False)

    return run


@pytest.fixture
def write_compressed(tmp_path, tokens, original):
    """`write_compressed(model, name, **recipe)`: the folder tmp_path / name with a result."""

    def run(model, name="mapped", **recipe):
        model = original(model) if isinstance(model, str) else model
        compress_moe(model, Recipe(**recipe), calibration=tokens, output_dir=tmp_path / name, progress=False)
        return tmp_path / name

    return run


@pytest.fixture
def export(tmp_path):
    """`export(folder, ...)`: the exported folder and its report."""

    def run(folder, **options):
        report = export_checkpoint(folder, tmp_path / "exported", progress=False, **options)
        return tmp_path / "exported", report

    return run
