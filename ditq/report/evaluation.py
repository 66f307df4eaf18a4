"""What an evaluation found: plain values that go to JSON and back, a summary, and the check against thresholds."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ditq.errors import DitqError
from ditq.report.metrics import psnr_of

FORMAT_VERSION = 1
T = TypeVar("T")


@dataclass(frozen=True)
class PromptResult:
    """One prompt: the engine's picture against the original's, drawn from the same noise.

    `psnr` in dB, `ssim` at most 1 and None for pictures smaller than its window, `mean_squared_error` on the [0, 1] scale,
    `st_lpips` None where not installed,
    `latent_error` = ||z - z'||^2 / ||z||^2 of the last latents, `defects` what is plainly wrong with either picture.
    """

    condition: str | int
    seed: int
    psnr: float
    ssim: float | None
    mean_squared_error: float
    st_lpips: float | None
    latent_error: float
    defects: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """One denoising step: relative errors ||a - b||^2 / ||a||^2, averaged over prompts and guidance branches.

    `forced`: the denoiser's output on the original's inputs at this step; `accumulated`: on the engine's own
    trajectory; `latents`: the latents after the step, on the engine's own trajectory; `effect`: the last latents when the
    engine's error on the original's inputs is made at this step alone, of the first prompt; None where not measured.
    """

    step: int
    timestep: float
    forced: float
    accumulated: float
    latents: float
    effect: float | None = None


@dataclass(frozen=True)
class SiteResult:
    """One linear: signal-to-noise ratio of its output in dB, both models run side by side on the same calls.

    `sqnr_db` holds what the layers before it added as well; `local_db` is the layer alone on the original's input, None
    where that input's basis was changed (a scale or rotation folded upstream) so that it cannot be fed to it.
    `aligned`: a pass has written the output in another basis, which was fitted and taken out first (alignment.py).
    """

    site: str
    format: str
    kind: str
    parameters: int
    sqnr_db: float
    local_db: float | None = None
    aligned: bool = False


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins over [-absmax, absmax]."""

    absmax: float
    rms: float
    counts: list[int]


@dataclass(frozen=True)
class SiteHistograms:
    """Weights and inputs of one linear: in the original, and as they are when the engine quantizes them."""

    site: str
    weight_before: Histogram
    weight_after: Histogram
    input_before: Histogram
    input_after: Histogram


@dataclass(frozen=True)
class Metric:
    """A number of the summary that a threshold may be set on."""

    label: str
    higher_is_better: bool


METRICS: dict[str, Metric] = {
    "psnr": Metric("mean image PSNR, dB", True),
    "psnr_worst": Metric("worst image PSNR, dB", True),
    "psnr_of_mean_error": Metric("PSNR of the mean squared error, dB", True),
    "ssim": Metric("mean SSIM", True),
    "ssim_worst": Metric("worst SSIM", True),
    "st_lpips": Metric("mean ST-LPIPS", False),
    "lite0_fd": Metric("lite0-FD of all pictures to the original's", False),
    "latent_error": Metric("mean relative error of the last latents", False),
    "step_error": Metric("mean relative error of the denoiser on its own trajectory", False),
    "forced_error": Metric("mean relative error of the denoiser on the original's inputs", False),
    "sqnr_worst": Metric("SQNR of the worst layer, dB", True),
    "sqnr": Metric("mean SQNR of the layers, dB", True),
}


@dataclass
class Evaluation:
    """Everything that `evaluate` measured. `pictures`: (original, engine) for each prompt, not part of the JSON."""

    checkpoint: str
    engine: str
    arguments: dict[str, Any]
    seed: int
    prompts: list[PromptResult]
    steps: list[StepResult]
    sites: list[SiteResult] = field(default_factory=list)
    histograms: list[SiteHistograms] = field(default_factory=list)
    lite0_fd: float | None = None
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    pictures: list[Any] = field(default_factory=list, compare=False, repr=False)

    @property
    def summary(self) -> dict[str, float | None]:
        """The numbers of METRICS by name; None for one that was not measured.

        `psnr` is the mean of the per-image PSNR over the pictures that differ at all (identical ones have no finite
        PSNR), infinite when all are identical.
        """
        finite = [result.psnr for result in self.prompts if math.isfinite(result.psnr)]
        distances = [result.st_lpips for result in self.prompts if result.st_lpips is not None]
        similarities = [result.ssim for result in self.prompts if result.ssim is not None]
        ratios = [result.sqnr_db for result in self.sites]
        finite_ratios = [ratio for ratio in ratios if math.isfinite(ratio)]
        return {
            "psnr": _mean(finite) if finite else (math.inf if self.prompts else None),
            "psnr_worst": min((result.psnr for result in self.prompts), default=None),
            "psnr_of_mean_error": (
                psnr_of(sum(result.mean_squared_error for result in self.prompts) / len(self.prompts))
                if self.prompts
                else None
            ),
            "ssim": _mean(similarities),
            "ssim_worst": min(similarities, default=None),
            "st_lpips": _mean(distances),
            "lite0_fd": self.lite0_fd,
            "latent_error": _mean([result.latent_error for result in self.prompts]),
            "step_error": _mean([result.accumulated for result in self.steps]),
            "forced_error": _mean([result.forced for result in self.steps]),
            "sqnr_worst": min(ratios, default=None),
            "sqnr": _mean(finite_ratios) if finite_ratios else (math.inf if ratios else None),
        }

    @property
    def defects(self) -> list[str]:
        """One line for each picture that is plainly wrong."""
        return [f"{result.condition!r}: {defect}" for result in self.prompts for defect in result.defects]

    def fail_below(self, thresholds: Mapping[str, float]) -> list[str]:
        """One line for each threshold that is not met; a number that was not measured does not meet any.

        Distances and errors (st_lpips, latent_error, ...) fail above their threshold, the others below it.
        """
        summary = self.summary
        lines = []
        for name, limit in thresholds.items():
            metric, value = METRICS[_known(name)], summary[name]
            if value is None:
                lines.append(f"{name} was not measured (threshold {limit:g}): {metric.label}")
            elif math.isnan(value) or (value < limit if metric.higher_is_better else value > limit):
                side = "below" if metric.higher_is_better else "above"
                lines.append(f"{name} is {value:.4g}, {side} {limit:g}: {metric.label}")
        return lines

    def to_json(self) -> str:
        """JSON text; infinities are written as the strings "inf" and "-inf", and not-a-number as "nan"."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "pictures"}
        return json.dumps(plain({**values, "summary": self.summary}), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The evaluation that `to_json` wrote. Raises DitqError for text that is not one."""
        try:
            values = json.loads(text)
            if values.get("format_version") != FORMAT_VERSION:
                raise DitqError(f"evaluation: format version {values.get('format_version')!r}, not {FORMAT_VERSION}")
            values.pop("summary", None)
            return _build(cls, values)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise DitqError(f"evaluation: not what 'ditq evaluate' writes: {error}; measure again") from error


def parse_thresholds(text: str) -> dict[str, float]:
    """ "psnr=22,ssim=0.9" -> {"psnr": 22.0, "ssim": 0.9}. Raises DitqError for an unknown name or a wrong number."""
    thresholds = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise DitqError(f"threshold '{part.strip()}' is not of the form name=number, e.g. psnr=22")
        try:
            thresholds[_known(name)] = float(value)
        except ValueError as error:
            raise DitqError(f"threshold '{part.strip()}': '{value}' is not a number") from error
        if math.isnan(thresholds[name]):
            raise DitqError(f"threshold '{part.strip()}': '{value}' is not a number")
    return thresholds


def _known(name: str) -> str:
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(METRICS)}"
        raise DitqError(f"no metric is called '{name}'; {hint}")
    return name


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as what JSON holds, floats that are not finite as strings."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _build(kind: Any, value: Any) -> Any:
    """`value` read from JSON as the type `kind`: a dataclass, a list, a mapping, a plain type or a union of those."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if origin is list:
        if not isinstance(value, list):
            raise TypeError(f"a list is expected, not {value!r:.40}")
        return [_build(arguments[0], item) for item in value]
    if origin is dict:
        return {key: _build(arguments[1], item) for key, item in value.items()}
    allowed = arguments if origin in (Union, UnionType) else (kind,)
    if float in allowed and not isinstance(value, bool) and (isinstance(value, int) or value in ("inf", "-inf", "nan")):
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise TypeError(f"{kind} is expected, not {value!r:.40}")
    return value
