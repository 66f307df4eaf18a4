"""Step weights are what an error at a step is worth in the end: as algebra has it, and on the built-in model."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from ditq.calibration.calibrate import calibrate
from ditq.calibration.probing import draw_copies, measure_step_weights
from ditq.calibration.sampling import SamplingSettings
from ditq.calibration.statistics import Statistics
from ditq.calibration.step_weights import FILE, StepWeights
from ditq.errors import DitqError

SLOPE, STEPS, WIDTH = 0.7, 12, 64


class _Scaled(nn.Module):
    """v(x) = SLOPE x, by a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)
        self.linear.weight.data = SLOPE * torch.eye(WIDTH)

    def forward(self, latents: Tensor) -> tuple[Tensor]:
        return (self.linear(latents),)


class _LinearPipeline:
    """Integrates dx/ds = SLOPE x from noise, with guidance branches in one batch: cond + 0 * uncond."""

    def __init__(self) -> None:
        self.transformer = _Scaled()
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)

    def set_progress_bar_config(self, **_: Any) -> None:
        pass

    def __call__(
        self, prompt: Any, generator: Any, num_inference_steps: int, output_type: str = "pil"
    ) -> SimpleNamespace:
        x = torch.stack([torch.randn(4, WIDTH, generator=one) for one in generator])
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            _, conditional = self.transformer(torch.cat([x, x]))[0].chunk(2)
            x = self.scheduler.step(conditional, timestep, x)[0]
        return SimpleNamespace(images=x)


def test_weights_of_a_linear_denoiser_are_those_of_algebra() -> None:
    """An error e of the velocity at step t moves the end by h_t e prod_(s > t) (1 + SLOPE h_s), h the steps in time."""
    pipeline = _LinearPipeline()
    settings = SamplingSettings({"num_inference_steps": STEPS})
    linears = {"linear": pipeline.transformer.linear}
    found = measure_step_weights(pipeline, linears, ["a", "b"], settings, STEPS, False)
    h = pipeline.scheduler.sigmas.double().diff()
    gain = torch.stack([h[t] * (1 + SLOPE * h[t + 1 :]).prod() for t in range(STEPS)]).square()
    probed = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]  # ten of twelve, and the last
    effect = found.by_step("effect")
    scale = effect[0] / gain[0]
    # The conditional branch alone reaches the latents; the noise on the other one halves all weights but for chance.
    assert (effect[probed] / (scale * gain[probed]) - 1).abs().max() < 0.3
    between = (effect[4].log() + effect[6].log()) / 2
    assert effect[5].log() == pytest.approx(float(between)) and effect.mean() == pytest.approx(1)


def test_a_change_of_one_copy_at_one_step_is_followed_to_the_end() -> None:
    pipeline, moved = _LinearPipeline(), 10.0

    def change(step: int, call: int, output: Tensor) -> Tensor:
        output = output.clone()
        if step == 3:
            output[1::2] += moved  # the second copy, in both branches
        return output

    with torch.no_grad():
        last = draw_copies(pipeline, "a", SamplingSettings({"num_inference_steps": STEPS}), 0, 2, change)
    h = pipeline.scheduler.sigmas.double().diff()
    expected = moved * h[3] * (1 + SLOPE * h[4:]).prod()
    assert ((last[1] - last[0]).double() / expected - 1).abs().max() < 1e-4
    assert pipeline.transformer._forward_hooks == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "stats"
    calibrate("mini", folder, steps=5, limit=1, bins=2, rows_per_bin=8, step_weights=True, progress=False)
    return folder


def test_on_the_built_in_model_every_step_counts_and_the_first_ones_most(folder: Path) -> None:
    statistics = Statistics.open(folder)
    assert statistics.step_weights is not None
    for kind in ("effect", "share"):
        weights = statistics.step_weights.by_step(kind)
        assert len(weights) == 5 and (weights > 0).all() and weights.mean() == pytest.approx(1)
        bins = statistics.bin_weights(kind)  # steps 0 to 2, and 3 and 4
        assert torch.allclose(bins, torch.stack([weights[:3].mean(), weights[3:].mean()]))
    effect = statistics.step_weights.effect
    assert effect[0] > effect[-1] and effect[0] == max(effect)


def test_they_are_the_same_each_time_and_added_to_a_folder_without(folder: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"steps": 5, "limit": 1, "bins": 2, "rows_per_bin": 8, "progress": False}
    bare = calibrate("mini", tmp_path / "stats", **settings)
    assert bare.step_weights is None and not (tmp_path / "stats" / FILE).exists()
    with pytest.raises(
        DitqError, match="hold no step weights; measure them with `ditq calibrate --resume --step-weights`"
    ):
        bare.bin_weights()
    added = calibrate("mini", tmp_path / "stats", step_weights=True, resume=True, **settings)
    assert added.step_weights == StepWeights.read(folder) != None  # noqa: E711
    added.save(tmp_path / "copy")
    assert Statistics.open(tmp_path / "copy").step_weights == added.step_weights


def test_a_finished_folder_is_not_probed_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditq.calibration.calibrate.measure_step_weights", lambda *_, **__: pytest.fail("probed again"))
    calibrate("mini", folder, steps=5, limit=1, bins=2, rows_per_bin=8, step_weights=True, progress=False, resume=True)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"effect": [1], "share": []}',
        '{"effect": [-1], "share": [1]}',
        '{"effect": [NaN, 1], "share": [1, 1]}',
        '{"effect": [1, 1], "share": [Infinity, 1]}',
        '{"effect": [1, 1], "share": [0, 0]}',
    ],
)
def test_a_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(text)
    with pytest.raises(DitqError, match=FILE):
        StepWeights.read(tmp_path)


def test_weights_of_other_steps_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "stats")
    StepWeights((1.0,) * 7, (1.0,) * 7).write(copy)
    with pytest.raises(DitqError, match="its step weights are of 7 steps, not 5; remove them"):
        Statistics.open(copy)


def test_a_denoiser_that_drops_samples_is_refused() -> None:
    pipeline = _LinearPipeline()
    pipeline.transformer.forward = lambda latents: (latents[:1],)  # type: ignore[method-assign]
    with pytest.raises(DitqError, match=r"has 1 rows for 6 samples.*leave --step-weights out"):
        measure_step_weights(pipeline, {}, ["a"], SamplingSettings({"num_inference_steps": 5}), 5, False)


def test_a_probe_of_nothing_is_refused() -> None:
    pipeline = _LinearPipeline()
    with pytest.raises(DitqError, match="changes nothing at some step"):
        measure_step_weights(pipeline, {}, ["a"], SamplingSettings({"num_inference_steps": 5}), 5, False)


def test_steps_of_another_denoiser_are_named() -> None:
    """As of Wan 2.2, whose second transformer draws the last steps."""

    class Halved(_LinearPipeline):
        def __call__(
            self, prompt: Any, generator: Any, num_inference_steps: int, output_type: str = "pil"
        ) -> SimpleNamespace:
            x = torch.stack([torch.randn(4, WIDTH, generator=one) for one in generator])
            self.scheduler.set_timesteps(num_inference_steps)
            for number, timestep in enumerate(self.scheduler.timesteps):
                both = torch.cat([x, x])
                y = self.transformer(both)[0] if number < 3 else 0.1 * both
                x = self.scheduler.step(y.chunk(2)[1], timestep, x)[0]
            return SimpleNamespace(images=x)

    pipeline = Halved()
    linears = {"linear": pipeline.transformer.linear}
    with pytest.raises(DitqError, match="does not call its transformer at step 3, which another denoiser draws"):
        measure_step_weights(pipeline, linears, ["a"], SamplingSettings({"num_inference_steps": 5}), 5, False)
