"""Statistics of gradients against autograd on one token after the other, HEAPr and Fisher merging against loops."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from slow_moe import MODELS, STUDIED, padded, ragged_rows, slow_layers
from torch import nn
from torch.testing import assert_close

from hf_mcsmoe import MergedSparseMoeConfig, Recipe, compress_moe, load_calibration
from hf_mcsmoe.executors import gradients
from hf_mcsmoe.executors.accumulator import StatisticsAccumulator
from hf_mcsmoe.executors.gradients import batches_with_backward, next_token_loss
from hf_mcsmoe.executors.in_memory import collect, collect_statistics
from hf_mcsmoe.executors.shards import NotStreamableError
from hf_mcsmoe.executors.streaming import compress_by_streaming
from hf_mcsmoe.expert_values import PackedExperts
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.merging import MERGING
from hf_mcsmoe.observation.observed import ObservedTokens
from hf_mcsmoe.selection import SELECTION
from hf_mcsmoe.types import ExpertWeights, LayerStatistics

ROWS = slice(0, 4)
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("nemotron_h", "gemma4_text", "granitemoe")]
NAMES = frozenset({"fisher", "activation_energy", "neuron_gradient_energy"})
BIG = NAMES | {"gated_activation_energy", "gated_activation_peak"}


@pytest.fixture(scope="module", params=STUDIED)
def studied(request, original, tokens):
    """(model, rows, layers by the slow reference, d loss / d output of the experts for each of their tokens)."""
    model = original(request.param, **MODELS[request.param], num_hidden_layers=2)
    rows = ragged_rows(tokens)[ROWS]
    return model, rows, slow_layers(model, rows), output_gradients(model, rows)


def output_gradients(model, rows):
    """By adding zeros that require a gradient to what the experts give, row by row."""
    found = find_layers(model)
    gradients = [[] for _ in found]
    for row in rows:
        zeros, handles = [], []
        for layer in found:
            zero = torch.zeros(len(row), layer.hidden_size, requires_grad=True)
            zeros.append(zero)
            handles.append(layer.experts.register_forward_hook(adding(zero)))
        logits = model(input_ids=torch.tensor([row])).logits[0]
        loss = sum(-logits[t].log_softmax(-1)[row[t + 1]] for t in range(len(row) - 1))
        for place, gradient in enumerate(torch.autograd.grad(loss, zeros)):
            gradients[place] += list(gradient.double())
        for handle in handles:
            handle.remove()
    return gradients


def adding(zero):
    return lambda *call: call[-1] + zero.view_as(call[-1])


def squared_gradients(layer, e, gammas):
    """Sum over tokens of the squared gradients of (gate, up, down) of an expert, one token after the other."""
    gate, up = (half.clone().requires_grad_() for half in layer.gate_up[e].chunk(2))
    down = layer.down[e].clone().requires_grad_()
    total = [torch.zeros_like(matrix) for matrix in (gate, up, down)]
    for token, gamma in zip(layer.tokens, gammas, strict=True):
        if e in token.gates:
            output = down @ (nn.functional.silu(gate @ token.hidden) * (up @ token.hidden))
            share = token.gates[e] * (gamma @ output)
            for sums, one in zip(total, torch.autograd.grad(share, (gate, up, down)), strict=True):
                sums += one**2
    return torch.cat([sums.flatten() for sums in total])


def heapr(layer, e, gammas):
    """With the (D, D) matrix of the paper."""
    routed = [
        (g, token, gamma)
        for token, gamma in zip(layer.tokens, gammas, strict=True)
        for i, g in token.gates.items()
        if i == e
    ]
    if not routed:
        return torch.full((layer.down.shape[2],), -1.0, dtype=torch.float64)
    matrix = sum(torch.outer(g * gamma, g * gamma) for g, _, gamma in routed) / len(routed)
    energy = sum(layer.activation(e, token.hidden) ** 2 for _, token, _ in routed) / len(routed)
    return energy * torch.stack([column @ matrix @ column for column in layer.down[e].T])


def test_gradient_statistics_are_those_of_autograd_token_by_token(studied):
    model, rows, slow, gammas = studied
    found, _ = collect_statistics(model, find_layers(model), padded(rows, batch_size=3), NAMES)
    for layer, of_layer, statistics in zip(slow, gammas, found.values(), strict=True):
        expected = torch.stack([squared_gradients(layer, e, of_layer) for e in range(layer.num_experts)])
        assert statistics["fisher"].dtype == torch.float32, "one copy of the experts"
        assert statistics["fisher"].numel() == layer.gate_up.numel() + layer.down.numel()
        assert_close(statistics["fisher"].double(), expected, rtol=1e-3, atol=1e-6 * expected.max().item())
        assert statistics["neuron_gradient_energy"].shape == (layer.num_experts, layer.down.shape[2])
        assert statistics["activation_energy"].shape == (layer.num_experts, layer.down.shape[2])


def test_heapr_keeps_the_neurons_of_the_papers_score(studied):
    model, rows, slow, gammas = studied
    recipe = MergedSparseMoeConfig.from_preset("heapr")
    result = compress_moe(copy.deepcopy(model), recipe, calibration=padded(rows), progress=False)
    assert type(result) is type(model)
    for layer, of_layer, small in zip(slow, gammas, find_layers(result), strict=True):
        for e in range(layer.num_experts):
            score = heapr(layer, e, of_layer)
            if score[0] < 0:
                continue
            best = score.argsort(descending=True)[: small.intermediate_size].sort().values
            assert torch.equal(small.experts.down_proj[e], layer.down[e][:, best].float())


def test_heapr_neurons_compete_in_the_mapped_layout_and_unused_experts_lose(studied):
    model, rows, slow, gammas = studied
    recipe = MergedSparseMoeConfig.from_preset("heapr", layout="mapped", keep=0.75)
    result = compress_moe(copy.deepcopy(model), recipe, calibration=padded(rows), progress=False)
    layer, report = slow[0], result.compression_report.layers[0]
    width = layer.down.shape[2]
    budget = round(0.75 * layer.num_experts * width)
    least = budget // layer.num_experts // 8
    scores = [heapr(layer, e, gammas[0]).sort(descending=True).values for e in range(layer.num_experts)]
    last = torch.cat([s[least:] for s in scores]).sort(descending=True).values[budget - least * layer.num_experts - 1]
    assert sum(report.widths) == budget
    assert report.widths == [least + int((s[least:] >= last).sum()) for s in scores]


def test_fisher_merging_weighs_every_weight_by_its_own_information(studied):
    model, rows, slow, gammas = studied
    recipe = MergedSparseMoeConfig.from_preset("m-smoe-fisher", alignment=None, allocation="uniform")
    result = compress_moe(copy.deepcopy(model), recipe, calibration=padded(rows), progress=False)
    layer, report = slow[1], result.compression_report.layers[1]
    information = [squared_gradients(layer, e, gammas[1]) for e in range(layer.num_experts)]
    weights = [torch.cat([layer.gate_up[e].flatten(), layer.down[e].flatten()]) for e in range(layer.num_experts)]
    small = find_layers(result)[1].experts
    for group in range(report.num_experts_after):
        members = [e for e, of in enumerate(report.group_of_expert) if of == group]
        total = sum(information[e] for e in members)
        expected = sum(information[e] * weights[e] for e in members) / total
        expected = torch.where(total > 0, expected, sum(weights[e] for e in members) / len(members))
        got = torch.cat([small.gate_up_proj[group].flatten(), small.down_proj[group].flatten()])
        assert_close(got.double(), expected, rtol=1e-3, atol=1e-5)


def test_fisher_merging_by_hand_with_an_order():
    experts = ExpertWeights(up=torch.tensor([[[1.0], [2.0]], [[5.0], [6.0]]]), down=torch.zeros(2, 1, 2))
    # Of expert 2, whose neurons change places: [up (2, 1), down (1, 2)].
    fisher = torch.tensor([[9.0] * 4, [3.0, 0.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]])
    statistics = LayerStatistics(1, torch.tensor([1, 1, 1]), {"fisher": fisher})
    order = torch.tensor([[0, 1], [0, 1], [1, 0]])
    merged = MERGING["fisher"](
        experts, torch.ones(2), members=torch.tensor([1, 2]), order=order, statistics=statistics
    )
    assert merged.up.flatten().tolist() == [(3 * 1 + 1 * 5) / 4, (0 * 2 + 2 * 6) / 2]
    nothing = LayerStatistics(1, torch.tensor([0, 0, 0]), {"fisher": torch.zeros(3, 4)})
    plain = MERGING["fisher"](experts, torch.ones(2), members=torch.tensor([1, 2]), order=None, statistics=nothing)
    assert plain.up.flatten().tolist() == [3.0, 4.0]


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3", *SLOW])
def test_fisher_merging_of_other_families(original, tokens, prompt, model_type):
    model = original(model_type)
    layer = find_layers(model)[0]
    found = collect(model, [layer], padded(ragged_rows(tokens)[ROWS]), frozenset({"fisher"}))[layer.name].statistics
    assert found["fisher"].shape == (8, layer.parameters_per_expert)
    assert (found["fisher"].sum(1) > 0).tolist() == (found.selection_count > 0).tolist()
    with torch.no_grad():
        result = compress_moe(model, "m-smoe-fisher", calibration=tokens, progress=False)
        assert torch.isfinite(result(input_ids=prompt).logits).all()


def test_padding_counts_neither_as_given_nor_as_predicted(original, tokens):
    model, rows = original("mixtral"), ragged_rows(tokens)[ROWS]
    layers = find_layers(model)
    one_by_one, _ = collect_statistics(model, layers, padded(rows, batch_size=1), NAMES)
    together, _ = collect_statistics(model, layers, padded(rows[::-1], batch_size=4), NAMES)
    for name, statistics in one_by_one.items():
        for what in NAMES:
            largest = statistics[what].max().item()
            assert_close(together[name][what], statistics[what], rtol=1e-3, atol=1e-6 * largest)


def test_the_loss_is_that_of_real_tokens_after_real_tokens():
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 2, 3, 0], [0, 4, 2, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 2] + log_p[0, 1, 3] + log_p[1, 1, 2] + log_p[1, 2, 1])
    assert_close(next_token_loss(logits, ids, mask), expected)


def test_a_pass_leaves_the_model_as_it_was(original, tokens, monkeypatch):
    model = original("qwen3_moe")
    model.lm_head.requires_grad_(False)
    model.train()
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    flags = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    monkeypatch.setattr(gradients, "GRAPH_BYTES", 0)
    collect_statistics(model, find_layers(model), padded(ragged_rows(tokens)[ROWS]), NAMES)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert flags == [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_layers_without_room_for_their_graph_are_checkpointed_and_counted_once(original, tokens, monkeypatch):
    model = original("mixtral")
    data, layers = padded(ragged_rows(tokens)[ROWS]), find_layers(model)
    calls = [[] for _ in layers]
    for one, of_layer in zip(model.model.layers, calls, strict=True):
        monkeypatch.setattr(one.self_attn, "forward", counted(one.self_attn.forward, of_layer))
    once, _ = collect_statistics(model, layers, data, frozenset({"selection_count"}))
    size, found = gradients.graph_bytes(model, layers, data), []
    for room, runs in (
        (2 * size - 1, [2] * (len(layers) - 1) + [1]),
        (0, [2] * len(layers)),
        (2**31, [1] * len(layers)),
    ):
        monkeypatch.setattr(gradients, "GRAPH_BYTES", room)
        for of_layer in calls:
            of_layer.clear()
        found.append(collect_statistics(model, layers, data, NAMES)[0])
        assert [len(of_layer) for of_layer in calls] == [n * len(data.batches) for n in runs]
    for name, statistics in found[0].items():
        assert torch.equal(statistics.selection_count, once[name].selection_count)
        assert statistics.num_tokens == once[name].num_tokens
        for other in found[1:]:
            assert all(torch.equal(statistics[key], other[name][key]) for key in NAMES)


def test_the_graph_of_a_layer_takes_no_more_than_is_said(original, tokens):
    model = original("mixtral")
    data, layers, saved = load_calibration(tokens), find_layers(model), {}

    def note(tensor):
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with gradients.differentiable(model, 1), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = model.model(**data.batches[0].inputs, use_cache=False).last_hidden_state
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    total = sum(size for place, size in saved.items() if place not in weights)
    said = gradients.graph_bytes(model, layers, data) * len(model.model.layers)
    assert states.requires_grad and said / 8 < total <= said


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("preset", ["heapr", "camera-p", "m-smoe-fisher"])
def test_a_bfloat16_model_has_nearly_the_same_statistics_and_stays_bfloat16(original, tokens, preset):
    # Not the same neurons: rounding in the forward changes the order of neurons that are nearly alike.
    recipe = MergedSparseMoeConfig.from_preset(preset, sequential=False)
    data, needs = load_calibration(tokens[:1, :4]), recipe.to_recipe().statistics_needed() & BIG
    narrow = original("mixtral").to(torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    found = [collect_statistics(model, find_layers(model)[:1], data, needs)[0] for model in (narrow, wide)]
    for one, other in zip(*(statistics.values() for statistics in found), strict=True):
        assert torch.equal(one.selection_count, other.selection_count)
        for name in needs:
            assert (one[name] - other[name]).norm() < 0.05 * other[name].norm()
    result = compress_moe(narrow, recipe, calibration=tokens, progress=False)
    assert {p.dtype for p in result.parameters()} == {torch.bfloat16}


def test_held_out_batches_have_no_say(original, tokens):
    rows = ragged_rows(tokens)
    model, data = original("mixtral"), load_calibration(rows, batch_size=6, held_out_fraction=0.3)
    kept = type(data)(tuple(b for b in data.batches if not b.held_out), "kept")
    mine, alone = (collect_statistics(model, find_layers(model), x, NAMES)[0] for x in (data, kept))
    for name, statistics in mine.items():
        assert torch.equal(statistics["fisher"], alone[name]["fisher"])


@pytest.mark.slow
def test_a_part_of_the_batches_runs_backward_and_all_of_them_forward(original, tokens):
    model, data = original("mixtral"), padded(ragged_rows(tokens), batch_size=1)
    layers, needs = find_layers(model), NAMES | {"gradient_count"}
    places = sorted(batches_with_backward(data, data.num_tokens // 2))
    part = type(data)(tuple(data.batches[place] for place in places), "part")
    assert len(places) < len(data.batches) and places[0] > 0, "evenly spaced"
    assert batches_with_backward(data, None) == batches_with_backward(data, 10**9) == set(range(len(data.batches)))
    found = collect_statistics(model, layers, data, needs, gradient_tokens=data.num_tokens // 2)[0]
    of_part = collect_statistics(model, layers, part, needs)[0]
    of_all = collect_statistics(model, layers, data, needs)[0]
    for name, statistics in found.items():
        for of_gradients in ("fisher", "neuron_gradient_energy", "gradient_count"):
            assert torch.equal(statistics[of_gradients], of_part[name][of_gradients])
        assert torch.equal(statistics["gradient_count"], of_part[name].selection_count)
        assert torch.equal(statistics["activation_energy"], of_all[name]["activation_energy"])
        assert torch.equal(of_all[name]["gradient_count"], of_all[name].selection_count)


def test_an_expert_without_gradients_takes_them_to_be_as_long_as_those_of_the_layer():
    down = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [5.0, 5.0], [5.0, 5.0]])  # 3 experts x 2
    experts = PackedExperts(offsets=torch.tensor([0, 2, 4, 6]), up=torch.zeros(6, 2), down=down)
    sums = {
        "gradient_count": torch.tensor([2, 0, 0]),
        "activation_energy": torch.tensor([[8.0, 4.0], [6.0, 3.0], [0.0, 0.0]]).double(),
        "neuron_gradient_energy": torch.tensor([[100.0, 4.0], [0.0, 0.0], [0.0, 0.0]]).double(),
    }
    statistics = LayerStatistics(9, torch.tensor([4, 3, 0]), sums)
    score = SELECTION["atomic_experts"](experts, statistics=statistics, experts_kept=torch.arange(3))
    square = 104 / (2 * (25 + 1))  # of the gradients of the first expert, in one direction
    expected = [8 / 4 * 100 / 2, 4 / 4 * 4 / 2, 6 / 3 * 4 * square, 3 / 3 * 2 * square, -1, -1]
    assert_close(score, torch.tensor(expected).double())


def test_a_layer_that_no_gradient_reached_is_named(original):
    accumulator = StatisticsAccumulator(8, frozenset({"fisher"}))
    layer = find_layers(original("mixtral"))[0]
    states, gates = torch.randn(3, layer.hidden_size), torch.ones(3, 2)
    accumulator.update(ObservedTokens(8, states, torch.tensor([[0, 1]] * 3), gates, torch.ones(3).bool()), layer)
    with pytest.raises(ValueError, match=r"gradients were taken reached 'mlp', so fisher .*\. Raise gradient_tokens"):
        accumulator.finish("mlp")


def test_what_has_no_gradients_is_refused_before_the_model_runs(original, tokens):
    model = original("switch_transformers")
    model.forward = None
    with pytest.raises(
        ValueError, match=r"collect fisher from gradients .*, but .* is an encoder-decoder.*without gradients"
    ):
        compress_moe(model, "m-smoe-fisher", calibration=tokens, progress=False)
    with pytest.raises(ValueError, match=r"has no language-model head\. Load it with AutoModelForCausalLM"):
        compress_moe(original("mixtral").model, "heapr", calibration=tokens, progress=False)


@pytest.mark.filterwarnings("ignore:.*offloaded modules.*:UserWarning")
def test_offloaded_weights_are_refused(original, tokens):
    model = cpu_offload(original("mixtral"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"offloaded, but gradients need all of them in memory.*without"):
        compress_moe(model, "heapr", calibration=tokens, progress=False)


def test_streaming_says_that_it_needs_the_whole_model(original, tokens, tmp_path):
    model = original("mixtral")
    with pytest.raises(
        NotStreamableError, match=r"its recipe needs gradients of the loss, through all layers at once"
    ):
        compress_by_streaming(
            tmp_path, model.config, Recipe(merging="fisher"), load_calibration(tokens), tmp_path / "out"
        )
