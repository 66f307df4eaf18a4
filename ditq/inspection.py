"""What `ditq inspect` tells: linears, parameters and multiply-adds by role, and what a recipe would do to each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditq.calibration.collect import bytes_on_disk
from ditq.checkpoint import Checkpoint
from ditq.cost_model import GPUS, Costs, costs_after, costs_before, this_processor
from ditq.errors import DitqError
from ditq.families import SIDE, Family, family_of
from ditq.graph import DiTGraph
from ditq.recipe import Recipe


@dataclass(frozen=True)
class Inspection:
    """The structure of a checkpoint. `plan` says per site what each pass of the recipe would do; `online` what all of them add
    at run time: the least and the most multiply-adds for one sample. `text_sites` see only the text. `before` and `after`: what
    a call costs without and with the recipe.
    """

    checkpoint: Checkpoint
    graph: DiTGraph
    parameters: int
    recipe: Recipe
    plan: dict[str, list[str]]
    online: tuple[int, int]
    text_sites: list[str]
    before: Costs
    after: Costs

    def predicted(self) -> list[dict[str, Any]]:
        """One row a device: the least milliseconds of one call before and after the recipe, by the cost model."""
        rows = []
        for device in (this_processor(), *GPUS):
            before, after = (1e3 * costs.seconds(device) for costs in (self.before, self.after))
            rows.append({"device": device.name, "source": device.source, "before_ms": before, "after_ms": after})
        return rows

    def costs(self) -> dict[str, Any]:
        """Parameters and multiply-adds before and after the recipe, as plain values."""
        return {
            when: {
                "parameters": costs.parameters,
                "activated_parameters": costs.activated,
                "multiply_adds": costs.macs,
                "attention_share": costs.attention_share,
            }
            for when, costs in (("before", self.before), ("after", self.after))
        }

    def by_role(self) -> list[dict[str, Any]]:
        """One row a role: number of linears, parameters, multiply-adds for one sample."""
        rows: dict[str, dict[str, Any]] = defaultdict(lambda: {"linears": 0, "parameters": 0, "macs": 0})
        for site in self.graph.sites.values():
            row = rows[site.role]
            row["linears"] += 1
            row["parameters"] += site.parameters
            row["macs"] += site.macs
        scores = {"linears": 0, "parameters": 0, "macs": sum(a.macs for a in self.graph.attentions.values())}
        return [{"role": role, **row} for role, row in rows.items()] + [{"role": "attention scores", **scores}]

    def to_json(self) -> dict[str, Any]:
        sites = [
            {
                "site": site.name,
                "role": site.role,
                "kind": site.kind,
                "shape": [site.out_features, site.in_features],
                "macs": site.macs,
                "input": site.group,
                "plan": self.plan.get(site.name, []),
            }
            for site in self.graph.sites.values()
        ]
        return {
            "checkpoint": self.checkpoint.name,
            "class": self.checkpoint.class_name,
            "family": self.checkpoint.family.name if self.checkpoint.family else None,
            "parameters": self.parameters,
            "blocks": list(self.graph.blocks),
            "recipe": self.recipe.to_json(),
            "online_multiply_adds": list(self.online),
            "text_sites": self.text_sites,
            "statistics_bytes": bytes_on_disk(self.graph),
            "roles": self.by_role(),
            "costs": self.costs(),
            "predicted_at_best": self.predicted(),
            "sites": sites,
        }


def inspect_checkpoint(checkpoint: Checkpoint, recipe: Recipe, tokens: int | None = None) -> Inspection:
    """Read the structure off a model without weights; nothing is loaded but headers.

    tokens: image tokens of the calls whose cost is counted, the square of their number along a side; None is few of them.

    Raises:
        DitqError: a class of no known family (its inputs cannot be made up), or a recipe that does not fit the model.
    """
    model = checkpoint.skeleton()
    graph = DiTGraph(model, example_inputs(checkpoint, side=None if tokens is None else _side(tokens)))
    plan = recipe.preview(graph)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    costs = [step.runtime_cost(found) for step, found in recipe.stages(graph)]
    online = sum(least for least, _ in costs), sum(most for _, most in costs)
    text_sites = graph.text_sites(checkpoint.changing)
    before, after = costs_before(graph), costs_after(graph, recipe)
    return Inspection(checkpoint, graph, parameters, recipe, plan, online, text_sites, before, after)


def _side(tokens: int) -> int:
    if tokens < 4 or math.isqrt(tokens) ** 2 != tokens:
        raise DitqError(f"{tokens} image tokens make no square picture; give a square number, such as 4096")
    return math.isqrt(tokens)


def example_inputs(
    checkpoint: Checkpoint,
    batch: int = 2,
    seed: int = 0,
    side: int | None = None,
    picture: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Made-up inputs of the right shapes, by the checkpoint's family. Image tokens along a side, or rows and columns of the
    `picture`, if not the usual."""
    config = {**_defaults(checkpoint), **checkpoint.config} | ({} if side is None else {SIDE: side})
    return made_up_inputs(checkpoint.name, checkpoint.class_name, config, batch, seed, picture, checkpoint.family)


def made_up_inputs(
    name: str,
    class_name: str,
    config: Mapping[str, Any],
    batch: int = 2,
    seed: int = 0,
    picture: tuple[int, int] | None = None,
    family: Family | None = None,
) -> dict[str, Any]:
    """The same for a transformer class with a full configuration; `name` is what an error calls it. family: if it is not to be
    found by the class."""
    family = family or family_of(class_name)
    if family is None:
        raise DitqError(
            f"{name}: {class_name} is of no family that ditq knows inputs for; give --stats of a calibration, which shows "
            "them, or add a file to ditq/families (docs/add-a-family.md)"
        )
    try:
        return family.inputs_of(config, batch, seed, picture)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DitqError(f"{name}: config.json does not tell the shapes of its inputs ({error!r})") from error


def _defaults(checkpoint: Checkpoint) -> dict[str, Any]:
    """Configuration values that config.json leaves to the class."""
    from inspect import Parameter, signature

    parameters = signature(checkpoint.model_class().__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not Parameter.empty}
