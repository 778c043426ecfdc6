"""What must hold for M-SMoE and pruning on every family: identities that need no reference implementation."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from hf_mcsmoe import Recipe, compress_moe, load_calibration, plan
from hf_mcsmoe.families import find_layers

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
# Within the groups of group-limited routers, so that the same experts compete after relabelling.
RELABELLED = [6, 4, 7, 5, 1, 3, 0, 2]
LEADERS, TWINS = [1, 2, 4, 7], [0, 3, 5, 6]


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def slot_tensors(layer):
    """Tensors of router and block with one entry per slot."""
    modules = [*layer.router.modules(), layer.block]
    tensors = [t for m in modules for t in [*m.parameters(recurse=False), *m.buffers(recurse=False)]]
    return [t for t in tensors if t.dim() > 0 and t.shape[0] == layer.num_slots]


@torch.no_grad()
def shuffle_neurons(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for layer in find_layers(model):
        weights = layer.family.view(layer, layer.expert_parameters)
        order = torch.rand(weights.num_experts, weights.width, generator=generator).argsort(dim=1)
        for name, shuffled in weights.permute_neurons(order).tensors().items():
            getattr(weights, name).copy_(shuffled)
    return model


@torch.no_grad()
def relabel_experts(model, order):
    for layer in find_layers(model):
        for tensor in [*layer.expert_parameters.values(), *slot_tensors(layer)]:
            tensor.copy_(tensor[order].clone())
    return model


@torch.no_grad()
def plant_features(model):
    """Let hidden states show, above all else, a constant (component 0) and two topics of the token (1 to 4)."""
    embedding = model.get_input_embeddings().weight
    token = torch.arange(len(embedding))
    embedding[:, :5] = 0
    embedding[:, 0] = 4.0
    embedding[token, 1 + token // 4 % 4] += 2.0
    embedding[token, 1 + token % 4] += 4.0
    return model


@torch.no_grad()
def steer(layer, experts, value):
    """Make the router of a layer read the constant: `experts` get a logit of that sign from it, the others none."""
    for tensor in slot_tensors(layer):
        if tensor.dim() == 2:
            tensor[:, 0] = 0.0
            tensor[experts, 0] = value
        elif value < 0:
            tensor[experts] = value  # biases, correction biases


def stored_experts(model):
    """All expert tensors of a model, by layer and name."""
    return {f"{x.name}.{n}": p.detach() for x in find_layers(model) for n, p in x.expert_parameters.items()}


def usage(model):
    return [layer.usage_frequency for layer in model.compression_report.layers]


def test_keeping_all_experts_is_bit_identical(family, layout, original, compress, prompt):
    model = compress(family, keep=1.0, layout=layout)
    assert torch.equal(logits(model, prompt), logits(original(family), prompt))


def test_keeping_all_experts_is_bit_identical_with_collapsing(family, original, compress, prompt):
    model = compress(family, keep=1.0, collapse_duplicates=True)
    assert torch.equal(logits(model, prompt), logits(original(family), prompt))


def test_neuron_order_of_the_input_does_not_matter(family, layout, original, compress, compressed, prompt):
    shuffled = shuffle_neurons(original(family))
    assert_close(logits(shuffled, prompt), logits(original(family), prompt), **ROUNDING)
    result = compress(shuffled, layout=layout)
    assert_close(logits(result, prompt), logits(compressed(family, layout), prompt), **ROUNDING)


def test_planted_copies_merge_without_loss(family, original, compress, prompt):
    model = plant_features(original(family))
    with torch.no_grad():
        for layer in find_layers(model):
            for tensor in layer.expert_parameters.values():
                tensor[TWINS] = tensor[LEADERS]
            for tensor in slot_tensors(layer):
                if tensor.dim() == 1:
                    tensor[:] = tensor[0].round()  # biases to 0, scales to 1
                    continue
                # One topic for each pair; the twin's row is weaker: the same similarity, less use.
                tensor[:, :5] = 0
                tensor[LEADERS, torch.arange(1, 5)] = 0.4
                tensor[TWINS] = tensor[LEADERS] * 0.1
    expected = logits(shuffle_neurons(model), prompt)
    result = compress(model, allocation="uniform")
    for report in result.compression_report.layers:
        assert report.dominant_of_group == LEADERS
        assert [report.group_of_expert[twin] for twin in TWINS] == [0, 1, 2, 3]
        assert sum(report.usage_frequency[twin] for twin in TWINS) > 0
        assert report.relative_error < 1e-9
    assert_close(logits(result, prompt), expected, **ROUNDING)


def test_relabelling_experts_commutes(family, layout, original, compress, compressed, prompt):
    relabelled = relabel_experts(original(family), RELABELLED)
    assert_close(logits(relabelled, prompt), logits(original(family), prompt), **ROUNDING)
    result = compress(relabelled, layout=layout)
    assert_close(logits(result, prompt), logits(compressed(family, layout), prompt), **ROUNDING)
    for before, after in zip(usage(compressed(family, layout)), usage(result), strict=True):
        assert_close(after, [before[expert] for expert in RELABELLED])


def test_padding_and_batching_do_not_count(family, compress, tokens, prompt):
    rows = [row[: 5 + place % 16].tolist() for place, row in enumerate(tokens)]
    alone = compress(family, load_calibration(rows, batch_size=1, held_out_fraction=0))
    left = [torch.tensor([[0] * (24 - len(row)) + row for row in half]) for half in (rows[:9], rows[9:])]
    masks = [torch.tensor([[0] * (24 - len(row)) + [1] * len(row) for row in half]) for half in (rows[:9], rows[9:])]
    batches = [{"input_ids": ids, "attention_mask": mask} for ids, mask in zip(left, masks, strict=True)]
    for data in (
        load_calibration(rows[::-1], batch_size=7, held_out_fraction=0),  # padded on the right, the last batch ragged
        load_calibration(batches, batch_size=24, held_out_fraction=0),
    ):
        model = compress(family, data)
        assert usage(model) == usage(alone)
        assert_close(stored_experts(model), stored_experts(alone), rtol=0, atol=1e-6)
        assert_close(logits(model, prompt), logits(alone, prompt), **ROUNDING)


def test_an_expert_that_was_never_used_adds_nothing(family, original, compress, prompt):
    model = plant_features(original(family))
    for layer in find_layers(model):
        steer(layer, [3], -8.0)
    garbage = copy.deepcopy(model)
    with torch.no_grad():
        for layer in find_layers(garbage):
            for tensor in layer.expert_parameters.values():
                tensor[3] = 100.0
    result, other = compress(model), compress(garbage)
    for report in result.compression_report.layers:
        assert report.usage_frequency[3] == 0 and report.unused_experts >= 1
        assert 3 not in report.dominant_of_group
    assert all(torch.equal(a, b) for a, b in zip(*(stored_experts(x).values() for x in (result, other)), strict=True))
    assert torch.isfinite(logits(result, prompt)).all()


def test_all_tokens_to_one_pair_of_experts(family, layout, original, compress, prompt):
    model = plant_features(original(family))
    for layer in find_layers(model):
        steer(layer, [5, 6], 8.0)
    before, expected = copy.deepcopy(stored_experts(model)), logits(model, prompt)
    result = compress(model, layout=layout, allocation="uniform")
    kept = [0, 1, 5, 6]  # unused experts tie, so the lowest lead; a group nobody used keeps its leader as it is
    for report in result.compression_report.layers:
        assert report.usage_frequency == [0, 0, 0, 0, 0, 0.5, 0.5, 0]
        assert report.dominant_of_group == kept
    for name, tensor in stored_experts(result).items():
        assert torch.equal(tensor, before[name][kept])
    assert_close(logits(result, prompt), expected, **ROUNDING)


def test_one_calibration_token(family, layout, compress, tokens, prompt):
    result = compress(family, tokens[:1, :1], layout=layout)
    for report in result.compression_report.layers:
        assert sorted(report.usage_frequency) == [0, 0, 0, 0, 0, 0, 0.5, 0.5]
        assert report.relative_error is None
    assert sum(x.num_experts_after for x in result.compression_report.layers) == 4 * len(find_layers(result))
    assert torch.isfinite(logits(result, prompt)).all()


@pytest.mark.parametrize("collapse", [True, False])
def test_collisions_equal_the_original_with_the_merged_experts_in_all_slots(
    family, collapse, original, compress, prompt
):
    result, aliased = compress(family, keep=0.25, allocation="uniform", collapse_duplicates=collapse), original(family)
    for layer, small in zip(find_layers(aliased), find_layers(result), strict=True):
        for name, parameter in layer.expert_parameters.items():
            parameter.data = small.expert_parameters[name].detach()[small.experts.expert_map.index]
    assert any(report.duplicate_share > 0 for report in result.compression_report.layers)
    aliased.set_experts_implementation("eager")
    expected = logits(aliased, prompt)
    for implementation in IMPLEMENTATIONS:
        result.set_experts_implementation(implementation)
        assert_close(logits(result, prompt), expected, **ROUNDING)


@pytest.mark.parametrize("collapse", [True, False])
def test_pruned_slots_add_nothing_in_the_mapped_layout(family, collapse, original, compress, prompt):
    result = compress(family, preset="frequency", collapse_duplicates=collapse)
    zeroed = original(family)
    for layer, report in zip(find_layers(zeroed), result.compression_report.layers, strict=True):
        dropped = torch.tensor(report.group_of_expert) < 0
        assert dropped.sum() == 8 - report.num_experts_after > 0
        with torch.no_grad():
            for name, parameter in layer.expert_parameters.items():
                if name.startswith("down_proj"):
                    parameter[dropped] = 0
    zeroed.set_experts_implementation("eager")
    expected = logits(zeroed, prompt)
    for implementation in IMPLEMENTATIONS:
        result.set_experts_implementation(implementation)
        assert_close(logits(result, prompt), expected, **ROUNDING)


def test_pruning_in_the_native_layout_removes_rows(family, original, compress, prompt):
    model = original(family)
    result = compress(family, preset="frequency", layout="native")
    reports = result.compression_report.layers
    kept = {x.block_name: r.dominant_of_group for x, r in zip(find_layers(model), reports, strict=True)}
    config = copy.deepcopy(model.config)
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if getattr(config, name, None) == 8:
            setattr(config, name, 4)
    by_hand = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    state = model.state_dict()
    for name, wanted in by_hand.state_dict().items():
        if wanted.shape != state[name].shape:
            block = next(block for block in kept if name.startswith(f"{block}."))
            state[name] = state[name][kept[block]]
    by_hand.load_state_dict(state)
    assert torch.equal(logits(result, prompt), logits(by_hand, prompt))
    assert type(result) is type(model)
    assert {n: p.shape for n, p in result.named_parameters()} == {n: p.shape for n, p in by_hand.named_parameters()}


@pytest.mark.parametrize("keep", [0.2, 0.4, 0.5, 0.7, 0.95])
@pytest.mark.parametrize("model_type", ["mixtral", "nemotron_h"])
def test_budgets_are_exact_under_ties(model_type, keep, original, tokens):
    recipe = Recipe(keep=keep)
    planned = plan(original(model_type), recipe)
    # One token: two slots of each layer tie for the first place, six for the last.
    result = compress_moe(original(model_type), recipe, calibration=tokens[:1, :1], progress=False)
    report = result.compression_report
    assert sum(x.num_experts_after for x in report.layers) == sum(x.experts_after for x in planned.layers)
    assert report.total_parameters_after == planned.total_parameters_after
    assert report.total_parameters_before == planned.total_parameters_before


def test_merged_experts_are_the_mean_of_their_members_by_usage(family, original, compress):
    model = original(family)
    before = copy.deepcopy(stored_experts(model))
    result = compress(model, alignment=None)
    for layer, report in zip(find_layers(result), result.compression_report.layers, strict=True):
        share, group_of_expert = torch.tensor(report.usage_frequency), torch.tensor(report.group_of_expert)
        for group in range(report.num_experts_after):
            members = (group_of_expert == group).nonzero().flatten()
            for name, parameter in layer.expert_parameters.items():
                parts = [share[member] * before[f"{layer.name}.{name}"][member].double() for member in members]
                expected = sum(parts) / share[members].sum()
                assert_close(parameter[group].double(), expected, rtol=0, atol=1e-6)


def test_a_bfloat16_model_gives_the_float32_result_rounded_once(family, original, compress, tokens):
    narrow = original(family).to(torch.bfloat16)
    wide = copy.deepcopy(narrow).float()
    few = tokens[:1, :4]  # few, so that rounding in the forward does not change the choice of an expert
    narrow, wide = (compress(model, few, num_experts=1, allocation="uniform") for model in (narrow, wide))
    assert usage(narrow) == usage(wide)
    for name, tensor in stored_experts(narrow).items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, stored_experts(wide)[name].to(torch.bfloat16)), name


def test_excluded_layers_stay_bit_identical(family, original, compress, prompt):
    model = original(family)
    first, *others = find_layers(model)
    before = {name: tensor.detach().clone() for name, tensor in first.block.state_dict().items()}
    result = compress(model, exclude_layers=[0])
    after = find_layers(result)[0].block.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [x.name for x in others] == list(result.config.merged_sparse_moe["layers"])
    assert torch.isfinite(logits(result, prompt)).all()


def test_layers_may_keep_different_numbers_of_experts(family, original, compress, prompt):
    model = plant_features(original(family))
    first, *others = find_layers(model)
    steer(first, [5, 6], 8.0)  # all its tokens go to one pair
    for layer in others:
        steer(layer, [], 0.0)
    result = compress(model)
    numbers = [report.num_experts_after for report in result.compression_report.layers]
    assert numbers[0] == 2 and min(numbers[1:]) > 2
    assert sum(numbers) == 4 * len(numbers)
    assert [layer.num_experts for layer in find_layers(result)] == numbers
    assert torch.isfinite(logits(result, prompt)).all()
