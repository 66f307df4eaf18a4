"""Modulation inputs of conditions that are not drawn: what drawing them would have shown, told from vectors alone."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ditq.calibration import further as further_module
from ditq.calibration.batches import moved
from ditq.calibration.calibrate import calibrate, further_conditions
from ditq.calibration.collect import collect_statistics
from ditq.calibration.further import FILE, FurtherConditions, record_further, vector_arguments
from ditq.calibration.prompts import builtin_prompts
from ditq.calibration.record import Trajectories, record_trajectories
from ditq.calibration.sampling import SamplingSettings
from ditq.calibration.statistics import TRAJECTORIES, Statistics
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.families import families
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from tests.calibration.small_pipelines import ARGUMENTS, mini, pipeline_of, saved_checkpoint

CONDITIONS: dict[str, list[Any]] = {
    "flux": ["red apple, fluent 3d", "dog, noto", "castle, twemoji", "whale, fluent 3d"],
    "sd3": ["red apple, fluent 3d", "dog, noto", "castle, twemoji", "whale, fluent 3d"],
    "dit": [7, 3, 2, 9],
}
DRAWN = 2
CPU = torch.device("cpu")


def gathered(family: str, folder: Path, drawn: int, further: Sequence[Any] = ()) -> Statistics:
    """Of the first so many conditions, drawn, and of further ones."""
    checkpoint, pipeline = saved_checkpoint(family, folder / "checkpoint"), pipeline_of(family)
    settings, place = SamplingSettings(ARGUMENTS[family]), folder / f"{drawn}-{len(further)}"
    conditions = CONDITIONS[family][:drawn]
    trajectories = record_trajectories(checkpoint, conditions, settings, place, False, pipeline=pipeline)
    record_further(checkpoint.family, pipeline, further, settings, trajectories, progress=False)
    graph = DiTGraph(pipeline.transformer, example_inputs(checkpoint))
    return collect_statistics(graph, trajectories, 2, 8, progress=False)


def make(checkpoint: Checkpoint, out: Path, family: str, **changes: Any) -> Statistics:
    settings = {"arguments": ARGUMENTS[family], "bins": 2, "rows_per_bin": 8, "progress": False, **changes}
    return calibrate(checkpoint, out, CONDITIONS[family], **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("further") / "stats"
    make(mini(), out, "flux", limit=DRAWN)
    return out


def flux_graph() -> DiTGraph:
    return DiTGraph(mini().load_model(), example_inputs(mini()))


def modulation(graph: DiTGraph) -> set[str]:
    groups = graph.groups.values()
    return {group.name for group in groups if all(graph.sites[site].role == "modulation" for site in group.sites)}


@pytest.mark.parametrize("family", CONDITIONS)
def test_they_are_what_drawing_would_have_shown(family: str, tmp_path: Path) -> None:
    others = CONDITIONS[family][DRAWN:]
    told = gathered(family, tmp_path, DRAWN, others)
    drawn = gathered(family, tmp_path, DRAWN + len(others))
    few = gathered(family, tmp_path, DRAWN)
    checkpoint = saved_checkpoint(family, tmp_path / "checkpoint")
    names = modulation(DiTGraph(pipeline_of(family).transformer, example_inputs(checkpoint)))
    assert names
    for name, found in told.groups.items():
        like = drawn if name in names else few
        assert torch.equal(found.count, like.groups[name].count)
        torch.testing.assert_close(found.second_moment, like.groups[name].second_moment, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.absmax, like.groups[name].absmax, rtol=1e-4, atol=1e-5)
    assert told.metadata["modulation_conditions"] == len(CONDITIONS[family])
    assert told.metadata["condition_count"] == DRAWN
    assert "modulation_conditions" not in few.metadata


def test_each_condition_is_read_at_some_steps_and_each_step_for_some_conditions(tmp_path: Path) -> None:
    arguments = {**ARGUMENTS["dit"], "num_inference_steps": 12}
    checkpoint = saved_checkpoint("dit", tmp_path / "checkpoint")
    found = calibrate(checkpoint, tmp_path / "stats", CONDITIONS["dit"], limit=3, bins=3, arguments=arguments)
    (name, *_) = modulation(DiTGraph(checkpoint.load_model(), example_inputs(checkpoint)))
    # four conditions in two guidance branches, each at six of the twelve steps
    assert found.groups[name].count.tolist() == [16, 16, 16]
    further = FurtherConditions.of(Trajectories.open(tmp_path / "stats" / TRAJECTORIES))
    assert further is not None
    read: dict[int, set[int]] = {}
    for step, rows in further._calls():
        for label in rows["class_labels"].tolist():
            read.setdefault(label, set()).add(step)
    assert {label: sorted(steps) for label, steps in read.items() if label < 1000} == {
        label: list(range(place % 2, 12, 2)) for place, label in enumerate(CONDITIONS["dit"])
    }


def test_without_vectors_besides_the_time_nothing_is_read(tmp_path: Path) -> None:
    assert vector_arguments(families()["pixart"]) == []
    assert vector_arguments(families()["flux"]) == ["pooled_projections", "guidance"]
    checkpoint = saved_checkpoint("pixart", tmp_path / "checkpoint")
    found = calibrate(checkpoint, tmp_path / "stats", CONDITIONS["flux"], limit=DRAWN, arguments=ARGUMENTS["pixart"])
    assert not (tmp_path / "stats" / TRAJECTORIES / FILE).exists()
    assert "modulation_conditions" not in found.metadata


def test_one_drawn_condition_does_not_tell_what_guidance_gets(tmp_path: Path) -> None:
    found = make(mini(), tmp_path / "stats", "flux", limit=1)
    assert not (tmp_path / "stats" / TRAJECTORIES / FILE).exists()
    assert "modulation_conditions" not in found.metadata


def test_vectors_that_are_the_same_for_all_conditions_are_not_looked_for(finished: Path, tmp_path: Path) -> None:
    """As guidance alone is in FLUX.2: nothing is asked of the pipeline."""
    (tmp_path / TRAJECTORIES).mkdir()
    for file in (finished / TRAJECTORIES).iterdir():
        if file.name != FILE:
            (tmp_path / TRAJECTORIES / file.name).write_bytes(file.read_bytes())
    trajectories = Trajectories.open(tmp_path / TRAJECTORIES)
    family = replace(families()["flux"], axes={"guidance": ("batch",), "hidden_states": ("batch", None, None)})
    record_further(family, None, ["castle, twemoji"], SamplingSettings(), trajectories)
    assert not (tmp_path / TRAJECTORIES / FILE).exists()


def test_a_modulation_that_sees_tokens_is_read_where_it_was_drawn(finished: Path) -> None:
    graph = flux_graph()
    trajectories = Trajectories.open(finished / TRAJECTORIES)
    further = FurtherConditions.of(trajectories)
    assert further is not None
    assert further.groups(graph, graph.groups.values(), CPU) == modulation(graph)
    block: Any = graph.model.get_submodule("transformer_blocks.1")
    linear, seen = block.norm1.linear, list[Tensor]()

    def look(_: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        seen.append((given[0] if given else named["hidden_states"]).mean(1))

    block.register_forward_pre_hook(look, with_kwargs=True)
    linear.register_forward_pre_hook(lambda _, given: (given[0] + seen[-1],))
    name = graph.sites["transformer_blocks.1.norm1.linear"].group
    assert further.groups(graph, graph.groups.values(), CPU) == modulation(graph) - {name}
    found = collect_statistics(graph, trajectories, 2, 8, progress=False)
    rows = 2 * DRAWN * trajectories.steps
    assert int(found.groups[name].count.sum()) == rows
    assert int(found.groups[graph.sites["transformer_blocks.0.norm1.linear"].group].count.sum()) == 2 * rows


def test_half_precision_is_read_as_the_model_wants_it(finished: Path) -> None:
    further = FurtherConditions.of(Trajectories.open(finished / TRAJECTORIES))
    assert further is not None
    graph = flux_graph()
    exact = further.groups(graph, graph.groups.values(), CPU)
    graph.model.to(torch.bfloat16)
    recorded = Trajectories.calls

    def in_half(self: Trajectories, *given: Any, **named: Any) -> Any:
        for call in recorded(self, *given, **named):
            yield call._replace(arguments=moved(call.arguments, "cpu", torch.bfloat16))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trajectories, "calls", in_half)
        assert further.groups(graph, graph.groups.values(), CPU) == exact


def test_vectors_of_half_precision_come_wide_where_calls_do(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "stats")
    place = tmp_path / "stats" / TRAJECTORIES
    with safe_open(place / FILE, framework="pt") as file:
        tensors, told = {name: file.get_tensor(name).bfloat16() for name in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, place / FILE, metadata=told)
    trajectories = Trajectories.open(place)
    as_drawn, wide = FurtherConditions.of(trajectories), FurtherConditions.of(trajectories.in_float32())
    assert as_drawn is not None and wide is not None
    assert {value.dtype for value in as_drawn.vectors.values()} == {torch.bfloat16}
    assert {value.dtype for value in wide.vectors.values()} == {torch.float32}


def test_an_interrupted_reading_resumes_to_the_very_same_bytes(finished: Path, tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if name == "reading further conditions" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(mini(), tmp_path / "stats", "flux", limit=DRAWN, progress=stop)
    make(mini(), tmp_path / "stats", "flux", limit=DRAWN, resume=True)
    for file in (f"{TRAJECTORIES}/{FILE}", "statistics.safetensors", "statistics.json"):
        assert (tmp_path / "stats" / file).read_bytes() == (finished / file).read_bytes()


def test_a_damaged_or_foreign_file_is_refused(finished: Path, tmp_path: Path) -> None:
    make(mini(), tmp_path / "other", "flux", limit=DRAWN, seed=1)
    place = tmp_path / "other" / TRAJECTORIES
    own = (place / FILE).read_bytes()
    (place / FILE).write_bytes((finished / TRAJECTORIES / FILE).read_bytes())
    with pytest.raises(DitqError, match=rf"{FILE}: belongs to another recording; calibrate again"):
        FurtherConditions.of(Trajectories.open(place))
    with safe_open(finished / TRAJECTORIES / FILE, framework="pt") as file:
        told = file.metadata()
    narrow = {name: tensor[..., 1:].contiguous() for name, tensor in load_file(finished / TRAJECTORIES / FILE).items()}
    for tensors in ({}, {"other": torch.zeros(2, 2)}, narrow):
        save_file(tensors, tmp_path / FILE, metadata=told)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(further_module, "FILE", str(tmp_path / FILE))
            with pytest.raises(DitqError, match=rf"{FILE}: damaged; calibrate again"):
                FurtherConditions.of(Trajectories.open(finished / TRAJECTORIES))
    (place / FILE).write_bytes(own[:-8])
    with pytest.raises(DitqError, match=rf"{FILE}: damaged; make it anew with ditq calibrate --resume"):
        FurtherConditions.of(Trajectories.open(place))
    make(mini(), tmp_path / "other", "flux", limit=DRAWN, seed=1, resume=True)
    assert (place / FILE).read_bytes() == own


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        (["a", "b", "", "c"], "is empty"),
        (["a", "b", 5], "prompt 2 is int 5"),
        ([["a"], ["b"]], r"condition 0 is \['a'\], neither a prompt nor a class label"),
    ],
)
def test_conditions_that_are_not_drawn_are_looked_at_before_any_is(conditions: Any, said: str, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(further_module, "sample_one", lambda *_, **__: pytest.fail("made a call"))
        patch.setattr("ditq.calibration.calibrate.record_trajectories", lambda *_, **__: pytest.fail("drew"))
        with pytest.raises(DitqError, match=said):
            calibrate(mini(), tmp_path / "stats", conditions, limit=2, progress=False)


def test_further_conditions_come_evenly_from_the_same_source(tmp_path: Path) -> None:
    prompts = builtin_prompts("mini")
    others = further_conditions(mini(), None, prompts[:16], 64)
    assert len(others) == 48 and not set(others) & set(prompts[:16]) and others[-1] in prompts[100:]
    file = tmp_path / "prompts.txt"
    file.write_text("a\nb\nb\nc\na\n")
    assert further_conditions(mini(), file, ["a"], 64) == ["b", "c"]
    assert further_conditions(mini(), ["x", "y"], ["x"], 64) == ["y"]
    with pytest.raises(DitqError, match=r"vbench is a set of prompts, but .* is asked by class labels"):
        further_conditions(saved_checkpoint("dit", tmp_path / "dit"), "vbench", [], 8)
    assert further_conditions(mini(), "vbench", builtin_prompts("vbench")[:16], 8) == []
    with pytest.raises(DitqError, match="modulation_conditions is -1; give a whole number of at least 0"):
        calibrate(mini(), tmp_path / "stats", modulation_conditions=-1)
