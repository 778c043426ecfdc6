import pytest
import torch

from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.executors.in_memory import collect
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer.expert_decomposition import decompose_experts
from hf_mcsmoe.observation.input_grams import input_grams
from hf_mcsmoe.observation.layer_inputs import LayerInputs
from hf_mcsmoe.training.gradient_importance import labelled
from hf_mcsmoe.types import ExpertWeights

FUSED = ["qwen3_moe", "gpt_oss", "nemotron_h"]


def grams_of(model, layer, data):
    """What a layer's matrices are given for all tokens, stacked: "up" (M, D, D), ..."""
    tokens = len(data.batches) * max(batch.token_mask.numel() for batch in data.batches)  # as many of each batch
    inputs = collect(model, [layer], data, frozenset(), calibration_tokens=tokens, progress=False)[layer.name]
    return {name: torch.stack(of_expert) for name, of_expert in input_grams(layer, inputs.calibration).items()}


def ragged_rows(tokens):
    return [row[: 20 - 2 * (place % 5)].tolist() for place, row in enumerate(tokens)]


def stacked_weights(layer):
    return layer.family.view(layer, layer.family.stack(layer, layer.expert_parameters))


def calls_of_experts(model, layer, rows):
    """(hidden_states, stored expert, weight) of every routed slot, from rows that go alone, without padding."""
    calls = []

    def watch(module, args, kwargs):  # noqa: ARG001
        hidden, index, weights = layer.family.routed_inputs(args, kwargs)
        for token, experts, gates in zip(hidden, index.tolist(), weights.tolist(), strict=True):
            used = {expert for expert, gate in zip(experts, gates, strict=True) if gate != 0}
            calls.extend((token, expert) for expert in used)

    handle = layer.experts.register_forward_pre_hook(watch, with_kwargs=True)
    for row in rows:
        model(torch.tensor([row]))
    handle.remove()
    return calls


@pytest.mark.parametrize("model_type", FUSED)
@pytest.mark.parametrize("mapped", [False, True], ids=["original", "merged"])
def test_grams_against_token_by_token(model_type, mapped, original, compressed, tokens):
    model = compressed(model_type, "mapped") if mapped else original(model_type)
    rows = ragged_rows(tokens[:8])
    data = load_calibration(rows, batch_size=3, held_out_fraction=0)
    layer = find_layers(model)[-1]
    mine = grams_of(model, layer, data)
    weights, activation = stacked_weights(layer), layer.family.activation(layer)
    inward = torch.zeros(weights.num_experts, layer.hidden_size, layer.hidden_size).double()
    outward = torch.zeros(weights.num_experts, weights.width, weights.width).double()
    with torch.no_grad():
        for token, expert in calls_of_experts(model, layer, rows):
            up = weights.up[expert] @ token + (weights.up_bias[expert] if weights.up_bias is not None else 0)
            gate = None
            if weights.gate is not None:
                gate = weights.gate[expert] @ token + (weights.gate_bias[expert] if layer.format.has_bias else 0)
                gate = gate[None]
            inner = activation(up[None], gate)[0].double()
            inward[expert] += token.double().outer(token.double())
            outward[expert] += inner.outer(inner)
    assert set(mine) == ({"gate", "up", "down"} if layer.format.has_gate else {"up", "down"})
    torch.testing.assert_close(mine["up"], inward, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine["down"], outward, rtol=1e-4, atol=1e-5)
    assert mine["up"].dtype == torch.float64


def test_grams_give_the_output_error_of_down(original, tokens):
    # What the model computes, not what the observer does: the inputs of the modules that Switch Transformers calls.
    model = original("switch_transformers")
    data = load_calibration(tokens, batch_size=4, held_out_fraction=0.25)
    layer = find_layers(model)[-1]
    seen = {}

    def watch(expert):
        def hook(module, args):  # noqa: ARG001
            seen.setdefault(expert, []).append(args[0].detach().reshape(-1, args[0].shape[-1]).double())

        return hook

    handles = [layer.experts[f"expert_{e}"].wo.register_forward_pre_hook(watch(e)) for e in range(8)]
    for batch in data.batches:
        if not batch.held_out:
            model(**labelled(batch, model))
    for handle in handles:
        handle.remove()
    mine = grams_of(model, layer, data)["down"]
    for expert in range(8):
        inputs = torch.cat(seen[expert]) if expert in seen else torch.zeros(0, 40).double()
        torch.testing.assert_close(mine[expert], inputs.T @ inputs, rtol=1e-4, atol=1e-5)


def test_whitened_experts_lose_less_of_the_outputs(original, tokens):
    model = original("qwen3_moe")
    data = load_calibration(tokens, held_out_fraction=0)
    layer = find_layers(model)[1]
    grams = grams_of(model, layer, data)
    weights = stacked_weights(layer)
    options = {"rank": 4, "keep_rows": 0.1}
    errors = {}
    for rule in ("low_rank_sparse", "whitened_low_rank_sparse"):
        factors, biases = decompose_experts(weights, rule, options, grams)
        assert not biases and {name: len(of_expert) for name, of_expert in factors.items()} == dict.fromkeys(grams, 8)
        for name, of_expert in factors.items():
            lost = [m.double() - f.dense().double() for m, f in zip(weights.tensors()[name], of_expert, strict=True)]
            error = sum((x @ gram @ x.T).trace().item() for x, gram in zip(lost, grams[name], strict=True))
            errors[rule, name] = error
    for name in grams:
        assert errors["whitened_low_rank_sparse", name] < 0.95 * errors["low_rank_sparse", name]


def test_biases_are_passed_on():
    weights = ExpertWeights(torch.ones(2, 6, 5), torch.ones(2, 5, 6), up_bias=torch.ones(2, 6))
    factors, biases = decompose_experts(weights, "low_rank_sparse", {"rank": 1})
    assert set(factors) == {"up", "down"} and biases == {"up": weights.up_bias}


def test_without_tokens_grams_are_zero(original):
    layer = find_layers(original("gpt_oss"))[0]
    grams = input_grams(layer, LayerInputs())
    shapes = {name: [tuple(gram.shape) for gram in of_expert] for name, of_expert in grams.items()}
    assert shapes == {"gate": [(32, 32)] * 8, "up": [(32, 32)] * 8, "down": [(40, 40)] * 8}
    assert not any(gram.any() for of_expert in grams.values() for gram in of_expert)
