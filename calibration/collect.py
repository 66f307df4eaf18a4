"""Recorded trajectories -> statistics: the model runs through every recorded call again, its linear inputs are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditq.calibration.accumulate import InputAccumulator
from ditq.calibration.batches import moved, units_of
from ditq.calibration.further import FurtherConditions
from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.record import RecordedCall, Trajectories
from ditq.calibration.statistics import INDEX, Statistics, read_groups, write_groups, write_index
from ditq.calibration.storage import ditq_version
from ditq.errors import DitqError
from ditq.given import check_whole
from ditq.graph import DiTGraph
from ditq.memory import free_memory
from ditq.parts import InputGroup
from ditq.progress import ProgressBar, ProgressSetting, progress_bar
from ditq.suggest import unknown_key

MOST_BY_BIN = 2 << 30  # bytes of second moments beyond which they are summed over all bins
ROWS = 1 << 18  # of the input with most; calls beyond that are left out, evenly
ROWS_A_CHANNEL = 8  # at least, of the widest input
MOMENTS = ("auto", "bins", "all")


def check_moments(moments: Any) -> None:
    """Raise DitqError unless it is a way to keep second moments."""
    if moments not in MOMENTS:
        raise DitqError(unknown_key("moments", str(moments), list(MOMENTS)))


def collect_statistics(
    graph: DiTGraph,
    trajectories: Trajectories,
    bins: int = 4,
    rows_per_bin: int = 512,
    *,
    groups: Iterable[str] | None = None,
    progress: ProgressSetting = None,
    seed: int = 0,
    moments: str = "auto",
    memory_limit: int | None = None,
    folder: str | Path | None = None,
    device: torch.device | None = None,
) -> Statistics:
    """Run the graph's model through the recorded calls and gather the statistics of its linear inputs.

    `groups` names the input groups wanted (default: all that the model uses). They are gathered in as many runs over
    the trajectories as it takes for the statistics of one run to fit in `memory_limit` bytes, at least one group a run;
    None is half of what is free where the model runs (`device`; None: where it is). With `folder`, each run's statistics are
    written there and let go, and runs that are there already are not repeated; without, all stay in memory. The result does
    not depend on how the groups were divided.

    `moments`: second moments for each bin of timesteps (`bins`), over all (`all`), or by bin where they take no more than 2
    GiB (`auto`). Where a call has thousands of tokens fewer calls tell enough: they are taken evenly from all steps until an
    input has 2^18 rows, or eight a channel of the widest.

    Text tokens that a call's attention mask hides are left out where keys and values of cross attention read them: they
    have no effect there, and padding would otherwise make up most of what PixArt's layers seem to get.

    Raises DitqError for values that are not finite (naming site and step), an unknown group, or bad settings.
    """
    for name, value in (("bins", bins), ("rows_per_bin", rows_per_bin)):
        check_whole(name, value, 1, needed=True)
    check_whole("memory_limit", memory_limit, 1)
    check_moments(moments)
    wanted = _wanted(graph, groups)
    device = next(graph.model.parameters()).device if device is None else device
    by_bin = is_by_bin(wanted, bins, moments)
    matrices = bins if by_bin else 1
    chosen = _enough_calls(graph, trajectories, wanted, bins, device)
    settings = {"bins": bins, "rows_per_bin": rows_per_bin, "seed": seed}
    metadata = {**_origin(trajectories), **settings}
    if not by_bin:
        metadata["moments"] = "all"
    if len(chosen) < trajectories.count():
        metadata["calls"] = len(chosen)
    further = FurtherConditions.of(trajectories)
    told = set() if further is None else further.groups(graph, wanted, device)
    if further is not None and told:
        metadata.update(modulation_conditions=further.count, modulation_conditions_sha256=further.digest)
    runs = list(_divide(wanted, matrices, bins, rows_per_bin, memory_limit or free_memory(device) // 2))
    sites = {group.name: group.sites for group in wanted}
    gathered: dict[str, InputStatistics] = {}
    described: dict[str, dict[str, Any]] = {}
    with progress_bar("collecting statistics", len(runs) * len(chosen), progress) as bar:
        for number, run in enumerate(runs):
            names = {**metadata, "inputs": [group.name for group in run]}
            path = Path(folder) / _file_name(number, len(runs)) if folder is not None else None
            stored = read_groups(path, names) if path is not None else None
            if stored is None:
                inputs = {
                    g.name: InputAccumulator(g.name, g.width, bins, rows_per_bin, seed, by_bin, device) for g in run
                }
                if further is not None:
                    further.read(graph, {name: inputs[name] for name in told & inputs.keys()}, bins, device)
                _replay(graph, trajectories, chosen, {n: inputs[n] for n in inputs if n not in told}, bar, device)
                found = _finished(inputs)
                if path is None:
                    gathered.update(found)
                else:
                    (path.parent / INDEX).unlink(missing_ok=True)  # it describes files that are about to change
                    stored = write_groups(path, found, sites, names)
            described.update(stored or {})
            bar.advance_to((number + 1) * len(chosen))
    if folder is None:
        return Statistics(gathered, sites, metadata)
    write_index(Path(folder), metadata, described)
    _remove_others(Path(folder), {str(entry["file"]) for entry in described.values()})
    return Statistics.open(folder)


def is_by_bin(groups: Iterable[InputGroup], bins: int, moments: str) -> bool:
    """Whether second moments are kept for each bin: where asked, or with `auto` where they are small."""
    return moments == "bins" or (moments == "auto" and 4 * bins * sum(g.width**2 for g in groups) <= MOST_BY_BIN)


def bytes_on_disk(graph: DiTGraph, bins: int = 4, moments: str = "auto", rows_per_bin: int = 512) -> int:
    """About what the statistics of a model will take, without the recorded calls."""
    groups = _wanted(graph, None)
    matrices = bins if is_by_bin(groups, bins, moments) else 1
    return sum(4 * g.width * (matrices * (g.width + 1) // 2 + bins * (rows_per_bin + 2)) for g in groups)


def _remove_others(folder: Path, files: set[str]) -> None:
    """Remove files of an earlier division into runs."""
    for path in folder.glob("statistics*.safetensors"):
        if path.name not in files:
            path.unlink()


def _wanted(graph: DiTGraph, names: Iterable[str] | None) -> list[InputGroup]:
    if names is None:
        return [g for g in graph.groups.values() if any(graph.sites[site].role != "unused" for site in g.sites)]
    wanted = set(names)
    unknown = sorted(wanted - set(graph.groups))
    if unknown:
        raise DitqError(f"the model has no linear input called '{unknown[0]}'; see `ditq inspect` for their names")
    return [group for name, group in graph.groups.items() if name in wanted]


def _origin(trajectories: Trajectories) -> dict[str, Any]:
    """Where statistics of these trajectories come from."""
    index = trajectories.index
    return {
        "ditq": ditq_version(),
        "checkpoint": index["checkpoint"],
        "pipeline": index["pipeline"],
        "dtype": index["dtype"],
        "kind": index["kind"],
        "condition_count": len(trajectories.conditions),
        "conditions_sha256": index["conditions_sha256"],
        "sampling_arguments": index["arguments"],
        "sampling_seed": index["seed"],
        "steps": trajectories.steps,
        "timesteps": trajectories.timesteps,
        "timestep_arguments": trajectories.timestep_arguments,
    }


def _enough_calls(
    graph: DiTGraph, trajectories: Trajectories, groups: list[InputGroup], bins: int, device: torch.device
) -> list[int]:
    """Numbers of the calls to read: all, or of large calls as many as tell enough, evenly from all steps.

    Guidance branches of a step are taken together, or by chance where their shapes differ: every second call of a pipeline
    that calls its denoiser once a branch would be of one branch alone.
    """
    steps, units = trajectories.steps_of_calls(), units_of(trajectories)
    rows = _rows_of_a_call(graph, trajectories, groups, device)
    enough = max(ROWS, ROWS_A_CHANNEL * max((group.width for group in groups), default=0))
    count = min(len(steps), max(2 * bins, -(-enough // max(rows, 1))))
    wanted = min(len(units), max(2 * bins, -(-count // min(len(unit) for unit in units))))
    mixed = torch.randperm(len(units), generator=torch.Generator().manual_seed(0)).tolist()
    by_step = sorted(mixed, key=lambda place: steps[units[place][0]])
    return sorted(number for place in range(wanted) for number in units[by_step[place * len(units) // wanted]])


@torch.no_grad()
def _rows_of_a_call(graph: DiTGraph, trajectories: Trajectories, groups: list[InputGroup], device: torch.device) -> int:
    """How many rows the input with most of them gets in the first recorded call."""
    call, seen = next(trajectories.calls()), [0]
    with ExitStack() as hooks:
        for group in groups:
            site = graph.linear(group.sites[0])
            handle = site.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
            hooks.callback(handle.remove)
        graph.model(**moved(call.arguments, device))
    return max(seen)


def _divide(
    groups: list[InputGroup], matrices: int, bins: int, rows_per_bin: int, limit: int
) -> Iterator[list[InputGroup]]:
    """The groups in order, cut into runs whose statistics fit the limit; `matrices` second moments each."""
    run: list[InputGroup] = []
    used = 0
    for group in groups:
        size = 4 * group.width * (matrices * group.width + bins * (rows_per_bin + 4))
        if run and used + size > limit:
            yield run
            run, used = [], 0
        run.append(group)
        used += size
    if run:
        yield run


def _file_name(number: int, count: int) -> str:
    return "statistics.safetensors" if count == 1 else f"statistics-{number + 1:05d}-of-{count:05d}.safetensors"


@torch.no_grad()
def _replay(
    graph: DiTGraph,
    trajectories: Trajectories,
    chosen: Sequence[int],
    inputs: dict[str, InputAccumulator],
    bar: ProgressBar,
    device: torch.device,
) -> None:
    """One run over the chosen calls for some of the input groups."""
    if not inputs:
        return
    with ExitStack() as hooks:
        watchers = [_Watcher(graph, name, found, trajectories) for name, found in inputs.items()]
        for watcher in watchers:
            # all sites of a group read the same tensor: the first stands for them
            site = graph.linear(graph.groups[watcher.name].sites[0])
            hooks.callback(site.register_forward_pre_hook(watcher).remove)
        for call in trajectories.calls(chosen=frozenset(chosen)):
            for watcher in watchers:
                watcher.call = call
            graph.model(**moved(call.arguments, device))
            bar.advance()


def _finished(inputs: Mapping[str, InputAccumulator]) -> dict[str, InputStatistics]:
    """Raises DitqError for an input that no call reached."""
    for name, found in inputs.items():
        if not found.count.any():
            raise DitqError(f"{name}: no recorded call reaches this layer; leave it out of the groups")
    finished = {name: InputStatistics(**found.tensors()) for name, found in inputs.items()}
    for name, statistics in finished.items():
        if not bool(statistics.second_moment.diagonal(dim1=1, dim2=2).isfinite().all()):
            raise DitqError(
                f"{name}: the squares of its input are beyond float32; the checkpoint or its format overflows"
            )
    return finished


class _Watcher:
    """Forward pre-hook of one linear: hands its input to the accumulator, in the bin of the call that is replayed."""

    def __init__(self, graph: DiTGraph, name: str, found: InputAccumulator, trajectories: Trajectories) -> None:
        self.name = name
        self.call: RecordedCall | None = None
        kinds = {kind for site in graph.groups[name].sites for kind in graph.sites[site].kind.split("+")}
        self._cross_attention = kinds <= {"key", "value"}  # self attention reads its queries from the same tensor
        self._found = found
        self._trajectories = trajectories

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert self.call is not None
        x = inputs[0]
        if not x.numel():
            raise DitqError(
                f"{self.name}: no token reaches it, its input is {list(x.shape)}: the pictures are too small for this model; "
                "calibrate with a larger height and width"
            )
        mask = self.call.arguments.get("encoder_attention_mask")
        if self._cross_attention and mask is not None and mask.shape == x.shape[:-1]:
            x = x[mask.to(x.device).bool()]
        rows = x.reshape(-1, x.shape[-1])
        number = self._trajectories.bin_of(self.call.step, self._found.count.numel())
        if not self._found.add(rows, number):
            raise DitqError(
                f"{self.name}: its input is not finite at step {self.call.step} of condition {self.call.condition}; "
                "the checkpoint or its number format overflows"
            )
