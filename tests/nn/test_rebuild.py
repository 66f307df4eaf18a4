"""What passes put into a model can be described as JSON and put into a fresh model, to the last bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ditq.nn import QuantLinear, TransformedLinear, describe, rebuild
from ditq.nn.modulation_factor import ModulationFactor, attach
from ditq.passes import Context
from ditq.passes.quantize import Quantize
from ditq.passes.rotate import Rotate
from ditq.passes.smooth import Smooth
from tests.families_small import FAMILIES, forward, small_graph, small_inputs, small_model, statistics_of


@pytest.mark.parametrize(
    ("family", "kind", "rotated"),
    # A rotation fitted to data lies in the weights, one made by construction in the description.
    [*((family, "hadamard", "role:token") for family in FAMILIES), ("pixart", "outlier", "transformer_blocks.0.ff.*")],
)
def test_a_rebuilt_model_gives_the_same_bits(family: str, kind: str, rotated: str) -> None:
    graph = small_graph(family)
    context = Context(statistics_of(graph))
    Smooth().run(graph, context)
    Rotate(mode=kind, select=[rotated]).run(graph, context)
    # Half the linears stay as they are behind their rotation, so that every kind of part is there.
    half = graph.select("role:token")[::2]
    Quantize(rounding="nearest", rules=[{"select": half, "keep": True}]).run(graph, context)
    parts = [type(module) for module in graph.model.modules()]
    assert QuantLinear in parts and TransformedLinear in parts
    assert (ModulationFactor in parts) == (family == "pixart")

    described = json.loads(json.dumps(describe(graph.model)))
    state = {name: tensor.clone() for name, tensor in graph.model.state_dict().items()}
    fresh = small_model(family, seed=1)
    rebuild(fresh, described, state)
    inputs = small_inputs(graph.model, seed=4)
    assert torch.equal(forward(fresh, inputs), forward(graph.model, inputs))
    assert describe(fresh) == describe(graph.model)
    assert set(fresh.state_dict()) == set(state)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_weights_that_do_not_fit_are_refused(damage: str) -> None:
    graph = small_graph("dit")
    Quantize(rounding="nearest", codebook="uniform", weighted=False, bias_correction=False).run(graph, Context())
    described, state = describe(graph.model), dict(graph.model.state_dict())
    name = "transformer_blocks.0.attn1.to_q.codes"
    if damage == "missing":
        del state[name]
    else:
        state[name] = state[name][:-1]
    with pytest.raises(RuntimeError, match=r"to_q\.codes"):
        rebuild(small_model("dit"), described, state)


HUGE = 10**13
LIES: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"out_features": HUGE}, r"to_q\.codes is .* among the weights, but described as"),
    "columns": ({"in_features": HUGE}, r"to_q\.codes is .* among the weights, but described as"),
    "table": ({"table": [HUGE]}, r"to_q\.table is \[16\] among the weights, but described as"),
    "scale": ({"scale": [64, HUGE]}, r"to_q\.scale is \[64\] among the weights, but described as"),
    "multiplier": ({"multiplier": [64, HUGE]}, r"to_q\.multiplier is not among the weights"),
    "rank": ({"rank": HUGE}, r"to_q\.down is not among the weights"),
    "scales of channels": ({"transform": {"scaled": HUGE, "shifted": None, "rotations": []}}, "inverse_scale is not among"),
    "rotation": (
        {"transform": {"scaled": None, "shifted": None, "rotations": [
            {"start": 0, "stop": HUGE, "rotation": {"kind": "hadamard", "size": HUGE, "seed": 0}}
        ]}}, "rotations: one of 10000000000000 channels, 0 to 10000000000000, in an input of 64",
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_nothing_is_made_in_a_size_that_the_weights_do_not_have(lie: str) -> None:
    """torch would be asked for terabytes, and say so, where a check came too late."""
    graph = small_graph("dit")
    Quantize(rounding="nearest", codebook="uniform", weighted=False, bias_correction=False).run(graph, Context())
    described, state = describe(graph.model), dict(graph.model.state_dict())
    entries, says = LIES[lie]
    described["quantized"]["transformer_blocks.0.attn1.to_q"] |= entries
    with pytest.raises(RuntimeError, match=says):
        rebuild(small_model("dit"), described, state)


def test_a_factor_of_ones_changes_nothing_and_is_put_on_once() -> None:
    model = small_model("pixart")
    inputs = small_inputs(model)
    reference = forward(model, inputs)
    block = model.get_submodule("transformer_blocks.0")
    factor = attach(block, 6, 64, "timestep")
    assert attach(block, 6, 64, "timestep") is factor
    assert torch.equal(forward(model, inputs), reference)
    factor.factor[1] = 2.0
    assert not torch.equal(forward(model, inputs), reference)
