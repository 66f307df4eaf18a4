"""The gate measures what the model has lost on conditions that nothing was learned from, and refuses beyond a limit."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from ditq.calibration.batches import held_out_conditions, sampled_batches
from ditq.calibration.calibrate import calibrate
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.compiler import CompileOptions, compile
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.pass_pipeline import run_passes
from ditq.passes import Context, PassReport
from ditq.passes.base import Pass, setting
from ditq.passes.gate import ERROR, HeldOutCalls, decibels, gated, limit_setting
from ditq.recipe import Recipe, _check_value
from tests.small_checkpoint import write_pipeline

PROMPTS = [f"shape {number}" for number in range(9)]


@dataclass(frozen=True)
class Weakened(Pass):
    """Multiplies the output linear of the model."""

    name: ClassVar[str] = "weakened"
    structural: ClassVar[bool] = True
    factor: float = setting(0.9, "what it is multiplied by")
    limit: float | str = limit_setting()

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        graph.model.get_parameter("proj_out.weight").mul_(self.factor)
        graph.model.get_parameter("proj_out.bias").mul_(self.factor)
        return gated(PassReport(self.name, self.settings()), graph, context, self.limit)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_pipeline(tmp_path_factory.mktemp("gate") / "pipeline"))


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    folder = tmp_path_factory.mktemp("gate") / "stats"
    return calibrate(checkpoint, folder, conditions=PROMPTS, steps=3, progress=False,
                     arguments={"true_cfg_scale": 3.0, "negative_prompt": ""})  # fmt: skip


def _run(checkpoint: Checkpoint, statistics: Statistics, *passes: Pass) -> list[PassReport]:
    graph = DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))
    return run_passes(graph, Recipe("test", "", passes), statistics)


def test_the_error_is_that_of_guided_answers_on_held_out_conditions(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    """Compared with the sum over every held-out call, guidance joined here by hand."""
    assert statistics.folder is not None
    trajectories = Trajectories.open(statistics.folder / "trajectories")
    assert held_out_conditions(trajectories) == [7]
    original, changed = checkpoint.load_model(), checkpoint.load_model()
    torch.manual_seed(0)
    for parameter in changed.parameters():
        parameter.add_(0.002 * torch.randn_like(parameter))
    lost = energy = 0.0
    calls = [call.arguments for call in trajectories.calls() if call.condition == 7]
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        with torch.no_grad():
            joined = [3 * model(**first)[0] - 2 * model(**second)[0] for model in (original, changed)]
        lost += float((joined[1] - joined[0]).square().sum())
        energy += float(joined[0].square().sum())
    found = HeldOutCalls.of(original, trajectories)
    # The branches' weights are found by least squares, to about 1e-3.
    assert found.error(changed) == pytest.approx(lost / energy, rel=0.02)
    assert found.error(original) == 0.0


def test_every_structural_pass_reports_the_error_after_it(checkpoint: Checkpoint, statistics: Statistics) -> None:
    """Answers that are 0.9 and then 0.81 times the original's are off by exactly 0.1 and 0.19 of them."""
    reports = _run(checkpoint, statistics, Weakened(), Weakened())
    for report, left in zip(reports, (0.9, 0.81), strict=True):
        assert report.summary[ERROR] == pytest.approx(decibels((1 - left) ** 2), abs=1e-3)


def test_beyond_its_limit_a_pass_refuses_and_nothing_is_written(
    checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    """A factor of 0.9 is an error of -20 dB: allowed at -19, refused at -21."""
    assert _run(checkpoint, statistics, Weakened(limit=-19.0))
    options = CompileOptions(statistics=statistics.folder)
    with pytest.raises(DitqError, match=r"'weakened': .* is -20\.0 dB, above the limit of -21 dB; change less"):
        compile(checkpoint, tmp_path / "engine", Recipe("test", "", (Weakened(limit=-21.0),)), options)
    assert list(tmp_path.iterdir()) == []


def test_answers_that_are_no_numbers_are_refused_without_a_limit(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    with pytest.raises(DitqError, match="not finite"):
        _run(checkpoint, statistics, Weakened(factor=float("nan")))


def test_without_recorded_calls_only_a_limit_is_refused(checkpoint: Checkpoint, statistics: Statistics) -> None:
    graph = DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))
    in_memory = {name: statistics.groups[name] for name in statistics.groups}
    context = Context(Statistics(in_memory, statistics.sites, statistics.metadata))
    context.original = copy.deepcopy(graph.model)
    assert "not measured" in gated(PassReport("some", {}), graph, context).summary[ERROR]
    with pytest.raises(DitqError, match="recorded calls"):
        gated(PassReport("some", {}), graph, context, -10.0)


def test_a_limit_is_a_number_or_none() -> None:
    described = {item.name: item for item in Weakened.__dataclass_fields__.values()}["limit"]
    for value in ("none", -20, -20.5):
        _check_value("test", value, described)
    for value in ("low", True, float("inf")):
        with pytest.raises(DitqError, match="must be a"):
            _check_value("test", value, described)


def test_what_is_held_out_is_whole_conditions(statistics: Statistics) -> None:
    assert statistics.folder is not None
    trajectories = Trajectories.open(statistics.folder / "trajectories")
    held_out = sampled_batches(trajectories, 1000, 16, conditions=held_out_conditions(trajectories))
    rest = sampled_batches(trajectories, 1000, 16, conditions=range(7))
    texts = [{tuple(row) for batch in part for row in batch.arguments["pooled_projections"].tolist()}
             for part in (held_out, rest)]  # fmt: skip
    assert len(texts[0] & texts[1]) == 1  # the empty negative prompt
