"""A sampler is found from what was recorded; costs along trajectories are those of drawing with one linear changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ditq
from ditq.budget.along_trajectory import AlongTrajectories
from ditq.budget.choices import make_choices
from ditq.budget.cost import find_cost
from ditq.budget.sensitivity import SingleCalls
from ditq.calibration.sampler import LATENTS, RecordedPath, Sampler, Step, answer, fit_sampler, read_path
from ditq.calibration.statistics import Statistics
from ditq.graph import DiTGraph
from ditq.nn import QuantLinear
from ditq.passes import Context
from ditq.passes.quantize import Quantize
from tests.small_checkpoint import CONFIG, small_flux, write_pipeline

GUIDANCE, STEPS, CONDITIONS, SIDE, TEXT = 3.0, 4, 4, 4, 8
# Steps long enough that an error's way through later calls counts, and the terms of the step before as well.
EULER = Step(1.0, 0.0, (-3.0 * GUIDANCE, -3.0 * (1 - GUIDANCE)), (0.0, 0.0))
SECOND_ORDER = Step(0.3, 0.9, (-0.3, 0.2), (0.5, -0.4))


def _model() -> torch.nn.Module:
    model = small_flux()
    for name, parameter in model.named_parameters():  # weights of a trained size, so that no attention is saturated
        if name.endswith("weight") and parameter.dim() == 2:
            parameter.data /= 2
    return model


def _draw(
    model: torch.nn.Module,
    step_of: Callable[[int], Step],
    conditions: int = CONDITIONS,
    dtype: torch.dtype = torch.float32,
) -> tuple[RecordedPath, list[Tensor]]:
    """Trajectories with two guidance branches, latents and answers rounded to `dtype`; the outputs before that rounding."""
    generator = torch.Generator().manual_seed(7)
    rows, places = 2 * conditions, torch.arange(float(SIDE))
    text = torch.randn(rows, TEXT, CONFIG["joint_attention_dim"], generator=generator)
    pooled = torch.randn(rows, CONFIG["pooled_projection_dim"], generator=generator)
    latents = torch.randn(conditions, SIDE * SIDE, CONFIG["in_channels"], generator=generator).to(dtype).float()
    before = answers_before = None
    calls, outputs = [], []
    for step in range(STEPS):
        arguments = {
            LATENTS: latents.repeat_interleave(2, 0),
            "encoder_hidden_states": text,
            "pooled_projections": pooled,
            "timestep": torch.full((rows,), 1 - step / STEPS),
            "img_ids": torch.cartesian_prod(torch.zeros(1), places, places),
            "txt_ids": torch.zeros(TEXT, 3),
        }
        calls.append(arguments)
        with torch.no_grad():
            outputs.append(answer(model, arguments))
        answers = outputs[-1].to(dtype).float().unflatten(0, (conditions, 2))
        found = step_of(step).next(latents, before, answers, answers_before).to(dtype).float()
        latents, before, answers_before = found, latents, answers
    return RecordedPath(tuple(calls), conditions, dtype), outputs


@pytest.mark.parametrize("wanted", [EULER, SECOND_ORDER])
def test_a_linear_sampler_is_found_from_its_latents(wanted: Step) -> None:
    path, outputs = _draw(_model(), lambda _: wanted)
    sampler = fit_sampler(path, outputs)
    assert sampler is not None and sampler.branches == 2 and sampler.residual < 1e-5
    latents, before = path.latents(1), path.latents(0)
    found = sampler.steps[1].next(latents, before, path.answers(outputs[1]), path.answers(outputs[0]))
    assert torch.allclose(found, path.latents(2), atol=1e-4)
    if wanted is EULER:
        assert np.allclose(sampler.steps[0].answers, wanted.answers, atol=1e-4)


def test_what_is_no_linear_step_is_not_taken_for_one() -> None:
    path, outputs = _draw(_model(), lambda _: EULER)
    assert fit_sampler(path, [output.square() for output in outputs]) is None


@pytest.mark.parametrize("wanted", [EULER, SECOND_ORDER])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounded_latents_are_not_taken_for_another_sampler(wanted: Step, dtype: torch.dtype) -> None:
    path, outputs = _draw(_model(), lambda _: wanted, dtype=dtype)
    sampler = fit_sampler(path, outputs)
    assert sampler is not None and sampler.residual < torch.finfo(dtype).eps
    assert sampler.residual > 1e-3 or dtype is torch.float16  # else nothing is tried here
    last = sampler.steps[-1]  # the second step's terms of second order are not told apart: the first had none
    assert any(last.answers_before) == any(wanted.answers_before)
    found = torch.tensor([*last.answers, *last.answers_before, last.latents, last.latents_before])
    known = torch.tensor([*wanted.answers, *wanted.answers_before, wanted.latents, wanted.latents_before])
    assert float((found - known).abs().max() / known.abs().max()) < torch.finfo(dtype).eps
    stochastic = [output + 0.3 * torch.randn_like(output) for output in outputs]
    assert fit_sampler(path, stochastic) is None


@pytest.mark.parametrize("step", [EULER, SECOND_ORDER])
def test_costs_are_those_of_drawing_with_the_one_linear_changed(step: Step) -> None:
    """To first order, which eight bits are within; the mean of n squares of a normal variable has a relative standard error
    of sqrt(2 / n), for n = 64 directions 0.7 dB a trajectory. Drawing in float32 tells no error below 1e-12.
    """
    model = _model()
    path, _ = _draw(model, lambda _: step)
    graph = DiTGraph(model, {name: value for name, value in path.calls[0].items()})
    quantize = Quantize(format="w4a16", codebook="uniform", rounding="nearest", weighted=False, bias_correction=False,
                        select=["role:token", "role:modulation"])  # fmt: skip
    names = ("w8", "keep")
    with torch.no_grad():
        choices = make_choices(graph, quantize, Context(), names)
    cost = AlongTrajectories((path,), Sampler((step,) * (STEPS - 1), 0.0))
    assert replace(cost, ends=(cost._drawn(model, path),)).drawn(model) == 0  # and not a logarithm's smallest number
    found = cost.candidates(graph, choices, probes=64)
    assert all(layer._carrier is None for row in choices.layers for layer in row if isinstance(layer, QuantLinear))
    assert (found[:, 1] == 0).all() and cost.assignment(graph, choices, np.ones(len(found), dtype=np.int64)) < 1e-12
    differences = []
    for row in np.flatnonzero(found[:, 0] > 1e-12)[::3]:
        alone = np.ones(len(found), dtype=np.int64)
        alone[row] = 0
        differences.append(10 * np.log10(cost.assignment(graph, choices, alone) / found[row, 0]))
    assert np.abs(differences).max() < 2.5 and abs(np.mean(differences)) < 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_trajectories_give_costs_in_the_last_latents_or_of_single_calls(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    pipeline = write_pipeline(tmp_path / "pipeline")
    ditq.calibrate(pipeline, tmp_path / "stats", ["red apple", "dog, noto"], steps=3, dtype=dtype, progress=False)
    statistics, checkpoint = Statistics.open(tmp_path / "stats"), ditq.Checkpoint.open(pipeline)
    trajectories = Context(statistics).trajectories()
    model = checkpoint.load_model()
    cost = find_cost(model, trajectories, statistics)
    assert isinstance(cost, AlongTrajectories) and trajectories.dtype is dtype
    assert cost.drawn(model) < 1e-12  # the model without any error
    path = read_path(trajectories, [0, 1])
    assert path is not None and path.conditions == 2 and len(path.calls) == 3
    for parameter in model.parameters():  # another model, whose answers did not make these latents
        parameter.data = parameter.data.flip(0)
    assert isinstance(find_cost(model, trajectories, statistics), SingleCalls)
    changed = find_cost(model, trajectories, statistics, recorded=checkpoint.load_model())
    assert isinstance(changed, AlongTrajectories)  # whose sampler is the original's, and whose end is its own
    assert changed.drawn(model) < 1e-12 and changed.drawn(checkpoint.load_model()) > 1e-3
