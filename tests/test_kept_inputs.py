"""The order of layers, and how many forwards their tokens take."""

import pytest
import torch
from tiny_models import tiny_model

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.executors import kept_inputs
from hf_mcsmoe.families import find_layers


@pytest.mark.parametrize("layout", ["mapped", "native"])
def test_layers_whose_tokens_do_not_fit_together_are_collected_in_groups(layout, monkeypatch, tokens):
    recipe = Recipe(keep=0.5, selection="gated_obs", refit="least_squares", layout=layout)
    at_once, in_groups = (tiny_model("qwen3_moe") for _ in range(2))
    compress_moe(at_once, recipe, calibration=tokens, progress=False)
    forwards = []
    original = kept_inputs.collect
    monkeypatch.setattr(kept_inputs, "collect", lambda *args, **how: forwards.append(args) or original(*args, **how))
    monkeypatch.setattr(kept_inputs, "MOST_BYTES", 1)
    compress_moe(in_groups, recipe, calibration=tokens, progress=False)
    num_layers = len(find_layers(tiny_model("qwen3_moe")))
    assert num_layers > 1 and [len(args[1]) for args in forwards] == [num_layers, *[1] * num_layers]
    for name, tensor in at_once.state_dict().items():
        assert torch.equal(tensor, in_groups.state_dict()[name]), name
    reports = (model.compression_report.layers for model in (at_once, in_groups))
    assert [one.layer for one in next(reports)] == [one.layer for one in next(reports)]
