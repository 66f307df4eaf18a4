"""Errors of single layers against what is worked out by hand on a small model."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from ditq.nn import ActivationFormat, InputTransform, QuantLinear
from ditq.numerics.codebook import CODEBOOKS, encode
from ditq.numerics.rotation import hadamard_rotation
from ditq.passes import Context
from ditq.passes.token_order import TokenOrderPass
from ditq.report import metrics
from ditq.report.alignment import LinearBlocks, ScaledChannels
from ditq.report.layers import histogram, per_layer_sqnr, rows_of, site_histograms
from tests.export.quantized import quantize_blocks
from tests.families_small import small_graph, small_inputs, small_model

torch.set_num_threads(1)
WIDTH = 32


class Chain(nn.Module):
    """first -> tanh -> value -> out, like an attention whose value and output projections meet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.value(torch.tanh(self.first(x))))


@pytest.fixture
def calls() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(2, 40, WIDTH, generator=generator)} for _ in range(4)]


def noisy(model: Chain, names: list[str], level: float = 0.1) -> Chain:
    changed = copy.deepcopy(model)
    for name in names:
        weight = changed.get_submodule(name).weight
        weight.data += level * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))  # type: ignore[operator, union-attr, arg-type]
    return changed


@torch.no_grad()
def test_sqnr_is_that_of_the_outputs_of_both_models(calls: list[dict[str, Tensor]]) -> None:
    original = Chain()
    quantized = noisy(original, ["first", "value"])
    found = {result.site: result for result in per_layer_sqnr(original, quantized, calls, sites=["first", "value"])}

    inputs = torch.cat([call["x"] for call in calls])
    hidden, other = torch.tanh(original.first(inputs)), torch.tanh(quantized.first(inputs))
    expected = metrics.sqnr_db(original.value(hidden), quantized.value(other))
    alone = metrics.sqnr_db(original.value(hidden), quantized.value(hidden))
    assert found["value"].sqnr_db == pytest.approx(expected, abs=1e-6)
    assert found["value"].local_db == pytest.approx(alone, abs=1e-6)
    assert alone > expected
    assert found["first"].sqnr_db == pytest.approx(metrics.sqnr_db(original.first(inputs), quantized.first(inputs)))
    assert found["first"].parameters == WIDTH * WIDTH


def test_an_unchanged_model_has_infinite_sqnr(calls: list[dict[str, Tensor]]) -> None:
    original = Chain()
    results = per_layer_sqnr(original, copy.deepcopy(original), calls, sites=["first", "out"])
    assert [(result.sqnr_db, result.local_db) for result in results] == [(math.inf, math.inf)] * 2


@torch.no_grad()
def test_scaled_shifted_and_rotated_values_are_brought_back_before_they_are_compared(
    calls: list[dict[str, Tensor]],
) -> None:
    original, head = Chain(), 8
    plain = noisy(original, ["value"])
    rotated = copy.deepcopy(plain)
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH // head, head, head, generator=torch.Generator().manual_seed(3)))
    full = torch.diag(torch.linspace(0.05, 20, WIDTH)) @ torch.block_diag(*rotation)
    shift = torch.linspace(-2, 2, WIDTH)
    rotated.value.weight.copy_(full.T @ plain.value.weight)
    rotated.value.bias.copy_(full.T @ plain.value.bias + shift)
    rotated.out.weight.copy_(torch.linalg.solve(full, plain.out.weight.T).T)
    rotated.out.bias.sub_(rotated.out.weight @ shift)

    names = ["value", "out"]
    before = {result.site: result for result in per_layer_sqnr(original, plain, calls, sites=names)}
    after = {
        result.site: result
        for result in per_layer_sqnr(original, rotated, calls, sites=names, alignments={"value": LinearBlocks(head)})
    }
    blind = per_layer_sqnr(original, rotated, calls, sites=["value"])[0]
    assert blind.sqnr_db < 3  # compared as they are, two bases have nothing in common
    assert after["value"].aligned and after["value"].local_db is None
    # What the best affine map of each head leaves, computed here row by row; of the error itself it takes up the part that
    # is linear in the head's 8 of 32 channels.
    inputs = torch.tanh(original.first(torch.cat([call["x"] for call in calls]))).reshape(-1, WIDTH)
    wanted, given = (model.value(inputs).double() for model in (original, rotated))
    fitted = []
    for start in range(0, WIDTH, head):
        columns = torch.cat((given[:, start : start + head], torch.ones(len(given), 1).double()), dim=1)
        fitted.append(columns @ torch.linalg.lstsq(columns, wanted[:, start : start + head]).solution)
    rows = len(given)
    expected = metrics.sqnr_db(wanted, torch.cat(fitted, dim=1)) - 10 * math.log10(rows / (rows - head - 1))
    assert after["value"].sqnr_db == pytest.approx(expected, abs=1e-4)
    assert before["value"].sqnr_db - 0.1 <= after["value"].sqnr_db <= before["value"].sqnr_db + 3
    # The function did not change, but `out` reads another basis, so alone it cannot be fed the original's input.
    assert after["out"].sqnr_db == pytest.approx(before["out"].sqnr_db, abs=1e-3)
    assert before["out"].local_db is not None and after["out"].local_db is None


@torch.no_grad()
def test_folded_scales_and_shifts_are_taken_out_before_outputs_are_compared(calls: list[dict[str, Tensor]]) -> None:
    original = Chain()
    plain = noisy(original, ["value"])
    folded = copy.deepcopy(plain)
    scale = torch.linspace(0.2, 5.0, WIDTH)
    shift = torch.linspace(-3.0, 3.0, WIDTH)
    folded.value.weight.copy_(plain.value.weight * scale[:, None])
    folded.value.bias.copy_(plain.value.bias * scale + shift)
    (before,) = per_layer_sqnr(original, plain, calls, sites=["value"])
    (after,) = per_layer_sqnr(original, folded, calls, sites=["value"], alignments={"value": ScaledChannels()})
    assert after.aligned and after.local_db is None

    # Exactly what a line fitted to each channel leaves, and close to the error itself.
    inputs = torch.tanh(original.first(torch.cat([call["x"] for call in calls]))).reshape(-1, WIDTH)
    wanted, given = (model.value(inputs).double() for model in (original, folded))
    fitted = []
    for channel in range(WIDTH):
        columns = torch.stack([given[:, channel], torch.ones(len(given), dtype=torch.float64)], dim=1)
        fitted.append(columns @ torch.linalg.lstsq(columns, wanted[:, channel, None]).solution[:, 0])
    rows = len(given)
    expected = metrics.sqnr_db(wanted, torch.stack(fitted, dim=1)) - 10 * math.log10(rows / (rows - 2))
    assert after.sqnr_db == pytest.approx(expected, abs=1e-6)
    assert after.sqnr_db == pytest.approx(before.sqnr_db, abs=1.0)


def test_alignments_with_too_few_rows_say_nothing() -> None:
    rotated, scaled = LinearBlocks(4), ScaledChannels()
    assert rotated.left() is None and scaled.left() is None
    y = torch.randn(7, 8, dtype=torch.float64)
    for alignment in (rotated, scaled):
        alignment.add(y, y)
        assert alignment.left() is None


def test_values_in_the_same_basis_are_not_aligned(calls: list[dict[str, Tensor]]) -> None:
    original = Chain()
    result = per_layer_sqnr(
        original, noisy(original, ["value"]), calls, sites=["value"], alignments={"value": LinearBlocks(8)}
    )[0]
    assert not result.aligned and result.local_db is not None


def quantized_by_rotation(model: Chain) -> Chain:
    changed = copy.deepcopy(model)
    rotation = hadamard_rotation(WIDTH)
    weight = rotation.right_multiply(model.value.weight.detach())
    layer = QuantLinear(
        "value",
        encode(weight, CODEBOOKS["uniform"](weight, 4)),
        model.value.bias,
        ActivationFormat(8, "token"),
        transform=InputTransform(rotations=[(0, WIDTH, rotation)]),
        codebook="uniform",
    )
    changed.set_submodule("value", layer)
    return changed


def test_quantized_linears_are_found_and_their_format_told(calls: list[dict[str, Tensor]]) -> None:
    original = Chain()
    (result,) = per_layer_sqnr(original, quantized_by_rotation(original), calls, kinds={"value": "value"})
    assert (result.site, result.format, result.kind) == ("value", "w4a8 uniform", "value")
    # 4-bit weights of a unit-variance shape: about 20 dB, whatever the basis
    assert 15 < result.sqnr_db < 28 and result.local_db == pytest.approx(result.sqnr_db, abs=1e-6)


@torch.no_grad()
def test_histograms_show_what_is_quantized(calls: list[dict[str, Tensor]]) -> None:
    original = Chain()
    quantized = quantized_by_rotation(original)
    (shown,) = site_histograms(original, quantized, calls, ["value"])
    hidden = torch.tanh(original.first(torch.cat([call["x"] for call in calls]))).reshape(-1, WIDTH)
    rotated = hidden @ hadamard_rotation(WIDTH).matrix().float()
    assert shown.input_before.absmax == pytest.approx(float(hidden.abs().max()))
    assert shown.input_after.absmax == pytest.approx(float(rotated.abs().max()), rel=1e-5)
    assert shown.input_after.rms == pytest.approx(shown.input_before.rms, rel=1e-5)  # a rotation keeps lengths
    assert sum(shown.input_before.counts) == hidden.numel()
    assert shown.weight_before.absmax == pytest.approx(float(original.value.weight.abs().max()))
    layer = quantized.value
    assert isinstance(layer, QuantLinear)
    assert shown.weight_after.absmax == pytest.approx(float(layer.weight().abs().max()))


def test_histogram_counts_every_value_by_hand() -> None:
    found = histogram(torch.tensor([-2.0, -1.9, 0.0, 0.1, 2.0]), bins=5)
    assert found.counts == [2, 0, 2, 0, 1] and found.absmax == 2.0
    assert histogram(torch.zeros(3), bins=5).counts == [0, 0, 3, 0, 0]


def test_rows_are_spread_over_all_tokens() -> None:
    x = torch.arange(10.0).view(2, 5, 1)
    assert rows_of(x, 5).flatten().tolist() == [0, 2, 4, 6, 8]
    assert rows_of(x, 100).flatten().tolist() == list(range(10))


def test_tokens_that_lie_in_another_order_are_compared_with_their_own() -> None:
    found = []
    for ordered in (False, True):
        graph = small_graph("sd3")
        if ordered:
            TokenOrderPass(tile=2).run(graph, Context())
        call = {**small_inputs(graph.model, seed=3), "return_dict": False}
        results = per_layer_sqnr(small_model("sd3"), quantize_blocks(graph.model), [call])
        found.append([result.sqnr_db for result in results])
    assert len(found[0]) > 10 and found[1] == pytest.approx(found[0], abs=0.1)  # roundings that nearly tie may differ
