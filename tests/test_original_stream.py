"""Sequential recipes whose layers bring the residual stream back to the original model's."""

import dataclasses
import re

import pytest
import torch
from all_families import tiny
from test_layer_fit import fit, logits, reports
from torch.testing import assert_close

from hf_mcsmoe import Recipe, compress_moe, load_calibration, plan
from hf_mcsmoe.executors import kept_inputs
from hf_mcsmoe.executors.kept_inputs import correct
from hf_mcsmoe.executors.part_of_forward import forward_until
from hf_mcsmoe.executors.stream_outputs import check_streams, decoder_layer
from hf_mcsmoe.executors.unit_check import is_unit
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.observation.layer_inputs import LayerInputs

SEQUENTIAL = {"keep": 0.4, "sequential": True, "selection": "gated_obs", "refit": "least_squares"}
REPAIRED = {**SEQUENTIAL, "targets": "original_stream"}
LAYERS = 3


@pytest.fixture
def padded():
    return rows_of_several_lengths(1 / 3)


def rows_of_several_lengths(held_out_fraction):
    """30 rows, padded."""
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(3, 150, (length,), generator=generator).tolist() for length in (9, 20, 14, 7, 18, 20) * 5]
    return load_calibration(rows, batch_size=4, held_out_fraction=held_out_fraction)


@torch.no_grad()
def streams(model, data, held_out):
    """The residual stream after each decoder layer for the real tokens, a list of (T, D)."""
    found = [[] for _ in range(LAYERS)]
    for batch in data.batches:
        if batch.held_out != held_out:
            continue
        kept = []
        handles = [x.register_forward_hook(lambda m, a, out: kept.append(out)) for x in decoder_layers(model)]  # noqa: ARG005, B023
        model(**batch.inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        for place, out in enumerate(kept):
            out = out[0] if isinstance(out, tuple) else out
            found[place].append(out[batch.token_mask])
    return [torch.cat(parts).double() for parts in found]


def decoder_layers(model):
    return model.get_submodule("model.layers")


@torch.no_grad()
def routed(model, data):
    """What the routed experts of each layer of a compressed model give for the held-out tokens, (T, D) each."""
    found = [[] for _ in range(LAYERS)]
    for batch in data.batches:
        if not batch.held_out:
            continue
        kept = []
        modules = [model.get_submodule(entry.layer) for entry in reports(model)]
        handles = [x.register_forward_hook(lambda m, a, out: kept.append(out)) for x in modules]  # noqa: ARG005, B023
        model(**batch.inputs, use_cache=False)
        for handle in handles:
            handle.remove()
        for place, out in enumerate(kept):
            found[place].append(out.reshape(*batch.token_mask.shape, -1)[batch.token_mask])
    return [torch.cat(parts).double() for parts in found]


def squares(tensor):
    return tensor.square().sum().item()


# --- what it is


@pytest.mark.parametrize("layout", ["mapped", "native"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe"])
def test_the_error_in_the_report_is_that_of_the_stream(model_type, layout, original, padded):
    # A shared expert that the refit changes would be beside the experts another one than in the original.
    as_it_was = {"refit_options": {"shared_expert": False}}
    result = fit(original(model_type), padded, layout=layout, **REPAIRED, **as_it_was)
    before, after = streams(original(model_type), padded, True), streams(result, padded, True)
    for report, old, new, given in zip(reports(result), before, after, routed(result, padded), strict=True):
        wanted = old - (new - given)  # beside the experts the stream has attention and shared experts
        assert report.relative_error == pytest.approx(squares(old - new) / squares(wanted), rel=1e-3)


def test_it_ends_nearer_to_the_original_than_without(original):
    data = rows_of_several_lengths(0)
    wanted = streams(original("mixtral"), data, False)
    how = {"refit_options": {"ridges": (1e-3,)}}
    errors = [
        [squares(new - old) for old, new in zip(wanted, streams(result, data, False), strict=True)]
        for result in (fit(original("mixtral"), data, **recipe, **how) for recipe in (SEQUENTIAL, REPAIRED))
    ]
    assert errors[1][0] == errors[0][0]
    assert all(repaired < plain for plain, repaired in zip(errors[0][1:], errors[1][1:], strict=True))


@pytest.mark.slow
def test_matching_aims_at_the_stream_too(original):
    """A held-out sample that is the calibration data lets every step pass: what is trained for is what gets nearer."""
    data = rows_of_several_lengths(0)
    data = dataclasses.replace(
        data, batches=(*data.batches, *(dataclasses.replace(batch, held_out=True) for batch in data.batches))
    )
    recipe = {**REPAIRED, "refit": None, "matching": "adam", "matching_options": {"steps": 40, "learning_rate": 0.02}}
    wanted = streams(original("mixtral"), data, False)
    errors = []
    for targets in ("original_stream", None):
        result = fit(original("mixtral"), data, **{**recipe, "targets": targets})
        errors.append([squares(old - new) for old, new in zip(wanted, streams(result, data, False), strict=True)])
    assert errors[0][0] == errors[1][0] and errors[0][1] < errors[1][1] and errors[0][2] < errors[1][2]


def test_the_refit_solves_the_normal_equations_of_the_stream(original):
    """With one tiny ridge, what is left of the stream's error is orthogonal to what each kept neuron can give."""
    how = {"refit_options": {"ridges": (1e-6,)}, "keep": 0.1}
    padded = rows_of_several_lengths(0)
    wanted = streams(original("mixtral"), padded, False)
    for recipe, is_orthogonal in ((REPAIRED, True), (SEQUENTIAL, False)):
        result = fit(original("mixtral"), padded, **{**recipe, **how})
        for place in (1, 2):
            error = wanted[place] - streams(result, padded, False)[place]
            features = slow_features(result, reports(result)[place].layer, padded)
            cosines = features.T @ error / (features.norm(dim=0)[:, None] * error.norm(dim=0))
            assert (cosines.abs().max() < 0.01) == is_orthogonal


@torch.no_grad()
def slow_features(model, name, data):
    """Gate weight times activation of each neuron of a layer for the calibration tokens, (T, P) float64."""
    experts, calls, found = model.get_submodule(name), [], []
    handle = experts.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((*args, *kwargs.values())),  # noqa: ARG005
        with_kwargs=True,
    )
    for batch in (batch for batch in data.batches if not batch.held_out):
        model(**batch.inputs, use_cache=False)
        states, index, weights = calls.pop()[:3]
        features = torch.zeros(len(states), len(experts.up), dtype=torch.float64)
        for token, state in enumerate(states.double()):
            for slot, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                neurons = slice(experts.offsets[slot], experts.offsets[slot + 1])
                gate, up = experts.gate[neurons].double() @ state, experts.up[neurons].double() @ state
                features[token, neurons] += weight * torch.nn.functional.silu(gate) * up
        found.append(features[batch.token_mask.flatten()])
    handle.remove()
    return torch.cat(found)


# --- where it changes nothing


def test_behind_an_uncompressed_prefix_it_changes_nothing(original, padded, prompt):
    """The first layer, whatever is excluded before it, is compressed as in a recipe without it.

    Bit by bit, but for what experts give in the one forward that a recipe with one shot keeps: module and features
    round their sums differently.
    """
    whole = [fit(original("qwen3_moe"), padded, **recipe) for recipe in (SEQUENTIAL, REPAIRED)]
    first = [model.get_submodule(reports(model)[0].layer).state_dict() for model in whole]
    assert all(torch.equal(first[1][name], tensor) for name, tensor in first[0].items())
    assert not torch.equal(logits(whole[0], prompt), logits(whole[1], prompt))
    last = {**REPAIRED, "exclude_layers": list(range(LAYERS - 1))}
    one_shot = {**last, "sequential": False, "targets": None}
    repaired, plain = (fit(original("qwen3_moe"), padded, **recipe) for recipe in (last, one_shot))
    torch.testing.assert_close(logits(repaired, prompt), logits(plain, prompt), rtol=1e-4, atol=1e-5)
    assert reports(repaired)[0].relative_error == pytest.approx(reports(plain)[0].relative_error, rel=1e-4)


def test_keeping_everything_changes_nothing(original, padded, prompt):
    result = fit(original("qwen3_moe"), padded, **{**REPAIRED, "keep": 1.0})
    assert torch.equal(logits(result, prompt), logits(original("qwen3_moe"), prompt))


def test_it_is_deterministic_and_plan_knows_its_sizes(original, padded, prompt):
    one, other = (fit(original("qwen3_moe"), padded, **REPAIRED) for _ in range(2))
    assert torch.equal(logits(one, prompt), logits(other, prompt))
    planned = plan(original("qwen3_moe"), Recipe(**REPAIRED))
    assert one.compression_report.total_parameters_after == planned.total_parameters_after


def test_padding_does_not_count(original, prompt):
    rows = [
        torch.randint(3, 150, (5 + place % 16,), generator=torch.Generator().manual_seed(place)) for place in range(16)
    ]
    left = torch.stack([torch.cat([torch.zeros(24 - len(row), dtype=torch.int64), row]) for row in rows])
    mask = torch.stack([torch.arange(24) >= 24 - len(row) for row in rows]).long()
    data = [
        load_calibration([row.tolist() for row in rows], batch_size=1, held_out_fraction=0),
        load_calibration([{"input_ids": left, "attention_mask": mask}], batch_size=24, held_out_fraction=0),
    ]
    results = [fit(original("mixtral"), batches, **REPAIRED) for batches in data]
    assert [x.widths for x in reports(results[0])] == [x.widths for x in reports(results[1])]
    assert_close(logits(results[0], prompt), logits(results[1], prompt), rtol=1e-3, atol=1e-3)


# --- what it takes


def test_forwards_end_at_the_layer_that_is_looked_at(original, padded):
    model = original("qwen3_moe")
    calls = [0] * LAYERS
    for place, module in enumerate(decoder_layers(model)):
        norm = module.input_layernorm
        norm.register_forward_pre_hook(lambda m, args, place=place: calls.__setitem__(place, calls[place] + 1))  # noqa: ARG005
    fit(model, padded, **SEQUENTIAL)
    batches = len(padded.batches)
    # One pass for the statistics, then each layer before it is compressed and, but for the last one, after that.
    assert calls == [batches * (3 if place < LAYERS - 1 else 2) for place in range(LAYERS)]


def test_forwards_that_go_on_give_what_those_from_the_start_do(original, padded, monkeypatch):
    results = [fit(original("qwen3_moe"), padded, **SEQUENTIAL)]
    monkeypatch.setattr(kept_inputs, "continued_forwards", lambda *_: None)
    results.append(fit(original("qwen3_moe"), padded, **SEQUENTIAL))
    for (name, one), other in zip(results[0].state_dict().items(), results[1].state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_model_that_cannot_begin_in_between_is_run_from_the_start(original, padded):
    expected = fit(original("qwen3_moe"), padded, **SEQUENTIAL)
    model, calls = original("qwen3_moe"), [0] * LAYERS
    for place, module in enumerate(decoder_layers(model)):
        norm = module.input_layernorm
        norm.register_forward_pre_hook(lambda m, args, place=place: calls.__setitem__(place, calls[place] + 1))  # noqa: ARG005
        # Never the same hidden states that the layer before gave.
        module.register_forward_pre_hook(lambda m, args: (args[0] + 0, *args[1:]))  # noqa: ARG005
    result = fit(model, padded, **SEQUENTIAL)
    assert calls[0] > len(padded.batches) * LAYERS
    for (name, one), other in zip(result.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_a_forward_that_is_cut_short_gives_the_layers_what_a_whole_one_does(original, prompt):
    model, seen = original("qwen3_moe"), []
    layers = find_layers(model)
    layers[1].experts.register_forward_pre_hook(lambda module, args: seen.append(args[0]))  # noqa: ARG005
    with torch.no_grad():
        model(prompt)
        for chosen in (layers[:2], layers[1:2]):
            forward_until(model, chosen)(0, {"input_ids": prompt})
        assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
        assert model(prompt).logits.shape[:2] == prompt.shape  # no hook is left


def test_the_corrections_are_the_difference_of_the_streams():
    now, original = LayerInputs(), LayerInputs()
    now.streams, original.streams = [torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.5, 0.0]], dtype=torch.bfloat16)]
    correct(now, original)
    assert now.corrections[0].tolist() == [[0.5, -2.0]] and not now.streams and not original.streams


def test_the_first_forward_keeps_the_streams_alone(original, padded, monkeypatch):
    kept, collect = [], kept_inputs.collect
    monkeypatch.setattr(kept_inputs, "collect", lambda *args, **how: kept.append(collect(*args, **how)) or kept[-1])
    seen = []
    monkeypatch.setattr(
        kept_inputs,
        "correct",
        lambda now, first: seen.append((first.num_tokens, len(first.streams))) or correct(now, first),
    )
    fit(original("qwen3_moe"), padded, **REPAIRED)
    assert len(kept) == 1 + LAYERS and all(tokens == 0 and batches for tokens, batches in seen)


# --- what is refused


def test_the_decoder_layer_of_a_layer(original):
    model = original("qwen3_moe")
    for place, layer in enumerate(find_layers(model)):
        assert decoder_layer(model, layer) is decoder_layers(model)[place]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("scale", "offset", "expected"), [(1.0, 0.0, True), (0.9, 0.0, False), (0.0, 0.0, False), (1.0, 0.5, False)]
)
def test_is_unit(dtype, scale, offset, expected):
    generator = torch.Generator().manual_seed(0)
    before, added, other = torch.randn(3, 400, 16, generator=generator).to(dtype)
    assert is_unit(before, before + scale * added + offset * other, added) == expected


def test_a_stream_that_is_not_a_sum_is_refused(original, tokens):
    with pytest.raises(ValueError, match=r"'model.layers.0.experts' cannot be followed: what its experts give is cha"):
        fit(original("gemma4_text"), tokens, **REPAIRED)
    model = original("granitemoe", residual_multiplier=0.5)
    with pytest.raises(ValueError, match="is changed before it is added"):
        fit(model, tokens, **REPAIRED)


def test_a_stream_that_is_not_a_sum_is_refused_where_layers_are_streamed_too(checkpoint, tokens, tmp_path):
    how = {"calibration": tokens, "progress": False, "executor": "streaming"}
    with pytest.raises(ValueError, match=r"'model.layers.0.experts' cannot be followed: what its experts give is cha"):
        compress_moe(checkpoint("gemma4_text"), Recipe(**REPAIRED), output_dir=tmp_path / "out", **how)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "stream"}, "targets is 'stream', allowed are (None, 'original_stream')"),
        ({"sequential": False}, "but sequential is False"),
        ({"refit": None}, "refit None and matching None. Use sequential=True"),
    ],
)
def test_recipes_that_do_not_go_with_it_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe(**{**REPAIRED, **changes})


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("switch_transformers", "is an encoder-decoder, which has two streams"),
        ("llama4_text", "not called with slots"),
    ],
)
def test_models_whose_streams_cannot_be_followed_are_refused_before_work(model_type, message, original):
    model = original(model_type) if model_type != "llama4_text" else tiny("llama4_text")
    with pytest.raises(ValueError, match=message):
        check_streams(model, find_layers(model))
