"""Build an engine's plans and keep them in its folder: plans/<library>-<version>/<gpu>/, listed with hashes in engine.json.

A plan holds its weights in the form in which they are multiplied, so it is larger than the engine where codes have fewer than
8 bits. It runs on its kind of GPU with its version of the library, and nowhere else; the engine itself stays portable.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ditq.errors import DitqError
from ditq.export.engine import Engine
from ditq.export.engine_files import hash_file
from ditq.export.fusion_report import FusionReport
from ditq.export.plans.build import PlanBuilder
from ditq.export.plans.fold import fold
from ditq.export.plans.layers import Layer
from ditq.export.plans.library import FIRST, Library, libraries, library_for, present_gpu
from ditq.export.plans.proof import proof_of
from ditq.export.plans.sizes import Picture, Sizes, picture_of, shapes_of, sizes_of
from ditq.progress import ProgressSetting, progress_bar

NAME = "tensorrt"
PLANS = "plans"
TIMING = "timing.cache"
AHEAD_OF_TIME = ("sm80", "sm89", "sm120")  # what is built where there is no GPU and none was asked for


@dataclass(frozen=True)
class MadePlan:
    """A plan that was built: for which kind of GPU and by what, in how many seconds and bytes, and what it multiplies."""

    gpu: str
    library: str
    seconds: float
    bytes: int
    proof: FusionReport

    def __str__(self) -> str:
        return f"{self.gpu} by {self.library}: {self.bytes / 1e6:.1f} MB in {self.seconds:.0f} s; {self.proof}"


def kinds_of_gpu(asked: Sequence[str], numbers: Collection[str] = ()) -> list[str]:
    """The kinds of GPU to build for: those asked for; else the one that is here; else sm80, sm89 and sm120, but only
    such as multiply these kinds of numbers. None without a TensorRT, if none were asked for.

    Raises:
        DitqError: a kind that the installed libraries cannot build for.
    """
    asked = [asked] if isinstance(asked, str) else asked
    if not isinstance(asked, Sequence) or not all(isinstance(kind, str) for kind in asked):
        raise DitqError(f"gpus is {asked!r}; give kinds of GPU, such as ['sm89', 'sm120']")
    if not asked:
        if not libraries():
            return []
        asked = _able(_here(), numbers) or _able(AHEAD_OF_TIME, numbers)
    kinds = list(dict.fromkeys(kind.lower().replace("sm_", "sm") for kind in asked))
    for kind in kinds:
        library_for(kind)
    return kinds


def _here() -> list[str]:
    try:
        return [present_gpu()]
    except DitqError:
        return []


def _able(kinds: Sequence[str], numbers: Collection[str]) -> list[str]:
    return [kind for kind in kinds if all(multiplies(kind, number) for number in numbers)]


def multiplies(gpu: str, number: str) -> bool:
    """Whether a kind of GPU has a product of this kind of numbers, of `PlannedMatMul.kind`."""
    return int(gpu.removeprefix("sm")) >= FIRST.get(number, 0)


def check_numbers(site: str, number: str, gpus: Sequence[str]) -> None:
    """Raise DitqError for a product that one of these kinds of GPU does not have."""
    gpu = next((kind for kind in gpus if not multiplies(kind, number)), None)
    if gpu is not None:
        name, instead = {"float8": ("FP8", "carrier: int8"), "float4": ("FP4", "another format than nvfp4")}[number]
        raise DitqError(
            f"{site}: multiplies {name} numbers, which {gpu} has no product of; set {instead} in the recipe"
        )


def make_plans(
    engine: Engine, gpus: Sequence[str] = (), sizes: str | None = None, show: ProgressSetting = None
) -> tuple[Engine, list[MadePlan]]:
    """Build the plans of an engine that was compiled for TensorRT, for these kinds of GPU: (the engine as it is then, them).

    Args:
        sizes: of axes, over the engine's own: `image_tokens=256:1024:4096`, smallest, usual and largest.

    Raises:
        DitqError: it was compiled for another target, no library builds for that GPU, or the library refuses the graph.
    """
    if engine.manifest["target"] != NAME:
        raise DitqError(
            f"{engine.name}: was compiled for {engine.manifest['target']}, which has no plans; compile with --target {NAME}"
        )
    products = {entry.kind: entry.site for entry in engine.planned}
    kinds = kinds_of_gpu(gpus, products)
    if not kinds:
        raise DitqError("no TensorRT is installed; pip install tensorrt-rtx-cu13, or tensorrt")
    for number, site in products.items():
        check_numbers(site, number, kinds)
    wanted, picture = sizes_of(engine, sizes), picture_of(engine, sizes)
    known = {kind: library_for(kind) for kind in kinds}
    made = []
    with progress_bar("plans", len(kinds) * len(engine.graphs), show) as bar:
        for library in dict.fromkeys(known.values()):
            some = [kind for kind in kinds if known[kind] == library]
            for work in _built(engine, library, some, wanted, picture, bar.advance):
                engine = _kept(engine, library, work, wanted, picture)
                made.append(work.made(engine, library))
    return engine, made


@dataclass
class _Work:
    """What was built for one kind of GPU so far: files by graph, relative to the engine, and layers by graph."""

    gpu: str
    seconds: float = 0.0
    bytes: int = 0
    files: dict[str, str] = field(default_factory=dict)
    layers: dict[str, list[Layer]] = field(default_factory=dict)

    def made(self, engine: Engine, library: Library) -> MadePlan:
        return MadePlan(self.gpu, str(library), self.seconds, self.bytes, proof_of(engine, self.layers))


def _built(
    engine: Engine,
    library: Library,
    kinds: Sequence[str],
    sizes: Sizes,
    picture: Picture | None,
    advance: Callable[[], None],
) -> list[_Work]:
    """Build every graph for every kind, each plan written as soon as it is there."""
    place = engine.folder / PLANS / library.folder
    works = [_Work(kind) for kind in kinds]
    timing = (place / TIMING).read_bytes() if (place / TIMING).is_file() else b""
    for graph in engine.graphs:
        folded = fold(engine.folder / graph, None if picture is None else picture.constants)
        builder = PlanBuilder(library, engine.name, folded, shapes_of(engine, graph, sizes))
        for work in works:
            start = time.perf_counter()
            built = builder.build(work.gpu, timing)
            timing = built.timing
            path = place / work.gpu / f"{Path(graph).stem}.plan"
            _write(engine, path, built.plan)
            work.seconds += time.perf_counter() - start
            work.bytes += len(built.plan)
            work.files[graph] = str(path.relative_to(engine.folder))
            work.layers[graph] = [layer for layer in built.layers if layer.multiplies]
            advance()
    _write(engine, place / TIMING, timing)
    return works


def _kept(engine: Engine, library: Library, work: _Work, sizes: Sizes, picture: Picture | None) -> Engine:
    """The plan written into engine.json, in the place of an older one of its kind."""
    layers = engine.folder / PLANS / library.folder / work.gpu / "layers.json"
    found = {graph: [asdict(layer) for layer in built] for graph, built in work.layers.items()}
    _write(engine, layers, (json.dumps(found, indent=1) + "\n").encode())
    entry = {
        "gpu": work.gpu,
        "library": library.name,
        "version": library.version,
        "sizes": {axis: list(three) for axis, three in sizes.items()},
        "picture": None if picture is None else [picture.height, picture.width],
        "files": work.files,
        "layers": str(layers.relative_to(engine.folder)),
    }
    same = ("gpu", "library", "version")
    others = [plan for plan in engine.plans if any(plan[key] != entry[key] for key in same)]
    new = {name: hash_file(engine.folder / name) for name in (*work.files.values(), str(entry["layers"]))}
    return engine.update(plans=[*others, entry], files=engine.files | new)


def _write(engine: Engine, path: Path, content: bytes) -> None:
    """Write a file beside its place and put it there in one step."""
    beside = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise DitqError(f"{engine.folder}: the plan cannot be written: {error.strerror or error}") from error
