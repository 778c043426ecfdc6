import math
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from test_publishing import ALL, CODE, EVALUATION, PROSE, card_of, compression_report, section, table_rows

from hf_mcsmoe.evaluation import DomainScore, Evaluation, Interval
from hf_mcsmoe.evaluation.generation import check_generation
from hf_mcsmoe.publishing import model_card

LOOPS, PLAIN = [1, 2, 3, 4] * 4, list(range(10, 26))
LM_EVAL = {
    "version": "0.4.13",
    "tasks": {
        "quiz": {
            "documents": 1206,
            "num_fewshot": 5,
            "version": 1.0,
            "metrics": {
                "acc,none": {
                    "value": 0.4375,
                    "standard_error": 0.0123,
                    "interval": {"low": 0.4134, "high": 0.4617},
                    "baseline": 0.5125,
                    "increase": -0.075,
                    "increase_interval": {"low": -0.0912, "high": -0.0588},
                },
                "f1,none": {
                    "value": 0.25,
                    "standard_error": None,
                    "interval": None,
                    "baseline": None,
                    "increase": None,
                    "increase_interval": None,
                },
            },
        },
        "group": {"documents": None, "num_fewshot": None, "version": None, "metrics": {}},
    },
}


def with_intervals(score, half):
    """A score and intervals around it."""
    around = {
        "loss_interval": score.loss,
        "kl_interval": score.kl,
        "top1_agreement_interval": score.top1_agreement,
        "loss_increase_interval": score.loss - score.baseline_loss,
    }
    perplexity = Interval(math.exp(score.loss - half), math.exp(score.loss + half))
    return replace(
        score,
        rows=7,
        loss_increase=score.loss - score.baseline_loss,
        baseline_perplexity=math.exp(score.baseline_loss),
        perplexity_interval=perplexity,
        **{name: Interval(value - half, value + half) for name, value in around.items()},
    )


def checked(written, baseline, ends=(99,)):
    return check_generation(written, baseline, ends=ends, max_new_tokens=16, prompt_source="rows | <of> text")


WHOLE = Evaluation(
    {"code": with_intervals(CODE, 0.0123), "prose": with_intervals(PROSE, 0.0456)},
    with_intervals(ALL, 0.0234),
    EVALUATION.sources,
    baseline="some-lab/Tiny-MoE",
    kl_top_k=64,
    generation=checked([LOOPS, LOOPS[1:], [*LOOPS[:9], 99]], [PLAIN, PLAIN[1:], [*PLAIN[:5], 99]]),
    lm_eval=LM_EVAL,
)


def tables(card, title):
    """The tables of a section, by their headings."""
    text = "\n".join(section(card, title))
    return {part.splitlines()[0]: table_rows(part.splitlines()) for part in f"### {title}\n{text}".split("### ")[1:]}


def test_the_tables_hold_the_scores_with_their_intervals():
    found = tables(card_of(evaluation=WHOLE), "Evaluation")
    assert found["Evaluation"][0] == [
        "code",
        "1,201",
        f"{math.exp(2.0):#.4g}",
        f"{math.exp(2.1):#.4g} [{math.exp(2.1 - 0.0123):#.4g}, {math.exp(2.1 + 0.0123):#.4g}]",
        "+0.1000 [+0.0877, +0.1123]",
        "≥ 0.0625 [0.0502, 0.0748]",
        "87.5% [86.3%, 88.7%]",
    ]
    assert [row[0] for row in found["Evaluation"]] == ["code", "prose", "all"]
    assert found["Benchmarks"] == [
        ["quiz", "acc,none", "1,206", "5", "0.5125", "0.4375 [0.4134, 0.4617]", "-0.0750 [-0.0912, -0.0588]"],
        ["quiz", "f1,none", "1,206", "5", "not evaluated", "0.2500", "not evaluated"],
    ]
    rows = found["What the model writes"]
    assert [row[0] for row in rows] == ["repeated 4-grams", "ended by itself", "tokens"]
    check = WHOLE.generation.repetition
    assert rows[0][1:] == [
        f"{one.value:{form}} [{one.interval.low:{form}}, {one.interval.high:{form}}]"
        for one, form in ((check.baseline, ".1%"), (check.value, ".1%"), (check.increase, "+.1%"))
    ]
    text = "\n".join(section(card_of(evaluation=WHOLE), "Evaluation"))
    assert "KL is over the 64 tokens" in text and "rows \\| &lt;of> text" in text and "95% confidence" in text
    assert text.index("- code: `file e.jsonl, domain code`") < text.index("### What")


def test_scores_of_older_reports_have_no_intervals():
    found = tables(card_of(evaluation=EVALUATION), "Evaluation")
    assert found["Evaluation"] == [
        ["code", "1,201", f"{math.exp(2.0):#.4g}", f"{math.exp(2.1):#.4g}", "+0.1000", "0.0625", "87.5%"],
        ["prose", "803", f"{math.exp(3.0):#.4g}", f"{math.exp(3.4):#.4g}", "+0.4000", "0.2500", "75.0%"],
        ["all", "2,004", f"{math.exp(2.4):#.4g}", f"{math.exp(2.6):#.4g}", "+0.2000", "0.1250", "81.2%"],
    ]
    old = {
        name: {key: value for key, value in vars(score).items() if key in list(vars(CODE))[:7]}
        for name, score in EVALUATION.domains.items()
    }
    overall = {key: value for key, value in vars(ALL).items() if key in list(vars(CODE))[:7]}
    report = {**compression_report().to_dict(), "evaluation": {"domains": old, "overall": overall, "sources": {}}}
    assert tables(model_card(report), "Evaluation")["Evaluation"] == found["Evaluation"]


def test_what_was_not_evaluated_says_so():
    card = card_of()
    lines = "\n".join(section(card, "Evaluation"))
    for part in (
        "Perplexity and KL to the base model: not",
        "generated text: not evaluated",
        "Benchmarks\n\nNot eval",
    ):
        assert part in lines
    assert "was not evaluated" in section(card, "Limitations")[-1]

    alone = DomainScore(1201, 2.1, 0.05, math.exp(2.1))
    card = card_of(evaluation=Evaluation({"code": alone}, alone))
    row = table_rows(section(card, "Evaluation"))[0]
    assert [row[place] for place in (2, 4, 5, 6)] == ["not evaluated"] * 4
    limits = section(card, "Limitations")
    assert "- The loss of quality against the base model was not evaluated." in limits
    assert limits[-1].startswith("- Not evaluated: what the model writes, benchmarks, other domains")
    assert section(card_of(evaluation=WHOLE), "Limitations")[-1].startswith("- Not evaluated: other domains")


def test_limitations_follow_from_the_measurements():
    limits = section(card_of(evaluation=WHOLE), "Limitations")
    worst = next(line for line in limits if "worst domain first" in line)
    assert "prose (+0.4000 [+0.3544, +0.4456]), code (+0.1000 [+0.0877, +0.1123])." in worst
    assert any(line.startswith("- It repeats itself more than the base model: ") for line in limits)
    assert not any("ends texts by itself" in line for line in limits)  # both ended one of three

    def of(written, baseline, ends=(99,)):
        return section(card_of(evaluation=WHOLE.with_(generation=checked(written, baseline, ends))), "Limitations")

    noisy = [PLAIN, LOOPS, PLAIN]
    assert any("more than the base model is open" in line for line in of([LOOPS, PLAIN, PLAIN], noisy))
    swapped = of([PLAIN] * 3, [LOOPS, LOOPS[1:], LOOPS[2:]])
    assert any(line.startswith("- It repeats itself less than the base model") for line in swapped)
    never = of([PLAIN] * 40, [[*PLAIN[:3], 99]] * 40)
    assert any(line.startswith("- It ends texts by itself in 0.0% [0.0%, 8.8%] of the cases") for line in never)
    alone = of([LOOPS, PLAIN], None, ends=())
    assert any(line.startswith("- Of the 4-grams it writes, ") for line in alone)


NUMBER = re.compile(r"(?<![\w.,-])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?%?(?![\w-])")


def numbers_of(text):
    """The numbers in prose and tables; code, links and names are no measurements."""
    for pattern in (r"```.*?```", r"`[^`]*`", r"<[^>]*>", r"\]\([^)]*\)"):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    return NUMBER.findall(text)


def known_numbers(report):
    """Every number of a report, the shares of sizes, sizes in larger units, and those in its strings."""
    found, strings = set(), []

    def walk(value):
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)
        elif isinstance(value, str):
            strings.append(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.add(float(value))

    walk(report)
    sizes = [f"{kind}_{what}" for kind in ("total", "active") for what in ("parameters", "bytes")]
    for name in sizes:
        before, after = (report.get(f"{name}_{time}") for time in ("before", "after"))
        if before is not None:
            found |= {after / before, *(value / 10**power for value in (before, after) for power in (3, 6, 9))}
    layers = report["layers"]
    found.add(sum(one["parameters_after"] for one in layers) / sum(one["parameters_before"] for one in layers))
    found |= {
        float(len(layers)),
        *(float(sum(one[f"num_experts_{t}"] for one in layers)) for t in ("before", "after")),
    }
    found |= {
        float(sum(one["unused_experts"] for one in layers)),
        float(sum(1 for o in layers if o["unused_experts"])),
    }
    runs = range(1, len(layers) + 1)  # neighbours with equal sizes
    return found | set(map(float, runs)), " ".join(strings)


def is_known(text, numbers, strings):
    """Whether some number shows as `text` with as many digits."""
    digits = text.rstrip("%").lstrip("+").replace(",", "")
    places = len(digits.partition("e")[0].partition(".")[2])
    scale = 100 if text.endswith("%") else 1
    values = [number * scale for number in numbers]
    close = any(
        f"{value:.{places}f}" == digits or f"{value:.4g}" == digits or f"{value:#.4g}" == digits for value in values
    )
    return close or re.search(rf"(?<!\d){re.escape(text)}(?!\d)", strings) is not None


@pytest.mark.parametrize("evaluation", [WHOLE, EVALUATION, None], ids=["whole", "old", "none"])
def test_every_number_of_the_card_is_in_the_report(evaluation):
    report = compression_report(active_parameters_before=600_123, active_parameters_after=450_321).to_dict()
    if evaluation is not None:
        report["evaluation"] = evaluation.to_dict()
    card = model_card(report, repo_name="me/half")
    values, strings = known_numbers(report)
    if evaluation is not None:  # which reports of older versions do not hold
        scores = [*report["evaluation"]["domains"].values(), report["evaluation"]["overall"]]
        values |= {math.exp(one["baseline_loss"]) for one in scores if evaluation is EVALUATION}
        values |= {one["loss"] - one["baseline_loss"] for one in scores if evaluation is EVALUATION}
    # "Method" and "Recipe" are the recipe in words, with the year of the paper.
    titles = ("Sizes", "Evaluation", "How to load", "Calibration data", "Limitations", "Licence")
    measured = "\n".join(card.text.split("\n## ")[0:1] + ["\n".join(section(card, title)) for title in titles])
    found = numbers_of(measured)
    assert len(found) > (100 if evaluation is WHOLE else 30)
    assert [text for text in found if not is_known(text, values, strings)] == []


def test_the_test_of_numbers_finds_a_wrong_one():
    report = {**compression_report().to_dict(), "evaluation": WHOLE.to_dict()}
    values, strings = known_numbers(report)
    assert is_known("+0.1000", values, strings) and is_known("87.5%", values, strings)
    for wrong in ("+0.1001", "87.6%", "1,202", "0.06251"):
        assert not is_known(wrong, values, strings), wrong
    assert numbers_of("a 1,201 b-4 +0.5 [3.0%, 4e-05] `7` model.9 4-grams") == ["1,201", "+0.5", "3.0%", "4e-05"]


def test_the_card_with_everything_is_valid():
    card = card_of(evaluation=WHOLE, repo_name="me/half")
    assert ModelCard(card.content).data.to_dict() == card.data.to_dict()
    assert "{{" not in card.text and "{%" not in card.text and "None" not in card.text
    assert "hf-mcsmoe evaluate me/half --baseline some-lab/Tiny-MoE --data" in card.text
