"""What a pass is: frozen settings, one `run`, a report. And what passes share while a graph is being compiled."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import TRAJECTORIES, Statistics
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.nn.input_transform import InputTransform, RotatedRange
from ditq.numerics.weight_code import WeightCode
from ditq.parts import Work
from ditq.progress import ProgressSetting, progress_bar

Item = TypeVar("Item")
CPU = torch.device("cpu")


def setting(
    default: Any,
    help: str,
    choices: tuple[Any, ...] | None = None,
    words: tuple[str, ...] = (),
    otherwise: Any = None,
    only: tuple[str, tuple[Any, ...] | None] | None = None,
) -> Any:
    """A dataclass field of a pass: its default, what it means, the values it may take if only some, and words that may stand
    in place of a value of the default's type, or of the type of `otherwise` where the default is a word itself.

    only: it has an effect with these values of another setting alone, or with None where that is above 0.
    """
    metadata = {"help": help, "choices": choices, "words": words, "otherwise": otherwise, "only": only}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class InputChange:
    """How the input of a group differs by now from the original model's: x' = (x * inverse_scale - shift) R.

    `online` is the part of it that the group's layers must compute themselves; the rest was folded into what comes before.
    """

    inverse_scale: Tensor | None = None
    shift: Tensor | None = None
    rotations: list[RotatedRange] = field(default_factory=list)
    online: list[RotatedRange] = field(default_factory=list)

    def transform(self) -> InputTransform:
        return InputTransform(rotations=self.online)


@dataclass
class PassReport:
    """What a pass did: one row a site or group, and figures over all."""

    name: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"pass": self.name, "settings": self.settings, "rows": self.rows, "summary": self.summary}


class SiteCache(Protocol):
    """Keeps the codes of finished sites on disk, so that an interrupted compile resumes where it stopped."""

    def get(self, site: str) -> WeightCode | None: ...

    def put(self, site: str, code: WeightCode) -> WeightCode: ...

    def get_tensors(self, name: str) -> dict[str, Tensor] | None: ...

    def put_tensors(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]: ...


Latency = Callable[[Sequence[nn.Module], Tensor], list[float]]


class Context:
    """What passes read besides the graph: calibration statistics, seed, progress, and the changes made so far.

    `site_cache`, where given, keeps finished layers so that an interrupted compile resumes where it stopped.
    `work` is a folder that outlives an interruption, for passes that keep how far they are; `original` the model as it was
    before the first structural pass. `keep_weights`: passes that code weights leave in `weights` what they coded, float16
    by site. `prepared`: what passes took from the model before any pass changed it, by pass. `latency`: seconds that each of
    some modules takes for an input, as an engine runs them.
    """

    def __init__(
        self,
        statistics: Statistics | None = None,
        seed: int = 0,
        site_cache: SiteCache | None = None,
        keep_weights: bool = False,
        work: Path | None = None,
        device: torch.device = CPU,
        latency: Latency | None = None,
    ) -> None:
        self.device = device
        self.latency = latency
        self.keep_weights = keep_weights
        self.work = work
        self.original: nn.Module | None = None
        self.weights: dict[str, Tensor] = {}
        self.prepared: dict[str, Any] = {}
        self._statistics, self.seed, self.site_cache = statistics, seed, site_cache
        self._folder = None if statistics is None else statistics.folder
        self._progress: ProgressSetting = False
        self._latest: tuple[object, InputStatistics] | None = None
        self.changes: dict[str, InputChange] = {}

    def restructured(self, statistics: Statistics) -> None:
        """From now on statistics are those of the model as structural passes have left it; steps weigh what they did."""
        known = None if self._statistics is None else self._statistics.step_weights
        self._statistics, self._latest = replace(statistics, step_weights=known), None

    def showing(self, progress: ProgressSetting) -> Context:
        """The same context, with its passes' progress shown so."""
        self._progress = progress
        return self

    def track(self, name: str, items: Collection[Item]) -> Iterator[Item]:
        """Go through `items` under a progress bar called `name`."""
        with progress_bar(name, len(items), self._progress) as bar:
            for item in items:
                yield item
                bar.advance()

    def change(self, group: str) -> InputChange:
        return self.changes.setdefault(group, InputChange())

    def rescaled(self, group: str, inverse_scale: Tensor, shift: Tensor, part: slice) -> None:
        """From now on the channels `part` of a group's input are x * inverse_scale - shift; both [C], of all channels."""
        change = self.change(group)
        if change.inverse_scale is None or change.shift is None:
            change.inverse_scale, change.shift = torch.ones(len(shift)), torch.zeros(len(shift))
        change.inverse_scale[part], change.shift[part] = inverse_scale[part].float(), shift[part].float()
        self._latest = None

    @property
    def calibration(self) -> Mapping[str, Any]:
        """Where the statistics come from (`Statistics.metadata`); empty without any."""
        return {} if self._statistics is None else self._statistics.metadata

    def statistics(self, group: str) -> InputStatistics:
        """Statistics of the group's input as it is now, after what earlier passes changed.

        Raises:
            DitqError: the recipe needs calibration but none was given.
        """
        if self._statistics is None:
            raise DitqError(f"{group}: this recipe needs calibration statistics; run `ditq calibrate` or give prompts")
        if group not in self._statistics.groups:
            raise DitqError(f"{group}: the statistics do not hold this input; calibrate again with this model")
        change = self.changes.get(group)
        state = (group, None if change is None else (change.inverse_scale is not None, len(change.rotations)))
        if self._latest is None or self._latest[0] != state:  # linears of one group ask one after the other
            found = self._statistics.groups[group]
            if change is not None:
                found = found.transformed(change.inverse_scale, change.shift, change.rotations)
            self._latest = (state, found)
        return self._latest[1]

    def bin_weights(self, kind: str) -> Tensor | None:
        """How much a row of each timestep bin counts: step weights of that kind, their square roots for 'softened' (of
        'share'), or None for 'none'.

        Raises:
            DitqError: the statistics hold no step weights.
        """
        if kind == "none" or self._statistics is None:
            return None
        if kind == "softened":
            return self._statistics.bin_weights("share").sqrt()
        return self._statistics.bin_weights(kind)

    @property
    def has_trajectories(self) -> bool:
        """Are there recorded calls beside the statistics?"""
        return self._folder is not None and (self._folder / TRAJECTORIES).is_dir()

    def trajectories(self) -> Trajectories:
        """The recorded calls of the denoiser that the statistics were gathered from, in float32.

        Raises:
            DitqError: there are none.
        """
        if self._folder is None:
            raise DitqError(
                "this recipe learns from recorded calls; give the statistics as a folder of `ditq calibrate`"
            )
        return Trajectories.open(self._folder / TRAJECTORIES).in_float32()

    def step_weights(self, steps: Tensor, kind: str) -> Tensor:
        """How much a sample of each of the scheduler steps [B] counts: float32 [B]; ones for 'none'.

        Raises:
            DitqError: the statistics hold no step weights.
        """
        if kind == "none" or self._statistics is None:
            return torch.ones(len(steps))
        return self._statistics.weights_of_steps(kind)[steps].float()

    def cached_tensors(self, name: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors from an earlier, interrupted run if there are any, else made now and kept."""
        if self.site_cache is None:
            return make()
        found = self.site_cache.get_tensors(name)
        return self.site_cache.put_tensors(name, make()) if found is None else found

    def cached(self, site: str, make: Callable[[], WeightCode]) -> WeightCode:
        """The site's code from an earlier, interrupted run if there is one, else made now and kept."""
        if self.site_cache is None:
            return make()
        found = self.site_cache.get(site)
        return self.site_cache.put(site, make()) if found is None else found


@dataclass(frozen=True)
class Pass(ABC):
    """One step of a recipe. Subclasses are frozen dataclasses whose fields are the settings, declared with `setting`.

    After `run` the graph can still be executed; what was approximated is measured in the report.
    """

    name: ClassVar[str]
    not_after: ClassVar[tuple[str, ...]] = ()
    """Passes that must not have treated a linear before this one does."""
    only_after: ClassVar[tuple[str, ...]] = ()
    """Passes of which one must stand before this one in the recipe."""
    wants_weights: ClassVar[bool] = False
    """Does it need the weights that an earlier pass coded?"""

    @property
    def spoiled_by(self) -> tuple[str, ...]:
        """Passes that must not follow anywhere, since they change what this one has measured."""
        return ()

    exact: ClassVar[bool] = False
    """Does it leave the function as it is, up to rounding? The compiler makes sure of it."""

    structural: ClassVar[bool] = False
    """Does it change what the model computes? Such passes stand before all others, and the statistics are gathered anew after
    them. They leave the graph refreshed."""
    trains: ClassVar[bool] = False
    """Is it a structural pass that changes no structure, but trains what others changed? One of them must stand before it."""

    @property
    def requires_statistics(self) -> bool:
        """Must the model be calibrated for this pass?"""
        return True

    @property
    def keeps_state(self) -> bool:
        """Do calls of what it makes depend on those before them? Graphs are for targets that know nothing of other calls."""
        return False

    def check_recorded(self, trajectories: Trajectories, seed: int) -> None:  # noqa: B027  most need no more of them
        """Raise DitqError for recorded calls that are too few; called before a budget's search, which takes long."""

    def prepare(self, graph: DiTGraph, context: Context) -> None:  # noqa: B027  most passes have nothing to prepare
        """See the model before the first pass of the recipe changes it."""

    @abstractmethod
    def run(self, graph: DiTGraph, context: Context) -> PassReport:
        """Change the graph in place and say what was done."""

    def preview(self, graph: DiTGraph) -> dict[str, str]:
        """What `run` would do to each site, in a word or two; for `ditq inspect`, and to fail before calibration.

        Raises:
            DitqError: a selector that matches nothing, or a setting that does not fit a site.
        """
        return {}

    def folds_into(self, graph: DiTGraph) -> set[str]:
        """Linears whose weights `run` changes beside those of `preview`: what makes the inputs of these."""
        return set()

    def sketch(self, graph: DiTGraph) -> None:  # noqa: B027  most passes leave the linears where they are
        """Put the parts that `run` would put in into the graph, with any values, and refresh it: passes behind a structural one
        are checked on that before anything is computed. The model may have no values (torch's meta device).
        """

    def runtime_cost(self, graph: DiTGraph) -> tuple[int, int]:
        """Multiply-adds that this pass adds to one forward of one sample at run time: the least and the most it may be."""
        return 0, 0

    def costs(self, graph: DiTGraph) -> dict[str, Work]:
        """What this pass leaves in the place of linears and attentions, by their names in `graph.sites` and
        `graph.attentions`, for the cost model of `ditq inspect`: only those whose cost it changes. The graph is the one that
        the first pass of the recipe gets; what several passes say of one place is put together (cost_model.py).
        """
        return {}

    def check(self) -> None:  # noqa: B027  most passes have nothing to check
        """Raise DitqError for settings that do not fit each other; called before anything runs."""

    def without_effect(self) -> str | None:
        """What is set to another value than its default, and what of the other settings keeps that from mattering."""
        for item in fields(self):
            default = item.default if item.default_factory is MISSING else item.default_factory()
            value, only = getattr(self, item.name), item.metadata.get("only")
            if only is None or value == default:
                continue
            name, values = only
            given = getattr(self, name)
            wanted = f"{name} above 0" if values is None else f"{name}: {' or '.join(map(str, values))}"
            if not (given > 0 if values is None else given in values):
                return f"{item.name} is {value}, which has an effect with {wanted} only, not {given}; leave it out"
        return None

    def settings(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


_registered: dict[str, type[Pass]] = {}
PassClass = TypeVar("PassClass", bound=type[Pass])


def register(pass_class: PassClass) -> PassClass:
    """Decorator of a pass class; makes it known under its `name`."""
    _registered[pass_class.name] = pass_class
    return pass_class


def registered() -> dict[str, type[Pass]]:
    return _registered


def relative_error(reference: Tensor, approximation: Tensor) -> float:
    """||reference - approximation||^2 / ||reference||^2, in float64."""
    difference = (reference.double() - approximation.double()).square().sum()
    return float(difference / reference.double().square().sum().clamp_min(torch.finfo(torch.float64).tiny))
