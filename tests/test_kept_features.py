"""Features that are computed once for several steps, against computing them in each."""

import dataclasses

import pytest
import torch
from fit_layers import FORMATS, activation, packed_experts, routed

from hf_mcsmoe.layer.fit import fit_experts, with_answers
from hf_mcsmoe.observation import kept_features, token_batches
from hf_mcsmoe.observation.gated_features import apply_down, features_in_chunks, sum_expert_grams, sum_features
from hf_mcsmoe.observation.kept_features import KeptFeatures
from hf_mcsmoe.recipe import Recipe

WIDTHS = (4, 0, 6, 5)
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture
def batches(monkeypatch):
    monkeypatch.setattr(token_batches, "CHUNK_TOKENS", 7)
    return [routed(tokens, len(WIDTHS), seed=tokens) for tokens in (5, 3, 16)]


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def experts(request):
    return packed_experts(request.param, WIDTHS)


def assert_same(one, other):
    for mine, theirs in zip(one, other, strict=True):
        for (tokens, features), (their_tokens, their_features) in zip(mine, theirs, strict=True):
            assert torch.equal(tokens, their_tokens) and torch.equal(features, their_features)


@pytest.mark.parametrize("most", [0, 2**29])
def test_every_pass_gives_the_same_and_only_what_fits_stays_in_memory(experts, batches, most, monkeypatch):
    monkeypatch.setattr(kept_features, "MOST_BYTES", most)
    features = KeptFeatures(experts, activation, batches)
    plain = list(features_in_chunks(experts, activation, batches))
    assert_same(features, plain)
    assert_same(features, plain)
    first, second = list(features), list(features)
    assert all((one is other) == (most > 0) for one, other in zip(first, second, strict=True))
    assert features.num_bytes == sum(f.nbytes for chunk in plain for _, f in chunk)


def test_some_neurons_are_those_of_experts_that_have_no_others(experts, batches):
    kept = torch.tensor([0, 2, 3, 5, 9, 11, 14])
    features = KeptFeatures(experts, activation, batches)
    smaller = experts.select_neurons(kept)
    for mine, theirs in zip(features.of_neurons(kept), features_in_chunks(smaller, activation, batches), strict=True):
        for (tokens, found), (their_tokens, expected) in zip(mine, theirs, strict=True):
            assert torch.equal(tokens, their_tokens)
            torch.testing.assert_close(found, expected)
    sums = sum_features(smaller, activation, batches, features.of_neurons(kept))
    expected = sum_features(smaller, activation, batches)
    torch.testing.assert_close(sums.gram, expected.gram, **CLOSE)
    torch.testing.assert_close(sums.cross, expected.cross, **CLOSE)
    assert torch.equal(sums.gram, sums.gram.T)


def test_answers_are_what_the_experts_give(experts, batches):
    answered = with_answers(KeptFeatures(experts, activation, batches))
    for batch, given in zip(answered, batches, strict=True):
        torch.testing.assert_close(batch.targets, apply_down(experts, activation, given))
        assert batch.gates is given.gates and batch.hidden_states is given.hidden_states
    assert with_answers(KeptFeatures(experts, activation, [])) == []


def test_they_serve_equal_experts_on_equal_tokens_only(experts, batches):
    features = KeptFeatures(experts, activation, batches)
    tensors = {name: tensor.clone() for name, tensor in experts.tensors().items()}
    unanswered = [dataclasses.replace(batch, gates=batch.gates.clone(), targets=None) for batch in batches]
    assert features.serves(dataclasses.replace(experts, **tensors), unanswered)
    assert features.serves(dataclasses.replace(experts, down=experts.down + 1), unanswered)
    for name in tensors.keys() - {"down", "down_bias"}:
        changed = tensors[name].clone()
        changed[3] += 1
        assert not features.serves(dataclasses.replace(experts, **{name: changed}), batches)
    gates = batches[1].gates.clone()
    gates[0, 3] += 0.5
    assert not features.serves(experts, [batches[0], dataclasses.replace(batches[1], gates=gates), batches[2]])
    assert not features.serves(experts, batches[:2])
    if experts.gate is not None:
        assert not features.serves(dataclasses.replace(experts, gate=None, gate_bias=None), batches)


@pytest.mark.parametrize("is_stale", [False, True])
def test_a_fit_takes_known_features_only_if_they_are_its_own(experts, batches, is_stale):
    recipe = Recipe(selection="gated_obs", refit="least_squares", layout="mapped")
    expected = fit_experts(experts, activation, recipe, 9, batches, batches[:1])
    known = KeptFeatures(experts, activation, batches)
    known._held = [[(tokens, 2 * f) for tokens, f in chunk] for chunk in known] if is_stale else None
    if is_stale:
        known.experts = dataclasses.replace(experts, up=2 * experts.up)
    found = fit_experts(experts, activation, recipe, 9, batches, batches[:1], known=known)
    for name, tensor in expected.experts.tensors().items():
        torch.testing.assert_close(found.experts.tensors()[name], tensor, rtol=1e-4, atol=1e-5)
    assert known._held is not None, "they are computed in the first pass that needs them" or is_stale
    grams = sum_expert_grams(experts, activation, batches, KeptFeatures(experts, activation, batches))
    for gram, plain in zip(grams, sum_expert_grams(experts, activation, batches), strict=True):
        assert torch.equal(gram, plain)
