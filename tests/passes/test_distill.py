"""distill: what a structural change lost is learned back on recorded calls, judged on conditions that taught nothing."""

from __future__ import annotations

import copy
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ditq.calibration.batches import CallStream, held_out_conditions
from ditq.calibration.calibrate import calibrate
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.nn.structural import StructuralPart
from ditq.pass_pipeline import run_passes
from ditq.passes import Context, PassReport
from ditq.passes.base import Pass
from ditq.passes.distill import Distill, DistillReport, _chosen
from ditq.passes.distill_losses import feature_losses, regression_losses, weighted_features
from ditq.passes.watched import Watched, fitted_alone
from ditq.recipe import Recipe
from ditq.site_cache import FolderSiteCache
from tests.families_small import FAMILIES, forward, small_graph, small_inputs
from tests.small_checkpoint import write_pipeline

PROMPTS = [f"shape {number}" for number in range(4)]
PLACE = "transformer_blocks.0.ff"


class Routed(StructuralPart):
    """A feed-forward with half its hidden channels and a router that scales what it gives, as parts of real passes do."""

    kind: ClassVar[str] = "routed for a test"

    def __init__(self, dense: nn.Module) -> None:
        super().__init__()
        self.inside, self.router, self.lost = copy.deepcopy(dense), nn.Linear(64, 1), torch.zeros(())
        with torch.no_grad():
            for parameter in self.router.parameters():
                parameter.zero_()
            self.inside.net[0].proj.weight[::2] = 0.0
            self.inside.net[0].proj.bias[::2] = 0.0

    def forward(self, x: Tensor) -> Tensor:
        share = self.router(x)
        if self.training:
            self.dtype = share.dtype
            self.lost = (share - 0.1).square().mean()
        return self.inside(x) * (1 + share)

    def auxiliary_loss(self) -> Tensor:
        return self.lost

    def spec(self) -> dict[str, Any]:
        return {}

    @classmethod
    def install(cls, model: nn.Module, place: str, spec: Mapping[str, Any]) -> None:
        model.set_submodule(place, cls(model.get_submodule(place)).eval().requires_grad_(False))


@dataclass(frozen=True)
class Halve(Pass):
    name: ClassVar[str] = "halve"
    structural: ClassVar[bool] = True

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        Routed.install(graph.model, PLACE, {})
        graph.refresh()
        return PassReport(self.name, {})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_pipeline(tmp_path_factory.mktemp("distill") / "pipeline"))


@pytest.fixture(scope="module")
def statistics(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    folder = tmp_path_factory.mktemp("distill") / "stats"
    return calibrate(checkpoint, folder, conditions=PROMPTS, steps=4, progress=False)


def _graph(checkpoint: Checkpoint) -> DiTGraph:
    return DiTGraph(checkpoint.load_model(), example_inputs(checkpoint))


def _distilled(checkpoint: Checkpoint, statistics: Statistics, **settings: Any) -> tuple[DiTGraph, DistillReport]:
    graph = _graph(checkpoint)
    report = run_passes(graph, Recipe("test", "", (Halve(), Distill(batch=4, **settings))), statistics)[-1]
    assert isinstance(report, DistillReport)
    return graph, report


def test_what_was_lost_is_learned_back_and_the_report_tells_how(checkpoint: Checkpoint, statistics: Statistics) -> None:
    graph, report = _distilled(checkpoint, statistics, steps=60, rate=0.002, warmup=5)
    told = report.summary
    assert told["kept"] and told["error after, dB"] < told["error before, dB"] - 3
    assert told["error of the denoiser, dB"] == pytest.approx(told["error after, dB"])
    assert [point["step"] for point in report.curves] == list(range(1, 61))
    assert [point["step"] for point in sorted(report.held_out, key=lambda p: p["step"])] == [0, 12, 24, 36, 48, 60]
    assert report.curves[-1]["output"] < report.curves[0]["output"]
    assert not any(parameter.requires_grad for parameter in graph.model.parameters())
    assert not any(module.training for module in graph.model.modules())


def test_what_does_not_help_held_out_conditions_is_dropped(checkpoint: Checkpoint, statistics: Statistics) -> None:
    plain = _graph(checkpoint)
    run_passes(plain, Recipe("test", "", (Halve(),)), statistics)
    graph, report = _distilled(checkpoint, statistics, steps=3, rate=0.5, warmup=0)
    assert report.summary["kept"] is False
    assert report.summary["error of the denoiser, dB"] == pytest.approx(report.summary["error before, dB"])
    expected = plain.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in graph.model.state_dict().items())


@pytest.mark.parametrize(("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_products_have_the_precision_that_was_asked_for(
    checkpoint: Checkpoint, statistics: Statistics, precision: str, dtype: torch.dtype
) -> None:
    graph, report = _distilled(checkpoint, statistics, steps=2, precision=precision)
    part = graph.model.get_submodule(PLACE)
    assert isinstance(part, Routed) and part.dtype == dtype
    assert all(parameter.dtype == torch.float32 for parameter in graph.model.parameters())
    assert report.curves[-1]["output"] > 0


def test_calls_drawn_in_half_precision_teach_a_model_in_float32(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """As a GPU draws them; of statistics and calls, everything that passes look at."""
    calls = {"conditions": PROMPTS, "steps": 2, "dtype": torch.bfloat16, "progress": False}
    statistics = calibrate(checkpoint, tmp_path / "stats", **calls)  # type: ignore[arg-type]
    graph, report = _distilled(checkpoint, statistics, steps=2)
    assert all(parameter.dtype == torch.float32 for parameter in graph.model.parameters())
    assert report.curves[-1]["output"] > 0


def test_calls_kept_in_memory_are_those_on_disk(statistics: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statistics.folder is not None
    trajectories = Trajectories.open(statistics.folder / "trajectories")
    kept = CallStream.of(trajectories, [0, 2], 4).batch(5)
    monkeypatch.setattr("ditq.calibration.batches.MEMORY", 0)
    read = CallStream.of(trajectories, [0, 2], 4).batch(5)
    for a, b in zip(kept, read, strict=True):
        assert torch.equal(a.steps, b.steps)
        assert torch.equal(a.arguments["hidden_states"], b.arguments["hidden_states"])


def test_an_interrupted_training_resumes_to_the_same_bits(
    checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    """Ctrl-C in the first of the two phases, and SIGTERM in the second: the step is finished and saved, and a further run goes
    on behind it."""

    def run(cache: Path, stop_at: tuple[str, int] | None, by: signal.Signals = signal.SIGINT) -> DiTGraph:
        graph = _graph(checkpoint)
        context = Context(statistics, 0, FolderSiteCache(cache, {}))
        context.original = copy.deepcopy(graph.model)

        def shown(description: str, done: int, total: int) -> None:
            if (description, done) == stop_at:
                signal.raise_signal(by)

        passes = (Halve(), Distill(steps=6, layerwise=5, batch=4, accumulate=2, rate=0.002, save_every=4))
        with torch.no_grad():
            for step in passes:
                step.run(graph, context.showing(shown))
        return graph

    whole = run(tmp_path / "whole", None).model.state_dict()
    for stop_at, by in ((("distill.1.parts", 3), signal.SIGINT), (("distill.1", 2), signal.SIGTERM)):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", stop_at, by)
    resumed = run(tmp_path / "cut", None).model.state_dict()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert not torch.equal(whole[f"{PLACE}.router.weight"], torch.zeros_like(whole[f"{PLACE}.router.weight"]))


def test_only_what_is_to_learn_changes(checkpoint: Checkpoint, statistics: Statistics) -> None:
    plain = _graph(checkpoint)
    run_passes(plain, Recipe("test", "", (Halve(),)), statistics)
    before = plain.model.state_dict()
    graph, report = _distilled(checkpoint, statistics, steps=2, train=["routers"], balance=10.0)
    changed = {name for name, tensor in graph.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert report.summary["parameters that learned"] == 65
    assert changed <= {f"{PLACE}.router.weight", f"{PLACE}.router.bias"}
    names = {name for name in before if name.startswith(f"{PLACE}.")}
    assert set(_chosen(plain.model, "parts")) == names
    assert set(_chosen(plain.model, ["*.to_q.bias", "routers"])) == {
        f"{PLACE}.router.weight", f"{PLACE}.router.bias", "transformer_blocks.0.attn.to_q.bias",
        "single_transformer_blocks.0.attn.to_q.bias",
    }  # fmt: skip
    assert len(_chosen(plain.model, ["all"])) == len(list(plain.model.parameters()))
    with pytest.raises(DitqError, match=r"'blocks\.9' matches no parameter"):
        _chosen(plain.model, ["blocks.9"])


def test_what_parts_ask_for_is_learned_too(checkpoint: Checkpoint, statistics: Statistics) -> None:
    """The part asks for a share of 0.1 for every token; with nothing else to learn, its loss falls."""
    _, report = _distilled(checkpoint, statistics, steps=15, train="routers", balance=1000.0, feature=0.0, rate=0.002,
                           warmup=0)  # fmt: skip
    assert report.curves[0]["balance"] == pytest.approx(0.01)  # the router starts at 0
    assert report.curves[-1]["balance"] < 0.005


def test_parts_are_fitted_alone_to_what_stood_there(checkpoint: Checkpoint, statistics: Statistics) -> None:
    """Half the weights of a feed-forward are 0: fitting it to the original's, on the original's inputs, brings them back."""
    _, report = _distilled(checkpoint, statistics, steps=0, layerwise=40, layerwise_rate=0.01, warmup=0)
    assert report.summary["at last"] < 0.3 * report.summary["parts alone, error at first"]
    assert report.summary["error after, dB"] < report.summary["error before, dB"] - 3


def test_a_part_is_fitted_in_the_module_that_both_models_have(checkpoint: Checkpoint) -> None:
    original, changed = checkpoint.load_model(), checkpoint.load_model()
    Routed.install(changed, PLACE, {})
    assert fitted_alone(changed, original) == {PLACE: "l2"}
    block = "single_transformer_blocks.0"
    inside = Routed(original.get_submodule(PLACE))
    inside.fitted_by = "l1"  # type: ignore[misc]
    changed.get_submodule(f"{block}.attn").add_module("part", inside)
    assert fitted_alone(changed, original) == {PLACE: "l2", f"{block}.attn": "l1"}
    moved = Routed(original.get_submodule(PLACE))
    moved.same_input = False  # type: ignore[misc]
    changed.set_submodule(f"{block}.proj_out", moved)
    assert fitted_alone(changed, original) == {PLACE: "l2", block: "l1"}


def test_conditions_that_judge_teach_nothing(statistics: Statistics) -> None:
    assert statistics.folder is not None
    trajectories = Trajectories.open(statistics.folder / "trajectories")
    assert held_out_conditions(trajectories) == [3]
    stream = CallStream.of(trajectories, {0, 1, 2}, 5, seed=1)
    rounds = [[batch for number in range(turn * 2, turn * 2 + 2) for batch in stream.batch(number)] for turn in (0, 1)]
    judged = {tuple(call.arguments["hidden_states"].flatten().tolist()) for call in trajectories.calls()
              if call.condition == 3}  # fmt: skip
    for batches in rounds:
        rows = [tuple(row.flatten().tolist()) for batch in batches for row in batch.arguments["hidden_states"]]
        assert len(rows) == len(set(rows)) == 10 and not judged & set(rows)
    again = stream.batch(3)
    assert torch.equal(again[0].arguments["hidden_states"], rounds[1][1].arguments["hidden_states"])


def test_block_weights_are_those_of_the_formula() -> None:
    """w_l = |L_out| / |L_l| * (sum ||f_T|| / L) / ||f_T^l||, in float64 from the definition, and without gradient."""
    generator = torch.Generator().manual_seed(0)
    teacher = [[torch.randn(2, 3, 4, generator=generator) * size] for size in (1.0, 5.0)]
    student = [[tensor + 0.1 * torch.randn(tensor.shape, generator=generator)] for (tensor,) in teacher]
    for (tensor,) in student:
        tensor.requires_grad_(True)
    output = torch.tensor(0.3)
    lost, norms = feature_losses(student, teacher)
    found = weighted_features(output, lost, norms)
    found.backward()
    sizes = [tensor.double().norm() for (tensor,) in teacher]
    for (made,), (wanted,), size in zip(student, teacher, sizes, strict=True):
        difference = made.detach().double() - wanted.double()
        weight = 0.3 / difference.square().sum() * (sum(sizes) / 2) / size
        torch.testing.assert_close(made.grad.double(), 2 * weight * difference, rtol=1e-4, atol=1e-7)


def test_regression_is_relative_squares_or_absolute_values() -> None:
    made, wanted = [[torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 3.0])]], [[torch.tensor([2.0, 1.0])]] * 2
    found = regression_losses(made, wanted, ["l2", "l1"])
    assert found["total"] == pytest.approx(5 / 5 + 3 / 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_nothing_and_sees_every_block(family: str) -> None:
    graph = small_graph(family)
    inputs = small_inputs(graph.model)
    answers, features, asked = Watched(graph.model, list(graph.blocks))(inputs)
    assert torch.equal(answers[0], forward(graph.model, inputs))
    assert len(features) == len(graph.blocks) and all(features) and float(asked) == 0.0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in graph.model.modules())


def test_there_must_be_something_to_learn_back() -> None:
    with pytest.raises(DitqError, match=r"'distill' trains what another changed; put .*moe or .*prune or .* before it"):
        Recipe.from_dict({"passes": [{"distill": {}}, {"quantize": {}}]}, "test")
    stages = [{"prune": {}}, {"distill": {"train": ["parts"]}}, {"distill": {}}, {"quantize": {}}]
    assert [step.name for step in Recipe.from_dict({"passes": stages}, "test").passes][1:3] == ["distill"] * 2


def test_a_mixture_learns_with_its_router_and_can_be_copied_afterwards(
    checkpoint: Checkpoint, statistics: Statistics
) -> None:
    """Real experts, first fitted alone, in both kinds of blocks; then only routers, with the balance of their loads."""
    graph = _graph(checkpoint)
    stages = [
        {"moe": {"experts": 4, "top": 1, "samples": 8, "rows": 1024}},
        {"distill": {"layerwise": 3, "steps": 4, "batch": 4, "train": ["parts"]}},
        {"distill": {"steps": 2, "batch": 4, "train": "routers"}},
    ]
    reports = run_passes(graph, Recipe.from_dict({"passes": stages}, "test"), statistics)
    assert fitted_alone(graph.model, checkpoint.load_model()) == {
        "transformer_blocks.0.ff": "l2", "transformer_blocks.0.ff_context": "l2", "single_transformer_blocks.0": "l2"
    }  # fmt: skip
    told = [report.to_json() for report in reports]
    assert any(point["balance"] != 0 for report in told[1:] for point in report["curves"])
    assert told[1]["summary"]["error of the denoiser, dB"] <= told[0]["summary"]["error of the denoiser, dB"]
    copied = copy.deepcopy(graph.model)
    assert not any(tensor.requires_grad for tensor in copied.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "nothing would be learned"),
        ({"rate": 0.0}, "rate is 0"),
        ({"ema": 1.0}, "ema is 1"),
        ({"train": []}, "train is empty"),
        ({"decay": "linear"}, "decay"),
        ({"train": "experts"}, "a list or all or parts or routers"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(DitqError, match=said):
        Recipe.from_dict({"passes": [{"distill": settings}]}, "test")


TOGETHER = """
import sys
import torch
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.pass_pipeline import run_passes
from ditq.passes.distill import Distill
from ditq.recipe import Recipe
from safetensors.torch import save_file
from tests.passes.test_distill import Halve, _graph

torch.set_num_threads(1)
graph = _graph(Checkpoint.open(sys.argv[1]))
distill = Distill(steps=3, layerwise=2, batch=4, rate=0.002, clip=0.0)
run_passes(graph, Recipe("test", "", (Halve(), distill)), Statistics.open(sys.argv[2]))
save_file(graph.model.state_dict(), sys.argv[3])
"""


def test_two_processes_learn_what_one_does_with_twice_the_batches(
    checkpoint: Checkpoint, statistics: Statistics, tmp_path: Path
) -> None:
    """Each of two processes takes every other batch; one process that accumulates two batches takes the same ones."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = []
    for rank in (0, 1):
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", TOGETHER, checkpoint.pipeline_root, statistics.folder, tmp_path / str(rank)]
        environment = {**os.environ, **{key: str(value) for key, value in group.items()}, "ACCELERATE_USE_CPU": "true"}
        started.append(subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            _, said = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in started:
            process.kill()
    first, second = (load_file(tmp_path / str(rank)) for rank in (0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    alone, _ = _distilled(checkpoint, statistics, steps=3, layerwise=2, rate=0.002, clip=0.0, accumulate=2)
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-4)  # Adam's steps are 0.002 at most
