"""The values of an evaluation: summary, thresholds, JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from ditq.errors import DitqError
from ditq.report.evaluation import (
    METRICS,
    Evaluation,
    Histogram,
    PromptResult,
    SiteHistograms,
    SiteResult,
    StepResult,
    parse_thresholds,
)


def prompt(psnr: float, error: float, **changes: object) -> PromptResult:
    result = PromptResult("a cat", 0, psnr, 0.9, error, 0.1, 0.01)
    return replace(result, **changes)  # type: ignore[arg-type]


def evaluation(*prompts: PromptResult) -> Evaluation:
    histogram = Histogram(2.0, 0.5, [1, 5, 1])
    return Evaluation(
        checkpoint="mini",
        engine="engine",
        arguments={"height": 64, "negative_prompt": ""},
        seed=3,
        prompts=list(prompts),
        steps=[StepResult(0, 1000.0, 0.01, 0.02, 0.03), StepResult(1, 500.0, 0.03, 0.06, 0.05)],
        sites=[
            SiteResult("a", "w4a8", "query", 12, 10.0, 12.0),
            SiteResult("b", "w4a8", "", 12, 30.0),
            SiteResult("c", "w4a8", "value", 12, math.inf, aligned=True),
        ],
        histograms=[SiteHistograms("a", histogram, histogram, histogram, histogram)],
        notes=["a note"],
        environment={"torch": "2"},
    )


def test_means_are_of_what_they_say() -> None:
    summary = evaluation(prompt(20.0, 0.01), prompt(40.0, 0.0001)).summary
    assert summary["psnr"] == 30.0 and summary["psnr_worst"] == 20.0
    assert summary["psnr_of_mean_error"] == pytest.approx(-10 * math.log10(0.00505))
    assert summary["step_error"] == pytest.approx(0.04) and summary["forced_error"] == pytest.approx(0.02)
    assert summary["sqnr"] == 20.0 and summary["sqnr_worst"] == 10.0
    assert set(summary) == set(METRICS)


def test_pictures_too_small_for_a_similarity_have_the_other_numbers() -> None:
    tiny = replace(prompt(20.0, 0.01), ssim=None)
    summary = evaluation(tiny).summary
    assert summary["ssim"] is summary["ssim_worst"] is None and summary["psnr"] == 20.0
    assert evaluation(tiny, prompt(40.0, 0.0001)).summary["ssim_worst"] == prompt(40.0, 0.0001).ssim
    assert Evaluation.from_json(evaluation(tiny).to_json()).prompts[0].ssim is None


def test_identical_pictures_do_not_hide_the_others_in_the_mean() -> None:
    assert evaluation(prompt(20.0, 0.01), prompt(math.inf, 0.0)).summary["psnr"] == 20.0
    assert evaluation(prompt(math.inf, 0.0)).summary["psnr"] == math.inf
    assert evaluation().summary["psnr"] is None


def test_an_evaluation_survives_json() -> None:
    original = evaluation(
        prompt(math.inf, 0.0, latent_error=0, st_lpips=None), prompt(3.0, 0.5, condition=7, defects=["it is black"])
    )
    text = original.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert Evaluation.from_json(text) == original
    assert json.loads(text)["summary"]["psnr"] == 3.0


def test_not_a_number_survives_json() -> None:
    again = Evaluation.from_json(evaluation(prompt(20.0, 0.01, latent_error=math.nan)).to_json())
    assert math.isnan(again.prompts[0].latent_error)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format_version": 2}', '{"format_version": 1}', '{"format_version": 1, "prompts": 5}'],
)
def test_foreign_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(DitqError) as caught:
        Evaluation.from_json(text)
    assert "\n" not in str(caught.value)


def test_changed_types_are_refused() -> None:
    values = json.loads(evaluation(prompt(20.0, 0.01)).to_json())
    for path, wrong in ((("prompts", 0, "psnr"), "high"), (("steps", 0, "step"), 1.5), (("sites",), {})):
        changed = json.loads(json.dumps(values))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = wrong
        with pytest.raises(DitqError, match="not what 'ditq evaluate' writes"):
            Evaluation.from_json(json.dumps(changed))


def test_thresholds_fail_on_the_worse_side_of_each_metric() -> None:
    found = evaluation(prompt(20.0, 0.01))
    assert found.fail_below({"psnr": 20.0, "st_lpips": 0.1}) == []
    assert found.fail_below({"psnr": 22.0}) == ["psnr is 20, below 22: mean image PSNR, dB"]
    assert found.fail_below({"st_lpips": 0.05, "psnr": 19}) == ["st_lpips is 0.1, above 0.05: mean ST-LPIPS"]


def test_what_was_not_measured_or_is_not_a_number_meets_no_threshold() -> None:
    found = evaluation(prompt(20.0, 0.01, st_lpips=None, latent_error=math.nan))
    assert found.fail_below({"st_lpips": 1.0}) == ["st_lpips was not measured (threshold 1): mean ST-LPIPS"]
    assert len(found.fail_below({"latent_error": 1.0})) == 1


def test_thresholds_are_read_from_text() -> None:
    assert parse_thresholds("psnr=22, ssim = 0.9") == {"psnr": 22.0, "ssim": 0.9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnrr=22", "no metric is called 'psnrr'; did you mean 'psnr'?"),
        ("lions=2", "there are psnr, "),
        ("psnr", "not of the form name=number"),
        ("", "not of the form name=number"),
        ("psnr=high", "'high' is not a number"),
        ("psnr=nan", "'nan' is not a number"),
    ],
)
def test_wrong_thresholds_are_named(text: str, message: str) -> None:
    with pytest.raises(DitqError, match=r"psnr|metric|threshold") as caught:
        parse_thresholds(text)
    assert message in str(caught.value)
