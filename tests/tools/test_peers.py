"""The comparison with peers: planted outliers keep the function, pictures are those of ditq's sampling, rows compare fairly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ditq.calibration.sampling import SamplingSettings, sample
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.numerics.rounding import output_error
from tests.families_small import small_inputs, small_model
from tools.peers import grids, layers
from tools.peers.draw import draw
from tools.peers.page import beaten, fill, joined, write_json
from tools.peers.planted import MILD, SALIENT, plant
from tools.peers.row import rows


@pytest.mark.parametrize("name", ["mini", "mini-pixart"])
def test_planted_outliers_leave_the_function_unchanged(name: str) -> None:
    checkpoint = Checkpoint.open(name)
    model, inputs = checkpoint.load_model(), example_inputs(checkpoint)
    graph = DiTGraph(model, inputs)
    with torch.no_grad():
        before = model(**inputs, return_dict=False)[0]
        planted = plant(graph)
        after = model(**inputs, return_dict=False)[0]
    assert planted
    assert (after - before).norm() <= 1e-5 * before.norm()


@pytest.mark.parametrize("family", ["flux", "pixart"])
def test_planted_channels_are_salient_and_mild(family: str) -> None:
    """In float64 the function stays to 1e-6 (weights are float32), and inputs have channels kappa times as large."""
    model = small_model(family)
    inputs = small_inputs(model)
    graph = DiTGraph(model, inputs)
    seen: dict[str, torch.Tensor] = {}

    def run() -> torch.Tensor:
        handles = [
            graph.linear(name).register_forward_pre_hook(
                lambda _, x, name=name: seen.__setitem__(name, x[0].flatten(0, -2).std(0))
            )
            for name in graph.groups
        ]
        with torch.no_grad():
            output = model(**inputs, return_dict=False)[0]
        for handle in handles:
            handle.remove()
        return output

    before, small = run(), dict(seen)
    planted = plant(graph)
    after = run()
    torch.testing.assert_close(after, before, rtol=1e-3, atol=float(before.abs().max()) * 1e-4)
    for name in planted:
        ratio = seen[name] / small[name].clamp_min(1e-6)
        assert ((ratio > 0.98 * SALIENT[0]) & (ratio < 1.02 * SALIENT[1])).sum() == 2
        assert ((ratio > 0.98 * MILD) & (ratio < 1.02 * MILD)).sum() == round(0.05 * len(ratio))


def test_pictures_of_a_batch_are_those_drawn_one_by_one() -> None:
    checkpoint = Checkpoint.open("mini-pixart")
    arguments = {**checkpoint.sampling, "num_inference_steps": 2}
    captions = ["red apple, noto", "smirking face, fluent 3d", "rocket, twemoji"]
    alone = sample(checkpoint.load_pipeline(), captions, SamplingSettings(arguments, 7), progress=False)
    drawn = draw(checkpoint.load_pipeline(), captions, arguments, 7, batch=2, watch=True)
    for number, one in enumerate(alone):
        np.testing.assert_allclose(drawn.latents[number], one.latents[0].numpy(), atol=1e-4)
        assert np.abs(drawn.pictures[number].astype(int) - np.asarray(one.image).astype(int)).max() <= 1
    assert [call["hidden_states"].shape[0] for call in drawn.calls] == [2, 2]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_a_grid_rounds_like_the_formula(symmetric: bool, group: int | None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 64) * 0.1
    grid = grids.uniform_grid(weight, 4, group, symmetric)
    values = weight.reshape(-1, group or 64)
    if symmetric:
        scale = values.abs().amax(1, keepdim=True) / 7
        expected = (values / scale).round().clamp(-8, 7) * scale
    else:
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        scale = (high - low) / 15
        zero = (-low / scale).round()
        expected = ((values / scale + zero).round().clamp(0, 15) - zero) * scale
    found = grids.nearest(weight, grid).reshape(-1, group or 64)
    # the scale is kept in half precision, and a weight halfway may go either way
    assert ((found - expected).abs() > scale * 0.01).float().mean() < 0.02
    groups = 8 * 64 // (group or 64)
    assert grid.stored_bits() == 8 * 64 * 4 + groups * (16 if symmetric else 16 + 4)


def test_gptq_on_an_asymmetric_grouped_grid_beats_nearest() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 32) @ torch.randn(32, 64) + 0.1 * torch.randn(256, 64)
    weight, hessian = torch.randn(16, 64), x.T @ x / 256
    grid = grids.uniform_grid(weight, 4, 16, symmetric=False)
    errors = [
        float(output_error(weight, w, hessian))
        for w in (grids.nearest(weight, grid), grids.gptq(weight, hessian, grid))
    ]
    assert errors[1] < 0.5 * errors[0]


def test_activation_quantizers_keep_to_half_a_step() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 64) * 3 + 1
    token, group = layers.per_token(8), layers.per_group(8, 16)
    shifted = layers.asymmetric(8, 16)
    assert token is not None and group is not None and shifted is not None
    assert ((token(x) - x).abs() <= x.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    grouped = x.unflatten(-1, (-1, 16))
    assert ((group(x) - x).unflatten(-1, (-1, 16)).abs() <= grouped.abs().amax(-1, keepdim=True) / 127 * 0.501).all()
    step = (grouped.amax(-1, keepdim=True).clamp_min(0) - grouped.amin(-1, keepdim=True).clamp_max(0)) / 255
    assert ((shifted(x) - x).unflatten(-1, (-1, 16)).abs() <= step * 1.01).all()


def result(name: str, bits: float, activation: int, psnr: float, modulation: float = 16.0) -> dict:
    return {"name": name, "bits": bits, "activation": activation, "psnr": psnr, "modulation": modulation}


def test_a_peer_wins_only_against_rows_of_equal_bits() -> None:
    ours = [result("ours", 4.1, 8, 33.0), result("wide", 8.1, 8, 48.0)]
    assert not beaten(result("worse", 4.1, 8, 32.0), ours)
    assert beaten(result("better", 4.1, 8, 34.0), ours)
    assert not beaten(result("quantizes activations more", 4.1, 4, 34.0), ours)
    assert not beaten(result("alone at its bits", 6.0, 8, 40.0), ours)
    assert not beaten(result("leaves less", 4.1, 8, 34.0, modulation=4.5), ours)


def test_rows_join_those_of_the_page_that_were_not_measured_now(tmp_path: Path) -> None:
    path = tmp_path / "page.json"
    write_json(path, "mini", [{"name": name, "psnr": 1.0} for name in ("gone", "b", "c")])
    found = joined(path, "mini", [{"name": "a", "psnr": 2.0}, {"name": "c", "psnr": 2.0}], ["a", "b", "c"])
    assert [(row["name"], row["psnr"]) for row in found] == [("a", 2.0), ("b", 1.0), ("c", 2.0), ("gone", 1.0)]
    assert [row["name"] for row in joined(path, "other", [{"name": "a"}], ["a"])] == ["a"]


def test_the_table_is_put_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- table mini -->\nold\n<!-- end mini -->\nb\n")
    assert fill(page, "mini", "new")
    assert page.read_text() == "a\n<!-- table mini -->\nnew\n<!-- end mini -->\nb\n"
    assert not fill(page, "other", "new")


def test_every_recipe_has_a_row() -> None:
    from ditq.recipe import shipped_recipes

    names = set(rows())
    assert {f"ditq {name}" for name in shipped_recipes()} <= names
