"""Predicted costs are those that are found when the one linear is really quantized, and fall with the bits."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from ditq.budget.choices import Choices, make_choices
from ditq.budget.front import agreement
from ditq.budget.sensitivity import Call, SingleCalls, chosen_calls, step_lengths
from ditq.calibration.record import RecordedCall
from ditq.calibration.sampler import answer
from ditq.graph import DiTGraph
from ditq.nn import QuantLinear
from ditq.passes import Context
from ditq.passes.quantize import Quantize
from tests.small_checkpoint import CONFIG, small_flux

NAMES = ("w4", "w6", "w8", "keep")
CALLS, PROBES = 4, 48


@dataclass(frozen=True)
class Case:
    graph: DiTGraph
    choices: Choices
    cost: SingleCalls
    errors: np.ndarray


def _call(seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    side = 4
    places = torch.arange(float(side))
    arguments = {
        "hidden_states": torch.randn(1, side * side, CONFIG["in_channels"], generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, CONFIG["joint_attention_dim"], generator=generator),
        "pooled_projections": torch.randn(1, CONFIG["pooled_projection_dim"], generator=generator),
        "timestep": torch.rand(1, generator=generator),
        "img_ids": torch.cartesian_prod(torch.zeros(1), places, places),
        "txt_ids": torch.zeros(8, 3),
    }
    return Call(arguments)


@pytest.fixture(scope="module")
def case() -> Case:
    calls = [_call(seed) for seed in range(CALLS)]
    model = small_flux()
    for name, parameter in model.named_parameters():  # weights of a trained size, so that no attention is saturated
        if name.endswith("weight") and parameter.dim() == 2:
            parameter.data /= 2
    graph = DiTGraph(model, calls[0].arguments)
    step = Quantize(format="w4a16", codebook="uniform", rounding="nearest", weighted=False, bias_correction=False,
                    select=["role:token", "role:modulation"])  # fmt: skip
    with torch.no_grad():
        choices = make_choices(graph, step, Context(), NAMES)
        cost = SingleCalls(calls, [answer(graph.model, call.arguments) for call in calls])
    return Case(graph, choices, cost, cost.candidates(graph, choices, PROBES))


def test_predictions_are_what_quantizing_one_linear_really_costs(case: Case) -> None:
    """The mean of n squares of a normal variable has a relative standard error of sqrt(2 / n). Where one call makes up nearly
    all of an error, n is the number of probes, and that is 0.8 dB: 3 dB for one entry and 1 dB for the mean over eleven.
    """
    keep, six = NAMES.index("keep"), NAMES.index("w6")
    differences = []
    for row in range(0, len(case.choices.sites), 2):
        alone = np.full(len(case.choices.sites), keep)
        alone[row] = six
        found = case.cost.assignment(case.graph, case.choices, alone)
        differences.append(10 * np.log10(found / case.errors[row, six]))
    assert np.abs(differences).max() < 3.0 and abs(np.mean(differences)) < 1.0


def test_more_bits_cost_less_and_kept_linears_nothing(case: Case) -> None:
    assert (case.errors[:, 0] > case.errors[:, 1]).all() and (case.errors[:, 1] > case.errors[:, 2]).all()
    assert (case.errors[:, NAMES.index("keep")] == 0).all()
    assert (np.diff(case.choices.bytes, axis=1) > 0).all() and (np.diff(case.choices.bits, axis=1) > 0).all()


def test_errors_of_many_linears_add_up(case: Case) -> None:
    rows = np.arange(len(case.choices.sites))
    predicted, found = [], []
    for index in (1, 2):
        choice = np.full(len(rows), index)
        predicted.append(float(case.errors[rows, choice].sum()))
        found.append(case.cost.assignment(case.graph, case.choices, choice))
    _, difference = agreement(predicted, found)
    assert difference is not None and abs(difference) < 1.5


def test_measuring_leaves_the_model_as_it_was(case: Case) -> None:
    case.cost.assignment(case.graph, case.choices, np.zeros(len(case.choices.sites), dtype=np.int64))
    with torch.no_grad():
        after = [answer(case.graph.model, call.arguments) for call in case.cost.calls]
    assert all(torch.equal(a, b) for a, b in zip(case.cost.clean, after, strict=True))


def test_no_more_than_one_candidate_is_decoded_at_a_time(case: Case) -> None:
    layers = {layer for row in case.choices.layers for layer in row if isinstance(layer, QuantLinear)}
    held: list[int] = []
    handles = [layer.register_forward_hook(lambda *_: held.append(_decoded(layers))) for layer in layers]
    SingleCalls(case.cost.calls[:1], case.cost.clean[:1]).candidates(case.graph, case.choices, probes=1)
    largest = max(layer.in_features * layer.out_features for layer in layers) * 4
    assert len(held) == len(layers) and 0 < max(held) <= largest and _decoded(layers) == 0
    held.clear()
    case.cost.assignment(case.graph, case.choices, np.zeros(len(case.choices.sites), dtype=np.int64))
    assert 0 < max(held) <= 4 * int(case.choices.weights.sum()) and _decoded(layers) == 0
    for handle in handles:
        handle.remove()


def _decoded(layers: Iterable[QuantLinear]) -> int:
    """Bytes of weights that the layers hold in float32 beside their codes."""
    return sum(layer._carrier.nbytes for layer in layers if layer._carrier is not None)


def test_calls_are_drawn_in_proportion_to_the_weight_of_their_step() -> None:
    read = []

    class Recorded:
        def steps_of_calls(self) -> list[int]:
            return [step for _ in range(40) for step in range(4)]

        def calls(self, chosen: Collection[int]) -> Iterator[RecordedCall]:
            for number in range(160):
                if number in chosen:
                    read.append(number)
                    yield RecordedCall({"number": number % 4}, 0.0, number % 4, number // 4)

    weights = step_lengths([1000.0, 600.0, 300.0, 300.0])
    assert weights == [160_000, 90_000, 0, 90_000]
    drawn = chosen_calls(Recorded(), weights, count=34)  # type: ignore[arg-type]
    counts = np.zeros(4)
    for call in drawn:
        counts[call.arguments["number"]] += call.times
    assert counts.sum() == 34 and len(read) == len(drawn)  # no other is read
    assert np.abs(counts - 34 * np.array(weights) / sum(weights)).max() <= 1 and counts[2] == 0
