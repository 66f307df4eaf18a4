"""Judging a change of basis before it is made: the quantized output error of a group's linears on sampled rows.

`Trial` is one input with a sample of the weights that read it, in some basis; `Judge` quantizes both as `quantize` will and
says how far each row's output is off. `choose` compares such errors and does not mistake noise for a gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ditq.calibration.input_statistics import InputStatistics
from ditq.formats import NVFP4, BitFormat
from ditq.numerics.activation_format import ActivationFormat
from ditq.numerics.carrier import BLOCK, FLOAT4
from ditq.numerics.codebook import CODEBOOKS, Fit, encode
from ditq.numerics.rotation import Rotation
from ditq.numerics.rounding import round_gptq, round_nearest
from ditq.numerics.uniform import absmax_scale, quantize_per_token

MOST_OUTPUTS = 512  # rows of the weights; a row has its own scale, so that a part of them tells of all
MOST_ROWS = 1024
CERTAIN = 2.0  # standard errors of the mean that a gain must have


@dataclass(frozen=True, eq=False)
class Trial:
    """An input in the basis under trial.

    rows: float32 [n, C]; weight: float32 [O, C], rows of the linears that read it; moment float64 [C, C] = E[x^T x] and mean
    float64 [C] over all calibration rows; constant: float32 [O], what the linears add because of a shift.
    """

    rows: Tensor
    weight: Tensor
    moment: Tensor
    mean: Tensor
    constant: Tensor

    @classmethod
    def of(
        cls,
        statistics: InputStatistics,
        weights: list[Tensor],
        channels: slice = slice(None),
        most_outputs: int = MOST_OUTPUTS,
    ) -> Trial:
        """The input as it is, with an even sample of the rows of its linears' weights [O_i, C]."""
        weight = torch.cat([part.detach()[:, channels].float() for part in weights])
        weight = weight[:: -(-len(weight) // most_outputs)]
        rows = statistics.sample[:, channels].float()
        moment = statistics.hessian()[channels, channels].double()
        return cls(rows, weight, moment, statistics.mean()[channels].double(), torch.zeros(len(weight)))

    def halves(self) -> tuple[Trial, Trial]:
        """(to choose or learn on, held out): every other row, at most `MOST_ROWS` each."""
        parts = (self.rows[::2], self.rows[1::2])
        first, second = (replace(self, rows=part[:: -(-len(part) // MOST_ROWS) or 1]) for part in parts)
        return first, second

    def output(self) -> Tensor:
        """[n, O], unquantized, without the linears' own biases."""
        return self.rows @ self.weight.T + self.constant

    def scaled(self, inverse: Tensor, shift: Tensor) -> Trial:
        """x' = x * inverse - shift with both [C] folded into the weights and the constant."""
        inverse, shift = inverse.double(), shift.double()
        rows = self.rows.double() * inverse - shift
        weight = self.weight.double() / inverse
        moved = torch.outer(self.mean * inverse, shift)
        moment = self.moment * inverse * inverse[:, None] - moved - moved.T + torch.outer(shift, shift)
        constant = self.constant + (weight @ shift).float()
        return Trial(rows.float(), weight.float(), moment, self.mean * inverse - shift, constant)

    def rotated(self, rotation: Rotation | None) -> Trial:
        """x' = x R, W' = W R."""
        if rotation is None:
            return self
        moment = rotation.apply(rotation.apply(self.moment).T)
        weight = rotation.right_multiply(self.weight)
        return replace(
            self, rows=rotation.apply(self.rows), weight=weight, moment=moment, mean=rotation.apply(self.mean)
        )


@dataclass(frozen=True)
class Judge:
    """Quantizes a trial: codebook, rounding and bias correction as `quantize` does them, activations a token.

    nvfp4 has levels and scales of its own; that of the input is of the largest value in the trial.
    """

    format: str
    codebook: str
    rounding: str

    def errors(self, trial: Trial, reference: Tensor) -> Tensor:
        """float64 [n]: squared error of each row's output, over the mean squared output of all rows."""
        fit = self.fit(trial.weight, trial.moment)
        gptq = self.rounding == "gptq"
        code = round_gptq(trial.weight, trial.moment, fit) if gptq else round_nearest(trial.weight, fit)
        weight = code.decode()
        correction = ((trial.weight - weight).double() @ trial.mean).float()
        x = self.rounded(trial.rows)
        difference = (reference - (x @ weight.T + correction + trial.constant)).double()
        return difference.square().sum(1) / reference.double().square().sum(1).mean().clamp_min(1e-300)

    def rounded(self, x: Tensor) -> Tensor:
        """Rows [n, C] as the products see them."""
        bits = BitFormat.parse(self.format).activation
        if self.format == NVFP4:
            form = ActivationFormat(bits, "tensor", "float4_e2m1", group_size=BLOCK)
            return form.rounded(x, form.scale(x.abs().max()))
        if bits == 16:
            return x
        q, step = quantize_per_token(x, bits)
        return q * step

    def fit(self, weight: Tensor, moment: Tensor) -> Fit:
        """The codebook's levels for a weight [O, C] whose input has that second moment [C, C]."""
        if self.format == NVFP4:
            blocks = {"group_size": BLOCK, "carrier": FLOAT4}
            return CODEBOOKS["e2m1"](weight, 4, importance=moment.diagonal().clone(), **blocks)
        bits = BitFormat.parse(self.format).weight
        codebook = "uniform" if bits == 8 else self.codebook
        return CODEBOOKS[codebook](weight, bits, importance=moment.diagonal().clone())


class FakeQuantLoss:
    """Relative output error of a rotated trial, differentiable in the rotation, for learning.

    Rounding passes gradients straight through; an error grows with the range of its token or weight row, and that much is
    differentiated: x_q = x + s (round(x/s) - x/s) with the bracket held fixed. The levels of the weights are fitted anew
    every `refit` calls and scale with the row's range in between.
    """

    def __init__(self, judge: Judge, trial: Trial, refit: int = 10) -> None:
        self.judge, self.trial, self.refit = judge, trial, refit
        self.form = BitFormat.parse(judge.format)
        self.reference = trial.output()
        self.energy = self.reference.square().sum().clamp_min(1e-30)
        self.calls = 0
        self.fitted: tuple[Fit, Tensor] | None = None

    def __call__(self, rotation: Rotation) -> Tensor:
        trial = self.trial
        x, weight = rotation.apply(trial.rows), rotation.apply(trial.weight)
        weight = self._weight(weight, lambda: trial.rotated(rotation).moment)
        return (self.reference - self._input(x) @ weight.T - trial.constant).square().sum() / self.energy

    def held_out_errors(self, trial: Trial, rotation: Rotation) -> Tensor:
        """float64 [n]: what the judge says of the rotation on other rows of the same input."""
        return self.judge.errors(trial.rotated(rotation), trial.output())

    def _input(self, x: Tensor) -> Tensor:
        if self.form.activation == 16:
            return x
        if self.judge.format == NVFP4:
            return x + (self.judge.rounded(x.detach()) - x).detach()
        step = absmax_scale(x.abs().amax(dim=-1, keepdim=True), self.form.activation)
        return x + step * ((x / step).round() - x / step).detach()

    def _weight(self, weight: Tensor, moment: Callable[[], Tensor]) -> Tensor:
        peak = weight.abs().amax(dim=1).clamp_min(1e-30)
        with torch.no_grad():
            plain = weight.contiguous()
            if self.fitted is None or self.calls % self.refit == 0:
                self.fitted = self.judge.fit(plain, moment()), peak.clone()
            self.calls += 1
            fit, before = self.fitted
            rounded = encode(plain, replace(fit, scale=fit.scale * peak / before)).decode()
            relative = (rounded - weight) / peak[:, None]
        return weight + peak[:, None] * relative


def hold_out(statistics: InputStatistics) -> tuple[InputStatistics, Tensor, Tensor]:
    """(the statistics without every other sampled row, the numbers of those rows [n], what each of them stands for [n]).

    The sums of the statistics hold the sampled rows, so those held out are subtracted: what is fitted to the rest is fitted
    to all that calibration saw but them. At most `MOST_ROWS` are held out. A row stands for as many as its bin has rows a
    held-out one, 1 on average. Largest magnitudes and crest factors stay those of all rows.
    """
    places = torch.arange(len(statistics.sample), device=statistics.sample.device)[1::2]
    places = places[:: -(-len(places) // MOST_ROWS) or 1]
    bins = statistics.sample_bin[places]
    moments, totals = statistics.second_moment.clone(), statistics.total.clone()
    held = torch.bincount(bins, minlength=statistics.bins)
    for number in bins.unique().tolist():
        rows = statistics.sample[places[bins == number]].double()
        place = number if statistics.by_bin else 0
        moments[place] = (moments[place].double() - rows.T @ rows).to(moments.dtype)
        totals[number] = (totals[number].double() - rows.sum(0)).to(totals.dtype)
    rest = replace(statistics, count=statistics.count - held, moments=moments, total=totals)
    worth = (statistics.count.double() / held)[bins]
    return rest, places, worth / worth.mean()


def choose(errors: Mapping[str, Tensor], tolerance: float) -> str:
    """The name whose errors [n] are least, going from the first on: a later one must be better than the one held by more than
    `tolerance` of it and by more than `CERTAIN` standard errors of the row-by-row difference.
    """
    names = list(errors)
    held = names[0]
    for name in names[1:]:
        gain = errors[held] - errors[name]
        noise = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else 0.0
        if float(gain.mean()) > max(tolerance * float(errors[held].mean()), CERTAIN * noise):
            held = name
    return held
