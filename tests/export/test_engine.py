"""Engines of small models of every family: they compute what the quantized model means, for the sizes that may vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ditq.errors import DitqError
from ditq.export import load_engine, model_agreement, prove_fusion, site_agreement
from ditq.export.onnx_graph import export_what_varies
from ditq.nn import QuantLinear
from tests.export.quantized import engine_of, means_torch, quantize_blocks, relative, shallow_model
from tests.families_small import FAMILIES, forward, small_inputs


def nudged(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs moved by a few units in the last place."""
    torch.manual_seed(1)
    moved = {"hidden_states", "encoder_hidden_states"} & set(inputs)
    return inputs | {name: inputs[name] * (1 + 3e-7 * torch.randn_like(inputs[name])) for name in moved}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_computes_what_the_quantized_model_means(family: str, tmp_path: Path) -> None:
    model = quantize_blocks(shallow_model(family))
    quantized = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    engine = engine_of(model, tmp_path / "engine")
    proof = prove_fusion(engine)
    assert (
        proof.complete and proof.planned == sum(layer.activation.granularity == "token" for layer in quantized) > 5
    ), str(proof)

    # Each layer on the input that the engine itself gave it: 1e-3 leaves room for a rounding that a rotation tipped.
    errors = site_agreement(engine, small_inputs(model))
    assert set(errors) == set(engine.sites)
    assert max(errors.values()) < 1e-3, max(errors, key=lambda site: errors[site])

    transformer, exact = load_engine(tmp_path / "engine", threads=1), load_engine(tmp_path / "engine", target="torch")
    for batch in (1, 3):
        inputs = small_inputs(model, batch, seed=7)
        between = inputs["timestep"] + 0.25  # which schedulers of continuous time ask for
        agreement = model_agreement(engine, {**inputs, "timestep": between})
        assert agreement.holds and agreement.error < 1e-5, str(agreement)
        means_torch(engine, {**inputs, "timestep": between})
        expected = forward(model, inputs)
        # Flipped roundings: the model does as much to itself when its input moves by a rounding error.
        own = max(relative(forward(model, nudged(inputs)), expected), 1e-4)
        assert relative(transformer(**inputs, return_dict=False)[0], expected) < 10 * own
        assert relative(exact(**inputs).sample, expected) < 10 * own


class Decides(nn.Module):
    def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (x if bool((x > 0).all()) else -x,)


class Lists(nn.Module):
    def forward(self, x: torch.Tensor, return_dict: bool = False) -> tuple[list[torch.Tensor]]:
        return (list(x),)


@pytest.mark.parametrize(
    ("model", "says"),
    [(Decides(), "Could not guard on data-dependent"), (Lists(), "its answer is a list, not one tensor")],
)
def test_what_cannot_be_a_graph_is_refused_in_one_line(
    model: nn.Module, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DitqError, match=f"^the model cannot be exported: {says}"):
        export_what_varies(model, {"x": torch.ones(2, 3)}, {})
    assert capfd.readouterr() == ("", "")
