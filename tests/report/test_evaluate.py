"""Evaluation in the real pipeline of the built-in checkpoint, with engines whose loss is known beforehand."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditq.calibration.calibrate import default_conditions
from ditq.calibration.sampling import Sample
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.nn import ActivationFormat, QuantLinear
from ditq.numerics.codebook import CODEBOOKS, encode
from ditq.report.evaluate import _Drawn, _for_layers, evaluate, heldout_conditions
from ditq.report.evaluation import Evaluation
from tests.export.quantized import engine_of
from tests.families_small import small_model

torch.set_num_threads(1)
PROMPTS = ["red apple, fluent 3d", "flag, noto"]
STEPS = 2


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint.open("mini")


def perturbed(checkpoint: Checkpoint, level: float) -> nn.Module:
    """The transformer with relative Gaussian noise on every matrix."""
    model = checkpoint.load_model()
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * level)
    return model


def with_eight_bit_attention(checkpoint: Checkpoint) -> nn.Module:
    """The transformer with three 8-bit linears, one of them fed by another."""
    model = checkpoint.load_model()
    for site in (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_v",
        "single_transformer_blocks.5.proj_out",
    ):
        linear: Any = model.get_submodule(site)
        code = encode(linear.weight, CODEBOOKS["uniform"](linear.weight, 8))
        layer = QuantLinear(site, code, linear.bias, ActivationFormat(8, "token"), codebook="uniform")
        model.set_submodule(site, layer)
    return model


@pytest.fixture(scope="module")
def by_noise(checkpoint: Checkpoint) -> dict[float, Evaluation]:
    return {
        level: evaluate(perturbed(checkpoint, level), checkpoint, conditions=PROMPTS, steps=STEPS, layers=False)
        for level in (0.0, 0.03, 0.2)
    }


def test_layers_of_large_models_are_measured_on_one_sample() -> None:
    drawn = _Drawn(
        Sample(None, torch.empty(0), []), [{"call": number} for number in range(20)], [torch.empty(4096 * 64)]
    )
    small, large = 7_600_000, 12_000_000_000
    assert [len(_for_layers(index, drawn, large)) for index in range(6)] == [6, 0, 0, 0, 0, 0]
    assert [len(_for_layers(index, drawn, small)) for index in range(6)] == [6, 6, 6, 6, 0, 0]


def test_the_same_model_loses_nothing(by_noise: dict[float, Evaluation]) -> None:
    found = by_noise[0.0]
    assert found.summary["psnr"] == math.inf and found.summary["psnr_worst"] == math.inf
    assert found.summary["ssim"] == pytest.approx(1.0, abs=1e-12)
    for name in ("latent_error", "step_error", "forced_error"):
        assert found.summary[name] == 0.0
    assert found.summary["st_lpips"] in (None, 0.0)
    assert found.defects == []


def test_more_noise_in_the_weights_is_worse_by_every_measure(by_noise: dict[float, Evaluation]) -> None:
    small, large = by_noise[0.03].summary, by_noise[0.2].summary
    for name in ("psnr", "psnr_worst", "psnr_of_mean_error", "ssim"):
        assert large[name] < small[name] < by_noise[0.0].summary[name]  # type: ignore[operator]
    for name in ("latent_error", "step_error", "forced_error"):
        assert large[name] > small[name] > 0  # type: ignore[operator]


def test_the_first_step_starts_from_the_same_noise_in_both_models(by_noise: dict[float, Evaluation]) -> None:
    steps = by_noise[0.2].steps
    assert [step.step for step in steps] == list(range(STEPS))
    assert steps[0].forced == pytest.approx(steps[0].accumulated, rel=1e-6)
    assert steps[1].accumulated != steps[1].forced
    assert steps[0].timestep > steps[1].timestep


def test_each_prompt_has_its_own_seed_and_pair_of_pictures(by_noise: dict[float, Evaluation]) -> None:
    found = by_noise[0.03]
    assert [(result.condition, result.seed) for result in found.prompts] == [(PROMPTS[0], 0), (PROMPTS[1], 1)]
    assert [len(pair) for pair in found.pictures] == [2, 2]
    assert found.arguments["num_inference_steps"] == STEPS and found.arguments["height"] == 64
    assert found.environment["original drawn in"] == "float32 on cpu"
    assert Evaluation.from_json(found.to_json()) == found


def test_any_callable_module_can_stand_in_for_the_transformer(
    checkpoint: Checkpoint, by_noise: dict[float, Evaluation]
) -> None:
    class Engine(nn.Module):
        """Not a diffusers model: what the pipeline asks of its transformer, and a forward that gives a bare tuple."""

        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inside, self.config, self.dtype, self.device = [model], model.config, model.dtype, model.device

        def cache_context(self, name: str) -> Any:
            return nullcontext()

        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            return (self.inside[0](*arguments, **{**keywords, "return_dict": False})[0],)

    found = evaluate(
        Engine(perturbed(checkpoint, 0.03)), checkpoint, conditions=PROMPTS[:1], steps=STEPS, layers=True, name="other"
    )
    assert found.prompts[0] == by_noise[0.03].prompts[0]
    assert found.engine == "other"
    assert found.sites == [] and any("no layer was measured" in note for note in found.notes)


def test_quantized_layers_are_measured_with_histograms(checkpoint: Checkpoint) -> None:
    found = evaluate(with_eight_bit_attention(checkpoint), checkpoint, conditions=PROMPTS[:1], steps=1)
    sites = {result.site: result for result in found.sites}
    assert set(sites) == {
        "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "single_transformer_blocks.5.proj_out"
    }  # fmt: skip
    query = sites["transformer_blocks.0.attn.to_q"]
    assert query.format == "w8a8 uniform" and query.kind == "query"
    assert query.parameters == checkpoint.load_model().get_submodule(query.site).weight.numel()  # type: ignore[union-attr, operator]
    # Nothing before it is quantized, so the layer alone is the layer in its place.
    assert query.local_db == pytest.approx(query.sqnr_db, abs=1e-3)
    # 8 bits at a crest factor near 10: noise some 35 dB below the signal, certainly between 25 and 55.
    assert all(25 < result.sqnr_db < 55 for result in sites.values())
    assert found.histograms and {shown.site for shown in found.histograms} <= set(sites)
    assert found.summary["sqnr_worst"] == min(result.sqnr_db for result in found.sites)


def test_an_engine_of_another_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    engine_of(small_model("flux"), tmp_path / "engine")
    with pytest.raises(DitqError, match=r"was compiled from .*, which is not mini \(other weights or config\)"):
        evaluate(tmp_path / "engine", checkpoint, conditions=PROMPTS[:1], steps=1, layers=False)


def test_an_engine_that_overflows_is_named(checkpoint: Checkpoint) -> None:
    broken = checkpoint.load_model()
    broken.get_submodule("proj_out").weight.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(DitqError, match=r"engine: drawing 'red apple, fluent 3d': the latents are not finite"):
        evaluate(broken, checkpoint, conditions=PROMPTS[:1], steps=1)


def test_pictures_of_one_colour_are_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    load = Checkpoint.load_pipeline

    def with_a_dead_decoder(self: Checkpoint, **settings: Any) -> Any:
        pipeline = load(self, **settings)
        decode = pipeline.vae.decode
        pipeline.vae.decode = lambda *given, **named: (decode(*given, **named)[0] * 0 - 1,)
        return pipeline

    monkeypatch.setattr(Checkpoint, "load_pipeline", with_a_dead_decoder)
    found = evaluate(checkpoint.load_model(), checkpoint, conditions=PROMPTS[:1], steps=1, layers=False)
    assert found.defects == [
        f"{PROMPTS[0]!r}: the {who}'s picture is one colour everywhere (0, 0, 0)" for who in ("original", "engine")
    ]


def test_what_is_evaluated_was_not_calibrated_with(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    prompted = replace(checkpoint, name="other", pipeline_root=tmp_path)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    labelled = replace(
        checkpoint, name="labelled", pipeline_root=tmp_path / "labels", config={"num_embeds_ada_norm": 1000}
    )
    for where in (checkpoint, prompted, labelled):
        found = heldout_conditions(where, 32)
        assert len(found) == len(set(found)) == 32
        assert not set(found) & set(default_conditions(where))
    few = replace(labelled, config={"num_embeds_ada_norm": 10})  # so few that all are calibrated with
    assert sorted(heldout_conditions(few, 32)) == list(range(10))


def test_at_most_the_asked_number_is_drawn(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    found = evaluate(
        checkpoint.load_model(), checkpoint, conditions=tmp_path / "prompts.txt", steps=1, limit=1, layers=False, seed=5
    )
    assert [(result.condition, result.seed) for result in found.prompts] == [(PROMPTS[0], 5)]
    with pytest.raises(DitqError, match="limit is 0; give a whole number"):
        evaluate(nn.Identity(), checkpoint, limit=0)


def test_settings_that_the_pipeline_does_not_take_are_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(DitqError, match="num_inference_steps"):
        evaluate(nn.Identity(), checkpoint, conditions=PROMPTS, steps=0)


def test_the_error_of_each_step_alone_moves_the_last_latents(by_noise: dict[float, Evaluation]) -> None:
    assert all(step.effect == pytest.approx(0, abs=1e-9) for step in by_noise[0.0].steps)
    found = by_noise[0.2]
    assert all(step.effect is not None and step.effect > 0 for step in found.steps)
    # What all steps do together is of the order of what they do one by one: errors may help or hinder each other.
    alone = sum(step.effect or 0.0 for step in found.steps)
    assert 0.1 * alone < found.steps[-1].latents < 10 * alone
