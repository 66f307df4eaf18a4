"""ditq's own recipes, in their torch meaning; each once as shipped and once with the modulation left in full precision.

Peers without groups store 3.06 or 4.06 bits a weight, so recipes with a budget are measured at `FEWER` bits too.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from ditq.budget.fit import fit_budget
from ditq.formats import BitFormat
from ditq.nn.input_transform import InputTransform
from ditq.nn.quant_linear import QuantLinear
from ditq.pass_pipeline import run_passes
from ditq.passes.quantize import stored_bits
from ditq.recipe import Recipe, load_recipe, shipped_recipes
from tools.peers.bench import Bench
from tools.peers.row import Outcome, add

FEWER = {"w4a8-mixed": 4.1, "w4a4-mixed": 4.1, "w3a8-mixed": 3.1}


def apply(bench: Bench, recipe: dict[str, Any]) -> Outcome:
    graph, wanted = bench.graph, Recipe.from_dict(recipe, recipe["name"])
    if wanted.budget is not None:
        fitted = fit_budget(
            bench.checkpoint, bench.new_graph(), wanted, wanted.budget, bench.statistics, bench.trajectories
        )
        wanted = fitted.recipe
    run_passes(graph, wanted, bench.statistics)
    layers = {module.site: module for module in graph.model.modules() if isinstance(module, QuantLinear)}
    online = {}
    for group in graph.groups.values():  # the linears of an input share its transform
        first = next((layers[site] for site in group.sites if site in layers), None)
        if first is not None and first.transform is not None:
            online[first.site] = online_bits(first.transform)
    return Outcome(graph.model, {site: stored_bits(layer) for site, layer in layers.items()}, online)


def online_bits(transform: InputTransform) -> int:
    """What an engine keeps of an online transform: float32 scales and shifts, tensors of rotations found from data."""
    kept = [buffer for buffer in (transform.inverse_scale, transform.shift) if buffer is not None]
    for _, _, rotation in transform.rotations:
        kept += rotation.spec()[1].values()
    return sum(8 * tensor.element_size() * tensor.numel() for tensor in kept)


def without_modulation(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe less its rules for modulation."""
    steps = []
    for step in recipe["passes"]:
        ((name, settings),) = step.items()
        if "rules" in settings:
            kept = [rule for rule in settings["rules"] if rule.get("select") != "role:modulation"]
            settings = {**settings, "rules": kept}
        steps.append({name: settings})
    return {**recipe, "passes": steps}


def activation_bits(recipe: dict[str, Any]) -> int:
    formats = [settings["format"] for step in recipe["passes"] for name, settings in step.items() if name == "quantize"]
    return BitFormat.parse(formats[-1]).activation if formats else 16


for _name in shipped_recipes():
    _recipe = load_recipe(_name).to_json()
    _bare = without_modulation(_recipe)
    add(f"ditq {_name}", "ditq", activation_bits(_recipe), partial(apply, recipe=_recipe), _recipe)
    if _bare != _recipe:
        add(f"ditq {_name}, modulation left", "ditq", activation_bits(_bare), partial(apply, recipe=_bare), _bare)
    if _name in FEWER:
        _small = {**_bare, "budget": f"bits={FEWER[_name]}"}
        _call = partial(apply, recipe=_small)
        add(f"ditq {_name} at {FEWER[_name]} bits, modulation left", "ditq", activation_bits(_small), _call, _small)
