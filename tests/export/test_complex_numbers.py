"""Models that turn queries and keys by complex numbers are exported in pairs of reals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from ditq.errors import DitqError
from ditq.export import model_agreement, write_engine
from ditq.export.fusion import prove_fusion
from ditq.export.onnx_graph import to_onnx
from ditq.export.session import open_session, session_options
from tests.export.quantized import means_torch, quantize_blocks


def test_an_engine_of_qwen_image_runs_low_bit_and_agrees(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=24, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15 if parameter.dim() > 1 else 0.3)
    model.eval().requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(2, 48, 16),
        "encoder_hidden_states": torch.randn(2, 12, 24),
        "encoder_hidden_states_mask": torch.ones(2, 12, dtype=torch.int64),
        "timestep": torch.tensor([0.2, 0.9]),
        "img_shapes": [[(1, 6, 8)]] * 2,
    }
    quantize_blocks(model)
    axes = {"hidden_states": ("batch", None, None), "encoder_hidden_states": ("batch", "text_tokens", None)}
    axes |= {"encoder_hidden_states_mask": ("batch", "text_tokens"), "timestep": ("batch",)}
    engine = write_engine(
        tmp_path / "engine", model, name="small", config=dict(model.config), class_name=type(model).__name__, family=None,
        fingerprint="0" * 64, recipe={}, inputs=inputs, axes=axes,
    )  # fmt: skip
    assert engine.manifest["dropped_axes"] == ["text_tokens"]  # whose length its forward turns into a number
    assert prove_fusion(engine).complete and model_agreement(engine, inputs).holds
    means_torch(engine, inputs)


class Turned(nn.Module):
    """x [B, N, 8] as complex numbers, by numbers that its forward computes, and what `step` makes of them."""

    def __init__(self, step: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        angles = torch.outer(torch.arange(6.0), 1 / torch.arange(1.0, 5))
        z = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return (torch.view_as_real(self.step(z, torch.polar(torch.ones_like(angles), angles))).flatten(-2),)


def exported(step: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
    graph = to_onnx(Turned(step), {"x": x}, {"x": ("batch", None, None)})
    (found,) = open_session(ir.to_proto(graph).SerializeToString(), session_options(1)).run(None, {"x": x.numpy()})
    return torch.from_numpy(found)


@pytest.mark.parametrize("step", [
    lambda z, turn: z * turn,
    lambda z, turn: z * turn + z,
    lambda z, turn: z * (turn * turn - turn[:1]),
], ids=["product", "sum", "constants of any kind"])  # fmt: skip
def test_products_and_sums_are_what_they_mean(step: Callable[[Tensor, Tensor], Tensor]) -> None:
    x = torch.randn(2, 6, 8)
    torch.testing.assert_close(exported(step, x), Turned(step)(x)[0])


@pytest.mark.parametrize("step", [
    lambda z, turn: torch.cat(((z * turn)[..., 2:], z[..., :2]), -1),
    lambda z, turn: (z * turn).mean(-1, keepdim=True) + z,
    lambda z, turn: z * turn + 1.0,
    lambda z, turn: z / turn,
    lambda z, turn: (z * turn) * 0.5,
    lambda z, turn: z * turn.real,
    lambda z, turn: torch.add(z, turn, alpha=2),
    lambda z, turn: (z * turn).conj().resolve_conj(),
], ids=["cut", "mean", "number added", "quotient", "number", "real factor", "alpha", "conjugate"])  # fmt: skip
def test_what_would_mean_something_else_in_pairs_is_refused_in_one_line(
    step: Callable[[Tensor, Tensor], Tensor],
) -> None:
    with pytest.raises(DitqError, match="the model cannot be exported: complex numbers go through aten") as error:
        exported(step, torch.randn(2, 6, 8))
    assert "\n" not in str(error.value)
