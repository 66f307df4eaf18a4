"""On a real GPU, where there is one: FP8 attention by cuDNN, and the kernel in front of it, against their meaning."""

from __future__ import annotations

import pytest
import torch

from tests.export.quantized import quantize_blocks, relative, shallow_model
from tests.families_small import forward, small_inputs

pytest.importorskip("triton")
pytest.importorskip("cudnn", reason="nvidia-cudnn-frontend is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
        reason="no NVIDIA GPU with FP8 attention",
    ),
]

from ditq.kernels import fp8_attention, heads  # noqa: E402  triton first
from ditq.kernels.asked import answering  # noqa: E402
from ditq.kernels.captured import CapturedCalls  # noqa: E402
from ditq.kernels.on_gpu import as_wanted, to_gpu  # noqa: E402
from ditq.kernels.traced import compiled  # noqa: E402
from ditq.nn import attention_rounding  # noqa: E402
from ditq.nn.attention_rounding import AttentionRounding, watched  # noqa: E402
from ditq.numerics.attention_rounding import FLOAT8, PARTS, AttentionFormat  # noqa: E402
from ditq.numerics.carrier import E4M3  # noqa: E402


@pytest.mark.parametrize("size", [(1, 24, 4608, 4608, 128), (2, 3, 77, 13, 32), (1, 5, 1000, 333, 64)], ids=str)
def test_it_is_as_near_to_exact_attention_as_its_meaning(size: tuple[int, ...]) -> None:
    """Not nearer to the meaning: cuDNN rounds probabilities before the largest score is known, and other ones."""
    batch, count, queries, keys, width = size
    generator = torch.Generator("cuda").manual_seed(0)
    given = [torch.randn(batch, count, n, width, device="cuda", generator=generator) for n in (queries, keys, keys)]
    scales = tuple(4 * float(x.abs().max()) / 448 for x in given)  # as if rotated before
    form = AttentionFormat(FLOAT8, PARTS, False, scales)
    part = fp8_attention.FP8Attention(AttentionRounding("site", form), torch.device("cuda"))
    eight = [(x / s).to(E4M3) for x, s in zip(given, scales, strict=True)]
    with answering([part]):
        found = torch.ops.ditq.fp8_attention(*eight, 0, None).float() * scales[2]
    meant = fp8_attention.meaning(part, *eight, width**-0.5).float() * scales[2]
    exact = torch.nn.functional.scaled_dot_product_attention(*given)
    assert relative(found, exact) < 1.1 * relative(meant, exact) < 0.1
    assert relative(found, meant) < 0.06


@pytest.mark.parametrize("float8", [False, True])
def test_heads_of_flux_are_their_meaning(float8: bool) -> None:
    """Queries, keys and values of one product, text before image."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows = [torch.randn(1, n, 3 * 3072, device="cuda", generator=generator).bfloat16() for n in (512, 4096)]
    pieces = [row.chunk(3, -1)[part].unflatten(-1, (24, 128)) for part in range(3) for row in rows]
    weights = [torch.rand(128, device="cuda", generator=generator).bfloat16() + 0.5 for _ in range(4)]
    angles = torch.rand(4608, 64, device="cuda", generator=generator).repeat_interleave(2, 1) * 6
    tables = angles.cos(), angles.sin()
    factors = torch.tensor([20.0, 60.0, 40.0], device="cuda") if float8 else None
    steps = heads.NORM | heads.WEIGHT | heads.ROTARY | (heads.ROTATED if float8 else 0)
    found = torch.ops.ditq.heads(pieces, [2, 2, 2], [steps, steps, 0], weights, [1e-6, 1e-6, 0.0], *tables, factors)
    for number, (y, of_part) in enumerate(zip(found, (steps, steps, 0), strict=True)):
        own = weights[2 * number : 2 * number + 2]
        part = heads.Part(pieces[2 * number : 2 * number + 2], of_part, own, 1e-6)
        meant = heads.heads_meaning(part, *tables, None if factors is None else factors[number])
        assert relative(y.double(), meant) < (0.03 if float8 else 3e-3)


def test_a_denoiser_with_fp8_attention_compiled_and_replayed_computes_its_meaning() -> None:
    model = quantize_blocks(shallow_model("flux"))
    device = torch.device("cuda")
    examples = [small_inputs(model, batch=batch, seed=seed) for batch, seed in ((2, 0), (2, 1))]
    exact = [forward(model, inputs) for inputs in examples]
    sites = [name for name, _ in model.named_modules() if name.endswith(".attn")]
    with watched(model, sites, rotate=True) as found:
        forward(model, examples[0])
    for site, part in found.items():
        form = AttentionFormat(FLOAT8, PARTS, False, part.scales(FLOAT8, 4.0), rotate=True)
        attention_rounding.attach(model.get_submodule(site), site, form)
    meant = [forward(model, inputs) for inputs in examples]
    call = compiled(to_gpu(model, device, 90))
    plain = {k: v for k, v in examples[0].items() if not isinstance(v, torch.Tensor)}

    def run(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        wanted = {name: as_wanted(name, tensor) for name, tensor in tensors.items()}
        made: torch.Tensor = call(**wanted, **plain, return_dict=False)[0]
        return made

    captured = CapturedCalls(run)  # type: ignore[arg-type]
    with torch.no_grad():
        for inputs, wanted, whole in zip(examples, meant, exact, strict=True):
            tensors = {name: v.to(device) for name, v in inputs.items() if isinstance(v, torch.Tensor)}
            y = captured(tensors).float().cpu()
            assert relative(y, whole) < 1.2 * relative(wanted, whole) + 0.03
