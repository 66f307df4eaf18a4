"""Drawing with real pipelines: nothing changes in what they draw, and every denoiser call and step is seen."""

from __future__ import annotations

import math
from inspect import Parameter, Signature
from typing import Any

import pytest
import torch

from ditq.calibration.sampling import DenoiserCall, SamplingSettings, StepRecord, _bind, condition_kind, sample
from ditq.errors import DitqError
from tests.calibration.small_pipelines import ARGUMENTS, CONDITIONS, FAMILIES, STEPS, pipeline_of


@pytest.mark.parametrize("family", ["flux", "pixart", "sd3"])
def test_watching_does_not_change_what_the_pipeline_draws(family: str) -> None:
    pipeline, prompt = pipeline_of(family), CONDITIONS[family][0]
    [drawn] = sample(pipeline, [prompt], SamplingSettings(ARGUMENTS[family], seed=5))
    generator = torch.Generator().manual_seed(5)
    stock = pipeline(prompt=prompt, generator=generator, output_type="latent", **ARGUMENTS[family]).images
    assert torch.equal(drawn.latents, stock)
    assert drawn.image.size == (32, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sample_does_not_depend_on_its_neighbours(family: str) -> None:
    pipeline, conditions = pipeline_of(family), CONDITIONS[family]
    state = torch.get_rng_state()
    both = sample(pipeline, conditions, SamplingSettings(ARGUMENTS[family], seed=5))
    alone = sample(pipeline, conditions[1:], SamplingSettings(ARGUMENTS[family], seed=6))
    assert torch.equal(both[1].latents, alone[0].latents)
    assert not torch.equal(both[0].latents, both[1].latents)
    assert torch.equal(torch.get_rng_state(), state)


def calls_of(family: str) -> tuple[list[DenoiserCall], list[tuple[int, StepRecord]]]:
    calls: list[DenoiserCall] = []
    steps: list[tuple[int, StepRecord]] = []
    sample(
        pipeline_of(family),
        CONDITIONS[family],
        SamplingSettings(ARGUMENTS[family]),
        on_denoiser_call=calls.append,
        on_step=lambda index, step: steps.append((index, step)),
        decode=False,
    )
    return calls, steps


def test_both_guidance_branches_are_seen_when_they_are_separate_calls() -> None:
    calls, steps = calls_of("flux")
    assert [(call.condition, call.step, call.call) for call in calls] == [
        (condition, step, 2 * step + branch) for condition in (0, 1) for step in range(STEPS) for branch in (0, 1)
    ]
    conditional, unconditional = (call.arguments["encoder_hidden_states"] for call in calls[:2])
    assert not torch.equal(conditional, unconditional)
    assert [(index, step.step) for index, step in steps] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (_, step), call in zip(steps, calls[::2], strict=True):
        # FluxPipeline gives the denoiser a thousandth of the scheduler's timestep
        assert step.timestep / 1000 == pytest.approx(float(call.arguments["timestep"]), rel=1e-6)


@pytest.mark.parametrize("family", ["pixart", "sd3", "dit"])
def test_both_guidance_branches_are_seen_when_they_share_a_call(family: str) -> None:
    calls, _ = calls_of(family)
    assert [(call.condition, call.step) for call in calls] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(call.arguments["hidden_states"].shape[0] == 2 for call in calls)
    if family == "dit":
        assert [call.arguments["class_labels"].tolist() for call in calls[::2]] == [[7, 1000], [3, 1000]]


def test_model_output_and_latents_of_a_step_are_the_schedulers() -> None:
    _, steps = calls_of("flux")
    first, second = (step for index, step in steps if index == 0)
    # rectified flow, Euler: x' = x + (sigma' - sigma) v, and the last sigma is 0
    moved = first.latents + (0 - second.timestep / 1000) * second.model_output
    torch.testing.assert_close(second.latents, moved, rtol=0, atol=4 * 2**-23 * float(first.latents.abs().max()))


def test_everything_is_put_back_after_an_error() -> None:
    pipeline = pipeline_of("flux")

    def interrupt(call: DenoiserCall) -> None:
        raise KeyboardInterrupt

    hooks = len(pipeline.transformer._forward_pre_hooks)
    with pytest.raises(KeyboardInterrupt):
        sample(pipeline, ["a"], SamplingSettings(ARGUMENTS["flux"]), on_denoiser_call=interrupt)
    assert "step" not in vars(pipeline.scheduler)
    assert len(pipeline.transformer._forward_pre_hooks) == hooks


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"num_inference_step": 3},
            "FluxPipeline has no sampling argument 'num_inference_step'; did you mean 'num_inf",
        ),
        ({"generator": None}, "'generator' is set by ditq itself"),
        ({"num_inference_steps": 0}, "'num_inference_steps' is 0; give a whole number of at least 1"),
        ({"height": 32.0}, "'height' is 32.0; give a whole number"),
        ({"guidance_scale": "abc"}, "'guidance_scale' is 'abc'; give a number"),
        ({"guidance_scale": math.nan}, "'guidance_scale' is nan; give finite numbers"),
        ({"negative_prompt": "a \udcff"}, "'negative_prompt' is 'a \\udcff'; give finite numbers, and texts as UTF-8"),
        ({"sigmas": [1.0, math.inf]}, "'sigmas' is [1.0, inf]; give finite numbers"),
        ({"latents": 1}, "FluxPipeline cannot draw 'a': "),
        ({"num_images_per_prompt": 0}, "FluxPipeline cannot draw 'a': "),
        ({"callback_on_step_end": 1}, "FluxPipeline cannot draw 'a': "),
        ({"max_sequence_length": 1000}, "FluxPipeline cannot draw 'a': `max_sequence_length` cannot be greater than"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(DitqError) as caught:
        sample(pipeline_of("flux"), ["a"], SamplingSettings({**ARGUMENTS["flux"], **arguments}))
    assert words in str(caught.value)


def test_conditions_of_the_wrong_kind_are_refused() -> None:
    assert condition_kind(pipeline_of("dit")) == "class"
    assert condition_kind(type(pipeline_of("sd3"))) == "prompt"
    for family, conditions, words in (
        ("flux", [3], "takes text prompts"),
        ("flux", [], "no prompts"),
        ("flux", [""], "is empty"),
        ("dit", ["dog"], "takes labels from 0 to 999"),
        ("dit", [1000], "takes labels from 0 to 999"),
        ("dit", [], "no class labels"),
    ):
        with pytest.raises(DitqError, match=words):
            sample(pipeline_of(family), conditions, SamplingSettings(ARGUMENTS[family]))


def test_latents_that_are_not_finite_stop_the_drawing() -> None:
    pipeline = pipeline_of("flux")
    bias = pipeline.transformer.proj_out.bias
    before = bias.clone()
    try:
        bias[0] = torch.nan
        with pytest.raises(DitqError, match="drawing 'a': the latents are not finite after step 0"):
            sample(pipeline, ["a"], SamplingSettings(ARGUMENTS["flux"]))
    finally:
        bias.copy_(before)


def test_progress_counts_steps() -> None:
    seen: list[tuple[str, int, int]] = []
    sample(
        pipeline_of("flux"),
        ["a", "b"],
        SamplingSettings(ARGUMENTS["flux"]),
        decode=False,
        progress=lambda *news: seen.append(news),
    )
    assert seen == [("sampling", done, 2 * STEPS) for done in range(2 * STEPS + 1)]


def test_latents_by_position_are_named_as_an_engine_tells_its_originals_arguments() -> None:
    """Whose own forward takes any: PixArt's and DiT's pipelines give latents without a name."""

    class Engine(torch.nn.Module):
        call_signature = Signature(
            [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in ("hidden_states", "timestep")]
        )

        def forward(self, *arguments: Any, **keywords: Any) -> None: ...

    latents, timestep = torch.zeros(1, 4), torch.ones(1)
    assert _bind(Engine(), (latents,), {"timestep": timestep}) == {"hidden_states": latents, "timestep": timestep}
    plain = torch.nn.Module()
    plain.forward = lambda *arguments, **keywords: None  # type: ignore[method-assign]
    with pytest.raises(DitqError, match="unnamed extra arguments"):
        _bind(plain, (latents,), {})
