import dataclasses
import json
import math

import pytest
import torch
from safetensors import safe_open
from tiny_models import CAUSAL_FAMILIES, tiny_config, tiny_model
from transformers import LlamaConfig, SwitchTransformersConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hf_mcsmoe.families import find_layers
from hf_mcsmoe.families.fused import FusedExperts
from hf_mcsmoe.layouts import budget_of_layer, check_layout, resolve_layers
from hf_mcsmoe.loading import empty_model
from hf_mcsmoe.planning import plan
from hf_mcsmoe.recipe import Recipe
from hf_mcsmoe.sizes import measure

# The tiny models in numbers: vocabulary 160, hidden 32, 8 experts, top-2, 3 layers.
EMBEDDINGS_AND_NORM = 2 * 160 * 32 + 32
ATTENTION_QWEN3 = (4 * 8 + 2 * 8 + 2 * 8) * 32 + 32 * (4 * 8) + 2 * 8  # q, k, v, o, norms of q and k
ATTENTION_DEEPSEEK = (
    (16 * 32 + 16 + 4 * (8 + 8) * 16)  # q: down to 16, its norm, up to 4 heads of 8 + 8
    + ((16 + 8) * 32 + 16 + 4 * (8 + 8) * 16)  # k and v: down to 16 and 8 with rotation, norm, up
    + 32 * (4 * 8)
)
ATTENTION_GPT_OSS = (32 + 16 + 16) * 32 + (32 + 16 + 16) + 32 * 32 + 32 + 4  # q, k, v with biases, o with bias, sinks
NORMS = 2 * 32


def qwen3_moe_numbers(num_experts, num_rows):
    """(bytes per number, numbers, bytes of everything stored beside them)."""
    layer = ATTENTION_QWEN3 + NORMS + num_rows * 32 + num_experts * 3 * 24 * 32
    return 4, EMBEDDINGS_AND_NORM + 3 * layer, 0


def deepseek_v3_numbers(num_experts, num_rows):
    dense = ATTENTION_DEEPSEEK + NORMS + 3 * 40 * 32
    shared = 3 * 24 * 32
    layer = ATTENTION_DEEPSEEK + NORMS + num_rows * 32 + shared + num_experts * 3 * 24 * 32
    # bfloat16, but the correction biases, which are buffers, stay in float32.
    return 2, EMBEDDINGS_AND_NORM + dense + 2 * layer, 2 * num_rows * 4


def gpt_oss_numbers(num_experts, num_rows):
    expert = (32 * 80 + 80) + (40 * 32 + 32)
    layer = ATTENTION_GPT_OSS + NORMS + num_rows * (32 + 1) + num_experts * expert
    return 2, EMBEDDINGS_AND_NORM + 3 * layer, 0


BY_HAND = {
    "qwen3_moe": ("float32", 3, qwen3_moe_numbers),
    "deepseek_v3": ("bfloat16", 2, deepseek_v3_numbers),
    "gpt_oss": ("bfloat16", 3, gpt_oss_numbers),
}


@pytest.mark.parametrize("family", list(BY_HAND))
@pytest.mark.parametrize("layout, num_rows, map_bytes", [("mapped", 8, 8 * 8), ("native", 4, 0)])
def test_bytes_are_those_counted_by_hand(family, layout, num_rows, map_bytes):
    dtype, num_layers, numbers = BY_HAND[family]
    result = plan(tiny_config(family, dtype=dtype), Recipe(num_experts=4, layout=layout))
    size, parameters, others = numbers(num_experts=8, num_rows=8)
    assert result.total_parameters_before == parameters
    assert result.total_bytes_before == size * parameters + others
    size, parameters, others = numbers(num_experts=4, num_rows=num_rows)
    assert result.total_parameters_after == parameters
    assert result.total_bytes_after == size * parameters + others + num_layers * map_bytes
    assert result.expert_bytes_after * 2 == result.expert_bytes_before
    assert len(result.layers) == num_layers


@pytest.mark.parametrize("family", [*CAUSAL_FAMILIES, "switch_transformers"])
@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_bytes_before_are_those_of_the_saved_file(family, tie_word_embeddings, tmp_path):
    model = tiny_model(family, tie_word_embeddings=tie_word_embeddings)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]
    assert plan(tmp_path, Recipe()).total_bytes_before == sum(t.numel() * t.element_size() for t in tensors)
    assert plan(model, Recipe()) == plan(tmp_path, Recipe())


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_a_native_result_is_as_large_as_a_model_built_with_fewer_experts(family):
    count = next(n for n in ("num_experts", "num_local_experts", "n_routed_experts") if n in tiny_config(family))
    small = tiny_model(family, **{count: 4})
    result = plan(tiny_config(family), Recipe(num_experts=4, layout="native"))
    assert result.total_parameters_after == sum(p.numel() for p in small.parameters())
    small_sizes = measure(small, find_layers(small))
    assert result.total_bytes_after == small_sizes.total_bytes
    assert result.flops_per_token_after == small_sizes.flops_per_token
    assert result.active_parameters_after == small_sizes.active_parameters


def test_active_parameters_and_flops_are_those_counted_by_hand():
    result = plan(tiny_config("qwen3_moe"), Recipe(num_experts=1))
    head, router, expert = 160 * 32, 8 * 32, 3 * 24 * 32
    rest = head + 32 + 3 * (ATTENTION_QWEN3 + NORMS + router)  # without the embedding table
    assert result.active_parameters_before == rest + 3 * 2 * expert
    assert result.active_parameters_after == rest + 3 * 1 * expert  # one expert is left, though top-k is 2
    matrices = head + 3 * (ATTENTION_QWEN3 - 2 * 8 + router)
    assert result.flops_per_token_before == 2 * (matrices + 3 * 2 * expert)
    assert result.flops_per_token_after == 2 * (matrices + 3 * 1 * expert)


def test_a_tied_embedding_table_counts_once_as_output_layer():
    tied, untied = (plan(tiny_config("qwen3_moe", tie_word_embeddings=tie), Recipe()) for tie in (True, False))
    assert untied.total_parameters_before - tied.total_parameters_before == 160 * 32
    assert tied.active_parameters_before == untied.active_parameters_before
    assert tied.flops_per_token_before == untied.flops_per_token_before


SWITCH_BASE_32 = {
    "d_model": 768,
    "d_ff": 3072,
    "d_kv": 64,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "num_experts": 32,
    "vocab_size": 32128,
}


def test_switch_base_32_has_the_sizes_of_the_paper():
    config = SwitchTransformersConfig(**SWITCH_BASE_32)
    merged = plan(config, Recipe(num_experts=8, exclude_layers=(0,)))
    assert f"{merged.total_parameters_before / 1e9:.1f} B" == "2.0 B"
    assert f"{merged.total_parameters_after / 1e6:.0f} M" == "733 M"
    assert [layer.experts_after for layer in merged.layers] == [32] + [8] * 11
    assert [layer.excluded for layer in merged.layers] == [True] + [False] * 11
    decomposition = {"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 32, "keep_rows": 0.1}}
    decomposed = plan(config, Recipe(num_experts=8, exclude_layers=(0,), **decomposition))
    assert f"{decomposed.total_parameters_after / 1e6:.0f} M" == "381 M"
    # Merging alone saves no computation, the factors do.
    assert merged.flops_per_token_after == merged.flops_per_token_before
    assert decomposed.flops_per_token_after < merged.flops_per_token_after


def test_decomposed_experts_are_counted_by_hand():
    options = {"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 4, "keep_rows": 0.3}}
    result = plan(tiny_config("gpt_oss", dtype="bfloat16"), Recipe(num_experts=3, allocation="uniform", **options))
    # gate and up (40, 32): 40 * 0.3 = 12 rows; down (32, 40): 32 * 0.3 = 9.6, so 10 rows; biases stay.
    factors = 2 * (4 * (40 + 32) + 12 * 32) + (4 * (32 + 40) + 10 * 40)
    biases = 80 + 32
    assert result.layers[0].expert_parameters_after == 3 * (factors + biases)
    assert result.layers[0].expert_bytes_after == 3 * (2 * (factors + biases) + 8 * (12 + 12 + 10))
    saved = 3 * 2 * (3 * 40 * 32 - factors)  # 3 layers, top-2
    assert result.flops_per_token_before - result.flops_per_token_after == 2 * saved
    assert math.isclose(result.expert_parameters_after, 3 * 3 * (factors + biases))


def test_factors_that_save_nothing_are_noted():
    options = {"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 24, "keep_rows": 1.0}}
    notes = plan(tiny_config("qwen3_moe"), Recipe(keep=1.0, **options)).notes
    assert any("rank 24 and keep_rows 1.0 store more than the experts they replace" in note for note in notes)


def test_keeping_everything_changes_nothing_but_the_map():
    result = plan(tiny_config("mixtral"), Recipe(keep=1.0))
    assert result.total_bytes_after == result.total_bytes_before + 3 * 8 * 8
    assert result.total_parameters_after == result.total_parameters_before
    native = plan(tiny_config("mixtral"), Recipe(keep=1.0, layout="native"))
    assert native.total_bytes_after == native.total_bytes_before


def test_notes_say_what_the_numbers_leave_open():
    notes = " ".join(plan(tiny_config("switch_transformers"), Recipe(keep=0.5)).notes)
    for text in ("upper bounds", "'global_usage' spends 16 experts on 4 layers", "one source"):
        assert text in notes
    assert plan(tiny_config("mixtral"), Recipe(layout="native")).notes == []
    quantized = tiny_config("gpt_oss", quantization_config={"quant_method": "mxfp4"})
    assert "The checkpoint is quantized" in " ".join(plan(quantized, Recipe()).notes)


def test_a_plan_is_ready_for_json():
    result = plan(tiny_config("mixtral"), Recipe(exclude_layers=(-1,)))
    values = json.loads(json.dumps(result.to_dict()))
    assert values["layers"][2]["excluded"] is True
    assert values["layers"][0]["is_average"] is True and values["layers"][2]["is_average"] is False


@pytest.fixture(scope="module")
def layers():
    return find_layers(empty_model(tiny_config("qwen3_moe")))


@pytest.mark.parametrize(
    "entries, kept",
    [
        ((), [0, 1, 2]),
        ((0,), [1, 2]),
        ((-1,), [0, 1]),
        (("model.layers.1.*",), [0, 2]),
        ((2, "*.layers.[12].*"), [0]),
    ],
)
def test_layers_are_excluded_by_position_and_pattern(layers, entries, kept):
    found, excluded = resolve_layers(layers, Recipe(exclude_layers=entries))
    assert found == [layers[position] for position in kept]
    assert found + excluded == sorted(layers, key=lambda layer: layer in excluded)
    assert budget_of_layer(found, Recipe(keep=0.3)) == [2] * len(kept)  # 2.4


@pytest.mark.parametrize(
    "entry, error, message",
    [
        (3, ValueError, r"exclude_layers has 3, but the model has 3 MoE layers: positions -3..2"),
        (-4, ValueError, r"exclude_layers has -4, but the model has 3 MoE layers"),
        (
            "model.layer.1.mlp.experts",
            ValueError,
            r"matches none of the 3 MoE layers.*Did you mean 'model.layers.1.mlp.experts'\?",
        ),
        ("*", ValueError, r"exclude_layers \['\*'\] leaves none of the 3 MoE layers"),
        (1.5, TypeError, r"exclude_layers has 1.5 of type float. Give positions \(int\) or patterns \(str\)"),
    ],
)
def test_layers_that_are_not_there_cannot_be_excluded(layers, entry, error, message):
    with pytest.raises(error, match=message):
        resolve_layers(layers, Recipe(exclude_layers=(entry,)))


def refused(config_or_layers, message, **recipe):
    layers = config_or_layers
    if not isinstance(layers, list):
        layers = find_layers(empty_model(config_or_layers))
    with pytest.raises(ValueError, match=message):
        check_layout(layers, Recipe(**recipe))


def test_a_dense_model_is_refused():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layer that hf_mcsmoe knows"):
        plan(config, Recipe())
    refused([], "The model has no MoE layer")


def test_an_already_compressed_model_is_refused(layers):
    refused([dataclasses.replace(layers[0], num_experts=4)], "already compressed")
    model = empty_model(tiny_config("qwen3_moe"))
    model.config.merged_sparse_moe = {}
    with pytest.raises(ValueError, match=r"Qwen3MoeForCausalLM is already compressed.*Start from the original"):
        plan(model, Recipe())


def test_tied_experts_are_refused():
    model = empty_model(tiny_config("qwen3_moe"))
    model.model.layers[2].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj
    refused(find_layers(model), "ties some matrices of experts, not all")


def test_experts_in_separate_modules_have_both_layouts():
    layers = find_layers(empty_model(tiny_config("switch_transformers")))
    check_layout(layers, Recipe())
    check_layout(layers, Recipe(layout="native"))


def test_a_layout_that_the_family_has_not_is_refused(layers):
    class MappedOnly(FusedExperts):
        layouts = ("mapped",)

    changed = [dataclasses.replace(layer, family=MappedOnly()) for layer in layers]
    refused(changed, r"layout 'native' is not possible for .*. Use one of \['mapped'\]", layout="native")


@pytest.mark.parametrize("layout", ["mapped", "native"])
def test_more_experts_than_there_are_is_refused(layers, layout):
    refused(layers, r"num_experts is 9, but .* has 8 experts. Ask for 1\.\.8", num_experts=9, layout=layout)


def test_a_native_router_needs_k_experts(layers):
    refused(layers, r"picks 2 of 8 experts: at least 2. Use 2, or layout='mapped'", num_experts=1, layout="native")
    check_layout(layers, Recipe(num_experts=2, layout="native"))
    check_layout(layers, Recipe(num_experts=1))


@pytest.mark.parametrize("num_experts, remedy", [(2, "Use 4"), (5, "Use 4 or 6"), (7, "Use 6 or 8")])
def test_a_grouped_native_router_keeps_equal_groups(num_experts, remedy):
    # 2 groups of 4; a token takes 1 group, so 2 experts must stay in each.
    message = rf"picks 2 of 8 experts in 2 groups .*: at least 4, a multiple of 2. {remedy}, or layout='mapped'"
    refused(tiny_config("deepseek_v3"), message, num_experts=num_experts, layout="native")


def test_native_layers_must_have_the_same_number_of_experts(layers):
    odd = dataclasses.replace(layers[1], num_slots=6, num_experts=6)
    message = r"same number of experts in all layers, but .*layers.0.* has 8 and '.*layers.1.*' \(6\) differ"
    refused([layers[0], odd], message, num_experts=4, layout="native")


def test_a_router_without_a_row_per_expert_cannot_be_cut(layers):
    router = Qwen3MoeTopKRouter(tiny_config("qwen3_moe", num_experts=9))
    changed = [dataclasses.replace(layer, router=router) for layer in layers]
    refused(changed, "cannot cut the router of .*: none of its matrices has 8 rows", layout="native")


def test_a_rank_that_no_matrix_has_is_refused(layers):
    options = {"decomposition": "low_rank_sparse", "decomposition_options": {"rank": 25}}
    message = r"do not fit 'model.layers.0.mlp.experts': rank is 25, it must be .* 1 to 24 for a matrix \(24, 32\)"
    refused(layers, message, **options)


def test_limits_that_the_budget_cannot_meet_are_refused(layers):
    refused(layers, "at least min_experts=5", keep=0.5, allocation_options={"min_experts": 5})
    refused(layers, "most max_experts=3", keep=0.5, allocation_options={"max_experts": 3})


def test_planning_leaves_the_model_alone():
    model = tiny_model("qwen3_moe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    plan(model, Recipe(layout="native"))
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
