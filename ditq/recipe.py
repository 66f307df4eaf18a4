"""A recipe (YAML) -> an ordered list of passes with their settings, checked before anything runs.

name: w4a8
description: one line
passes:
  - smooth: {alpha: 0.5}
  - quantize: {format: w4a8}
budget: bits=4.25   # optional: choose the bits of each linear, or attentions, as `--budget` does (ditq/budget)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ditq.budget.attention import within
from ditq.budget.request import ATTENTION, Budget
from ditq.errors import DitqError
from ditq.passes import Pass, passes
from ditq.suggest import unknown_key

if TYPE_CHECKING:
    from ditq.graph import DiTGraph

SHIPPED = Path(__file__).parent / "recipes"
DEFAULT = "w4a8"
KEYS = ("name", "description", "passes", "budget", "candidates")


@dataclass(frozen=True)
class Recipe:
    """Ordered passes under a name; budget: what the formats of its `quantize` are chosen within, where they are."""

    name: str
    description: str
    passes: tuple[Pass, ...]
    budget: Budget | None = None

    def to_json(self) -> dict[str, Any]:
        """The resolved recipe, every setting written out; `Recipe.from_dict` reads it back."""
        steps = [{step.name: step.settings()} for step in self.passes]
        asked = {} if self.budget is None else {"budget": str(self.budget), "candidates": list(self.budget.candidates)}
        return {"name": self.name, "description": self.description, "passes": steps, **asked}

    def preview(self, graph: DiTGraph, look: Callable[[Pass, DiTGraph], None] | None = None) -> dict[str, list[str]]:
        """What each pass would do to each site, in order; nothing is changed. Finds in a second what would fail in an hour.

        look: is called with each pass and the graph that it gets, and may raise too.

        Raises:
            DitqError: a selector that matches nothing, settings that do not fit a site, passes in an impossible order.
        """
        plan: dict[str, list[str]] = {}
        done: dict[str, list[str]] = {}
        for step, found in self.stages(graph):
            said = step.preview(found)
            if look is not None:
                look(step, found)
            for site, what in said.items():
                before = done.setdefault(site, [])
                if spoiled := next((name for name in before if name in step.not_after), None):
                    raise DitqError(_order(self.name, step, spoiled, site))
                before.append(step.name)
                plan.setdefault(site, []).append(what)
            for site in step.folds_into(found) - said.keys():
                if "quantize" in done.get(site, ()):
                    raise DitqError(_order(self.name, step, "quantize", site))
        return plan

    def stages(self, graph: DiTGraph) -> Iterator[tuple[Pass, DiTGraph]]:
        """Each pass with the graph that it gets, as sketched by the structural passes before it; `graph` stays as it is."""
        present = graph
        for step in self.passes:
            yield step, present
            if step.structural:
                present = copy.deepcopy(present) if present is graph else present
                step.sketch(present)

    @property
    def changes_structure(self) -> bool:
        return any(step.structural for step in self.passes)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Recipe:
        """Check a recipe and make its passes.

        Raises:
            DitqError: unknown pass, setting, value or format; nothing to do.
        """
        if not isinstance(values, Mapping):
            raise DitqError(f"{where}: a recipe is a mapping with name and passes")
        for key in values:
            if key not in KEYS:
                raise DitqError(unknown_key(where, key, list(KEYS)))
        steps = values.get("passes")
        if not isinstance(steps, list) or not steps:
            raise DitqError(f"{where}: passes is empty; list at least one pass (see `ditq passes`)")
        made = tuple(_make_pass(step, where) for step in steps)
        for number, step in enumerate(made):
            if step.only_after and not any(earlier.name in step.only_after for earlier in made[:number]):
                first = " or ".join(step.only_after)
                raise DitqError(f"{where}: pass {step.name!r} works on what {first} made; put {first} before it")
            if step.trains and not any(earlier.structural and not earlier.trains for earlier in made[:number]):
                first = " or ".join(name for name, known in passes().items() if known.structural and not known.trains)
                raise DitqError(f"{where}: pass {step.name!r} trains what another changed; put {first} before it")
            if spoiled := next((earlier.name for earlier in made[:number] if step.name in earlier.spoiled_by), None):
                raise DitqError(
                    f"{where}: pass {step.name!r} changes what {spoiled!r} has measured; put it before {spoiled!r}"
                )
            if step.structural and (before := next((e.name for e in made[:number] if not e.structural), None)):
                raise DitqError(f"{where}: pass {step.name!r} is structural; put it before {before!r}")
        name, description = str(values.get("name", Path(where).stem)), str(values.get("description", ""))
        budget = _budget(values, where)
        found = cls(name, description, made, budget)
        return within(found, budget) if budget is not None and budget.kind == ATTENTION else found


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A shipped recipe by name, or a YAML file.

    Raises:
        DitqError: neither, not YAML, or anything in it that is not right.
    """
    text = str(name_or_path)
    path = SHIPPED / f"{text}.yaml"
    if not path.exists():
        path = Path(text)
        if not path.is_file():
            raise DitqError(unknown_key("recipe", text, shipped_recipes()) + " (or give a .yaml file)")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise DitqError(f"{path}: not a readable YAML file: {str(error).splitlines()[0]}") from error
    return Recipe.from_dict(values, path.name)


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with ditq."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _order(recipe: str, step: Pass, before: str, site: str) -> str:
    return f"{recipe}: pass {step.name!r} cannot follow {before!r} on {site}; change their order or what they select"


def _budget(values: Mapping[str, Any], where: str) -> Budget | None:
    asked, candidates = values.get("budget"), values.get("candidates")
    if asked is None:
        if candidates is not None:
            raise DitqError(f"{where}: candidates are what a budget chooses from; give a budget too, such as bits=4.25")
        return None
    if not isinstance(asked, str) or not (candidates is None or isinstance(candidates, (str, list))):
        raise DitqError(f"{where}: budget is {asked!r}; write it as on the command line, such as bits=4.25")
    try:
        return Budget.parse(asked, candidates)
    except DitqError as error:
        raise DitqError(f"{where}: {error}") from error


def _make_pass(step: Any, where: str) -> Pass:
    if isinstance(step, str):
        step = {step: {}}
    if not isinstance(step, Mapping) or len(step) != 1:
        raise DitqError(f"{where}: each item of passes is one `name: {{settings}}`, not {step!r}")
    name, settings = next(iter(step.items()))
    known = passes()
    if name not in known:
        raise DitqError(unknown_key(f"{where}: pass", name, known))
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise DitqError(f"{where}: the settings of pass {name!r} must be a mapping, not {settings!r}")
    described = {item.name: item for item in fields(known[name])}
    if unknown := [key for key in settings if key not in described]:
        raise DitqError(_unknown_setting(where, name, unknown[0], list(described)))
    settings = {key: _as_list(value, described[key]) for key, value in settings.items()}
    for key, value in settings.items():
        _check_value(f"{where}: pass {name!r}: {key}", value, described[key])
    made = known[name](**settings)
    try:
        made.check()
    except DitqError as error:
        raise DitqError(f"{where}: {error}") from error
    if idle := made.without_effect():
        raise DitqError(f"{where}: pass {name!r}: {idle}")
    return made


def _unknown_setting(where: str, name: str, key: str, known: list[str]) -> str:
    message = unknown_key("", key, known)
    return f"{where}: pass {name!r} has no setting {key!r}; " + message.partition("; ")[2]


def _as_list(value: Any, described: Any) -> Any:
    """A word where a list of words is due is a list of one; not where certain words are taken too, perhaps a slip of these."""
    one = isinstance(value, str) and not described.metadata.get("words") and _is_list(described)
    return [value] if one else value


def _is_list(described: Any) -> bool:
    return described.default_factory is not MISSING and isinstance(described.default_factory(), list)


def _check_value(where: str, value: Any, described: Any) -> None:
    """The value must be of the default's type and among the choices, if there are any."""
    default = described.default if described.default_factory is MISSING else described.default_factory()
    choices = described.metadata.get("choices")
    words = described.metadata.get("words") or ()
    if value in words:
        return
    if default in words:
        default = described.metadata["otherwise"]
    numeric = isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool)
    if type(value) is not type(default) and not numeric:
        raise DitqError(f"{where} is {value!r}, must be {' or '.join([_kind(default), *words])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise DitqError(f"{where} is {value!r}, must be a finite number")
    if isinstance(value, list) and default and not all(type(item) is type(default[0]) for item in value):
        raise DitqError(f"{where} is {value!r}, must be a list of {_kind(default[0]).removeprefix('a ')}s")
    if choices and value not in choices:
        raise DitqError(unknown_key(where, value, [str(choice) for choice in choices]))


def _kind(default: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list"}
    return names.get(type(default), type(default).__name__)
