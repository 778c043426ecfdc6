import pytest
import torch
from test_evaluation import WordTokenizer, batch_of, random_rows
from tiny_models import tiny_model

from hf_mcsmoe.calibration import Calibration, CalibrationBatch
from hf_mcsmoe.evaluation.generation import (
    check_generation,
    continuations,
    encode_prompts,
    end_tokens,
    prompts_from_rows,
)

PROMPTS = [[5, 9, 17, 40], [30], [7, 7, 8], [50, 51, 52, 53, 54, 55], [11, 3]]


def greedy(model, prompt, most, ends):
    """One token at a time, without cache or padding."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and not (len(ids) > len(prompt) and ids[-1] in ends):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen3_moe")


def test_batches_with_padding_write_what_each_prompt_alone_gives(model):
    plain = [greedy(model, prompt, 8, ()) for prompt in PROMPTS]
    ends = [plain[0][3], plain[3][5]]  # tokens that come up, so that some texts end early
    expected = [greedy(model, prompt, 8, ends) for prompt in PROMPTS]
    assert len({len(row) for row in expected}) > 1
    for batch_size in (1, 2, 5):
        options = {"ends": ends, "max_new_tokens": 8, "batch_size": batch_size, "progress": False}
        assert continuations(model, PROMPTS, **options) == expected


def test_a_models_own_wishes_do_not_hide_loops(model):
    expected = continuations(model, PROMPTS[:1], ends=[], max_new_tokens=8, progress=False)
    strange = tiny_model("qwen3_moe")
    strange.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0, no_repeat_ngram_size=1)
    strange.train()
    assert continuations(strange, PROMPTS[:1], ends=[], max_new_tokens=8, progress=False) == expected
    assert strange.training


def test_measures_are_those_of_each_prompt():
    written = [[1, 2, 3, 4, 1, 2, 3, 4, 9], [5, 6, 7]]  # the first repeats one of five 4-grams, and ends
    baseline = [[1, 2, 9], [5, 6, 7]]
    check = check_generation(written, baseline, ends=[9], max_new_tokens=10, prompt_source="rows")
    assert (check.prompts, check.ngram, check.max_new_tokens, check.prompt_source) == (2, 4, 10, "rows")
    repeated = check.repetition
    assert [one.value for one in (repeated.value, repeated.baseline, repeated.increase)] == pytest.approx(
        [0.1, 0, 0.1]
    )
    assert [check.length.value.value, check.length.baseline.value, check.length.increase.value] == [5.5, 2.5, 3.0]
    assert [check.ended.value.value, check.ended.baseline.value, check.ended.increase.value] == [0.5, 0.5, 0.0]
    # Two of nine, the longer one with its end; all of three.
    assert check.same_prefix.value == pytest.approx((2 / 9 + 1) / 2)
    assert check.repetition.increase.interval.low >= -1 and check.length.value.interval.high <= 10


def test_ends_count_for_the_common_beginning():
    check = check_generation([[1, 2, 9]], [[1, 2, 3]], ends=[9], max_new_tokens=3, prompt_source="")
    assert check.same_prefix.value == pytest.approx(2 / 3)
    same = check_generation([[1, 2, 9]], [[1, 2, 9]], ends=[9], max_new_tokens=3, prompt_source="")
    assert same.same_prefix.value == 1.0 and same.same_prefix.interval is None


def test_without_a_baseline_there_is_nothing_to_compare():
    check = check_generation([[1, 2], [3, 4]], None, ends=[], max_new_tokens=2, prompt_source="")
    assert check.same_prefix is None and check.ended is None
    assert check.repetition.baseline is None and check.length.increase is None


def test_prompts_are_beginnings_of_rows_of_all_domains_in_turn():
    code, prose = random_rows(80, 9, 1), random_rows(6, 40, seed=1)
    data = {
        "code": Calibration((batch_of(code[:1]), batch_of(code[1:], left=True)), ""),
        "prose": Calibration((batch_of(prose),), ""),
    }
    expected = [code[0][:32], prose[0][:3], code[1][:4], prose[1][:20]]
    assert prompts_from_rows(data, 16) == expected
    assert prompts_from_rows(data, 3) == expected[:3] and prompts_from_rows(data, 0) == []

    picture = batch_of(prose)
    picture = CalibrationBatch({**picture.inputs, "pixel_values": torch.zeros(2, 3)}, picture.token_mask, False)
    assert prompts_from_rows({"pictures": Calibration((picture,), "")}, 4) == []


def test_prompts_and_ends_are_the_tokenizers():
    assert encode_prompts(["5 9", "30"], WordTokenizer()) == [[5, 9], [30]]
    with pytest.raises(ValueError, match="The prompt '' has no token"):
        encode_prompts(["5", ""], WordTokenizer())
    other = tiny_model("qwen3_moe")
    for stored, expected in ((None, [2]), (7, [7]), ([7, 8], [7, 8])):
        other.generation_config.eos_token_id = stored
        assert end_tokens(other, WordTokenizer()) == expected
    other.generation_config.eos_token_id = None
    assert end_tokens(other) == []
