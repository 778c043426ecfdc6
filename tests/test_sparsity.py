import itertools
import math

import pytest
import torch
from decomposed_models import decompose_model

from hf_mcsmoe.calibration import load_calibration
from hf_mcsmoe.modeling.densify import harden
from hf_mcsmoe.training import RowPruner, cubic_schedule, prune_by_gradients, sparse_parts
from hf_mcsmoe.training.gradient_importance import labelled, scores_of_backward
from hf_mcsmoe.training.row_importance import RowImportance, most_important, row_scores
from hf_mcsmoe.training.schedule import SparsitySchedule, warmup_steps

MODEL_TYPES = ["qwen3_moe", "switch_transformers"]


@pytest.fixture
def decomposed(original):
    """`decomposed(model_type)`: that tiny model with all experts decomposed and all rows kept."""

    def build(model_type="qwen3_moe", **options):
        return decompose_model(original(model_type), **{"rank": 4, "keep_rows": 1.0, **options})

    return build


def schedule(total=10, initial=0, final=0, keep=0.25):
    return SparsitySchedule(total, initial, final, keep)


def loss_of(model, rows):
    return model(input_ids=rows, labels=rows).loss


# The schedule


@pytest.mark.parametrize(
    ("step", "keep"), [(0, 1.0), (399, 1.0), (400, 1.0), (5000, 0.169), (8399, 0.1), (8400, 0.1), (10000, 0.1)]
)
def test_schedule_of_the_paper(step, keep):
    # 5000: 0.1 + 0.9 * (1 - 4600 / 8000)^3 = 0.16909
    assert cubic_schedule(step, 10000, 400, 1600, 0.1) == pytest.approx(keep, abs=1e-4)


def test_schedule_falls_from_one_to_the_final_share():
    shares = [cubic_schedule(step, 100, 10, 20, 0.3) for step in range(101)]
    assert shares[:11] == [1.0] * 11 and shares[80:] == [0.3] * 21
    assert all(later < earlier for earlier, later in itertools.pairwise(shares[10:81]))


def test_schedule_without_a_middle():
    assert [cubic_schedule(step, 4, 2, 2, 0.5) for step in range(5)] == [1.0, 1.0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("given", "steps"), [(0, 0), (0.04, 400), (0.00001, 1), (1, 1), (16, 16), (16.0, 16)])
def test_warmup_in_steps_or_as_a_share(given, steps):
    assert warmup_steps(given, 10000, "final_warmup") == steps


@pytest.mark.parametrize("given", [-1, -0.1, 1.5, True])
def test_warmup_that_is_neither(given):
    with pytest.raises(ValueError, match=r"final_warmup is .* a whole number of steps, or a share"):
        warmup_steps(given, 100, "final_warmup")


ERRORS = {
    "keep": ({"keep": 1.5}, r"final_keep is 1.5, it must be in \[0, 1\]"),
    "negative": ({"initial": -1}, "initial_warmup is -1 steps, it must be >= 0"),
    "too long": (
        {"initial": 6, "final": 5},
        "initial_warmup is 6 and final_warmup 5 steps, together they must not exceed the 10",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_schedule_that_cannot_be(case):
    changes, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        schedule(**changes)


# Importance


def test_scores_by_hand():
    values, gradient = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[-3.0, 1.0], [1.0, 9.0]])
    assert row_scores(values, gradient).tolist() == [(3 + 2) / 2, 3 / 2]


def test_wide_rows_are_not_favoured():
    # The same numbers in every column: only the width differs.
    narrow, wide = torch.full((1, 3), 2.0), torch.full((1, 300), 2.0)
    assert row_scores(narrow, narrow).tolist() == row_scores(wide, wide).tolist() == [4.0]


def test_average_of_two_steps_by_hand():
    importance = RowImportance(beta=0.85)
    importance.update({"a": torch.tensor([1.0, 0.0])})
    # The score of a step counts in that step; with a lag of one step this would be 0.
    torch.testing.assert_close(importance.average["a"], torch.tensor([0.15, 0.0]))
    importance.update({"a": torch.tensor([2.0, 4.0])})
    torch.testing.assert_close(importance.average["a"], torch.tensor([0.85 * 0.15 + 0.15 * 2, 0.15 * 4]))


@pytest.mark.parametrize("beta", [1.0, -0.1, True])
def test_beta_out_of_range(beta):
    with pytest.raises(ValueError, match=r"beta is .*, it must be in"):
        RowImportance(beta)


def test_budget_is_exact_under_ties():
    importance = {"b": torch.tensor([1.0, 2.0, 1.0]), "a": torch.tensor([1.0, 0.5, 1.0, 2.0])}
    expected = {
        0: ([0, 0, 0], [0, 0, 0, 0]),
        1: ([0, 1, 0], [0, 0, 0, 0]),
        3: ([1, 1, 0], [0, 0, 0, 1]),
        5: ([1, 1, 1], [1, 0, 0, 1]),  # in the order of the parts, then of their rows
        6: ([1, 1, 1], [1, 0, 1, 1]),
        7: ([1, 1, 1], [1, 1, 1, 1]),
    }
    for count, (of_b, of_a) in expected.items():
        kept = most_important(importance, count)
        assert (kept["b"].int().tolist(), kept["a"].int().tolist()) == (of_b, of_a)


# The pruner, in a loop of one's own


def reference_rows(history, beta, keeps, final_step):
    """Which rows stay after each step, from the formulas: {name: per step (S before pruning, gradient)} as lists."""
    average = {name: [0.0] * len(steps[0][0]) for name, steps in history.items()}
    stays = []
    for step, keep in enumerate(keeps, start=1):
        if step > final_step:
            stays.append(stays[-1])
            continue
        for name, steps in history.items():
            values, gradient = steps[step - 1]
            for row, (of_values, of_gradient) in enumerate(zip(values, gradient, strict=True)):
                score = sum(abs(a * b) for a, b in zip(of_values, of_gradient, strict=True)) / len(of_values)
                average[name][row] = beta * average[name][row] + (1 - beta) * score
        every = [(-value, place, row) for place, name in enumerate(average) for row, value in enumerate(average[name])]
        count = math.floor(keep * len(every) + 0.5)
        stays.append({(place, row) for _, place, row in sorted(every)[:count]})
    return stays


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pruner_against_the_formulas(model_type, decomposed, tokens):
    model = decomposed(model_type)
    pruner = RowPruner(model, schedule(6, 1, 2, keep=0.5), beta=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-2)
    parts = sparse_parts(model)
    history, kept = {name: [] for name in parts}, []
    for step in range(1, 7):
        loss_of(model, tokens[4 * step - 4 : 4 * step]).backward()
        optimizer.step()
        for name, part in parts.items():
            history[name].append((part.parameter.detach().tolist(), part.parameter.grad.tolist()))
        pruner.step(step)
        optimizer.zero_grad()
        nonzero = [(part.parameter != 0).any(1).nonzero().flatten().tolist() for part in parts.values()]
        kept.append({(place, row) for place, rows in enumerate(nonzero) for row in rows})
    keeps = [cubic_schedule(step, 6, 1, 2, 0.5) for step in range(1, 7)]
    assert kept == reference_rows(history, 0.3, keeps, final_step=4)
    returned = [later - earlier for earlier, later in itertools.pairwise(kept)]
    assert any(returned[:3]) and not any(returned[3:])  # rows come back before the final phase, none in it


def test_share_is_of_all_rows_of_the_matrices(decomposed, tokens):
    model = decomposed(keep_rows=0.5)  # half of the rows are stored
    pruner = RowPruner(model, schedule(3, keep=0.25))
    stored = sum(part.row.numel() for part in pruner.parts.values())
    assert pruner.num_rows == 3 * 8 * (24 + 24 + 32) and stored == pruner.num_rows / 2
    left = []
    for step in (1, 2, 3):
        loss_of(model, tokens[:4]).backward()
        pruner.step(step)
        left.append(pruner.num_nonzero_rows())
    # 0.25 + 0.75 * (2 / 3)^3 = 0.472, 0.25 + 0.75 / 27 = 0.278
    assert left == [math.floor(share * pruner.num_rows + 0.5) for share in (0.25 + 6 / 27, 0.25 + 0.75 / 27, 0.25)]


def test_nothing_is_pruned_before_the_budget_binds(decomposed, tokens):
    model = decomposed()
    before = [part.parameter.clone() for part in sparse_parts(model).values()]
    pruner = RowPruner(model, schedule(10, initial=5))
    for step in (1, 2, 3, 4, 5):
        loss_of(model, tokens[:4]).backward()
        pruner.step(step)
    after = [part.parameter for part in sparse_parts(model).values()]
    assert all(map(torch.equal, before, after)) and not pruner.kept


def test_unused_layers_lose_their_rows_first(decomposed, tokens):
    model = decomposed()
    loss_of(model, tokens[:4]).backward()
    parts = sparse_parts(model)
    unused = next(name for name in parts if ".layers.1." in name)
    parts[unused].parameter.grad = None
    RowPruner(model, schedule(1, keep=0.5)).step(1)
    assert not parts[unused].parameter.any()


def test_skipped_step_is_not_measured(decomposed, tokens):
    model = decomposed()
    pruner = RowPruner(model, schedule(4))
    pruner.prune(1, None)
    assert not pruner.kept
    loss_of(model, tokens[:4]).backward()
    pruner.step(2)
    average = {name: one.clone() for name, one in pruner.importance.average.items()}
    for part in pruner.parts.values():
        part.parameter.grad.fill_(float("inf"))
    pruner.prune(3, None)
    assert all(torch.equal(average[name], one) for name, one in pruner.importance.average.items())
    assert pruner.num_nonzero_rows() == pruner.budget(3) < pruner.budget(2)


def test_hardening_keeps_the_function_and_counts_the_rows(decomposed, tokens, prompt):
    model = decomposed()
    pruner = RowPruner(model, schedule(1, keep=0.3))
    loss_of(model, tokens[:4]).backward()
    pruner.step(1)
    logits = model(prompt).logits
    harden(model)
    torch.testing.assert_close(model(prompt).logits, logits, rtol=1e-5, atol=1e-5)
    parts = sparse_parts(model)
    assert sum(part.row.numel() for part in parts.values()) == pruner.budget(1) == math.floor(0.3 * 1920 + 0.5)
    for name, part in parts.items():
        path, matrix = name.rsplit(".", 1)
        entry = model.config.merged_sparse_moe["layers"][path]
        assert entry["num_rows"][matrix.removesuffix("_sparse")] == part.row.numel()


def test_state_restores_the_pruner(decomposed, tokens):
    def run(model, pruner, steps):
        for step in steps:
            loss_of(model, tokens[4 * step : 4 * step + 4]).backward()
            pruner.step(step)
            model.zero_grad()

    whole, parts = decomposed(), decomposed()
    uninterrupted = RowPruner(whole, schedule(5, final=2))
    run(whole, uninterrupted, range(1, 6))
    first = RowPruner(parts, schedule(5, final=2))
    run(parts, first, range(1, 4))
    second = RowPruner(parts, schedule(5, final=2))
    second.load_state_dict(first.state_dict())
    assert second.is_final
    run(parts, second, range(4, 6))
    states = (uninterrupted.state_dict(), second.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_state_of_another_model_is_refused(decomposed, tokens):
    model = decomposed()
    pruner = RowPruner(model, schedule(1))
    loss_of(model, tokens[:4]).backward()
    pruner.step(1)
    state = pruner.state_dict()
    harden(model)
    with pytest.raises(ValueError, match="Resume with the model that the training began with"):
        RowPruner(model, schedule(1)).load_state_dict(state)


def test_pruner_needs_decomposed_experts(original):
    with pytest.raises(ValueError, match="Qwen3MoeForCausalLM has no decomposed experts"):
        RowPruner(original("qwen3_moe"), schedule())


def test_pruner_needs_trained_sparse_parts(decomposed):
    model = decomposed()
    list(sparse_parts(model).values())[4].parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts.up_sparse' and 0 more of 9 .* require no grad"):
        RowPruner(model, schedule())


def test_pruner_needs_gradients(decomposed):
    with pytest.raises(RuntimeError, match=r"No sparse part has a gradient\. Call the pruner before zero_grad"):
        RowPruner(decomposed(), schedule()).step(1)


# By gradients alone


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_pruning_by_gradients_is_training_without_an_optimiser(model_type, decomposed, tokens):
    mine, reference = decomposed(model_type), decomposed(model_type)
    batches = [{"input_ids": rows, "labels": rows} for rows in tokens.split(6)]
    pruner = RowPruner(reference, schedule(len(batches), keep=0.2))
    for step, batch in enumerate(batches, start=1):
        reference(**batch).loss.backward()
        pruner.step(step)
        reference.zero_grad()
    harden(reference)
    prune_by_gradients(mine, batches, keep_rows=0.2, progress=False)
    states = (mine.state_dict(), reference.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])
    assert all(p.requires_grad and p.grad is None for p in mine.parameters())


def test_only_sparse_parts_get_gradients(decomposed, tokens):
    model = decomposed().train()
    frozen = model.get_input_embeddings().weight.requires_grad_(False)
    with scores_of_backward(model) as scores:
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        loss_of(model, tokens[:4]).backward()
        assert trained == set(sparse_parts(model)) == set(scores)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert not frozen.requires_grad and all(p.requires_grad for p in model.parameters() if p is not frozen)


def test_loss_of_a_calibration_does_not_count_padding(original, tokens):
    rows = [row[: 20 - 3 * place].tolist() for place, row in enumerate(tokens[:4])]
    batch = load_calibration(rows, batch_size=4, held_out_fraction=0).batches[0]
    model = original("qwen3_moe")
    labels = labelled(batch, model)["labels"]
    expected = [row + [-100] * (20 - len(row)) for row in rows]
    assert labels.tolist() == expected


def test_encoder_decoder_predicts_its_own_text(original, tokens):
    rows = [row[: 20 - 3 * place].tolist() for place, row in enumerate(tokens[:4])]
    batch = load_calibration(rows, batch_size=4, held_out_fraction=0).batches[0]
    inputs = labelled(batch, original("switch_transformers"))
    for row, decoder, labels in zip(rows, inputs["decoder_input_ids"], inputs["labels"], strict=True):
        known = len(row) - 1
        assert decoder[: known + 1].tolist() == [0, *row[:-1]]
        assert labels.tolist() == row[:-1] + [-100] * (20 - known)


def test_calibration_prunes_without_its_held_out_rows(decomposed, tokens):
    data = load_calibration(tokens, batch_size=4, held_out_fraction=0.25)
    mine, reference = decomposed(), decomposed()
    prune_by_gradients(mine, data, progress=False)
    batches = [{**b.inputs, "labels": b.inputs["input_ids"]} for b in data.batches if not b.held_out]
    prune_by_gradients(reference, batches, progress=False)
    states = (mine.state_dict(), reference.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_mode_of_the_model_comes_back(decomposed, tokens):
    model = decomposed().train()
    prune_by_gradients(model, [{"input_ids": tokens[:4], "labels": tokens[:4]}], harden=False, progress=False)
    assert model.training and sum(p.row.numel() for p in sparse_parts(model).values()) == 1920


@pytest.mark.parametrize(
    ("batches", "message"),
    [([], "There are no batches"), ([{"input_ids": torch.ones(1, 4).long()}], "Batch 0 has no labels")],
)
def test_batches_that_cannot_be_used(batches, message, decomposed):
    with pytest.raises(ValueError, match=message):
        prune_by_gradients(decomposed(), batches, progress=False)
