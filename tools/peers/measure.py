"""One row, from the original model to numbers; runs in a process of its own."""

from __future__ import annotations

import hashlib
import json
import re
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ditq.report import metrics
from ditq.report.alignment import LinearBlocks
from ditq.report.layers import per_layer_sqnr
from ditq.report.measure import resident_peak
from ditq.report.perceptual import st_lpips
from tools.peers.bench import SEED, Bench, Place
from tools.peers.draw import draw
from tools.peers.row import Outcome, Row, rows

FULL = 16  # bits that a weight left in full precision counts


def run_row(name: str, place: dict[str, Any], path: str) -> None:
    """In a process of its own: measure a row and write its numbers, whole or not at all."""
    warnings.simplefilter("ignore")  # libraries warn of each other's versions, once a layer
    row, bench = rows()[name], Bench(Place(**place))
    try:
        result: dict[str, Any] = measure(row, bench)
    except Exception as error:  # whatever a library raises is what the table says of it
        Path(path).with_suffix(".log").write_text(traceback.format_exc(), encoding="utf-8")
        reason = (str(error).strip().splitlines() or [""])[0][:160].replace("|", "/")
        result = {"name": name, "peer": row.peer, "failed": f"{type(error).__name__}: {reason}"}
    result["key"] = key(row, bench)
    beside = Path(path).with_suffix(".new")
    beside.write_text(json.dumps(result, indent=1), encoding="utf-8")
    beside.rename(path)


def key(row: Row, bench: Bench) -> str:
    """What a cached result depends on."""
    place = bench.place
    parts = [row.name, row.settings, bench.checkpoint.fingerprint(), place.limit, place.batch, SEED, bench.settings]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def measure(row: Row, bench: Bench) -> dict[str, Any]:
    """All numbers of a row, as JSON."""
    torch.manual_seed(0)
    _ = bench.graph, bench.statistics, bench.token_sites  # what every row needs is no row's time or memory
    memory, began, worked = _Memory(), time.perf_counter(), time.process_time()
    with torch.no_grad():
        outcome = row.apply(bench)
    seconds, cpu, peak = time.perf_counter() - began, time.process_time() - worked, memory.growth()
    began = time.perf_counter()
    with torch.no_grad():
        check_untouched(bench, outcome.model)
        sqnr = layer_sqnr(bench, outcome.model)
        drawn = draw(
            bench.pipeline(outcome.model), bench.conditions, bench.settings, SEED, bench.place.batch
        )  # fmt: skip
    return {
        "name": row.name,
        "peer": row.peer,
        "activation": row.activation,
        **bit_counts(bench, outcome),
        **quality(bench, drawn.pictures, drawn.latents),
        "layer_sqnr": sqnr,
        "compile_minutes": seconds / 60,
        "compile_cpu_minutes": cpu / 60,
        "compile_peak_mb": peak / 1e6,
        "draw_seconds": time.perf_counter() - began,
        "note": outcome.note,
    }


def check_untouched(bench: Bench, model: nn.Module) -> None:
    """No row may touch a linear outside the blocks: a library's patterns match more than they seem to.

    Raises RuntimeError for an embedder or final linear that computes something else than the original's.
    """
    original = bench.model()
    for name, site in bench.graph.sites.items():
        if site.role not in ("embedder", "final"):
            continue
        x = torch.randn(4, site.in_features, generator=torch.Generator().manual_seed(0))
        before, after = original.get_submodule(name)(x), model.get_submodule(name)(x)
        if not torch.allclose(before, after, atol=1e-5, rtol=1e-4):
            raise RuntimeError(f"{name} was changed too, which is outside the blocks")


def bit_counts(bench: Bench, outcome: Outcome) -> dict[str, Any]:
    """Bits a weight over the token linears and over all linears of the blocks; linears left alone count 16 bits each."""
    sizes = {name: site.parameters for name, site in bench.graph.sites.items()}
    counted = {"bits": bench.token_sites, "bits_all": [*bench.token_sites, *bench.modulation_sites]}
    found: dict[str, Any] = {
        key: sum(outcome.stored.get(site, FULL * sizes[site]) for site in sites) / sum(sizes[site] for site in sites)
        for key, sites in counted.items()
    }
    stored = [outcome.stored[site] / sizes[site] for site in bench.modulation_sites if site in outcome.stored]
    found["modulation"] = sum(stored) / len(stored) if stored else FULL
    tokens = sum(sizes[site] for site in bench.token_sites)
    found["online"] = sum(outcome.online.values()) / tokens
    covered = set(outcome.stored)
    found["covers"] = {
        "token": f"{len(covered & set(bench.token_sites))}/{len(bench.token_sites)}",
        "modulation": f"{len(covered & set(bench.modulation_sites))}/{len(bench.modulation_sites)}",
        "left": sorted(set(bench.token_sites) - covered),
    }
    return found


def quality(bench: Bench, pictures: np.ndarray, latents: np.ndarray) -> dict[str, Any]:
    """PSNR, SSIM, ST-LPIPS and relative error of the last latents: means over the pictures, and the worst PSNR."""
    original = bench.originals
    pairs = list(zip(original.pictures, pictures, strict=True))
    ratios = [metrics.psnr(a, b) for a, b in pairs]
    distances = [st_lpips(a, b) for a, b in pairs]
    known = [value for value in distances if value is not None]
    errors = [
        metrics.relative_error(torch.from_numpy(a), torch.from_numpy(b))
        for a, b in zip(original.latents, latents, strict=True)
    ]
    return {
        "psnr": float(np.mean(ratios)),
        "psnr_worst": float(min(ratios)),
        "psnr_error": float(np.std(ratios) / max(1, len(ratios) - 1) ** 0.5),
        "ssim": float(np.mean([metrics.ssim(a, b) for a, b in pairs])),
        "st_lpips": float(np.mean(known)) if known else None,
        "latent_error": float(np.mean(errors)),
        "pictures": len(pairs),
    }


def layer_sqnr(bench: Bench, model: nn.Module) -> float | None:
    """Mean over the token linears of their outputs' signal-to-noise ratio in dB, both models on the same calls."""
    names = {name for name, _ in model.named_modules()} | {getattr(m, "site", "") for m in model.modules()}
    sites = [site for site in bench.token_sites if site in names]
    values = {site: item.head_width for item in bench.graph.attentions.values() for site in item.values}
    alignments = {site: LinearBlocks(width) for site, width in values.items()}
    results = per_layer_sqnr(
        bench.model(), model, bench.calls(), sites=sites, alignments=alignments, progress=False
    )  # fmt: skip
    finite = [result.sqnr_db for result in results if np.isfinite(result.sqnr_db)]
    return float(np.mean(finite)) if finite else None


class _Memory:
    """How far the resident size of this process has risen above where it stood, in bytes."""

    def __init__(self) -> None:
        reset = Path("/proc/self/clear_refs")
        if reset.exists():
            reset.write_text("5")  # puts the mark of the highest resident size back to the present one
        self.before = resident_peak()

    def growth(self) -> int:
        return max(0, resident_peak() - self.before)


def slug(name: str) -> str:
    """A file name for a row."""
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
