"""Denoisers with generated weights for bench_gpu.py: blocks as FLUX, SD3.5 and DiT-XL have them, and a whole FLUX.

What counts for time is there: linears of the real sizes, modulation, norms, those of queries and keys among them, attention
over all tokens, rotary embeddings, gates; each written as diffusers has it in FLUX.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ditq.nn.sliced import FeedForwardForm
from ditq.nn.structural.experts import MixtureOfExperts, divided
from ditq.numerics.token_layout import Grid


@dataclass(frozen=True)
class Shape:
    """Sizes of a model. double: blocks with streams of their own for image and text; single: blocks of one joint stream;
    feed_forwards: alone, with their modulation; experts: that they are divided into, of which a token gets two, beside a
    shared one of a quarter of the width; large: whether it is there for what attention takes."""

    name: str
    width: int
    heads: int
    image: int
    text: int
    double: int
    single: int
    batch: int = 1
    feed_forwards: int = 0
    experts: int = 0
    large: bool = False

    @property
    def grid(self) -> Grid:
        """Of a square picture."""
        side = math.isqrt(self.image)
        return Grid(self.text, side, side)

    def small(self) -> Shape:
        """The same with every part, for a CPU."""
        image, text = 16 if self.large else 3, min(self.text, 2)
        double, single = min(self.double, 1), min(self.single, 1)
        return replace(self, width=64, heads=2, image=image, text=text, batch=1, double=double, single=single)


# 1024 x 1024 pixels make 64 x 64 tokens, 512 x 512 of DiT-XL/2 32 x 32. FLUX.1 reads 512 tokens of text, SD3.5 77 + 256. A step
# of FLUX is 19 times one double and two single blocks, which stand for it where the picture is larger.
SHAPES = {
    "flux-double": Shape("flux-double", 3072, 24, 4096, 512, 1, 0),
    "flux-single": Shape("flux-single", 3072, 24, 4096, 512, 0, 1),
    "sd35-block": Shape("sd35-block", 2432, 38, 4096, 333, 1, 0, batch=2),
    "dit-xl-block": Shape("dit-xl-block", 1152, 16, 1024, 0, 0, 1, batch=2),
    "flux-feed-forward": Shape("flux-feed-forward", 3072, 24, 4608, 0, 0, 0, feed_forwards=1),
    "flux-experts": Shape("flux-experts", 3072, 24, 4608, 0, 0, 0, feed_forwards=1, experts=12),
    "flux": Shape("flux", 3072, 24, 4096, 512, 19, 38),
    "flux-2048": Shape("flux-2048", 3072, 24, 16384, 512, 1, 2, large=True),
    "flux-4096": Shape("flux-4096", 3072, 24, 65536, 512, 1, 2, large=True),
}


class Stream(nn.Module):
    """Modulation, q, k, v, norms of their heads, output and feed-forward of one stream of tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.modulation = nn.Linear(width, 6 * width)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def heads_of(x: Tensor, heads: int) -> Tensor:
    """[B, T, C] -> [B, T, heads, C / heads]."""
    return x.unflatten(-1, (heads, -1))


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs of channels of [B, T, heads, d] by angles given as cos and sin [T, d]."""
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-b, a], dim=-1).flatten(3)
    return (x.float() * cos[None, :, None] + turned.float() * sin[None, :, None]).to(x.dtype)


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6)


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d)) v of [B, T, heads, d] as [B, T, C]; a module, so that something else can stand in its place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class DoubleBlock(nn.Module):
    """Image and text with weights of their own and one attention, as the first blocks of FLUX and those of SD3."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.image, self.text, self.attention = Stream(width, heads), Stream(width, heads), Attention()

    def forward(self, image: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        pieces, joined = [], []
        for stream, x in ((self.text, text), (self.image, image)):
            six = stream.modulation(F.silu(time)).chunk(6, dim=1)
            z = normed(x) * (1 + six[1][:, None]) + six[0][:, None]
            q, k, v = (heads_of(linear(z), self.heads) for linear in (stream.to_q, stream.to_k, stream.to_v))
            joined.append([stream.norm_q(q), stream.norm_k(k), v])
            pieces.append(six)
        q, k, v = (torch.cat(parts, dim=1) for parts in zip(*joined, strict=True))
        mixed = self.attention(rotary(q, cos, sin), rotary(k, cos, sin), v)
        results = []
        for stream, x, six, part in zip(
            (self.text, self.image),
            (text, image),
            pieces,
            mixed.split((text.shape[1], image.shape[1]), dim=1),
            strict=True,
        ):
            x = x + six[2][:, None] * stream.to_out(part)
            z = normed(x) * (1 + six[4][:, None]) + six[3][:, None]
            results.append(x + six[5][:, None] * stream.down(F.gelu(stream.up(z), approximate="tanh")))
        return results[1], results[0]


class SingleBlock(nn.Module):
    """One stream whose attention and feed-forward stand side by side and share their output linear, as FLUX's later blocks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 3 * width)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(width // heads, eps=1e-6) for _ in range(2))
        self.up, self.out = nn.Linear(width, 4 * width), nn.Linear(5 * width, width)
        self.attention = Attention()

    def forward(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(time)).chunk(3, dim=1)
        z = normed(x) * (1 + scale[:, None]) + shift[:, None]
        q, k, v = (heads_of(linear(z), self.heads) for linear in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)
        mixed = self.attention(rotary(q, cos, sin), rotary(k, cos, sin), v)
        both = torch.cat((mixed, F.gelu(self.up(z), approximate="tanh")), dim=2)
        return x + gate[:, None] * self.out(both)


class PlainBlock(nn.Module):
    """One stream, attention before feed-forward, as DiT's blocks."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.stream, self.attention = heads, Stream(width, heads), Attention()

    def forward(self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        stream = self.stream
        six = stream.modulation(F.silu(time)).chunk(6, dim=1)
        z = normed(x) * (1 + six[1][:, None]) + six[0][:, None]
        q, k, v = (heads_of(linear(z), self.heads) for linear in (stream.to_q, stream.to_k, stream.to_v))
        x = x + six[2][:, None] * stream.to_out(self.attention(q, k, v))
        z = normed(x) * (1 + six[4][:, None]) + six[3][:, None]
        return x + six[5][:, None] * stream.down(F.gelu(stream.up(z), approximate="tanh"))


class FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))

    def divided(self, experts: int) -> MixtureOfExperts:
        """As the pass `moe` divides it by default; which channels go where makes no difference to the time."""
        hidden = self.down.in_features
        shared, parts = torch.arange(hidden // 4), torch.arange(hidden // 4, hidden).view(experts, -1)
        form = FeedForwardForm(("up",), "down", hidden)
        return divided(self, form, shared, parts, top=2, capacity=1.25, choice="token")


class FeedForwardBlock(nn.Module):
    """A feed-forward, dense or of experts, between modulation and gate."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(width, 3 * width)
        dense = FeedForward(width)
        self.feed_forward = dense.divided(experts) if experts else dense

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(time)).chunk(3, dim=1)
        return x + gate[:, None] * self.feed_forward(normed(x) * (1 + scale[:, None]) + shift[:, None])


class Denoiser(nn.Module):
    """The blocks of a shape, one after the other. Weights are generated: variance 1 / inputs, so that no value grows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        one_stream = PlainBlock if not shape.text else SingleBlock
        self.doubles = nn.ModuleList(DoubleBlock(shape.width, shape.heads) for _ in range(shape.double))
        self.singles = nn.ModuleList(one_stream(shape.width, shape.heads) for _ in range(shape.single))
        self.feeds = nn.ModuleList(FeedForwardBlock(shape.width, shape.experts) for _ in range(shape.feed_forwards))

    def generate(self, seed: int = 0) -> Denoiser:
        generator = torch.Generator(device=next(self.parameters()).device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                spread = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.02
                parameter.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
        return self.eval().requires_grad_(False)

    def forward(self, image: Tensor, text: Tensor, time: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for block in self.doubles:
            image, text = block(image, text, time, cos, sin)
        x = torch.cat((text, image), dim=1)
        for block in self.singles:
            x = block(x, time, cos, sin)
        for feed in self.feeds:
            x = feed(x, time)
        return x


def inputs_of(shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 1) -> dict[str, Tensor]:
    """Tokens of unit variance with a few channels ten times as large, as real inputs have."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def tokens(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    image, text = tokens(shape.batch, shape.image, shape.width), tokens(shape.batch, shape.text, shape.width)
    large = torch.where(torch.arange(shape.width, device=device) % 97 == 5, 10.0, 1.0)
    angles = torch.outer(
        torch.arange(shape.image + shape.text, device=device).float(),
        10000.0 ** -torch.linspace(0, 1, shape.width // shape.heads // 2, device=device),
    )
    given = {"image": image * large, "text": text * large, "time": tokens(shape.batch, shape.width)}
    both = angles.repeat_interleave(2, 1)  # the two channels of a pair
    return {name: value.to(dtype) for name, value in given.items()} | {"cos": both.cos(), "sin": both.sin()}


def multiply_adds(model: Denoiser) -> tuple[int, int]:
    """(of the linears over tokens, of attention) of one call."""
    shape = model.shape
    joined, linear = shape.batch * (shape.image + shape.text), 0
    slots = {
        f"{name}.experts.": part.slots(shape.image + shape.text)
        for name, part in model.named_modules()
        if isinstance(part, MixtureOfExperts)
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "modulation" not in name:
            tokens = {"image": shape.image, "text": shape.text}
            part = next((tokens[part] for part in tokens if f".{part}." in f".{name}."), shape.image + shape.text)
            part = next((count for place, count in slots.items() if name.startswith(place)), part)
            linear += shape.batch * part * module.weight.numel()
    attention = 2 * joined * (shape.image + shape.text) * shape.width * (len(model.doubles) + len(model.singles))
    return linear, attention
