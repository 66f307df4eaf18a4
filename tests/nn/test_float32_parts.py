"""What a model's class in diffusers keeps in float32 stays so, wherever the rest is moved."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from ditq.checkpoint import Checkpoint
from ditq.nn.float32_parts import cast, stays_in_float32
from tests.families_small import forward, small_inputs, small_model

CPU = torch.device("cpu")


def wan() -> nn.Module:
    """With tables and positions whose rounding shows."""
    model, generator = small_model("wan"), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "scale_shift_table" in name or parameter.dim() == 1:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model


def check(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        exact = any(part in ("rope", "time_embedder", "scale_shift_table", "norm2") for part in name.split("."))
        assert exact == stays_in_float32(model, name)
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name


def test_positions_times_and_tables_of_wan_stay_and_its_answers_are_nearer() -> None:
    model, inputs = wan(), small_inputs(small_model("wan"))
    exact = forward(copy.deepcopy(model), inputs)
    halves = {
        key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() and value.dim() > 1 else value
        for key, value in inputs.items()
    }
    moved = cast(copy.deepcopy(model), CPU, torch.bfloat16)
    check(moved)
    rounded = nn.Module.to(copy.deepcopy(model), torch.bfloat16)
    near, far = ((forward(found, halves).float() - exact).norm() for found in (moved, rounded))
    assert near < 0.95 * far


def test_a_checkpoint_is_loaded_so(tmp_path: Path) -> None:
    wan().save_pretrained(tmp_path)  # type: ignore[operator]
    check(Checkpoint.open(str(tmp_path)).load_model(torch.bfloat16))


def test_a_model_that_names_nothing_is_moved_whole() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    assert {tensor.dtype for tensor in cast(model, CPU, torch.bfloat16).parameters()} == {torch.bfloat16}
