"""On a real GPU, where there is one: products, transforms and whole denoisers against their meaning, tuned and replayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.export.quantized import quantize_blocks, quantized, relative, shallow_model, with_experts
from tests.families_small import FAMILIES, forward, small_graph, small_inputs
from tests.nn.test_token_attention import converted, sized

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")]

from ditq.kernels.answered_attention import KINDS, tell_grids, turns_of  # noqa: E402  triton first
from ditq.kernels.captured import CapturedCalls  # noqa: E402
from ditq.kernels.fast_linear import FastLinear  # noqa: E402
from ditq.kernels.matmul import Product, experts_meaning  # noqa: E402
from ditq.kernels.on_gpu import as_wanted, to_gpu  # noqa: E402
from ditq.kernels.product import computed  # noqa: E402
from ditq.kernels.storage import stack  # noqa: E402
from ditq.kernels.traced import compiled  # noqa: E402
from ditq.nn import ActivationFormat, InputTransform  # noqa: E402
from ditq.nn.structural.compressed_keys import CompressedKeys  # noqa: E402
from ditq.nn.structural.held_tiles import HeldTiles, Turn  # noqa: E402
from ditq.nn.structural.linear_attention import LinearAttention  # noqa: E402
from ditq.nn.structural.local_attention import LocalAttention  # noqa: E402
from ditq.nn.structural.sparse_attention import SparseAttention  # noqa: E402
from ditq.nn.structural.token_attention import token_attentions  # noqa: E402
from ditq.numerics.local_attention import in_blocks  # noqa: E402
from ditq.numerics.rotation import block_hadamard_rotation, hadamard_rotation  # noqa: E402
from ditq.numerics.sparse_attention import sparse_attention, tile_scores, tiles_of  # noqa: E402
from ditq.numerics.token_layout import Grid, TokenLayout  # noqa: E402
from ditq.numerics.window import Window  # noqa: E402
from ditq.passes import Context  # noqa: E402
from ditq.passes.token_order import TokenOrderPass  # noqa: E402

FLOAT = ActivationFormat()


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways are measured, and so compared with the meaning, in every run."""
    monkeypatch.setenv("DITQ_CACHE", str(tmp_path))


@pytest.mark.parametrize("form", ["int8", "FP8"])
def test_linears_of_one_input_are_one_product(form: str) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            activation = ActivationFormat(8, "token", "symmetric" if form == "int8" else "float8_e4m3")
            settings: dict[str, Any] = {"group_size": 64} if form == "int8" else {}
            layers = [quantized(nn.Linear(1152, 1152), "site", activation=activation, **settings) for _ in range(3)]
            for layer in layers:
                assert layer.table is not None
                layer.table = layer.table if form == "int8" else layer.table.float().to(torch.float8_e4m3fn)
            self.q, self.k, self.v = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((self.v(x), self.q(x), self.k(x)), -1)

    torch.manual_seed(0)
    model = Three().requires_grad_(False)
    x = torch.randn(2, 333, 1152)
    expected = model(x)
    found = compiled(to_gpu(model, torch.device("cuda")))(x.cuda().bfloat16())
    assert relative(found.float().cpu(), expected) < 2e-2


@pytest.mark.parametrize("tokens", [1, 77, 1000])
@pytest.mark.parametrize("width", [1152, 4608])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_linears_of_dit_xl(bits: int, width: int, tokens: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(width, 1152)
    x = torch.randn(tokens, width)
    for rotation in (block_hadamard_rotation(width, 64), hadamard_rotation(width)):
        transform = InputTransform(rotations=[(0, width, rotation)])
        settings: dict[str, Any] = {"group_size": 64} if bits < 8 else {}
        layer = quantized(linear, "site", bits=bits, transform=transform, **settings).requires_grad_(False)
        expected = layer(x)
        found = FastLinear(layer.cuda())(x.cuda().bfloat16())
        assert relative(found.float().cpu(), expected) < 2e-2
    layer = quantized(linear, "site", bits=bits, activation=FLOAT).requires_grad_(False)
    expected = layer(x)
    assert relative(FastLinear(layer.cuda())(x.cuda().bfloat16()).float().cpu(), expected) < 1e-2


@pytest.mark.parametrize("slots", [1, 77, 960])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_products_of_experts_of_flux(bits: int, slots: int) -> None:
    """Five experts of 768 x 3072, each way of every tile measured and so compared; some slots are not used."""
    generator = torch.Generator().manual_seed(bits + slots)
    layers = [quantized(nn.Linear(3072, 768), "site", bits=bits).requires_grad_(False).cuda() for _ in range(5)]
    stored = stack([FastLinear(layer).stored for layer in layers])
    x = torch.randint(-127, 128, (1000, 3072), generator=generator).to(torch.int8).cuda()
    chosen = torch.randint(-1, 1000, (10, slots), generator=generator, dtype=torch.int32).cuda()
    chosen[3] = -1
    bias = torch.cat([layer.bias for layer in layers if layer.bias is not None])
    product = Product(x, torch.rand(1000, device="cuda"), stored, bias, chosen=chosen, experts=5)
    assert relative(computed(product, torch.float32).double(), experts_meaning(product)) < 1e-5
    half = Product(x.bfloat16(), None, stored, bias, chosen=chosen, experts=5)
    assert relative(computed(half, torch.float32).double(), experts_meaning(half)) < 1e-2


@pytest.mark.parametrize("family", [*FAMILIES, "flux decoded", "flux of experts", "dit of experts"])
def test_denoisers_compiled_and_replayed_compute_their_meaning(family: str) -> None:
    family, _, form = family.partition(" ")
    experts = form == "of experts"
    if experts:
        model = with_experts(family, {"flux": "token", "dit": "expert"}[family])
    else:
        model = quantize_blocks(shallow_model(family))
    device = torch.device("cuda")
    examples = [small_inputs(model, batch=batch, seed=seed) for batch, seed in ((2, 0), (2, 1), (1, 2))]
    expected = [forward(model, inputs) for inputs in examples]
    plain = [{k: v for k, v in inputs.items() if not isinstance(v, torch.Tensor)} for inputs in examples]
    call = compiled(to_gpu(model, device, decoded=form == "decoded"))

    def run(tensors: Any) -> torch.Tensor:
        wanted = {name: as_wanted(name, tensor) for name, tensor in tensors.items()}
        return call(**wanted, **plain[0], return_dict=False)[0]

    captured = CapturedCalls(run)
    with torch.no_grad():
        for _ in range(2):  # the second time nothing is captured anew
            for inputs, meant in zip(examples, expected, strict=True):
                tensors = {name: v.to(device) for name, v in inputs.items() if isinstance(v, torch.Tensor)}
                found = captured(tensors).float().cpu()
                if experts:
                    # The router reads bfloat16, so a token whose scores nearly tie may get another expert than in float32:
                    # its answer is then another one, right as well. Few tokens are that near to a tie.
                    assert _typical(found, meant) < 0.05 and relative(found, meant) < 0.15
                else:
                    assert relative(found, meant) < 0.05
    assert len(captured.captured) == 2


def _typical(found: torch.Tensor, meant: torch.Tensor) -> float:
    """The median over tokens [B, T, C], or places of a picture [B, C, H, W], of ||difference|| to the tokens' usual norm."""
    axis = 1 if meant.dim() == 4 else 2
    usual = meant.norm(dim=axis).square().mean().sqrt()
    return float(((found - meant).norm(dim=axis) / usual).median())


@pytest.mark.parametrize("settings", [{"window": Window("circle", 2, 2)}, {"window": Window("tiles", 1, 2), "pool": 2}])
@pytest.mark.parametrize("kind", [LocalAttention, LinearAttention])
@pytest.mark.parametrize("ordered", [False, True], ids=["row by row", "tile by tile"])
def test_windows_and_linear_attention_compute_their_meaning(ordered: bool, kind: Any, settings: dict[str, Any]) -> None:
    """Two pictures of the same number of tokens and other sides: recorded for each, one after the other, and again."""
    if kind is LinearAttention:
        settings = {"features": "softmax", "window": None if "pool" in settings else settings["window"]}
    graph = small_graph("flux")
    converted(graph, kind, **settings)
    if ordered:
        TokenOrderPass(tile=2).run(graph, Context())
    model = quantize_blocks(graph.model)
    pictures = [sized(model, *sides) for sides in ((3, 8), (8, 3))]
    expected = [forward(model, inputs) for inputs in pictures]
    fast = to_gpu(model, torch.device("cuda"))
    call = compiled(fast)
    plain = {name: v for name, v in pictures[0].items() if not isinstance(v, torch.Tensor)}

    def run(tensors: Any) -> torch.Tensor:
        wanted = {name: as_wanted(name, tensor) for name, tensor in tensors.items()}
        return call(**wanted, **plain, return_dict=False)[0]

    captured = CapturedCalls(run)
    with torch.no_grad():
        for _ in range(2):
            for inputs, meant in zip(pictures, expected, strict=True):
                tensors = {name: v.cuda() for name, v in inputs.items() if isinstance(v, torch.Tensor)}
                grids = tell_grids(fast, tensors)
                assert relative(captured(tensors, *grids).float().cpu(), meant) < 0.05
    assert len(captured.captured) == 2


def test_recorded_calls_hold_tiles_from_step_to_step_of_a_picture() -> None:
    """Two calls are recorded, the one that searches tiles and the one that sees them; two pictures replay both."""
    model = quantize_blocks(converted(small_graph("flux"), HeldTiles, tile=2, keep=4, every=2, means=True))
    parts = [part for part in token_attentions(model).values() if isinstance(part, HeldTiles)]
    steps = [{**sized(model, 8, 8), "timestep": torch.full((2,), time)} for time in (0.9, 0.5)]
    expected = []
    for number, inputs in enumerate(steps):
        for part in parts:
            part.turn = Turn(number, "call", number == 0)
        expected.append(forward(model, inputs))
    for part in parts:
        part.turn = None
        part.held.clear()
    fast = to_gpu(model, torch.device("cuda"))
    call, turns = compiled(fast), turns_of(fast)
    plain = {name: v for name, v in steps[0].items() if not isinstance(v, torch.Tensor)}

    def run(tensors: Any) -> torch.Tensor:
        wanted = {name: as_wanted(name, tensor) for name, tensor in tensors.items()}
        return call(**wanted, **plain, return_dict=False)[0]

    captured = CapturedCalls(run)
    with torch.no_grad():
        for _ in range(2):
            for inputs, meant in zip(steps, expected, strict=True):
                tensors = {name: v.cuda() for name, v in inputs.items() if isinstance(v, torch.Tensor)}
                also = (*tell_grids(fast, tensors), turns.tell(tensors))
                assert relative(captured(tensors, *also).float().cpu(), meant) < 0.05
    assert len(captured.captured) == 2


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LocalAttention, {"window": Window("circle", 8, 8)}),
        (LocalAttention, {"window": Window("tiles", 3, 4), "pool": 4}),
        (LinearAttention, {"features": "softmax"}),
        (LinearAttention, {"features": "relu", "window": Window("circle", 4, 4)}),
        (CompressedKeys, {"factor": 2}),
        (SparseAttention, {"tile": 8, "keep": 5, "means": True}),
    ],
)
def test_attentions_of_many_blocks_compute_their_meaning(kind: Any, settings: dict[str, Any]) -> None:
    """Of more than a block of 128 tokens, in two pictures of as many tokens: bfloat16 in and out, and within products."""
    part = kind("site", TokenLayout(), 2, 64, True, 0, **settings).cuda()
    for grid in (Grid(77, 40, 24), Grid(77, 24, 40)):
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (2, 2, grid.text + grid.image, 64)
        given = [torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(3)]
        with torch.no_grad():
            expected = kind.attention(part, *(tensor.float() for tensor in given), grid, 0.125)
            found = KINDS[kind](part)(*given, grid, 0.125)
        assert relative(found.float(), expected) < 1e-2


@pytest.mark.parametrize("tile", [8, 16])
@pytest.mark.parametrize("means", [False, True], ids=["alone", "means"])
def test_tiles_of_large_pictures_compute_their_meaning_without_gathering(tile: int, means: bool) -> None:
    """Chosen at the call, in a picture of which tiles are whole and one of which some reach beyond the edge."""
    part = SparseAttention("site", TokenLayout(), 2, 64, True, 0, tile, 9, None, means).cuda()
    for grid in (Grid(77, 128, 128), Grid(77, 130, 131)):
        generator = torch.Generator("cuda").manual_seed(0)
        shape = (2, 2, grid.text + grid.image, 64)
        given = [torch.randn(shape, generator=generator, device="cuda").bfloat16() for _ in range(3)]
        with torch.no_grad():
            seen = sparse_tiles(*given[:2], grid, tile, 9)
            expected = sparse_attention(*(tensor.float() for tensor in given), grid, 0.125, tile, 9, seen, means)
            found = KINDS[SparseAttention](part)(*given, grid, 0.125)
        assert relative(found.float(), expected) < 1e-2


def sparse_tiles(query: torch.Tensor, key: torch.Tensor, grid: Grid, tile: int, keep: int) -> torch.Tensor:
    """The tiles that are chosen at a call of these."""
    made = tiles_of(tile, *grid.sides)
    queries, keys = (in_blocks(grid.parted(tensor)[0], made.blocks) for tensor in (query, key))
    return tile_scores(queries, keys).topk(keep, sorted=False).indices
