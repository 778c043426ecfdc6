"""Layers that keep different shares of their neurons: what is measured, and what becomes of whole models."""

import dataclasses

import pytest
import torch
from test_layer_fit import fit, reports
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, calibrate_moe, compress_moe, neuron_allocation, plan
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.estimation import estimate
from hf_mcsmoe.executors import kept_inputs
from hf_mcsmoe.executors.gradients import next_token_loss
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer import fit as layer_fit
from hf_mcsmoe.layer import removal
from hf_mcsmoe.layer.removal import removal_curve
from hf_mcsmoe.observation.gated_features import sum_features
from hf_mcsmoe.observation.layer_inputs import LayerInputs
from hf_mcsmoe.observation.layer_tokens import original_tokens
from hf_mcsmoe.refit.least_squares import mean_energies
from hf_mcsmoe.selection import joint_obs
from hf_mcsmoe.selection.gated_obs import saliency_by_gated_obs

RULES = ("removal_curve", "fisher_curve")
DROP = {"similarity": None, "grouping": "drop", "alignment": None, "merging": None}
OURS = {"selection": "joint_obs", "refit": "least_squares", **DROP}
CORRECTED = {"sequential": True, "targets": "original_stream"}
NEURONS = 8 * 24  # of each of the 3 layers of the tiny Qwen3-MoE


def neurons_of(model):
    return [sum(report.widths) for report in reports(model)]


@pytest.fixture(scope="module")
def padded():
    """Rows of different lengths."""
    ids = torch.randint(3, 150, (24, 20), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[::3, :6] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def seen(original, padded):
    """A model, its first layer, and what that was given."""
    model = original("qwen3_moe")
    data = load_calibration(padded, batch_size=5)
    layers = find_layers(model)
    how = {"calibration_tokens": 300, "held_out_tokens": 50, "progress": False}
    return layers[0], collect(model, layers, data, frozenset(), **how)[layers[0].name]


@pytest.mark.parametrize("options", [{}, {"ridge": 0.03, "block": 0.3}])
def test_a_curve_is_the_held_in_error_of_the_refit(seen, options):
    layer, collected = seen
    curve = removal_curve(layer, Recipe(**OURS, selection_options=options), collected, 40)
    tokens = original_tokens(layer, collected)
    experts = tokens.features.experts
    sums = sum_features(experts, tokens.activation, tokens.calibration)
    ridge = options.get("ridge", 1e-3) * mean_energies(sums.gram, experts.offsets.tolist())
    down = experts.down.double()

    def minimum(kept):
        """Of |y - phi W|^2 + sum_a r_a |W_a - down_a|^2 over W that are 0 elsewhere, for each token."""
        system, wanted = sums.gram[kept][:, kept] + ridge[kept].diag(), (sums.cross + ridge[:, None] * down)[kept]
        best = torch.zeros_like(down).index_copy(0, kept, torch.linalg.solve(system, wanted))
        return (sums.error(best) + (ridge[:, None] * (best - down).square()).sum().item()) / sums.num_tokens

    order = curve.saliency.argsort()
    assert curve.costs.shape == (NEURONS,) and curve.costs[:-40].isfinite().all() and curve.costs[-40:].isinf().all()
    start = minimum(torch.arange(NEURONS))
    assert start == pytest.approx(0, abs=1e-6)  # the original experts give what is wanted
    for number in (1, 50, 120, NEURONS - 40):
        error = minimum(order[number:].sort().values)
        assert curve.costs[:number].sum().item() == pytest.approx(error - start, rel=1e-4)


def test_a_large_layer_takes_the_costs_of_its_experts_alone(seen, monkeypatch):
    layer, collected = seen
    joint = removal_curve(layer, Recipe(**OURS), collected, 40)
    monkeypatch.setattr(layer_fit, "MOST_JOINT_NEURONS", NEURONS - 1)
    curve = removal_curve(layer, Recipe(**OURS), collected, 40)
    tokens = original_tokens(layer, collected)
    saliency = saliency_by_gated_obs(tokens.features.experts, grams=layer_fit.grams_of(tokens.features))
    num_tokens = sum(len(batch.gates) for batch in tokens.calibration)
    assert torch.equal(curve.saliency, saliency) and curve.costs[-40:].isinf().all()
    torch.testing.assert_close(curve.costs[:100], saliency.sort().values[:100] / num_tokens)
    assert curve.costs[:-40].sum() > joint.costs[:-40].sum()  # other experts cannot make up for a neuron


@pytest.mark.parametrize("most", [0, NEURONS])
def test_no_expert_falls_below_its_least_width_on_the_way(most, seen, monkeypatch):
    layer, collected = seen
    monkeypatch.setattr(layer_fit, "MOST_JOINT_NEURONS", most)
    free = removal_curve(layer, Recipe(**OURS), collected, 130)
    monkeypatch.setattr(layer_fit, "LEAST_SHARE", 0.95)  # 15 of about 16 neurons
    bound = removal_curve(layer, Recipe(**OURS), collected, 130)
    assert bound.costs.isinf().sum() == free.costs.isinf().sum() == 130
    assert bound.costs[:-130].sum() > free.costs[:-130].sum()
    if most:
        widths_of = [(one.saliency.argsort()[-130:] // 24).bincount(minlength=8) for one in (free, bound)]
        assert widths_of[0].min() < widths_of[1].min() == 15


def test_a_token_with_a_huge_output_does_not_decide_what_a_layer_loses(seen):
    layer, collected = seen
    (states, index, weights), *others = collected.calibration.experts_inputs
    sink = torch.where(torch.arange(len(states)) == 7, 1000, 1)[:, None] * states
    inputs = dataclasses.replace(collected.calibration, experts_inputs=[(sink, index, weights), *others], outputs=[])
    found = removal_curve(layer, Recipe(**OURS), dataclasses.replace(collected, calibration=inputs), 40)
    expected = removal_curve(layer, Recipe(**OURS), collected, 40)
    assert 1 < found.costs[:-40].sum() / expected.costs[:-40].sum() < 3


def test_a_layer_without_tokens_has_nothing_to_lose(seen):
    layer, collected = seen
    curve = removal_curve(layer, Recipe(**OURS), dataclasses.replace(collected, calibration=LayerInputs()), 40)
    assert (curve.costs[:-40] == 0).all() and curve.costs[-40:].isinf().all() and curve.saliency.isfinite().all()


def test_the_statistics_are_those_of_the_stream_and_of_the_loss(original, padded):
    model, data = original("qwen3_moe"), load_calibration(padded, batch_size=5)
    layers = find_layers(model)
    found = collect(model, layers, data, frozenset({"stream_energy", "output_gradient_energy"}), progress=False)
    streams, gradients, outputs = [0.0] * len(layers), [0.0] * len(layers), []
    for layer in layers:
        layer.experts.register_forward_hook(lambda *called: outputs.append(called[2]))
    for batch in data.batches:
        if batch.held_out:
            continue
        outputs.clear()
        result = model(**batch.inputs, output_hidden_states=True)
        loss = next_token_loss(result.logits, batch.inputs["input_ids"], batch.token_mask)
        real = batch.token_mask.flatten()
        for place, state in enumerate(result.hidden_states[1:-1]):  # the last ones are normalised
            streams[place] += state.flatten(0, 1)[real].double().square().sum().item()
        for place, gradient in enumerate(torch.autograd.grad(loss, outputs)):
            gradients[place] += gradient.reshape(len(real), -1)[real].double().square().sum().item()
    for place, layer in enumerate(layers):
        statistics = found[layer.name].statistics
        assert statistics["output_gradient_energy"].item() == pytest.approx(gradients[place], rel=1e-4)
        if place < len(layers) - 1:
            assert statistics["stream_energy"].item() == pytest.approx(streams[place], rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", [0.3, 0.77])
def test_the_total_is_exact_and_layers_keep_their_least(rule, keep, original, padded):
    recipe = {"keep": keep, "allocation": rule, "allocation_options": {"min_share": 0.6}, **OURS}
    model = fit(original("qwen3_moe"), padded, **recipe)
    share = Recipe(**recipe).neurons_per_layer(8, 24, 8)
    kept, planned = neurons_of(model), plan(original("qwen3_moe"), Recipe(**recipe))
    assert sum(kept) == 3 * share and len(set(kept)) > 1
    assert min(kept) >= int(0.6 * share)
    assert planned.expert_parameters_after == sum(report.parameters_after for report in reports(model))
    assert all(layer.is_average for layer in planned.layers)
    assert f"allocation '{rule}' spends {3 * share} neurons on 3 layers" in " ".join(planned.notes)


@pytest.mark.parametrize("rule", RULES)
def test_a_layer_keeps_its_share_where_that_is_the_least(rule, original, padded):
    """Then the result is that of the uniform allocation to the bit."""
    how = {"keep": 0.5, **OURS, "selection": "gated_obs"}
    same = fit(original("qwen3_moe"), padded, allocation=rule, allocation_options={"min_share": 1}, **how)
    uniform = fit(original("qwen3_moe"), padded, **how)
    expected = uniform.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in same.state_dict().items())


def test_nothing_is_measured_where_all_neurons_stay(original, padded, monkeypatch):
    monkeypatch.setattr(neuron_allocation, "removal_curve", None)
    before = original("qwen3_moe").state_dict()
    model = fit(original("qwen3_moe"), padded, keep=1.0, allocation="removal_curve", **OURS)
    assert neurons_of(model) == [NEURONS] * 3
    assert all(torch.equal(model.get_parameter(name), t) for name, t in before.items() if "down_proj" in name)


def test_a_layer_may_keep_all_its_neurons_and_the_result_loads(original, padded, tmp_path):
    model = original("qwen3_moe")
    layer = find_layers(model)[1]
    layer.experts.down_proj.data *= 100
    recipe = Recipe(keep=0.6, allocation="removal_curve", **OURS)
    expected = plan(model, recipe).expert_parameters_after
    compress_moe(model, recipe, calibration=padded, output_dir=tmp_path / "out", progress=False)
    kept = neurons_of(model)
    assert kept[1] == NEURONS and sum(kept) == 3 * int(0.6 * NEURONS + 0.5)
    assert sum(report.parameters_after for report in reports(model)) == expected
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(**padded).logits, model(**padded).logits)


@pytest.mark.parametrize(("changes", "times"), [({}, 3), (CORRECTED, 6), ({"selection": "gated_obs"}, 3)])
def test_a_layer_is_taken_apart_once_where_its_tokens_stay_the_same(changes, times, original, padded, monkeypatch):
    calls, joint_removals = [], joint_obs.joint_removals

    def counted(*args, **options):
        calls.append(0)
        return joint_removals(*args, **options)

    monkeypatch.setattr(joint_obs, "joint_removals", counted)
    monkeypatch.setattr(removal, "joint_removals", counted)
    model = fit(original("qwen3_moe"), padded, keep=0.5, allocation="removal_curve", **{**OURS, **changes})
    assert len(calls) == times and len(set(neurons_of(model))) > 1


def test_curves_are_of_the_original_model_however_its_tokens_are_collected(original, padded, monkeypatch):
    how = {"keep": 0.5, "allocation": "removal_curve", **OURS}
    at_once = fit(original("qwen3_moe"), padded, **how)
    corrected = fit(original("qwen3_moe"), padded, **how, **CORRECTED)
    monkeypatch.setattr(kept_inputs, "MOST_BYTES", 1)
    in_groups = fit(original("qwen3_moe"), padded, **how)
    assert neurons_of(at_once) == neurons_of(corrected) == neurons_of(in_groups)
    expected = at_once.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in in_groups.state_dict().items())


@pytest.mark.parametrize("rule", RULES)
def test_saved_statistics_serve_as_well(rule, original, padded, tmp_path):
    recipe = Recipe(keep=0.5, allocation=rule, **OURS)
    calibrate_moe(original("qwen3_moe"), [recipe], tmp_path, calibration=padded, progress=False)
    model = compress_moe(original("qwen3_moe"), recipe, calibration=tmp_path, progress=False)
    direct = compress_moe(original("qwen3_moe"), recipe, calibration=padded, progress=False)
    expected = direct.state_dict()
    assert len(set(neurons_of(model))) > 1
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_model_on_the_disk_is_loaded_instead_of_streamed(original, padded, tmp_path, caplog):
    original("qwen3_moe").save_pretrained(tmp_path / "model")
    recipe = Recipe(keep=0.5, allocation="removal_curve", **OURS)
    model = compress_moe(tmp_path / "model", recipe, calibration=padded, output_dir=tmp_path / "out", progress=False)
    assert "cannot be streamed: its recipe's allocation 'removal_curve' looks at the neurons of all" in caplog.text
    assert neurons_of(model) == neurons_of(fit(original("qwen3_moe"), padded, **recipe.to_dict()))


@pytest.mark.parametrize("changes", [{}, CORRECTED])
def test_forwards_are_those_that_were_estimated(changes, original, padded, monkeypatch):
    """Two batches, one of them held out: first for statistics, then for what layers lose, then for each layer."""
    recipe = Recipe(keep=0.5, allocation="removal_curve", **OURS, **changes)
    model, forwards = original("qwen3_moe"), []
    monkeypatch.setattr(kept_inputs, "MOST_BYTES", 1 if not changes else kept_inputs.MOST_BYTES)
    said = estimate(model, recipe)
    model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: forwards.append(0))
    compress_moe(model, recipe, calibration={"input_ids": padded["input_ids"][:8]}, batch_size=8, progress=False)
    checks = 2 if changes else 0  # one batch, twice: whether the residual stream can be followed
    assert (len(forwards) - checks) / 2 == said["in_memory"].passes == (7 if not changes else 4)
    assert "looks at the neurons of all layers" in said["streaming"].impossible
