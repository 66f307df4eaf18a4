"""What all rows share: a checkpoint (as it is or with planted outliers), its calibration data, prompts, and originals.

The calibration data are ditq's own: the recorded inputs of the denoiser and the statistics gathered from them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ditq.calibration.calibrate import calibrate
from ditq.calibration.collect import collect_statistics
from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.parts import InputGroup
from ditq.report.evaluate import heldout_conditions
from tools.peers.draw import Call, Drawn, draw
from tools.peers.planted import plant_checkpoint

SEED = 1000  # of the first held-out picture's noise; calibration draws from 0 on


@dataclass(frozen=True)
class Place:
    """Where a bench finds and keeps its files, and what it measures on; as JSON for the processes of the rows."""

    checkpoint: str
    planted: bool
    limit: int
    batch: int
    work: str
    stats: str | None

    @property
    def variant(self) -> str:
        return f"{self.checkpoint}-planted" if self.planted else self.checkpoint

    @property
    def folder(self) -> Path:
        return Path(self.work) / self.variant


class Bench:
    """One checkpoint to measure rows on. `prepare` makes the files once; every row's process then only reads them."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.base = Checkpoint.open(place.checkpoint)
        planted = place.folder / "checkpoint"
        self.checkpoint = Checkpoint.open(planted) if place.planted and planted.exists() else self.base
        self.conditions = list(heldout_conditions(self.base, place.limit))

    def prepare(self) -> None:
        """Make what is missing: the planted checkpoint, statistics, originals."""
        place = self.place
        place.folder.mkdir(parents=True, exist_ok=True)
        base_stats = self._base_stats
        if not (base_stats / "statistics.json").exists():
            calibrate(self.base, base_stats, resume=base_stats.exists())
        if place.planted and self.checkpoint is self.base:
            graph = self._graph(self.base.load_model())
            plant_checkpoint(self.base, graph, place.folder / "checkpoint")
            self.checkpoint = Checkpoint.open(place.folder / "checkpoint")
        if place.planted and not (place.folder / "statistics" / "statistics.json").exists():
            # The function is the same, so the recorded inputs are too; what the layers get inside is not.
            graph = self._graph(self.model())
            collect_statistics(graph, self.trajectories, folder=place.folder / "statistics", progress=False)
            index = place.folder / "statistics" / "statistics.json"
            content = json.loads(index.read_text())
            content["checkpoint"]["fingerprint"] = self.checkpoint.fingerprint()
            index.write_text(json.dumps(content))
            (place.folder / "statistics" / "trajectories").symlink_to((base_stats / "trajectories").absolute())
        if not self._originals.exists():
            drawn = draw(self.pipeline(self.model()), self.conditions, self.settings, SEED, place.batch, watch=True)
            torch.save(drawn.calls, place.folder / f"calls-{place.limit}.pt")
            np.savez(self._originals, pictures=drawn.pictures, latents=drawn.latents)

    @property
    def _base_stats(self) -> Path:
        return Path(self.place.stats) if self.place.stats else Path(self.place.work) / f"stats-{self.place.checkpoint}"

    @property
    def _originals(self) -> Path:
        return self.place.folder / f"originals-{self.place.limit}-{self.place.batch}.npz"

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.base.sampling)

    @cached_property
    def originals(self) -> Drawn:
        """The pictures and latents of the original in float32."""
        found = np.load(self._originals)
        return Drawn(found["pictures"], found["latents"], [])

    def calls(self) -> list[Call]:
        """Some of the original's calls while it drew the held-out prompts."""
        return torch.load(self.place.folder / f"calls-{self.place.limit}.pt", weights_only=True)

    def model(self) -> nn.Module:
        """A fresh copy of the original in float32."""
        return self.checkpoint.load_model()

    def pipeline(self, transformer: nn.Module) -> Any:
        pipeline = self.base.load_pipeline()
        pipeline.transformer = transformer
        return pipeline

    def _graph(self, model: nn.Module) -> DiTGraph:
        return DiTGraph(model, example_inputs(self.base))

    @cached_property
    def graph(self) -> DiTGraph:
        """A graph around a model of its own, which rows quantize in place."""
        return self.new_graph()

    def new_graph(self) -> DiTGraph:
        """Another such graph, to be used up."""
        return self._graph(self.model())

    @cached_property
    def token_sites(self) -> list[str]:
        return self.graph.select("role:token")

    @cached_property
    def modulation_sites(self) -> list[str]:
        """Linears of modulation; empty where the family shares them and nothing but one small linear is left."""
        return [name for name, site in self.graph.sites.items() if site.role == "modulation"]

    @cached_property
    def statistics(self) -> Statistics:
        folder = self.place.folder / "statistics" if self.place.planted else self._base_stats
        return Statistics.open(folder, self.checkpoint.fingerprint(), self.graph)

    @cached_property
    def trajectories(self) -> Trajectories:
        return Trajectories.open(self._base_stats / "trajectories", self.base.fingerprint())

    def groups(self) -> Iterator[tuple[InputGroup, list[nn.Linear]]]:
        """The inputs of token linears, and the linears that read each."""
        tokens = set(self.token_sites)
        for group in self.graph.groups.values():
            if tokens & set(group.sites):
                linears: list[Any] = [self.graph.linear(site) for site in group.sites]
                yield group, linears

    def inputs(self, group: InputGroup) -> InputStatistics:
        """What calibration knows of an input."""
        return self.statistics.groups[group.name]

    def calibration_calls(self, stride: int = 1) -> Iterator[Call]:
        """The recorded calls of each `stride`-th step, those of all conditions with the same place joined in one batch."""
        by_place: dict[tuple[int, int], list[Call]] = {}
        seen: dict[tuple[int, int], int] = {}
        for call in self.trajectories.calls(stride):
            branch = seen.get((call.condition, call.step), 0)
            seen[(call.condition, call.step)] = branch + 1
            by_place.setdefault((call.step, branch), []).append(call.arguments)
        family = self.base.family
        axes: Mapping[str, tuple[str | None, ...]] = {} if family is None else family.axes
        for calls in by_place.values():
            yield {name: _joined([call[name] for call in calls], name, axes) for name in calls[0]}


def _joined(values: list[Any], name: str, axes: Mapping[str, tuple[str | None, ...]]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _joined([value[key] for value in values], f"{name}.{key}", axes) for key in first}
    if isinstance(first, Tensor) and first.dim() and axes.get(name, ("batch",))[0] == "batch":
        return torch.cat(values)
    return first
