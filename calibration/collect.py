"""Recorded trajectories -> statistics: the model runs through every recorded call again, its linear inputs are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ditq.calibration.accumulate import InputAccumulator
from ditq.calibration.record import RecordedCall, Trajectories
from ditq.calibration.statistics import INDEX, InputStatistics, Statistics, read_groups, write_groups, write_index
from ditq.calibration.storage import ditq_version
from ditq.errors import DitqError
from ditq.graph import DiTGraph
from ditq.parts import InputGroup
from ditq.progress import ProgressBar, ProgressSetting, progress_bar

MEMORY_LIMIT = 2 << 30


def collect_statistics(
    graph: DiTGraph,
    trajectories: Trajectories,
    bins: int = 4,
    rows_per_bin: int = 512,
    *,
    groups: Iterable[str] | None = None,
    progress: ProgressSetting = None,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    folder: str | Path | None = None,
) -> Statistics:
    """Run the graph's model through all recorded calls and gather the statistics of its linear inputs.

    `groups` names the input groups wanted (default: all that the model uses). They are gathered in as many runs over
    the trajectories as it takes for the statistics of one run to fit in `memory_limit` bytes, at least one group a run.
    With `folder`, each run's statistics are written there and let go, and runs that are there already are not repeated;
    without, all stay in memory. The result does not depend on how the groups were divided.

    Text tokens that a call's attention mask hides are left out where keys and values of cross attention read them: they
    have no effect there, and padding would otherwise make up most of what PixArt's layers seem to get.

    Raises DitqError for values that are not finite (naming site and step), an unknown group, or bad settings.
    """
    for name, value in (("bins", bins), ("rows_per_bin", rows_per_bin), ("memory_limit", memory_limit)):
        if value < 1:
            raise DitqError(f"{name} is {value}; give at least 1")
    wanted = _wanted(graph, groups)
    settings = {"bins": bins, "rows_per_bin": rows_per_bin, "seed": seed}
    metadata = {**_origin(trajectories), **settings}
    runs = list(_divide(wanted, bins, rows_per_bin, memory_limit))
    sites = {group.name: group.sites for group in wanted}
    gathered: dict[str, InputStatistics] = {}
    described: dict[str, dict[str, Any]] = {}
    with progress_bar("collecting statistics", len(runs) * trajectories.count(), progress) as bar:
        for number, run in enumerate(runs):
            names = {**metadata, "inputs": [group.name for group in run]}
            path = Path(folder) / _file_name(number, len(runs)) if folder is not None else None
            stored = read_groups(path, names) if path is not None else None
            if stored is None:
                inputs = {g.name: InputAccumulator(g.name, g.width, bins, rows_per_bin, seed) for g in run}
                found = _replay(graph, trajectories, inputs, bar)
                if path is None:
                    gathered.update(found)
                else:
                    (path.parent / INDEX).unlink(missing_ok=True)  # it describes files that are about to change
                    stored = write_groups(path, found, sites, names)
            described.update(stored or {})
            bar.advance_to((number + 1) * trajectories.count())
    if folder is None:
        return Statistics(gathered, sites, metadata)
    write_index(Path(folder), metadata, described)
    _remove_others(Path(folder), {str(entry["file"]) for entry in described.values()})
    return Statistics.open(folder)


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


def _divide(groups: list[InputGroup], bins: int, rows_per_bin: int, limit: int) -> Iterator[list[InputGroup]]:
    """The groups in order, cut into runs whose statistics fit the limit."""
    run: list[InputGroup] = []
    used = 0
    for group in groups:
        size = 4 * bins * group.width * (group.width + rows_per_bin + 4)
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
    graph: DiTGraph, trajectories: Trajectories, inputs: dict[str, InputAccumulator], bar: ProgressBar
) -> dict[str, InputStatistics]:
    """One run over the trajectories for some of the input groups."""
    device = next(graph.model.parameters()).device
    with ExitStack() as hooks:
        watchers = [_Watcher(graph, name, found, trajectories) for name, found in inputs.items()]
        for watcher in watchers:
            # all sites of a group read the same tensor: the first stands for them
            site = graph.linear(graph.groups[watcher.name].sites[0])
            hooks.callback(site.register_forward_pre_hook(watcher).remove)
        for call in trajectories.calls():
            for watcher in watchers:
                watcher.call = call
            graph.model(**moved(call.arguments, device))
            bar.advance()
    for name, found in inputs.items():
        if not found.count.any():
            raise DitqError(f"{name}: no recorded call reaches this layer; leave it out of the groups")
    return {name: InputStatistics(**found.tensors()) for name, found in inputs.items()}


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


def moved(value: Any, device: torch.device | str, dtype: torch.dtype | None = None) -> Any:
    """Arguments of a forward call on a device and, where `dtype` is given, tensors of floating types in that dtype."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device, dtype) for item in value)
    return value
