"""Rules for the rows of a router that is cut: formulas, whole models, and what is refused."""

import copy
import math

import pytest
import torch
from scipy.optimize import minimize
from tiny_models import tiny_model

from hf_mcsmoe import Recipe, compress_moe
from hf_mcsmoe.executors.in_memory import Collected
from hf_mcsmoe.families import find_layers
from hf_mcsmoe.layer.merging import MergedLayer
from hf_mcsmoe.layer.router import cut_router, membership
from hf_mcsmoe.layouts import check_layout
from hf_mcsmoe.modeling.experts import select_rows
from hf_mcsmoe.observation.layer_inputs import LayerInputs
from hf_mcsmoe.router_access import find_rows, read_rows, router_inputs, write_rows
from hf_mcsmoe.router_rows import ROUTER_ROWS
from hf_mcsmoe.router_rows.hessian import conjugate_gradients
from hf_mcsmoe.types import ExpertGroups, Routing

GROUPS = ExpertGroups(group_of_expert=torch.tensor([1, 0, -1, 1, 0, 1]), dominant_of_group=torch.tensor([1, 3]))
RULES = ("dominant_rows", "proportional_transfer", "log_sum_exp", "hessian")
SOFTMAX_RULES = ("log_sum_exp", "hessian")


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def call(name, rows, groups=GROUPS, tokens=(), **options):
    supplied = {"tokens": lambda: list(tokens), "transfer": lambda: membership(groups)}
    return ROUTER_ROWS.call(name, rows, groups, options=options, supply=supplied)


def slow_targets(rows, x):
    """log of the sum over each group of exp(logit), by loops."""
    z = [sum(r * v for r, v in zip(row, x, strict=True)) for row in rows.tolist()]
    return [math.log(sum(math.exp(z[e]) for e in members)) for members in ([1, 4], [0, 3, 5])]


# --- the formulas


def test_transferred_rows_by_hand():
    rows = torch.tensor([[1.0, 0.0], [10.0, 0.0], [100.0, 0.0], [0.0, 1.0], [0.0, 10.0], [5.0, 5.0]])
    assert call("dominant_rows", rows).tolist() == [[10.0, 0.0], [0.0, 1.0]]
    assert call("proportional_transfer", rows).tolist() == [[10.0, 10.0], [6.0, 6.0]]
    # Half of expert 0 to each group, a quarter of the dropped expert 2 to group 0, whatever is said of dominants.
    shares = torch.tensor([[0.5, 0.5], [9.0, 9.0], [0.25, 0.0], [9.0, 9.0], [0.0, 0.0], [0.0, 0.0]])
    got = ROUTER_ROWS["proportional_transfer"](rows, GROUPS, transfer=shares)
    assert got.tolist() == [[35.5, 0.0], [0.5, 1.0]]


def test_log_sum_exp_is_the_ridge_regression_of_the_formula():
    rows, tokens, ridge = drawn(6, 4), [drawn(9, 4).float(), drawn(5, 4).float()], 0.05
    x = torch.cat(tokens).double()
    z = torch.tensor([slow_targets(rows, row) for row in x.tolist()], dtype=torch.float64)
    first = rows[[1, 3]]
    # A number that is added to all logits of a token is free: it is fitted too.
    weight = ridge * x.square().sum() / 4

    def loss(values):
        new = torch.tensor(values).view(2, 4)
        errors = x @ new.T - z
        errors = errors - errors.mean(1, keepdim=True)
        return (errors.square().sum() + weight * (new - first).square().sum()).item()

    found = minimize(loss, first.flatten().numpy(), tol=1e-12).x
    torch.testing.assert_close(
        call("log_sum_exp", rows, tokens=tokens, ridge=ridge), torch.tensor(found).view(2, 4), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.0])
def test_hessian_rows_solve_the_normal_equation(off_diagonal):
    rows, tokens = drawn(6, 4), [drawn(9, 4).float(), drawn(5, 4).float()]
    new = call("hessian", rows, tokens=tokens, tolerance=1e-13, off_diagonal=off_diagonal)
    normal, right = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for x in torch.cat(tokens).double():
        z = torch.tensor(slow_targets(rows, x.tolist()), dtype=torch.float64)
        p = z.softmax(0)
        h = torch.diag(p) - torch.outer(p, p)
        h = torch.where(torch.eye(2, dtype=torch.bool), h, off_diagonal * h)
        normal += torch.kron(h, torch.outer(x, x))
        right += torch.outer(h @ z, x).flatten()
    torch.testing.assert_close(normal @ new.flatten(), right, rtol=1e-9, atol=1e-10)
    start = rows[[1, 3]].flatten()
    least = start + torch.linalg.pinv(normal, rtol=1e-12) @ (right - normal @ start)  # nearest to the dominants' rows
    torch.testing.assert_close(new.flatten(), least, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", SOFTMAX_RULES)
def test_members_with_equal_rows_need_no_fit_without_a_free_constant(name):
    # All experts of both groups have their dominant's row, and the groups are of one size: z = R0 x + log 3.
    rows = drawn(2, 4)[[1, 0, 0, 1, 0, 1]]
    groups = ExpertGroups(torch.tensor([1, 0, 0, 1, 0, 1]), torch.tensor([1, 3]))
    new = call(name, rows, groups, [drawn(20, 4).float()], **({"off_diagonal": 1.0} if name == "hessian" else {}))
    torch.testing.assert_close(new, rows[[1, 3]], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", SOFTMAX_RULES)
def test_inputs_that_were_not_seen_leave_the_rows_of_the_dominants(name):
    rows = drawn(6, 5)
    assert torch.equal(call(name, rows), rows[[1, 3]])
    seen = drawn(30, 5).float()
    seen[:, 3:] = 0
    new = call(name, rows, tokens=[seen])
    torch.testing.assert_close(new[:, 3:], rows[[1, 3], 3:], rtol=1e-12, atol=1e-12)
    assert (new[:, :3] - rows[[1, 3], :3]).abs().max() > 0.01


@pytest.mark.parametrize("name", RULES)
def test_batches_do_not_matter(name):
    rows, x = drawn(6, 4), drawn(14, 4).float()
    parts = call(name, rows, tokens=[x[:1], x[1:9], x[9:]])
    torch.testing.assert_close(call(name, rows, tokens=[x]), parts, rtol=1e-5, atol=1e-5)


def test_conjugate_gradients_end_where_they_are_told():
    root = drawn(6, 6)
    matrix, right = root @ root.T, drawn(6)
    calls = []

    def product(x):
        calls.append(x)
        return matrix @ x

    torch.testing.assert_close(matrix @ conjugate_gradients(product, right, 1e-12, 100), right)
    done = len(calls)
    conjugate_gradients(product, right, 1e-12, 3)
    assert len(calls) == done + 3 and done <= 12
    assert not conjugate_gradients(product, torch.zeros(6), 1e-6, 100).any()
    loose = conjugate_gradients(product, right, 0.5, 100)
    assert (right - matrix @ loose).norm() <= 0.5 * right.norm()


# --- rows in routers


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4_text", "switch_transformers", "deepseek_v3"])
def test_rows_times_inputs_are_the_logits_of_the_model(family, original, tokens):
    model = original(family)
    layer = find_layers(model)[0]
    place = find_rows(layer, layer.num_slots)
    inputs, logits = LayerInputs(), []
    keep = layer.router.register_forward_pre_hook(
        lambda _, args: inputs.router_calls.append((args[:1], {})) if not torch.is_grad_enabled() else None
    )
    with torch.no_grad():
        ids = tokens[0][None] if tokens[0].dim() == 1 else tokens[0]
        model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    keep.remove()
    inputs.router_calls = inputs.router_calls[:1]
    listen = layer.family.logits_module(layer).register_forward_hook(
        lambda *call: logits.append(layer.family.logits(call[-1]).flatten(0, -2))
    )
    (x,) = router_inputs(layer, place, inputs)
    listen.remove()
    rows = read_rows(layer, place, layer.num_slots)
    torch.testing.assert_close(x.double() @ rows.T, logits[0].double(), rtol=1e-4, atol=1e-5)


def test_written_rows_are_read_again_with_their_bias():
    layer = find_layers(tiny_model("gpt_oss"))[0]
    place = find_rows(layer, 8)
    assert place.bias == "bias"
    rows = read_rows(layer, place, 8)
    assert torch.equal(rows[:, -1].float(), layer.router.bias)
    select_rows(layer.router, {8: torch.tensor([1, 4, 6])})
    new = drawn(3, rows.shape[1]).float().double()
    write_rows(layer, place, new)
    assert torch.equal(layer.router.weight.double(), new[:, :-1]) and torch.equal(
        layer.router.bias.double(), new[:, -1]
    )


def test_rows_of_no_routed_expert_stay():
    layer = find_layers(tiny_model("gpt_oss"))[0]
    place, weight = find_rows(layer, 8), layer.router.weight.detach().clone()
    write_rows(layer, place, drawn(6, weight.shape[1] + 1))
    assert torch.equal(layer.router.weight[6:], weight[6:]) and layer.router.weight.shape == weight.shape
    assert not torch.equal(layer.router.weight[:6], weight[:6])


# --- whole models


def native(model, tokens, **recipe):
    base = {"layout": "native", "num_experts": 5}
    return compress_moe(model, Recipe(**{**base, **recipe}), calibration=tokens, progress=False)


@pytest.mark.parametrize("refit", [None, "least_squares"])
@pytest.mark.parametrize("rule", RULES)
def test_the_rows_of_a_rule_stay_only_where_held_out_tokens_are_better_off(rule, refit, original, tokens):
    first = native(original("qwen3_moe"), tokens)
    result = native(original("qwen3_moe"), tokens, router=rule, refit=refit)
    kept = 0
    for layer, plain, now, before in zip(
        find_layers(result),
        find_layers(first),
        result.compression_report.layers,
        first.compression_report.layers,
        strict=True,
    ):
        assert now.router_error_before == pytest.approx(before.relative_error, rel=1e-6)
        is_kept = now.router_error_after < now.router_error_before
        kept += is_kept
        assert torch.equal(layer.router.weight, plain.router.weight) != is_kept
        if refit is None:
            least = min(now.router_error_before, now.router_error_after)
            assert now.relative_error == pytest.approx(least, rel=1e-6)
        assert before.router_error_before is None and before.router_error_after is None
    if rule == "dominant_rows":
        assert not kept


def test_the_guard_takes_what_is_better_and_drops_what_is_worse(monkeypatch, original):
    layer = find_layers(original("qwen3_moe"))[0]
    groups = ExpertGroups(torch.arange(8).clamp(max=3), torch.arange(4))
    stacked = {name: p.detach()[:4].clone() for name, p in layer.expert_parameters.items()}
    hidden = drawn(30, layer.hidden_size).float()
    index, weights = layer.family.route(layer, (hidden,), {})
    inputs = LayerInputs([(hidden, index, weights)], [((hidden,), {})])
    collected = Collected(None, inputs, inputs)
    best = drawn(4, layer.hidden_size).float().double()
    merged = MergedLayer(groups, Routing(rows=groups.dominant_of_group), stacked)
    target = copy.deepcopy(layer)
    cut_router(target, Recipe(layout="native"), merged, collected, [])
    write_rows(target, find_rows(target, 4), best)
    wanted = [target.family.run_experts(target, hidden, *target.family.route(target, (hidden,), {})).detach()]
    for rows, stays in ((best, True), (-best, False)):
        monkeypatch.setitem(ROUTER_ROWS._entries, "dominant_rows", lambda *_, rows=rows: rows)
        one = copy.deepcopy(layer)
        original_rows = one.router.weight.detach()[:4].clone()
        errors = cut_router(one, Recipe(layout="native", router="dominant_rows"), merged, collected, wanted)
        assert errors.is_kept == stays
        assert torch.equal(one.router.weight, best.float() if stays else original_rows)
        assert (errors.rule < 1e-10) == stays


@pytest.mark.parametrize("rule", RULES)
def test_nothing_changes_where_all_experts_stay(rule, original, tokens):
    model, result = original("mixtral"), native(original("mixtral"), tokens, num_experts=8, router=rule)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, result.state_dict()[name])
    assert result.compression_report.layers[0].router_error_after is None


@pytest.mark.parametrize("rule", SOFTMAX_RULES)
def test_bfloat16_and_biases(rule, original, tokens):
    result = native(original("gpt_oss").bfloat16(), tokens, router=rule)
    for layer in find_layers(result):
        assert layer.router.weight.dtype == layer.router.bias.dtype == torch.bfloat16
        assert layer.router.bias.shape == (5,) and layer.router.weight.isfinite().all()


# --- what is refused


def test_mapped_routers_have_no_rows_to_choose():
    with pytest.raises(ValueError, match=r"router is 'hessian', but in layout 'mapped'.*Use layout='native'"):
        Recipe(router="hessian")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"router": "log_sum_exp", "router_options": {"ridge": 0}}, "ridge is 0, it must be a positive"),
        ({"router": "hessian", "router_options": {"tolerance": 1}}, "tolerance is 1, it must be in"),
        ({"router": "hessian", "router_options": {"iterations": 0}}, "iterations is 0, it must be a whole"),
        ({"router": "hessian", "router_options": {"off_diagonal": 2}}, "off_diagonal is 2, it must be in"),
        (
            {"router": "hessian", "router_options": {"iteration": 2}},
            "no option 'iteration'.*Did you mean 'iterations'",
        ),
        ({"router": "hesian"}, "Unknown router rule 'hesian'.*Did you mean 'hessian'"),
    ],
)
def test_options_are_refused_when_the_recipe_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Recipe(layout="native", **options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "family, reason",
    [
        ("deepseek_v3", "it chooses among groups of experts"),
        ("gemma4_text", "per_expert_scale changes scores"),
        ("mixtral", None),
        ("gpt_oss", None),
        ("switch_transformers", None),
    ],
)
def test_routers_are_refused_by_what_they_do(family, reason, rule):
    model = tiny_model(family)
    recipe = Recipe(layout="native", router=rule, num_experts=6)
    if reason is None or rule not in SOFTMAX_RULES:
        check_layout(find_layers(model), recipe, model=model)
        return
    with pytest.raises(ValueError, match=f"router is '{rule}'.*not defined: {reason}.*Leave router out"):
        check_layout(find_layers(model), recipe, model=model)


def test_sigmoid_scores_are_no_softmax():
    model = tiny_model("glm4_moe", n_group=1, topk_group=1)
    layers = find_layers(model)
    with pytest.raises(ValueError, match="e_score_correction_bias changes scores beside the rows"):
        check_layout(layers, Recipe(layout="native", router="log_sum_exp"), model=model)
    for layer in layers:
        del layer.router.e_score_correction_bias
        layer.router.e_score_correction_bias = 0.0
    with pytest.raises(ValueError, match="its weights are no softmax of the logits"):
        check_layout(layers, Recipe(layout="native", router="log_sum_exp"), model=model)
