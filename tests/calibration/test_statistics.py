"""Statistics are what a float64 count of the same inputs gives, however they were gathered, and name what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditq.calibration import collect
from ditq.calibration.collect import collect_statistics
from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.record import Trajectories, record_trajectories
from ditq.calibration.sampling import SamplingSettings
from ditq.calibration.statistics import Statistics
from ditq.calibration.triangles import packed, unpacked
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.numerics.rotation import hadamard_rotation
from ditq.passes.judging import hold_out
from tests.calibration.random_input import random_input
from tests.calibration.small_pipelines import ARGUMENTS, CONDITIONS, mini, pipeline_of, saved_checkpoint

EPS = 2.0**-24  # unit roundoff of float32
BINS = 2
TOKENS = "transformer_blocks.0.attn.to_q"
VECTOR = "transformer_blocks.0.norm1.linear"
CONCAT = "single_transformer_blocks.2.proj_out"
SOME = (TOKENS, VECTOR, CONCAT)


@pytest.fixture(scope="module")
def graph() -> DiTGraph:
    return DiTGraph(pipeline_of("flux").transformer, example_inputs(mini()))


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    folder = tmp_path_factory.mktemp("statistics") / "trajectories"
    settings = SamplingSettings(ARGUMENTS["flux"], seed=5)
    return record_trajectories(mini(), CONDITIONS["flux"], settings, folder, pipeline=pipeline_of("flux"))


@pytest.fixture(scope="module")
def statistics(graph: DiTGraph, trajectories: Trajectories) -> Statistics:
    return collect_statistics(graph, trajectories, BINS, rows_per_bin=16)


@pytest.fixture(scope="module")
def saved(statistics: Statistics, graph: DiTGraph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    some = {name: statistics.groups[name] for name in SOME}
    Statistics(some, {name: statistics.sites[name] for name in SOME}, statistics.metadata).save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture(scope="module")
def rows(graph: DiTGraph, trajectories: Trajectories) -> dict[str, list[torch.Tensor]]:
    """The rows of each input by bin, in float64, seen by plain hooks."""
    seen: dict[str, list[list[torch.Tensor]]] = {name: [[] for _ in range(BINS)] for name in SOME}
    for call in trajectories.calls():
        number = 0 if call.step < trajectories.steps / 2 else 1
        hooks = [
            graph.linear(name).register_forward_pre_hook(
                lambda module, inputs, name=name, number=number: seen[name][number].append(inputs[0].flatten(0, -2))
            )
            for name in SOME
        ]
        graph.model(**call.arguments)
        for hook in hooks:
            hook.remove()
    return {name: [torch.cat(parts).double() for parts in bins] for name, bins in seen.items()}


@pytest.mark.parametrize("name", SOME)
def test_statistics_are_those_of_a_float64_count(
    statistics: Statistics, rows: dict[str, list[torch.Tensor]], name: str
) -> None:
    found = statistics.groups[name]
    for number, x in enumerate(rows[name]):
        n = x.shape[0]
        assert found.count[number] == n
        # |error| of a float32 sum of n products is at most about n * eps * sum |products|
        error = (found.second_moment[number].double() - x.T @ x).abs()
        assert (error <= n * EPS * (x.abs().T @ x.abs())).all()
        # the sum is kept in float64 and rounded once
        error = (found.total[number].double() - x.sum(0)).abs()
        assert (error <= EPS * x.sum(0).abs() + n * 2.0**-53 * x.abs().sum(0)).all()
        assert torch.equal(found.absmax[number].double(), x.abs().amax(0))
        crest = (x.abs().amax(1) / x.square().mean(1).sqrt()).mean()
        assert float(found.crest[number]) == pytest.approx(float(crest), rel=x.shape[1] * EPS)
        sampled = found.sample[found.sample_bin == number].double()
        assert sampled.shape[0] == min(16, n)
        assert all((x == row).all(1).any() for row in sampled)
    together = torch.cat(rows[name])
    n = together.shape[0]
    assert found.rms() == pytest.approx(float(together.square().mean().sqrt()), rel=n * EPS)
    torch.testing.assert_close(found.channel_rms.double(), together.square().mean(0).sqrt(), rtol=n * EPS, atol=0)
    torch.testing.assert_close(
        found.mean().double(), together.mean(0), rtol=0, atol=4 * EPS * float(together.abs().max())
    )
    assert torch.equal(found.absmax_all.double(), together.abs().amax(0))
    bound = n * EPS * (together.abs().T @ together.abs()) / n
    assert ((found.hessian().double() - together.T @ together / n).abs() <= bound).all()


@pytest.mark.parametrize("name", SOME)
def test_weights_of_bins_weigh_their_rows(
    statistics: Statistics, rows: dict[str, list[torch.Tensor]], name: str
) -> None:
    found, weights = statistics.groups[name], torch.tensor([3.0, 0.5])
    total = sum(float(w) * len(x) for w, x in zip(weights, rows[name], strict=True))
    moment = sum(float(w) * x.T @ x for w, x in zip(weights, rows[name], strict=True)) / total
    mean = sum(float(w) * x.sum(0) for w, x in zip(weights, rows[name], strict=True)) / total
    n = found.count.sum()
    size = torch.cat(rows[name]).abs().amax()
    torch.testing.assert_close(found.hessian(weights).double(), moment, rtol=0, atol=float(n * EPS * size**2))
    torch.testing.assert_close(found.mean(weights).double(), mean, rtol=0, atol=float(n * EPS * size))
    torch.testing.assert_close(found.hessian(torch.ones(BINS)), found.hessian())
    for wrong in (torch.ones(BINS + 1), torch.zeros(BINS), torch.tensor([1.0, -0.1]), torch.tensor([1.0, torch.inf])):
        with pytest.raises(ValueError, match="no weights of 2 bins"):
            found.hessian(wrong)


def test_every_input_of_the_model_is_gathered(statistics: Statistics, graph: DiTGraph) -> None:
    assert list(statistics.groups) == list(graph.groups)
    statistics.check(graph)
    assert all(statistics.sites[name] == group.sites for name, group in graph.groups.items())
    assert all(found.count.sum() > 0 for found in statistics.groups.values())


def same(left: InputStatistics, right: InputStatistics) -> bool:
    return all(torch.equal(getattr(left, field.name), getattr(right, field.name)) for field in fields(InputStatistics))


def test_the_division_into_runs_and_the_choice_of_groups_change_nothing(
    statistics: Statistics, graph: DiTGraph, trajectories: Trajectories, tmp_path: Path
) -> None:
    limit = 4 * BINS * 192 * (192 + 16 + 4) * 2
    divided = collect_statistics(graph, trajectories, BINS, 16, groups=SOME, memory_limit=limit, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "statistics-00001-of-00002.safetensors",
        "statistics-00002-of-00002.safetensors",
        "statistics.json",
    ]
    assert set(divided.groups) == set(SOME)
    assert all(same(divided.groups[name], statistics.groups[name]) for name in SOME)
    assert divided.metadata == statistics.metadata
    again = collect_statistics(graph, trajectories, BINS, 16, groups=SOME, folder=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["statistics.json", "statistics.safetensors"]
    assert all(same(again.groups[name], statistics.groups[name]) for name in SOME)


def test_a_run_that_is_on_disk_is_not_repeated(graph: DiTGraph, trajectories: Trajectories, tmp_path: Path) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if done == total // 2 + 1:
            raise KeyboardInterrupt

    def collected(folder: Path, progress: Any = None) -> Statistics:
        return collect_statistics(
            graph, trajectories, BINS, 16, groups=SOME[:2], memory_limit=1, folder=folder, progress=progress
        )

    collected(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        collected(tmp_path / "resumed", interrupt)
    assert [path.name for path in (tmp_path / "resumed").iterdir()] == ["statistics-00001-of-00002.safetensors"]
    steps: list[int] = []
    collected(tmp_path / "resumed", lambda name, done, total: steps.append(done))
    assert steps[:3] == [0, trajectories.count(), trajectories.count() + 1]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "resumed" / path.name).read_bytes()


def test_second_moments_over_all_bins_are_the_sum_of_those_of_each(
    statistics: Statistics, graph: DiTGraph, trajectories: Trajectories, tmp_path: Path
) -> None:
    found = collect_statistics(graph, trajectories, BINS, 16, groups=SOME, moments="all", folder=tmp_path)
    assert found.metadata == {**statistics.metadata, "moments": "all"}
    for name in SOME:
        whole, divided = found.groups[name], statistics.groups[name]
        assert whole.second_moment.shape == (1, whole.width, whole.width) and not whole.by_bin
        for field in fields(InputStatistics):
            if field.name != "moments":
                assert torch.equal(getattr(whole, field.name), getattr(divided, field.name))
        rows = float(divided.count.sum())
        torch.testing.assert_close(whole.hessian(), divided.hessian(), rtol=1e-5, atol=rows * EPS)
        scale, shift = torch.linspace(0.5, 2, whole.width), torch.linspace(-1, 1, whole.width)
        changed = [each.transformed(scale, shift, [(0, 64, hadamard_rotation(64))]) for each in (whole, divided)]
        torch.testing.assert_close(changed[0].hessian(), changed[1].hessian(), rtol=1e-4, atol=rows * EPS)
        assert torch.equal(changed[0].total, changed[1].total)
        rest = [hold_out(each)[0] for each in (whole, divided)]
        torch.testing.assert_close(rest[0].hessian(), rest[1].hessian(), rtol=1e-4, atol=1e-4)
        left, places, _ = hold_out(divided)
        for number in range(BINS):  # what is held out of a bin goes from that bin's moments
            rows_held = divided.sample[places[divided.sample_bin[places] == number]]
            gone = divided.second_moment[number] - left.second_moment[number]
            torch.testing.assert_close(gone, rows_held.T @ rows_held, rtol=1e-3, atol=1e-2)
        with pytest.raises(DitqError, match="calibrate with --moments bins"):
            whole.hessian(torch.ones(BINS))


def test_moments_are_summed_over_all_bins_where_they_would_be_too_large(
    graph: DiTGraph, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "MOST_BY_BIN", 4 * BINS * sum(graph.groups[name].width ** 2 for name in SOME[:2]))
    for names, by_bin in ((SOME[:2], True), (SOME[:3], False)):
        found = collect_statistics(graph, trajectories, BINS, 16, groups=names)
        assert all(each.by_bin == by_bin for each in found.groups.values())
    with pytest.raises(DitqError, match="moments"):
        collect_statistics(graph, trajectories, BINS, moments="steps")


def test_of_large_calls_as_many_as_tell_enough_are_read_evenly_from_all_steps(
    statistics: Statistics, graph: DiTGraph, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = next(trajectories.calls()).arguments["hidden_states"].shape[:2].numel()
    monkeypatch.setattr(collect, "ROWS", 2 * rows)
    monkeypatch.setattr(collect, "ROWS_A_CHANNEL", 0)
    found = collect_statistics(graph, trajectories, 1, 16, groups=[TOKENS])
    assert trajectories.count() > 4 and found.metadata["calls"] == 4 and "calls" not in statistics.metadata
    assert int(found.groups[TOKENS].count.sum()) == 4 * rows  # of two steps, both guidance branches of each
    asked = graph, trajectories, [graph.groups[TOKENS]], 1, torch.device("cpu")
    chosen = collect._enough_calls(*asked)
    read = [trajectories.steps_of_calls()[number] for number in chosen]
    assert sorted(read) == [0, 0, *[trajectories.steps // 2] * 2]
    monkeypatch.setattr(collect, "ROWS_A_CHANNEL", 10**6)  # the widest input asks for more
    assert (
        len(collect._enough_calls(graph, trajectories, [graph.groups[TOKENS]], 1, torch.device("cpu")))
        == trajectories.count()
    )


def test_both_guidance_branches_are_among_the_calls_that_are_read(
    graph: DiTGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pipeline that calls its denoiser once a branch, every second call is of the same one."""

    class Recorded:
        def steps_of_calls(self) -> list[int]:
            return [step for _, step in self.places_of_calls()]

        def places_of_calls(self) -> list[tuple[int, int]]:
            return [(condition, step) for condition in range(4) for step in range(10) for _ in range(2)]

    monkeypatch.setattr(collect, "_rows_of_a_call", lambda *_: collect.ROWS)
    for alone in (False, True):  # where branches have shapes of their own, each is a unit
        units = [[2 * number, 2 * number + 1] for number in range(40)]
        monkeypatch.setattr(
            collect, "units_of", lambda _, u=units, a=alone: [[c] for unit in u for c in unit] if a else u
        )
        for bins in (2, 4, 5):
            chosen = collect._enough_calls(graph, Recorded(), [], bins, torch.device("cpu"))  # type: ignore[arg-type]
            assert len(chosen) == (2 if alone else 4) * bins and {number % 2 for number in chosen} == {0, 1}
            steps = [number // 2 % 10 for number in chosen]
            assert min(steps) < 3 and max(steps) > 4


def test_what_statistics_will_take_on_disk_is_told_before(
    statistics: Statistics, graph: DiTGraph, trajectories: Trajectories, tmp_path: Path
) -> None:
    for moments in ("bins", "all"):
        collect_statistics(graph, trajectories, BINS, 16, moments=moments, folder=tmp_path / moments)
        found = sum(path.stat().st_size for path in (tmp_path / moments).glob("*.safetensors"))
        assert collect.bytes_on_disk(graph, BINS, moments, 16) == pytest.approx(found, rel=0.1)


def test_a_triangle_holds_the_whole_symmetric_matrix() -> None:
    for width in (5, 300):  # one piece, and several with an odd one
        rows = torch.randn(3, 7, width, generator=torch.Generator().manual_seed(0))
        matrices = rows.mT @ rows
        matrices = (matrices + matrices.mT) / 2
        assert packed(matrices).shape == (3, width * (width + 1) // 2)
        assert torch.equal(unpacked(packed(matrices), width), matrices)


def test_statistics_of_the_first_version_are_read(saved: Path, statistics: Statistics, tmp_path: Path) -> None:
    """Which held second moments whole."""
    folder = shutil.copytree(saved, tmp_path / "old")
    index = json.loads((folder / "statistics.json").read_text())
    (folder / "statistics.json").write_text(json.dumps({**index, "version": 1}))
    path = folder / "statistics.safetensors"
    tensors = load_file(path)
    for name in SOME:
        tensors[f"{name}.second_moment"] = statistics.groups[name].second_moment.contiguous()
    save_file(tensors, path)
    opened = Statistics.open(folder)
    assert all(same(opened.groups[name], statistics.groups[name]) for name in SOME)


def test_hidden_text_tokens_do_not_count_for_cross_attention(tmp_path: Path) -> None:
    pipeline = pipeline_of("pixart")
    checkpoint = saved_checkpoint("pixart", tmp_path / "checkpoint")
    trajectories = record_trajectories(
        checkpoint,
        CONDITIONS["pixart"],
        SamplingSettings(ARGUMENTS["pixart"]),
        tmp_path / "trajectories",
        pipeline=pipeline,
    )
    graph = DiTGraph(pipeline.transformer, example_inputs(checkpoint))
    found = collect_statistics(graph, trajectories, bins=1)
    masks = [call.arguments["encoder_attention_mask"] for call in trajectories.calls()]
    assert int(found.groups["transformer_blocks.0.attn2.to_k"].count) == sum(int(mask.sum()) for mask in masks)
    assert int(found.groups["caption_projection.linear_1"].count) == sum(mask.numel() for mask in masks)


def test_values_that_are_not_finite_are_named_by_site_and_step(graph: DiTGraph, trajectories: Trajectories) -> None:
    weight = graph.linear(VECTOR).get_parameter("weight")
    before = weight.clone()
    try:
        weight[0, 0] = torch.inf
        with pytest.raises(DitqError, match=r"transformer_blocks\.0\.attn\.to_q: its input is not finite at step 0 of"):
            collect_statistics(graph, trajectories, BINS, groups=[TOKENS, VECTOR])
    finally:
        weight.copy_(before)
    assert not graph.linear(TOKENS)._forward_pre_hooks


def test_squares_beyond_float32_are_named(graph: DiTGraph, trajectories: Trajectories) -> None:
    weight = graph.linear(VECTOR).get_parameter("weight")
    before = weight.clone()
    try:
        weight.mul_(1e25)
        with pytest.raises(
            DitqError, match=r"to_q: the squares of its input are beyond float32; the checkpoint or its"
        ):
            collect_statistics(graph, trajectories, BINS, groups=[TOKENS])
    finally:
        weight.copy_(before)


def test_unknown_groups_and_bad_settings_are_named(graph: DiTGraph, trajectories: Trajectories) -> None:
    with pytest.raises(DitqError, match="no linear input called 'nothing'"):
        collect_statistics(graph, trajectories, groups=["nothing"])
    with pytest.raises(DitqError, match="bins is 0; give a whole number of at least 1"):
        collect_statistics(graph, trajectories, bins=0)


def test_what_was_saved_is_opened_again_bit_by_bit(saved: Path, statistics: Statistics) -> None:
    opened = Statistics.open(saved, mini().fingerprint())
    assert set(opened.groups) == set(SOME) and TOKENS in opened.groups and "nothing" not in opened.groups
    assert all(same(opened.groups[name], statistics.groups[name]) for name in SOME)
    assert opened.metadata == statistics.metadata
    assert opened.sites[TOKENS] == statistics.sites[TOKENS]
    origin = opened.metadata
    assert (origin["seed"], origin["bins"], origin["steps"], origin["condition_count"]) == (0, BINS, 2, 2)
    assert origin["sampling_arguments"] == ARGUMENTS["flux"] and origin["sampling_seed"] == 5


def truncate(folder: Path) -> None:
    path = folder / "statistics.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "statistics.safetensors")
    del tensors[f"{TOKENS}.second_moment"]
    save_file(tensors, folder / "statistics.safetensors")


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / "statistics.json").read_text())
        change(index)
        (folder / "statistics.json").write_text(json.dumps(index))

    return apply


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "statistics.safetensors: missing, truncated or damaged"),
        (lambda folder: (folder / "statistics.safetensors").unlink(), "missing, truncated or damaged"),
        (drop_tensor, f"does not hold the statistics of {TOKENS}"),
        (lambda folder: (folder / "statistics.json").unlink(), "not a statistics folder"),
        (lambda folder: (folder / "statistics.json").write_text("[]"), "should hold a JSON object"),
        (edit(lambda index: index.update(format="other")), "not written by ditq"),
        (edit(lambda index: index.update(version=3)), "has format version 3, this ditq reads 2"),
        (edit(lambda index: index.pop("groups")), "damaged or incomplete"),
        (edit(lambda index: index.update(sampling_arguments=None)), "damaged or incomplete"),
        (edit(lambda index: index["groups"][TOKENS].update(width=8)), f"does not hold the statistics of {TOKENS}"),
        (edit(lambda index: index["groups"][TOKENS].update(file="../x.safetensors")), "which is outside the folder"),
    ],
)
def test_a_damaged_folder_is_named(copy: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(copy)
    with pytest.raises(DitqError) as caught:
        Statistics.open(copy)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_is_found_when_the_input_is_read(copy: Path) -> None:
    path = copy / "statistics.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    opened = Statistics.open(copy)
    with pytest.raises(DitqError, match="were changed or damaged; calibrate again"):
        for name in opened.groups:
            opened.groups[name]


def test_statistics_of_another_checkpoint_or_model_are_refused(copy: Path, graph: DiTGraph) -> None:
    with pytest.raises(DitqError, match=r"of another checkpoint \(mini, .*\); calibrate this one"):
        Statistics.open(copy, "0" * 64)
    with pytest.raises(DitqError, match="do not hold the input of x_embedder"):
        Statistics.open(copy, graph=graph)


def test_statistics_of_another_width_are_refused(statistics: Statistics, graph: DiTGraph) -> None:
    narrow, _ = random_input()
    wrong = Statistics({**statistics.groups, TOKENS: narrow}, statistics.sites, statistics.metadata)
    with pytest.raises(DitqError, match=f"statistics of {TOKENS} have 24 channels, the model has 192"):
        wrong.check(graph)
