"""quantize: code the weights of linears into a few bits and say how their inputs are quantized at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ditq.calibration.input_statistics import InputStatistics
from ditq.errors import DitqError
from ditq.formats import BitFormat
from ditq.graph import DiTGraph
from ditq.nn.call_timestep import tell_at_each_call
from ditq.nn.quant_linear import Branch, QuantLinear
from ditq.nn.transformed_linear import TransformedLinear
from ditq.numerics.activation_noise import for_noisy_inputs, rounding_noise
from ditq.numerics.carrier import CARRIERS, INT8
from ditq.numerics.codebook import CODEBOOKS, Fit, WeightCode
from ditq.numerics.descent import refine
from ditq.numerics.low_rank import code_with_branch
from ditq.numerics.rounding import GptqCode, output_error, round_gptq, round_nearest
from ditq.numerics.scale_search import gptq_with_scale_search
from ditq.passes.activation_formats import (
    GRANULARITIES,
    GRIDS,
    GROUP_SIZE,
    PRODUCTS,
    UNSIGNED,
    ChosenFormat,
    InputFormats,
)
from ditq.passes.base import CPU, Context, Pass, PassReport, register, relative_error, setting
from ditq.passes.choose_codebook import AUTO, TRIED, choose_codebook
from ditq.passes.folding import plain_linear
from ditq.passes.site_settings import BRANCHES, ROUNDINGS, SiteSettings, check_rule, check_site_settings, overrides

STEP_WEIGHTS = ("none", "effect", "share", "softened")
REPORTED = 1024  # rows of a weight that its output error is told of, evenly; each row has a scale of its own


@register
@dataclass(frozen=True)
class Quantize(Pass):
    """Replace linears by QuantLinear.

    `format`, `codebook`, `rounding`, `group_size`, `activation`, `rank`, `branch` hold for the linears of `select`; each rule
    `{select: ..., <settings>}` overrides them for the linears that it selects, a later rule wins, and `keep: true` leaves
    a linear in full precision. Rules may also add linears that `select` leaves out.

    GPTQ (Frantar 2022) rounds column by column on the second moments of the input as it is after smoothing and rotation;
    `refine` then moves codes and scales by coordinate descent (numerics/descent.py). What the rounding still shifts in the
    mean goes into the bias: b += (W - W^) E[x].

    Example:
        - quantize:
            format: w4a8
            codebook: twin_log_shared
            rules:
              - {select: "role:modulation", format: w4a16, codebook: uniform, group_size: 64}
              - {select: "transformer_blocks.0.*", keep: true}
    """

    name: ClassVar[str] = "quantize"
    not_after: ClassVar[tuple[str, ...]] = ("quantize",)
    format: str = setting("w4a8", "bits of weights and activations, w<2-8>a<4-8 or 16>; or nvfp4")
    carrier: str = setting(INT8.name, "numbers that are multiplied: levels are snapped to them", PRODUCTS)
    codebook: str = setting("twin_log_shared", "where the levels of the weights lie", (*CODEBOOKS, AUTO))
    codebooks: list[str] = setting(list(TRIED), "codebook auto: which to choose from; in doubt the first")
    rounding: str = setting("gptq", "how weights are rounded to levels", ROUNDINGS)
    group_size: int = setting(0, "columns that share a scale; 0 is the whole row")
    activation: str = setting(
        "token",
        "one scale a token found at run time, or for each group of its channels; one calibrated, or one a timestep bin",
        GRANULARITIES,
    )
    activation_group: int = setting(GROUP_SIZE, "activation group: channels that share a scale")
    activation_grid: str = setting("symmetric", "levels of the activations: symmetric about 0, or all 2^b codes", GRIDS)
    activation_clip: bool = setting(False, "search for each input how far its range reaches, 1 to 0.5 of the maximum")
    activation_unsigned: str = setting("never", "no codes for what an input does not reach below 0", UNSIGNED)
    rank: int = setting(0, "rank of the low-rank branch beside the codes; 0 is none")
    rank_share: float = setting(0.0, "the rank as a share of a weight's shorter side, instead of rank")
    branch: str = setting("integer", "what the branch reads: the quantized input, or the input in float", BRANCHES)
    bias_correction: bool = setting(True, "put the mean error of the output into the bias")
    damping: float = setting(0.01, "GPTQ: share of the mean diagonal added to it")
    refine: int = setting(0, "sweeps of coordinate descent over codes and scales after GPTQ; 0 for none")
    scale_search: int = setting(0, "scales of each row that are tried by what GPTQ loses; 0 for the codebook's own")
    activation_noise: bool = setting(False, "GPTQ: round the weights that suit inputs with their own rounding error")
    centred: bool = setting(False, "GPTQ: leave out of the Hessian the mean, which the corrected bias takes care of")
    weighted: bool = setting(True, "search scales by output error (diagonal of the second moments), not weight error")
    step_weights: str = setting(
        "none", "what a step's rows count for: all the same, or by what an error there costs in the end", STEP_WEIGHTS
    )
    select: list[str] = setting(["role:token"], "which linears; routers of experts only by a rule")
    rules: list[dict[str, Any]] = setting([], "overrides: {select: pattern or list, settings...}; a later one wins")

    @property
    def requires_statistics(self) -> bool:
        needed = any(
            item.rounding == "gptq" or item.codebook == AUTO or item.needs_statistics() for item in self._asked()
        )
        return needed or self.weighted or self.bias_correction

    def check(self) -> None:
        if self.damping <= 0:
            raise DitqError(f"pass 'quantize': damping is {self.damping}, must be above 0")
        self._check_gptq_settings()
        for rule in self.rules:
            check_rule(rule)
            check_site_settings(replace(self._base(), **overrides(rule)))
        check_site_settings(self._base())
        if list(self.codebooks) != list(TRIED) and all(item.codebook != AUTO for item in self._asked()):
            raise DitqError("pass 'quantize': codebooks is what codebook: auto chooses from; set that or leave it out")
        if self.activation_group != GROUP_SIZE and all(item.activation != "group" for item in self._asked()):
            raise DitqError("pass 'quantize': activation_group is for activation: group; set that or leave it out")
        if self.activation_noise:
            for item in self._asked():
                if item.has_branch and item.branch == "float":
                    raise DitqError(
                        "pass 'quantize': activation_noise counts on one input for codes and branch; "
                        "set branch: integer, or leave activation_noise out"
                    )

    def _check_gptq_settings(self) -> None:
        for key in ("refine", "scale_search"):
            if getattr(self, key) < 0:
                raise DitqError(f"pass 'quantize': {key} is {getattr(self, key)}, must be 0 or more")
        rounded = {self.rounding, *(rule.get("rounding") for rule in self.rules if isinstance(rule, Mapping))}
        for key in ("refine", "scale_search", "activation_noise", "centred"):
            if getattr(self, key) and "gptq" not in rounded:
                raise DitqError(f"pass 'quantize': {key} works on what GPTQ rounds; set rounding: gptq or leave it out")
        if self.step_weights != "none" and not self.requires_statistics:
            raise DitqError(
                "pass 'quantize': step_weights weighs second moments, which nothing here reads; set rounding: gptq "
                "or leave it out"
            )
        if self.centred and not self.bias_correction:
            raise DitqError("pass 'quantize': centred leaves the mean to bias_correction; set that to true as well")

    def _base(self) -> SiteSettings:
        shared = {item.name: getattr(self, item.name) for item in fields(SiteSettings) if item.name != "keep"}
        return SiteSettings(**shared)

    def _asked(self) -> list[SiteSettings]:
        """The settings of the pass, and those of each rule over them."""
        base = self._base()
        return [item.settled() for item in (base, *(replace(base, **overrides(rule)) for rule in self.rules))]

    def plan(self, graph: DiTGraph) -> dict[str, SiteSettings]:
        """What each selected site gets, before anything is done.

        Raises:
            DitqError: a selector that matches nothing, or a group size that does not divide a linear's inputs.
        """
        # Routers choose experts: a rounded score sends a token elsewhere, and they are small.
        plan = {site: self._base() for site in graph.select(self.select) if graph.sites[site].kind != "router"}
        for rule in self.rules:
            for site in graph.select(rule["select"]):
                plan[site] = replace(plan.get(site, self._base()), **overrides(rule))
        sides = {site: (found.out_features, found.in_features) for site, found in graph.sites.items()}
        kept = {site: plan[site] for site in graph.sites if site in plan and not plan[site].keep}
        plan = {site: settings.settled().ranked(*sides[site]) for site, settings in kept.items()}
        for site, settings in plan.items():
            self.check_site(graph, site, settings)
        return plan

    def check_site(self, graph: DiTGraph, site: str, settings: SiteSettings, where: str = "pass 'quantize'") -> None:
        """Raise DitqError for settings that do not fit that linear."""
        width = graph.sites[site].in_features
        settings.check_width(site, width)
        if settings.group_size and width % settings.group_size:
            size = settings.group_size
            raise DitqError(f"{where}: {site}: group_size {size} does not divide its {width} inputs")
        settings.check_model(graph.example_inputs)
        smaller = min(width, graph.sites[site].out_features)
        if settings.rank > smaller:
            raise DitqError(f"{where}: {site}: a rank of {settings.rank} is above its width, {smaller}")

    def ruled(self, graph: DiTGraph) -> set[str]:
        """Sites whose format a rule gives."""
        rules = [rule for rule in self.rules if "format" in rule]
        return {site for rule in rules for site in graph.select(rule["select"])}

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        return {site: " ".join(item.words()) for site, item in self.plan(graph).items()}

    def runtime_cost(self, graph: DiTGraph) -> tuple[int, int]:
        added = 0
        for name, settings in self.plan(graph).items():
            site = graph.sites[name]
            added += site.tokens * settings.rank * (site.in_features + site.out_features)
        return added, added

    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        report = PassReport(self.name, self.settings())
        plan = self.plan(graph)
        formats = InputFormats(graph, plan, context.calibration)
        weights = bits = 0.0
        for site, settings in context.track(self.name, plan.items()):
            layer, row = self.layer_for(graph, context, site, settings, formats)
            graph.replace(site, layer)
            if layer.activation.granularity == "timestep":
                tell_at_each_call(graph.model)
            report.rows.append(row)
            weights += layer.in_features * layer.out_features
            bits += row["bits a weight"] * layer.in_features * layer.out_features
        report.summary = {"linears": len(plan), "weights": int(weights), "bits a weight": bits / max(weights, 1)}
        return report

    def layer_for(
        self, graph: DiTGraph, context: Context, site: str, settings: SiteSettings, formats: InputFormats
    ) -> tuple[QuantLinear, dict[str, Any]]:
        """The layer that would stand at a site with these settings, and the report's row of it; the graph stays as it is."""
        module = graph.linear(site)
        linear = plain_linear(graph, site)
        weight = linear.weight.detach().to(context.device, torch.float32)
        bias: Tensor | None = linear.bias
        form = BitFormat.parse(settings.format)
        statistics = context.statistics(graph.sites[site].group) if self.requires_statistics else None
        chosen = formats.of(site, statistics)
        statistics = None if statistics is None else statistics.to(context.device)
        weights = context.bin_weights(self.step_weights)
        weights = None if weights is None else weights.to(context.device)
        noise = self._noise(statistics, settings, chosen)

        def coded(codebook: str, part: Tensor, seen: InputStatistics | None) -> WeightCode:
            """Rows of the weight, fitted to those statistics."""
            target, used = self._target(part, seen, weights, settings, noise)
            return replace(self._code(target, used, replace(settings, codebook=codebook), form), codebook=codebook)

        def tried(codebook: str, part: Tensor, seen: InputStatistics) -> tuple[WeightCode, Tensor]:
            code = coded(codebook, part, seen)
            return code, self._shift(part, code, seen, weights)

        def make() -> WeightCode:
            codebook = "uniform" if form.weight == 8 else settings.codebook
            if codebook == AUTO:
                assert statistics is not None
                names = settings.codebooks
                codebook = choose_codebook(names, weight, statistics, tried, chosen.rounded, weights, settings.rank)
            return coded(codebook, weight, statistics)

        code = context.cached(site, lambda: make().to(CPU))
        if context.keep_weights:
            context.weights[site] = self._target(weight, statistics, weights, settings, noise)[0].half().cpu()
        there = code.to(context.device)
        decoded = there.decode()
        if self.bias_correction and statistics is not None:
            correction = self._shift(weight, there, statistics, weights).cpu()
            bias = correction if bias is None else bias + correction
        transform = module.transform if isinstance(module, TransformedLinear) else None
        branch: Branch = "float" if settings.branch == "float" else "integer"
        layer = QuantLinear(site, code, bias, chosen.format, chosen.scale, transform, code.codebook, branch)
        if chosen.format.shift:
            layer.fold_shift()
        row = {
            "site": site,
            "format": settings.format,
            "codebook": code.codebook,
            "rounding": settings.rounding,
            "bits a weight": stored_bits(layer) / weight.numel(),
            "weight error": relative_error(weight, decoded),
        }
        if settings.rank:
            row["rank"] = settings.rank
        if isinstance(code, GptqCode) and code.damping > self.damping:
            row["damping raised to"] = code.damping
        row |= chosen.row()
        if statistics is not None:
            every = -(-len(weight) // REPORTED)
            row["output error"] = output_error(weight[::every], decoded[::every], statistics.hessian(weights))
        if noise is not None and statistics is not None:
            row["activation noise"] = float(noise.sum() / statistics.channel_rms.double().square().sum())
        return layer, row

    def _noise(self, statistics: InputStatistics | None, settings: SiteSettings, chosen: ChosenFormat) -> Tensor | None:
        """Of the input's rounding, where the weights are to suit it: float64 [I]."""
        if statistics is None or not self.activation_noise or settings.rounding != "gptq" or settings.bits == 16:
            return None
        return rounding_noise(statistics.sample, chosen.format, chosen.scale_of(statistics.sample_bin))

    def _target(
        self,
        weight: Tensor,
        statistics: InputStatistics | None,
        weights: Tensor | None,
        settings: SiteSettings,
        noise: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """(what is rounded in the weight's place, the second moments [I, I] that say what an error costs)."""
        if statistics is None:
            return weight, None
        hessian = statistics.hessian(weights)
        if self.centred and settings.rounding == "gptq":
            hessian = hessian - torch.outer(statistics.mean(weights), statistics.mean(weights))
        return (weight, hessian) if noise is None else for_noisy_inputs(weight, hessian, noise)

    def _shift(
        self, weight: Tensor, code: WeightCode, statistics: InputStatistics | None, weights: Tensor | None
    ) -> Tensor:
        """What rounding shifts in the mean of each output, for the bias: float32 [O]; 0 without bias_correction."""
        if statistics is None or not self.bias_correction:
            return weight.new_zeros(len(weight))
        return ((weight - code.decode()).double() @ statistics.mean(weights).double()).float()

    def _code(self, weight: Tensor, hessian: Tensor | None, settings: SiteSettings, form: BitFormat) -> WeightCode:
        importance = hessian.diagonal().clamp_min(0) if self.weighted and hessian is not None else None

        def code(part: Tensor) -> WeightCode:
            fit = _fit(part, importance, settings, form)
            if settings.rounding == "nearest" or hessian is None:
                return round_nearest(part, fit)
            if self.scale_search and form.weight < 8:
                fit, found = gptq_with_scale_search(part, hessian, fit, self.scale_search, self.damping)
            else:
                found = round_gptq(part, hessian, fit, damping=self.damping)
            return refine(part, hessian, fit, found, self.refine, self.damping) if self.refine else found

        if not settings.rank:
            return code(weight)
        error = partial(relative_error, weight) if hessian is None else partial(output_error, weight, hessian=hessian)
        return code_with_branch(weight, hessian, settings.rank, code, error)


def _fit(weight: Tensor, importance: Tensor | None, settings: SiteSettings, form: BitFormat) -> Fit:
    """Fit the codebook; 8 bits are uniform whatever the codebook, since the levels are the carrier's own numbers."""
    keywords: dict[str, Any] = {"importance": importance, "carrier": CARRIERS[settings.carrier]}
    if settings.group_size:
        keywords |= {"group_size": settings.group_size, "float_group_scales": form.activation == 16}
    codebook = "uniform" if form.weight == 8 else settings.codebook
    return CODEBOOKS[codebook](weight, form.weight, **keywords)


def stored_bits(layer: QuantLinear) -> int:
    """Bits that the coded weight takes on disk: codes, table, scales, multipliers, branch (not the bias)."""
    coded = (layer.codes, layer.table, layer.scale, layer.multiplier)
    buffers = (*coded, layer.down, layer.up, layer.branch_scale)
    return sum(8 * buffer.numel() * buffer.element_size() for buffer in buffers if buffer is not None)


def quantized_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """Every QuantLinear of the model by its site."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
