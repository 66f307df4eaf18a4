"""How `quantize` chooses the format of each input: what a recipe says of it, checked, and what is calibrated of it.

Linears that read one input and ask for the same get the same format, so that the input is quantized once for all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor

from ditq.calibration.input_statistics import InputStatistics
from ditq.errors import DitqError
from ditq.formats import NVFP4, BitFormat
from ditq.graph import DiTGraph
from ditq.nn.call_timestep import ARGUMENT
from ditq.numerics.activation_clip import best_clip, column_energy, input_error
from ditq.numerics.activation_format import FLOAT, MIDRISE_BITS, ActivationFormat, Granularity, Grid
from ditq.numerics.carrier import BLOCK, FLOAT4, FLOAT8, INT8
from ditq.numerics.timestep_bins import bin_edges
from ditq.passes.folding import plain_linear
from ditq.suggest import unknown_key

GRANULARITIES = ("token", "group", "tensor", "timestep")
DYNAMIC = ("token", "group")  # scales that are found at run time
GROUP_SIZE = 64
GRIDS = ("symmetric", "midrise")
FLOAT_GRIDS = (FLOAT8.name, FLOAT4.name)  # which go with the carriers of their names
PRODUCTS = (INT8.name, FLOAT8.name)  # carriers that a recipe may ask for; FP4 goes with the format nvfp4
UNSIGNED = ("never", "auto", "always")
UNSIGNED_GAIN = 0.05  # share of the error that `auto` wants to win: below it, another sample might say the opposite


@dataclass(frozen=True)
class ActivationSettings:
    """What a recipe says of the input of one linear; the fields of a rule override those of the pass."""

    format: str = "w4a8"
    carrier: str = INT8.name
    activation: str = "token"
    activation_group: int = GROUP_SIZE
    activation_grid: str = "symmetric"
    activation_clip: bool = False
    activation_unsigned: str = "never"

    def check_model(self, arguments: Collection[str]) -> None:
        """Raise DitqError for settings that a model with these arguments cannot have."""
        if self.activation == "timestep" and self.bits < 16 and ARGUMENT not in arguments:
            raise DitqError(
                f"pass 'quantize': activation timestep needs a model with an argument called {ARGUMENT}; "
                "set activation: token"
            )

    @property
    def bits(self) -> int:
        return BitFormat.parse(self.format).activation

    @property
    def input_group(self) -> int:
        """Channels of a token that share a scale found at run time; 0 where there are no groups."""
        if self.carrier == FLOAT4.name:
            return BLOCK
        return self.activation_group if self.activation == "group" else 0

    def asked(self) -> tuple[Any, ...]:
        """What two linears of one input must have in common to share its format."""
        values = [getattr(self, item.name) for item in fields(ActivationSettings) if item.name != "format"]
        return (self.bits, *values)

    def needs_statistics(self) -> bool:
        return self.bits < 16 and (
            self.activation not in DYNAMIC or self.activation_clip or self.activation_unsigned != "never"
        )

    def activation_words(self) -> list[str]:
        """What is not as usual, for `ditq inspect`."""
        usual = ActivationSettings()
        if self.format == NVFP4:
            return []
        keys = ("activation", "activation_grid", "activation_unsigned")
        changed = [key for key in keys if getattr(self, key) != getattr(usual, key)]
        clipped = ["clipped"] if self.activation_clip else []
        named = {"activation_unsigned": f"unsigned {self.activation_unsigned}"}
        if self.activation == "group":
            named["activation"] = f"a scale for {self.activation_group} channels"
        return [] if self.bits == 16 else [named.get(key, getattr(self, key)) for key in changed] + clipped

    def check_width(self, site: str, width: int) -> None:
        """Raise DitqError where the groups of channels do not divide the width of a site's input."""
        if self.format == NVFP4 and width % BLOCK:
            raise DitqError(
                f"pass 'quantize': {site}: nvfp4 has blocks of {BLOCK}, which do not divide its {width} inputs; "
                "give it another format by a rule"
            )
        if self.activation == "group" and self.bits < 16 and width % self.activation_group:
            raise DitqError(
                f"pass 'quantize': {site}: activation_group {self.activation_group} does not divide its {width} inputs"
            )

    def check(self) -> None:
        """Raise DitqError for settings that are unknown or do not fit each other."""
        for key, known in (
            ("carrier", PRODUCTS),
            ("activation", GRANULARITIES),
            ("activation_grid", GRIDS),
            ("activation_unsigned", UNSIGNED),
        ):
            if getattr(self, key) not in known:
                raise DitqError(unknown_key(f"pass 'quantize': {key}", getattr(self, key), list(known)))
        if self.format == NVFP4:
            self._check_nvfp4()
        if self.carrier == FLOAT8.name:
            self._check_float8()
        if self.activation_group < 1:
            raise DitqError(f"pass 'quantize': activation_group is {self.activation_group}, must be 1 or more")
        if self.activation_unsigned != "never" and self.activation != "token":
            raise DitqError(
                f"pass 'quantize': activation_unsigned {self.activation_unsigned} needs a scale a token; "
                f"set activation: token, or activation_unsigned: never"
            )
        if self.activation_grid == "midrise" and MIDRISE_BITS < self.bits < 16:
            raise DitqError(
                f"pass 'quantize': activation_grid midrise takes at most {MIDRISE_BITS} bits of activations, "
                f"{self.format} has {self.bits}; leave it symmetric"
            )

    def _check_nvfp4(self) -> None:
        usual = ActivationSettings()
        for key in ("carrier", "activation", "activation_grid", "activation_clip", "activation_unsigned"):
            if getattr(self, key) != getattr(usual, key):
                value = getattr(usual, key)
                plain = str(value).lower() if isinstance(value, bool) else value
                raise DitqError(
                    f"pass 'quantize': nvfp4 has numbers and scales of its own; leave {key} out, or set {key}: {plain}"
                )

    def _check_float8(self) -> None:
        if self.bits not in (8, 16):
            raise DitqError(
                f"pass 'quantize': carrier {self.carrier} multiplies inputs of 8 bits, or of 16 as they are, "
                f"{self.format} has {self.bits}; set carrier: {INT8.name}"
            )
        for key in ("activation_grid", "activation_unsigned"):
            if self.bits == 8 and getattr(self, key) != getattr(ActivationSettings(), key):
                raise DitqError(
                    f"pass 'quantize': carrier {self.carrier} has one grid for inputs, FP8; leave {key} out, "
                    f"or set carrier: {INT8.name}"
                )


@dataclass(frozen=True, eq=False)
class ChosenFormat:
    """The format of an input, the calibrated scale where it is not found at run time, and what quantizing loses of it.

    bins: where there is a scale for each bin of timesteps, the statistics' bins that they are of.
    """

    format: ActivationFormat = FLOAT
    scale: Tensor | None = None
    error: float | None = None
    bins: tuple[int, ...] = ()

    def scale_of(self, row_bins: Tensor) -> Tensor | None:
        """The calibrated scale for rows of these bins [N]: [N, 1] where each bin has its own, else the one there is."""
        if self.scale is None:
            return None
        scale = self.scale.to(row_bins.device)
        if not self.bins:
            return scale
        return scale[torch.searchsorted(torch.tensor(self.bins, device=row_bins.device), row_bins)][:, None]

    def rounded(self, rows: Tensor, row_bins: Tensor) -> Tensor:
        """Rows [N, I] of these bins [N] as the layer's products see them, unsigned ones without their shift."""
        return rows if self.format.granularity == "none" else self.format.rounded(rows, self.scale_of(row_bins))

    def row(self) -> dict[str, Any]:
        """For the pass report."""
        if self.format.granularity == "none":
            return {}
        found: dict[str, Any] = {}
        if self.format.grid != "symmetric":
            found["grid"] = self.format.grid
        if self.format.grid == "unsigned":
            found["shift"] = self.format.shift
        if self.format.clip != 1:
            found["clip"] = self.format.clip
        return found if self.error is None else {**found, "input error": self.error}


class InputFormats:
    """The formats of the inputs of planned linears, each chosen once, when the first of its linears is quantized."""

    def __init__(
        self, graph: DiTGraph, plan: Mapping[str, ActivationSettings], calibration: Mapping[str, Any] | None = None
    ) -> None:
        """calibration: where the statistics come from (`Context.calibration`)."""
        self.graph, self.plan, self.calibration = graph, plan, calibration or {}
        self.chosen: dict[tuple[Any, ...], ChosenFormat] = {}

    def of(self, site: str, statistics: InputStatistics | None) -> ChosenFormat:
        """The format of the input of `site`; its linears must not have been quantized yet."""
        settings, group = self.plan[site], self.graph.sites[site].group
        if settings.bits == 16:
            return ChosenFormat()
        key = (group, *settings.asked())
        if key not in self.chosen:
            alike = [
                other
                for other, asked in self.plan.items()
                if self.graph.sites[other].group == group and asked.asked() == settings.asked()
            ]
            self.chosen[key] = self._choose(settings, alike, statistics)
        return self.chosen[key]

    def _choose(
        self, settings: ActivationSettings, sites: list[str], statistics: InputStatistics | None
    ) -> ChosenFormat:
        form = ActivationFormat(
            settings.bits,
            cast(Granularity, settings.activation),
            cast(Grid, settings.carrier if settings.carrier in FLOAT_GRIDS else settings.activation_grid),
            group_size=settings.input_group,
        )
        if statistics is None:
            return ChosenFormat(form)
        energy = column_energy([plain_linear(self.graph, site).weight.detach() for site in sites])
        largest: Tensor | None = None  # that the calibrated scales cover
        absmax: Tensor | None = None  # the same for each sampled row
        bins, edges = self._timestep_bins(statistics) if settings.activation == "timestep" else ([], ())
        if edges:
            form, largest = replace(form, edges=edges), statistics.absmax[bins].amax(1)
            # A bin in which the linear does not run was not seen and will not be asked for.
            largest = torch.where(statistics.count[bins] > 0, largest, statistics.absmax_all.max())
            absmax = largest[torch.searchsorted(torch.tensor(bins), statistics.sample_bin)][:, None]
        elif settings.activation not in DYNAMIC:  # also where all steps are in one bin
            form, largest = replace(form, granularity="tensor"), statistics.absmax_all.max()
            absmax = largest
        if settings.activation_unsigned != "never":
            form = self._unsigned(form, settings, statistics.sample, energy)
        elif settings.activation_clip:
            form = best_clip(statistics.sample, form, energy, absmax)
        scale = None if largest is None else form.scale(largest).float()
        error = input_error(statistics.sample, form, energy, absmax)
        return ChosenFormat(form, scale, error, tuple(bins) if edges else ())

    def _unsigned(
        self, signed: ActivationFormat, settings: ActivationSettings, rows: Tensor, energy: Tensor
    ) -> ActivationFormat:
        """The format without codes for what lies below the smallest sampled value, where asked or where it loses less."""
        unsigned = replace(signed, grid="unsigned", shift=max(0.0, -float(rows.min())))
        if settings.activation_clip:
            signed, unsigned = (best_clip(rows, form, energy) for form in (signed, unsigned))
        if settings.activation_unsigned == "always":
            return unsigned
        errors = [input_error(rows, form, energy) for form in (signed, unsigned)]
        return unsigned if errors[1] < (1 - UNSIGNED_GAIN) * errors[0] else signed

    def _timestep_bins(self, statistics: InputStatistics) -> tuple[list[int], tuple[float, ...]]:
        timesteps = self.calibration.get("timestep_arguments")
        if not timesteps:
            raise DitqError(
                "pass 'quantize': activation timestep needs the timestep of each step, of which these statistics lack some "
                "(another denoiser may draw them, as in Wan 2.2); set activation: token"
            )
        try:
            return bin_edges(timesteps, statistics.bins)
        except ValueError as error:
            raise DitqError(f"pass 'quantize': activation timestep: {error}; set activation: token") from error
