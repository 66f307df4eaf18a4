"""LRQ-DiT (Yang et al., arXiv 2508.03485) as published: smoothing, adaptive rotation, twin-log quantization of weights.

    m = max|w|^a / max|x|^(1-a),  x' = x m R,  W' = (W / m) R,  a = 0.5, for each linear
    L = log2(|w| + eta) of each sign;  q = round(L / d) - z,  d = (L_pct - min L) / 2^(b-1),  z = round(min L / d)
    w^ = +-(2^((q + z) d) - eta);  eta and the percentiles of both signs by the error of the whole tensor

Inputs of an RMS below 1 get a Hadamard rotation, others the two-step rotation found on sampled inputs. The published
code's twin-log is kept as it is: zeros in the places of the other sign count in the range, positive codes stop one
step early, negative ones are one more (2^b + 1 codes in all, counted as log2 of that). Mended only: rows without one
of the signs, where the code divides 0 by 0. ditq's `twin_log` is what it becomes with the defects removed
(docs/how-it-works.md). The authors leave FLUX's feed-forwards in full precision; here every token linear is
quantized, as for all peers.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from ditq.numerics.rotation import hadamard_rotation, outlier_rotation
from tools.peers.bench import Bench
from tools.peers.layers import PeerLinear, chain, per_token, scaled, smoothing
from tools.peers.methods.duquant import rotation_bits
from tools.peers.row import Outcome, add

ETAS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
PERCENTILES = (0.98, 0.99, 0.999, 0.9999, 0.99999)
THRESHOLD = 1.0  # of the RMS


def apply(bench: Bench, bits: int, activation: int) -> Outcome:
    stored, online, salient = {}, {}, 0
    for inputs, linears in bench.groups():
        statistics = bench.inputs(inputs)
        for site, linear in zip(inputs.sites, linears, strict=True):
            scale = smoothing(statistics.absmax_all, linear.weight.abs().amax(0), 0.5)
            online[site] = 16.0 * inputs.width  # q, k and v have scales of their own, so none folds into the modulation
            if statistics.rms() < THRESHOLD:
                rotation = hadamard_rotation(inputs.width)
            else:
                rotation = outlier_rotation(statistics.sample / scale, permutation="stride")
                online[site] += rotation_bits(rotation)
                salient += 1
            weight = rotation.right_multiply(linear.weight.float() * scale)
            rounded = twin_log(weight, bits)
            stored[site] = weight.numel() * math.log2(2**bits + 1) + 4 * 16 * linear.out_features + 16
            before = chain(scaled(1 / scale), rotation.apply)
            bench.graph.replace(site, PeerLinear(rounded, linear.bias, per_token(activation), before))
    note = f"{salient} of {len(stored)} linears have an input of an RMS above {THRESHOLD:g}"
    return Outcome(bench.graph.model, stored, online, note)


def twin_log(weight: Tensor, bits: int) -> Tensor:
    """weight [O, I] -> its levels, float32. The error of a sign depends on that sign's percentile alone."""
    best, least = torch.zeros_like(weight), float("inf")
    for eta in ETAS:
        total, found = 0.0, torch.zeros_like(weight)
        for sign, top in ((1, 2 ** (bits - 1) - 1), (-1, 2 ** (bits - 1))):
            side, error = _one_sign(weight, eta, sign, bits, top)
            total += error
            found = found + side
        if total < least:
            best, least = found, total
    return best


def _one_sign(weight: Tensor, eta: float, sign: int, bits: int, top: int) -> tuple[Tensor, float]:
    mask = weight * sign > 0
    logs = torch.where(mask, (weight.abs() + eta).log2(), 0.0)
    low = logs.amin(1, keepdim=True)
    ordered = logs.sort(1).values
    best, least = torch.zeros_like(weight), float("inf")
    for percentile in PERCENTILES:
        place = round(percentile * (logs.shape[1] - 1))
        step = (ordered[:, place : place + 1] - low) / 2 ** (bits - 1)
        step = torch.where(step.abs() < 1e-8, 1.0, step)
        zero = (low / step).round()
        q = ((logs / step).round() - zero).clamp(0, top)
        values = torch.where(mask, sign * (2 ** ((q + zero) * step) - eta), 0.0)
        error = float(torch.where(mask, values - weight, 0.0).square().sum())
        if error < least:
            best, least = values, error
    return best, least


for _bits, _activation in ((4, 8), (4, 4), (3, 8), (3, 6)):
    add(f"LRQ-DiT as published w{_bits}a{_activation}", "LRQ-DiT", _activation,
        partial(apply, bits=_bits, activation=_activation))  # fmt: skip
