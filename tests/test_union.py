"""Unions of neurons in place of averaged experts: against sums written out, and what a budget means for them."""

import math

import pytest
import torch
from checkpoints import same_tensors, texts
from fit_layers import activation, packed_experts, routed, slow_outputs, with_targets_of
from fit_layers import random_gates as gates_of
from method_models import MODELS, method_model, seen_by_layers
from test_layer_compression import (
    FORMATS,
    GROUPS,
    HIDDEN,
    IMPORTANCE,
    NUM_EXPERTS,
    WIDTH,
    expert_output,
    merged,
    random_weights,
)
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, calibrate_moe, compress_moe, export_checkpoint
from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.in_memory import Collected
from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer import fit as layer_fit
from hf_mcsmoe.layer.fit import LEAST_SHARE, fit_experts
from hf_mcsmoe.layer.merging import MergedLayer, unite_groups
from hf_mcsmoe.layer.parts import in_parts
from hf_mcsmoe.layer.router import cut_router
from hf_mcsmoe.modeling.densify import densify
from hf_mcsmoe.observation.gated_features import apply_down
from hf_mcsmoe.observation.layer_inputs import LayerInputs
from hf_mcsmoe.observation.token_batches import RoutedTokens
from hf_mcsmoe.presets import PRESETS
from hf_mcsmoe.publishing import read_report
from hf_mcsmoe.recipe_reading import recipe_from_preset
from hf_mcsmoe.types import ExpertGroups, Routing

UNION = {"merging": "union", "selection": "gated_obs", "refit": "least_squares"}
RECIPE = Recipe(**UNION)
NUM_GROUPS = GROUPS.num_groups


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def weights(request):
    return random_weights(request.param)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def compressed(model, tokens, **changes):
    return compress_moe(model, recipe_from_preset("m-smoe-union", **changes), calibration=tokens, progress=False)


def reports(model):
    return model.compression_report.layers


def unions_of(weights, groups=GROUPS, importance=IMPORTANCE):
    return unite_groups(weights, groups, RECIPE, importance, {})


def assignment_of(groups):
    """(N, M): 1 where an expert is a member."""
    return (groups.group_of_expert[:, None] == torch.arange(groups.num_groups)).float()


def error_of(experts, batch):
    """Squared error of experts for the targets of a batch."""
    return (apply_down(experts, activation, batch) - batch.targets).square().sum().item()


def slow_shares(groups, importance):
    """The share of each expert in its group, a list; all of it for the dominant one where none counts."""
    shares = [0.0] * len(importance)
    for group, dominant in enumerate(groups.dominant_of_group.tolist()):
        members = [e for e, label in enumerate(groups.group_of_expert.tolist()) if label == group]
        total = sum(importance[e].item() for e in members)
        for e in members:
            shares[e] = importance[e].item() / total if total > 0 else float(e == dominant)
    return shares


# --- the operator


def test_a_union_gives_the_mean_of_its_members_under_the_sum_of_their_gates(weights):
    """sum over groups of (sum of members' gates) times (sum of share_i f_i(x)), token by token."""
    states = torch.randn(25, HIDDEN, generator=torch.Generator().manual_seed(2))
    gates = gates_of(25, NUM_EXPERTS, 3)
    shares = slow_shares(GROUPS, IMPORTANCE)
    expected = torch.zeros(25, HIDDEN, dtype=torch.float64)
    for token, x in enumerate(states.double()):
        for group in range(NUM_GROUPS):
            members = [e for e, label in enumerate(GROUPS.group_of_expert.tolist()) if label == group]
            gate = sum(gates[token, e].item() for e in members)
            expected[token] += gate * sum(shares[e] * expert_output(weights, e, x) for e in members)
    act = (lambda up, gate: torch.relu(up)) if weights.gate is None else activation  # noqa: ARG005
    found = apply_down(unions_of(weights), act, RoutedTokens(states, gates @ assignment_of(GROUPS), None))
    assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_gate_and_up_are_those_of_the_members_and_groups_of_one_stay_to_the_bit(weights):
    unions = unions_of(weights)
    assert unions.widths.tolist() == [WIDTH * len(GROUPS.members(group)) for group in range(NUM_GROUPS)]
    for group in range(NUM_GROUPS):
        members, found = GROUPS.members(group), unions.expert(group)
        for name, tensor in found.tensors().items():
            if name not in ("down", "down_bias"):
                assert torch.equal(tensor[0], weights.tensors()[name][members].flatten(0, 1)), name
    alone = unions.expert(0)  # expert 1
    assert all(torch.equal(tensor[0], weights.tensors()[name][1]) for name, tensor in alone.tensors().items())
    unused = unions.expert(2)  # nobody was used: the dominant expert, 6, alone
    assert torch.equal(unused.down[0, :, :WIDTH], weights.down[6]) and not unused.down[0, :, WIDTH:].any()


def test_copies_of_one_expert_make_a_union_that_is_that_expert(weights):
    copies = [tensor[:1].expand_as(tensor) for tensor in weights.tensors().values()]
    same = type(weights)(**dict(zip(weights.tensors(), copies, strict=True)))
    batch = routed(20, NUM_GROUPS, hidden=HIDDEN)
    one = PackedExperts.from_experts([type(weights)(**{n: t[:1] for n, t in same.tensors().items()})] * NUM_GROUPS)
    act = (lambda up, gate: torch.relu(up)) if weights.gate is None else activation  # noqa: ARG005
    assert_close(apply_down(unions_of(same), act, batch), apply_down(one, act, batch), rtol=1e-5, atol=1e-5)


# --- selection and refit under the gates of the groups


def test_neurons_of_all_members_compete_under_the_sum_of_the_gates():
    """Energies sum over tokens of (G_t a(x_t))^2 |share down|^2, with G_t the gate of the whole group."""
    weights, gates = random_weights(FORMATS["gated"]), gates_of(60, NUM_EXPERTS, 3)
    states = torch.randn(60, HIDDEN, generator=torch.Generator().manual_seed(3))
    batch = RoutedTokens(states, gates @ assignment_of(GROUPS), torch.zeros(60, HIDDEN))
    shares, energy = slow_shares(GROUPS, IMPORTANCE), []
    for group in range(NUM_GROUPS):
        for expert in GROUPS.members(group).tolist():
            for a in range(WIDTH):
                total = 0.0
                for t, x in enumerate(states.double()):
                    gate = sum(gates[t, e].item() for e in GROUPS.members(group).tolist())
                    up, inner = weights.up[expert, a].double() @ x, weights.gate[expert, a].double() @ x
                    total += (gate * activation(up, inner).item()) ** 2
                column = shares[expert] * weights.down[expert, :, a].double()
                energy.append(total * column.square().sum().item())
    unions = unions_of(weights)
    recipe = Recipe(**{**UNION, "selection": "gated_energy", "refit": None})
    found = fit_experts(unions, activation, recipe, 16, [batch], [])
    # 16 of 32 neurons: each of the 4 keeps at least 16 / 4 / 8 = 0 of them, so the budget is shared freely.
    kept = sorted(sorted(range(len(energy)), key=lambda a: -energy[a])[:16])
    assert torch.equal(found.experts.up, unions.up[kept])
    assert max(found.experts.widths.tolist()) > WIDTH
    from_others = [a for a in kept if a % WIDTH + WIDTH <= a - unions.offsets[unions.expert_of_neuron[a]].item()]
    assert from_others, "neurons of members that do not lead must be among them"


@pytest.mark.parametrize("layout", ["mapped", "native"])
@pytest.mark.parametrize("selection", ["gated_obs", "joint_obs"])
@pytest.mark.parametrize("seed", range(3))
def test_where_members_are_good_for_different_things_a_union_beats_the_average(seed, selection, layout):
    """Each member of a pair has its own half of neurons that answer: half of all neurons is all it takes."""
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(FORMATS["gated"], num_experts=6, seed=seed)
    weights.down[::2, :, : WIDTH // 2] = 0
    weights.down[1::2, :, WIDTH // 2 :] = 0
    groups = ExpertGroups(torch.arange(6) // 2, torch.tensor([0, 2, 4]))
    importance = torch.rand(6, generator=generator) + 0.1
    states, gates = torch.randn(200, HIDDEN, generator=generator), gates_of(200, 6, 2, seed)
    targets = slow_outputs(PackedExperts.from_dense(weights), RoutedTokens(states, gates, None)).float()
    batch = RoutedTokens(states, gates @ assignment_of(groups), targets)
    recipe = Recipe(layout=layout, **{**UNION, "selection": selection})
    united = fit_experts(unions_of(weights, groups, importance), activation, recipe, 3 * WIDTH, [batch], [])
    averaged = merged(weights, groups, importance, merging="weighted_average", alignment="weight_matching")
    plain = Recipe(layout=layout, refit="least_squares")
    averaged = fit_experts(PackedExperts.from_dense(averaged), activation, plain, 3 * WIDTH, [batch], [])
    errors = [error_of(x.experts, batch) for x in (united, averaged)]
    assert errors[0] < errors[1], errors
    if layout == "native":
        assert united.experts.widths.tolist() == [WIDTH] * 3
    # Nothing is lost by selection alone: neurons that never answer go first.
    assert all((united.experts.down != 0).any(1))


@pytest.mark.parametrize("name", MODELS)
def test_selections_by_statistics_take_those_of_the_member_that_a_neuron_is_from(name, tokens):
    """Energies sum over the tokens of that member of (g_t a(x_t))^2 |share down|^2."""
    model = method_model(name)
    seen = seen_by_layers(model, tokens)
    how = {"selection": "micro_expert_energy", "selection_options": {"alpha": 0.0}, "refit": None}
    compressed(model, load_calibration(tokens, held_out_fraction=0), **how)
    for of_layer, entry in zip(seen, reports(model), strict=True):
        groups = ExpertGroups(torch.tensor(entry.group_of_expert), torch.tensor(entry.dominant_of_group))
        shares, rows, place, least = slow_shares(groups, torch.tensor(of_layer.counts())), [], 0, []
        for group in range(groups.num_groups):
            of_group = []
            for expert in groups.members(group).tolist():
                gates = torch.where(of_layer.index == expert, of_layer.gates, 0.0).sum(1)
                energy = (gates[:, None] * of_layer.activations(expert)).square().sum(0)
                columns = shares[expert] * of_layer.weights.down[expert].T
                saliency = energy * columns.square().sum(1)
                of_group += [(saliency[a].item(), place + a, expert, a) for a in range(len(energy))]
                place += len(energy)
            of_group.sort(key=lambda row: (-row[0], row[1]))
            number = math.floor(LEAST_SHARE * sum(entry.widths) / groups.num_groups)
            least, rows = least + of_group[:number], rows + of_group[number:]
        rows.sort(key=lambda row: (-row[0], row[1]))
        kept = sorted(least + rows[: sum(entry.widths) - len(least)], key=lambda row: row[1])
        module = model.get_submodule(entry.layer)
        for neuron, (_, _, expert, a) in enumerate(kept):
            assert torch.equal(module.up[neuron].double(), of_layer.weights.up[expert, a])
            assert torch.equal(module.gate[neuron].double(), of_layer.weights.gate[expert, a])
            assert_close(module.down[neuron].double(), shares[expert] * of_layer.weights.down[expert, :, a])


# --- very wide experts


@pytest.mark.parametrize("names", FORMATS.values(), ids=FORMATS.keys())
def test_parts_of_an_expert_add_up_to_it(names):
    experts, batch = packed_experts(names, widths=(7, 0, 3, 2)), routed(30, 4)
    parts, seen = in_parts(experts, [batch], most=3)
    assert parts.widths.tolist() == [2, 2, 3, 0, 3, 2] and torch.equal(parts.up, experts.up)
    assert seen[0].gates.shape == (30, 6) and torch.equal(seen[0].gates[:, 1], batch.gates[:, 0])
    assert_close(apply_down(parts, activation, seen[0]), apply_down(experts, activation, batch), rtol=1e-5, atol=1e-5)
    same, batches = in_parts(experts, [batch], most=7)
    assert same is experts and batches == [batch]


def test_very_wide_experts_are_judged_and_fitted_in_parts(monkeypatch):
    experts = packed_experts(FORMATS["gated-bias"], widths=(12, 4, 9))
    batch = with_targets_of(packed_experts(FORMATS["gated-bias"], (12, 4, 9), seed=4), routed(300, 3), noise=0.1)
    recipe = Recipe(selection="gated_energy", refit="least_squares", refit_options={"ridges": (1e-3,)})
    monkeypatch.setattr(layer_fit, "MOST_JOINT_NEURONS", 0)
    of, solve = layer_fit.grams_of, layer_fit.refit_by_passes
    widest, solved, fitted = [], [], []
    for most in (100, 4):
        monkeypatch.setattr(layer_fit, "in_parts", lambda e, b, most=most: in_parts(e, b, most))
        monkeypatch.setattr(layer_fit, "grams_of", lambda *features: widest.append(of(*features)) or widest[-1])
        monkeypatch.setattr(layer_fit, "refit_by_passes", lambda e, *a: solved.append(max(e.widths)) or solve(e, *a))
        fitted.append(fit_experts(experts, activation, recipe, 14, [batch], []))
    assert [max(len(gram) for gram in grams) for grams in widest] == [12, 4]
    assert solved[0] > solved[1] and solved[1] <= 4
    whole, parts = fitted
    assert torch.equal(whole.experts.up, parts.experts.up)  # energies of single neurons know nothing of parts
    assert_close(parts.experts.down, whole.experts.down, rtol=0.05, atol=0.05)  # but the ridge of a part is its own
    errors = [error_of(one.experts, batch) for one in (parts, whole)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


# --- what a budget means


@pytest.mark.parametrize(
    ("changes", "experts", "neurons"),
    [
        ({"keep": 0.5}, 4, 64),
        ({"keep": 0.45}, 4, 58),  # 3.6 experts, 57.6 neurons
        ({"keep": 0.45, "layout": "native"}, 4, 64),  # as wide as they were
        ({"keep": 0.3, "layout": "native"}, 2, 32),
        ({"keep": 0.5, "keep_experts": 0.75}, 6, 64),
        ({"keep": 0.5, "keep_experts": 0.75, "layout": "native"}, 6, 48),  # a multiple of 8 each, so 8 of 10.7
        ({"keep": 0.5, "keep_experts": 0.25}, 2, 64),  # twice as wide
        ({"keep": 1.0, "keep_experts": 0.25}, 2, 128),
        ({"keep": 1.0}, 8, 128),
    ],
)
def test_keep_is_the_share_of_the_neurons_and_of_the_experts(changes, experts, neurons):
    recipe = Recipe(**UNION, **changes)
    assert recipe.experts_per_layer(8) == experts
    assert recipe.neurons_per_layer(8, 16, experts) == neurons
    if recipe.layout == "native" and recipe.keep_experts is None:
        assert recipe.neurons_per_layer(8, 768, experts) == experts * 768  # though 0.45 of 8 are less than 4 experts


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": None, "refit": None}, r"merging 'union' keeps the neurons.*Use selection='joint_obs'"),
        ({"selection": None, "num_experts": 4}, r"merging 'union' keeps the neurons of all members"),
        ({"grouping": "drop"}, r"grouping 'drop' drops experts.*Use grouping='dominant_experts', or merging=None"),
        ({"keep_experts": 0.25, "layout": "native"}, r"keep_experts is 0.25, it must be in \[keep, 1\]"),
        ({"keep_experts": 0.0}, r"keep_experts is 0.0, it must be in \(0, 1\]"),
        ({"keep_experts": 1.5}, r"keep_experts is 1.5, it must be in \(0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**{**UNION, **changes})


def test_without_a_selection_only_everything_may_stay(original, tokens, prompt):
    recipe = Recipe(merging="union", keep=1.0)
    result = compress_moe(original("gpt_oss"), recipe, calibration=tokens, progress=False)
    assert torch.equal(logits(result, prompt), logits(original("gpt_oss"), prompt))


def test_the_preset_is_m_smoe_but_for_the_merge():
    recipe, m_smoe = recipe_from_preset("m-smoe-union"), recipe_from_preset("m-smoe")
    same = ("saliency", "similarity", "grouping", "importance", "layout")
    assert all(getattr(recipe, name) == getattr(m_smoe, name) for name in same)
    assert PRESETS["m-smoe-union"].recipe["merging"] == "union" and recipe.needs_inputs and not recipe.aligns
    assert not Recipe(**UNION, alignment="weight_matching").aligns


# --- whole models


@pytest.mark.parametrize("keep_experts", [None, 0.25])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_mapped_experts_become_wider_than_they_were(model_type, keep_experts, original, tokens, prompt, tmp_path):
    result = compressed(original(model_type), tokens, keep_experts=keep_experts)
    width = find_layers(original(model_type))[0].intermediate_size
    for entry in reports(result):
        assert len(entry.widths) == entry.num_experts_after == (4 if keep_experts is None else 2)
        assert sum(entry.widths) == 4 * width and max(entry.widths) > width
        assert len(set(entry.group_of_expert)) == entry.num_experts_after
    result.save_pretrained(tmp_path / "mapped")
    again, expected = AutoModelForCausalLM.from_pretrained(tmp_path / "mapped"), logits(result, prompt)
    assert torch.equal(logits(again, prompt), expected)
    densify(again)  # as wide as the widest
    assert_close(logits(again, prompt), expected, rtol=1e-4, atol=1e-5)
    again.save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(logits(dense, prompt), logits(again, prompt))


def test_the_native_result_is_a_plain_model_as_wide_as_before(original, tokens, prompt, tmp_path):
    result = compressed(original("qwen3_moe"), tokens, layout="native")
    before = original("qwen3_moe").config
    assert type(result) is type(original("qwen3_moe")) and result.config.num_experts == 4
    assert result.config.moe_intermediate_size == before.moe_intermediate_size
    assert all(entry.widths == [before.moe_intermediate_size] * 4 for entry in reports(result))
    result.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), prompt), logits(result, prompt))


def test_a_mapped_result_can_be_exported_though_experts_are_wider(write_compressed, original, prompt, tmp_path):
    mapped = write_compressed("qwen3_moe", **UNION)
    export_checkpoint(mapped, tmp_path / "plain", progress=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    widest = max(max(entry["widths"]) for entry in read_report(mapped)["layers"])
    assert plain.config.moe_intermediate_size >= widest > find_layers(original("qwen3_moe"))[0].intermediate_size
    assert logits(plain, prompt).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["mapped", "native"])
@pytest.mark.parametrize("changes", [{}, {"sequential": True}, {"sequential": True, "targets": "original_stream"}])
def test_streaming_gives_the_same(changes, layout, checkpoint, stream, tokens, tmp_path):
    recipe = {"layout": layout, **UNION, "selection": "joint_obs", "alignment": None, **changes}
    folder = checkpoint("qwen3_moe")
    stream(folder, **recipe)
    where = {"output_dir": tmp_path / "whole", "executor": "in_memory", "progress": False}
    compress_moe(folder, Recipe(**recipe), calibration=tokens, **where)
    assert same_tensors(tmp_path / "streamed", tmp_path / "whole")
    assert texts(tmp_path / "streamed") == texts(tmp_path / "whole")


def test_saved_statistics_serve_it(original, tokens, prompt, tmp_path):
    recipe = recipe_from_preset("m-smoe-union", keep=0.4)
    calibrate_moe(original("qwen3_moe"), [recipe], tmp_path / "saved", calibration=tokens, progress=False)
    result = compress_moe(original("qwen3_moe"), recipe, calibration=tmp_path / "saved", progress=False)
    direct = compress_moe(original("qwen3_moe"), recipe, calibration=tokens, progress=False)
    assert torch.equal(logits(result, prompt), logits(direct, prompt))


def test_router_rules_are_judged_by_the_unions_not_by_what_the_module_holds(original, monkeypatch):
    layer = find_layers(original("qwen3_moe"))[0]
    groups = ExpertGroups(torch.arange(8).clamp(max=3), torch.arange(4))
    stacked = {name: p.detach()[:4].clone() for name, p in layer.expert_parameters.items()}
    weights = layer.family.view(layer, {name: p.detach() for name, p in layer.expert_parameters.items()})
    unions = unite_groups(weights, groups, RECIPE, torch.ones(8), {})
    hidden = torch.randn(30, layer.hidden_size, generator=torch.Generator().manual_seed(1))
    index, gates = layer.family.route(layer, (hidden,), {})
    inputs = LayerInputs([(hidden, index, gates)], [((hidden,), {})])
    merged_layer = MergedLayer(groups, Routing(rows=groups.dominant_of_group), stacked, unions=unions)
    assert merged_layer.experts_kept.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    recipe = Recipe(layout="native", router="log_sum_exp", **UNION)
    act = layer.family.activation(layer)
    monkeypatch.setattr("hf_mcsmoe.layer.router.routed_output", lambda *_, **__: pytest.fail("dominant experts only"))
    wanted = [torch.ones(30, layer.hidden_size)]
    errors = cut_router(layer, recipe, merged_layer, Collected(None, inputs, inputs), wanted)
    index, gates = layer.family.route(layer, (hidden,), {})
    dense = torch.zeros(30, 4).scatter_add(1, index, gates)
    output = apply_down(unions, act, RoutedTokens(hidden, dense, None))
    found = ((output - wanted[0]).square().sum() / wanted[0].square().sum()).item()
    assert (errors.rule if errors.is_kept else errors.dominant_rows) == pytest.approx(found, rel=1e-5)
