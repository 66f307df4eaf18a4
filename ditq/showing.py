"""What the commands that only show things print: inspect, doctor, passes, targets. Text and tables as data."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ditq.calibration.record import Trajectories
from ditq.calibration.statistics import INDEX, TRAJECTORIES, Statistics
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.export.agreement import model_agreement
from ditq.export.engine import MANIFEST, TEXT_GRAPH, Engine
from ditq.export.float64 import float64_agreement
from ditq.export.fusion_report import FusionReport
from ditq.export.loader import load_engine, only_picture
from ditq.export.providers.available import is_doubled
from ditq.export.targets import target, targets
from ditq.export.targets.torch import rebuild
from ditq.inspection import Inspection, inspect_checkpoint, made_up_inputs
from ditq.passes import passes
from ditq.passes.attention_conversion import SMALL_SHARE, AttentionConversion
from ditq.recipe import Recipe, load_recipe
from ditq.recorded_family import with_family
from ditq.suggest import unknown_key

Table = tuple[list[str], list[list[str]]]
Lines = list[str | Table]

MOVED = 0.05  # ||difference|| / ||output||: some dozens of roundings to bfloat16, and integers that they move by one
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "triton",
    "nvidia-cudnn-frontend",
    "tensorrt",
    "tensorrt_rtx",
)


def show(
    what: str, recipe: str, config: Path | None = None, tokens: int | None = None, stats: Path | None = None
) -> tuple[Lines, dict[str, Any]]:
    """What `ditq inspect` prints, and the same as JSON, for a checkpoint, an engine or a statistics folder. `tokens`: image
    tokens of the calls whose cost is counted; `stats`: of a calibration, which shows the calls of a model of no family.
    """
    folder = Path(what)
    if (folder / MANIFEST).is_file():
        return _show_engine(Engine.open(folder))
    if (folder / INDEX).is_file():
        return _show_statistics(Statistics.open(folder))
    checkpoint = Checkpoint.open(what, config)
    if stats is not None:
        checkpoint = with_family(checkpoint, Trajectories.open(stats / TRAJECTORIES, checkpoint.fingerprint()))
    found = inspect_checkpoint(checkpoint, load_recipe(recipe), tokens)
    values = found.to_json()
    total = max(sum(row["macs"] for row in values["roles"]), 1)
    roles = [
        [row["role"], str(row["linears"] or ""), f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e6:.1f}",
         f"{100 * row['macs'] / total:.1f} %"]
        for row in values["roles"]
    ]  # fmt: skip
    sites = [
        [site["site"], site["role"], site["kind"], "x".join(map(str, site["shape"])), ", ".join(site["plan"]) or "kept"]
        for site in values["sites"]
        if site["role"] != "unused"
    ]
    head = f"{values['checkpoint']}: {values['class']}, {values['parameters'] / 1e6:.2f} M parameters"
    return [
        f"{head}, {len(values['blocks'])} blocks, family {values['family'] or 'unknown'}",
        "",
        (["linear", "role", "kind", "shape", f"with recipe {found.recipe.name}"], sites),
        "",
        (["role", "linears", "M parameters", "M multiply-adds", "share"], roles),
        "",
        *_costs(found, values),
        "",
        _online_cost(found.recipe.name, found.online, total),
        *_budget(found.recipe),
        _text_share(found, total),
        _needed(values),
    ], values


def _needed(values: Mapping[str, Any]) -> str:
    """What a compile takes, as far as the structure tells."""
    return (
        f"calibration keeps about {values['statistics_bytes'] / 1e9:.2g} GB of statistics on disk beside the recorded calls; "
        f"compiling holds the weights in float32, {4 * values['parameters'] / 1e9:.2g} GB "
        "of memory, or of disk where that is more than half of what is free"
    )


def _costs(found: Inspection, values: Mapping[str, Any]) -> Lines:
    """What a call costs before and after the recipe, by part; and the least that it may take on some devices."""
    before, after = values["costs"]["before"], values["costs"]["after"]
    parts: list[list[str]] = [
        [part, f"{count / 1e6:.1f}", f"{after['multiply_adds'][part] / 1e6:.1f}"]
        for part, count in before["multiply_adds"].items()
    ]
    for name, key in (("all parameters", "parameters"), ("activated parameters", "activated_parameters")):
        parts.append([f"{name}, M", f"{before[key] / 1e6:.2f}", f"{after[key] / 1e6:.2f}"])
    shares = [f"{100 * costs['attention_share']:.1f}" for costs in (before, after)]
    parts.append(["attention scores in blocks, %", *shares])
    converts = any(isinstance(step, AttentionConversion) for step in found.recipe.passes)
    few = [
        f"attention is {shares[0]} % of a block's multiply-adds at this size: converting it spares little; count larger "
        "pictures with --tokens"
    ]
    times = [
        [row["device"], f"{row['before_ms']:.3f}", f"{row['after_ms']:.3f}", row["source"]]
        for row in values["predicted_at_best"]
    ]
    recipe = f"with {found.recipe.name}"
    return [
        (["M multiply-adds of one sample", "now", recipe], parts),
        "",
        (["predicted at best, ms", "now", recipe, "peaks from"], times),
        "predicted from multiply-adds and bytes of linears and attentions at a device's peaks, not measured",
        *(few if converts and before["attention_share"] < SMALL_SHARE else ()),
    ]


def _budget(recipe: Recipe) -> list[str]:
    if recipe.budget is None:
        return []
    return [f"recipe {recipe.name} has the budget {recipe.budget}: `ditq compile` chooses the bits of each linear"]


def _online_cost(recipe: str, online: tuple[int, int], total: int) -> str:
    least, most = (f"{100 * count / total:.1f}" for count in online)
    return f"recipe {recipe} adds {least if least == most else f'{least} to {most}'} % multiply-adds at run time"


def _text_share(found: Inspection, total: int) -> str:
    if not found.text_sites:
        return "no keys and values are made of the text alone: every linear runs at each step"
    macs = sum(found.graph.sites[site].macs for site in found.text_sites)
    return (
        f"{len(found.text_sites)} linears see only the text and run once for a prompt: {macs / 1e6:.1f} M multiply-adds, "
        f"{100 * macs / total:.1f} % of a call"
    )


def _show_engine(engine: Engine) -> tuple[Lines, dict[str, Any]]:
    manifest = engine.manifest
    kinds = {entry.site: entry.kind for entry in engine.planned}
    of_text = {entry.site for entry in engine.planned if entry.graph == TEXT_GRAPH}
    sites = [
        [
            site,
            f"w{spec['bits']}a{spec['activation']['bits']}",
            spec["codebook"],
            kinds.get(site, ""),
            "prompt" if site in of_text else "step",
        ]
        for site, spec in engine.sites.items()
    ]
    for name, spec in engine.attentions.items():
        products = {entry.kind for entry in engine.planned if entry.site.rpartition("/")[0] == name}
        sites.append([name, f"{spec['number']} {spec['parts']}", "", ", ".join(sorted(products)), "step"])
    files = [[name, f"{entry['bytes'] / 1e6:.2f} MB"] for name, entry in engine.files.items()]
    inputs = [[item["name"], item["dtype"], str(item["shape"])] for item in manifest["inputs"]]
    measured = manifest.get("measured") or {}
    summary = [[name, f"{value}"] for name, value in (measured.get("summary") or {}).items() if value is not None]
    lines: Lines = [
        f"{engine.name}: {manifest['class_name']} from {manifest['source']['name']}, recipe "
        f"{manifest['recipe'].get('name')}, target {manifest['target']}",
        "",
        (["linear", "format", "codebook", "planned as", "runs each"], sites),
        "",
        (["file", "size"], files),
        "",
        (["input", "dtype", "shape"], inputs),
    ]
    if summary:
        lines += ["", (["measured", ""], summary)]
    return lines, dict(manifest)


def _show_statistics(statistics: Statistics) -> tuple[Lines, dict[str, Any]]:
    rows, values = [], {}
    for name in statistics.groups:
        found = statistics.groups[name]
        values[name] = {"width": found.width, "rms": found.rms(), "absmax": float(found.absmax_all.max()),
                        "crest": found.mean_crest}  # fmt: skip
        rows.append(
            [name, str(found.width), f"{found.rms():.3g}", f"{values[name]['absmax']:.3g}", f"{found.mean_crest:.2f}"]
        )
    metadata = statistics.metadata
    head = (
        f"statistics of {metadata['checkpoint'].get('name')}: {metadata.get('condition_count')} conditions, "
        f"{metadata.get('steps')} steps, {statistics.bins} bins"
    )
    return [head, "", (["input", "width", "RMS", "largest", "crest factor"], rows)], {**metadata, "inputs": values}


def show_passes(name: str | None) -> Lines:
    """All passes, or the settings of one with defaults, choices and meaning."""
    known = passes()
    if name is None:
        return [(["pass", "what it does"], [[key, _first_line(found.__doc__)] for key, found in known.items()])]
    if name not in known:
        raise DitqError(unknown_key("pass", name, known))
    made, rows = known[name](), []
    for item in fields(known[name]):
        choices = item.metadata.get("choices")
        meaning = item.metadata["help"] + (f"; one of {', '.join(map(str, choices))}" if choices else "")
        rows.append([item.name, repr(getattr(made, item.name)), meaning])
    text = "\n".join(line.removeprefix("    ") for line in (known[name].__doc__ or "").strip().splitlines())
    return [text, "", (["setting", "default", "meaning"], rows)]


def show_targets() -> Table:
    """All export targets and whether they work here."""
    rows = []
    for name, found in targets().items():
        works, why = found.available()
        rows.append([name, "yes" if works else "no", why, found.description])
    return ["target", "works here", "", "what it is"], rows


def diagnose(engine: str | None, float64: bool = False) -> tuple[list[str], bool]:
    """What is installed and what works; of an engine, which planned integer products really are and whether it computes
    what it means, if so asked in float64 as well. And: all well?

    Raises:
        DitqError: no engine in that folder; or float64 without an engine, or for one that has no graph.
    """
    if float64 and engine is None:
        raise DitqError("--float64 compares an engine with torch; give its folder")
    lines = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    for package in PACKAGES:
        try:
            lines.append(f"{package:15s} {_version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package:15s} not installed")
    lines += _providers()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    lines += [f"GPU             {torch.cuda.get_device_name(i)}" for i in range(count)] or [
        "GPU             none that torch sees"
    ]
    for name, found in targets().items():
        works, why = found.available()
        lines.append(f"target {name}: {'works' if works else 'does not work'} ({why})")
    if engine is None:
        return lines, True
    opened = Engine.open(engine)
    if not opened.graphs and not float64:
        said, well = _without_graph(opened)
        return [*lines, f"{engine}: {said}"], well
    if not opened.graphs:
        raise DitqError(f"{engine}: --float64 compares a graph with torch; target {opened.manifest['target']} has none")
    proven = _proofs(opened)
    for where, proof in proven.items():
        lines.append(f"{engine}{f' for {where}' if where else ''}: {proof.counted}")
        lines += [f"not fused: {site} runs as {kernel}" for site, kernel in proof.not_fused.items()]
        lines += [f"unplanned: {name} multiplies {types}" for name, types in proof.unplanned.items()]
    own = target(opened.manifest["target"])
    if own.plans and not proven:
        lines.append(f"{engine}: has no plan yet; build one with: ditq plan {engine} --gpu sm89")
    model: Any = rebuild(opened)
    inputs = _a_call(opened, model)
    agreement = model_agreement(opened, inputs, model=model)
    runs = "" if own.available()[0] else f" (its graph run by ONNX Runtime, since {own.name} does not run here)"
    lines.append(f"{engine}: {agreement}{runs}")
    well = all(proof.complete for proof in proven.values()) and agreement.holds
    if float64:
        meant = float64_agreement(opened, inputs)
        lines.append(f"{engine}: {meant}")
        well &= meant.holds
    return lines, well


def _providers() -> list[str]:
    """What the installed ONNX Runtime can run graphs on, and whether two packages of it are in each other's way."""
    try:
        import onnxruntime
    except ImportError:
        return []
    lines = [f"{'providers':15s} {', '.join(onnxruntime.get_available_providers())}"]
    if is_doubled():
        lines.append(
            "onnxruntime and onnxruntime-gpu hold the same module, of which the one installed last is left; "
            "pip uninstall both, then pip install one of them"
        )
    return lines


def _proofs(engine: Engine) -> Mapping[str, FusionReport]:
    """By what the engine's target built; nothing where that cannot tell or has built nothing yet."""
    prove = target(engine.manifest["target"]).prove
    return {} if prove is None else prove(engine)


def _without_graph(engine: Engine) -> tuple[str, bool]:
    """What can be said here of an engine for a target that builds the model itself, and whether all is well."""
    name = engine.manifest["target"]
    works, why = target(name).available()
    if not works:
        return f"sound; it is for target {name}, which does not work here ({why}), so its answer was not checked", True
    model: Any = rebuild(engine)
    inputs = _a_call(engine, model)
    meaning = model(**inputs, return_dict=False)[0]
    found = load_engine(engine.folder, name)(**inputs, return_dict=False)[0].to(meaning)
    error = float((found - meaning).norm() / meaning.norm())
    return (
        f"target {name} differs from the exact meaning by {error:.1e}, at most {MOVED:.0e} is rounding",
        error < MOVED,
    )


def _a_call(engine: Engine, model: Any) -> dict[str, Any]:
    """Inputs to compare answers for."""
    made_up = partial(made_up_inputs, engine.name, type(model).__name__, model.config, picture=only_picture(engine))
    return engine.example or made_up()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        if package in ("onnxruntime", "tensorrt_rtx", "tensorrt"):  # wheels whose name differs from the module's
            try:
                return str(importlib.import_module(package).__version__)
            except ImportError:
                pass
        raise


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0]
