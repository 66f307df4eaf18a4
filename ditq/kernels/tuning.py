"""Which way a product runs: measured on the GPU at hand, once a shape, and kept for later runs.

A way is a tile of the kernel that decodes as it multiplies, or of the product of 8 bits after the weight was written out in
full (decode.py), which pays for many tokens; or that product by the vendor's library; or, for few tokens, the kernel of
vector.py. Each is compared with the plain meaning before its time is taken: one that a compiler got wrong is never used.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from ditq.errors import DitqError
from ditq.kernels.matmul import Tile
from ditq.kernels.storage import StoredWeight
from ditq.numerics.carrier import E4M3

FOLDER = "DITQ_CACHE"  # environment variable: where what was measured is kept
GENERATION = 2  # of the kernels: one more, when a way is added or changed, has all ways measured again
MANY = 256  # tokens from which it may pay to write the weight out in full


@dataclass(frozen=True)
class Way:
    """tile: of the product. decoded: whether the weight is written out first. library: the vendor's product (library.py).
    vector: the kernel for few tokens (vector.py)."""

    tile: Tile
    decoded: bool = False
    library: bool = False
    vector: bool = False

    def __str__(self) -> str:
        tile = f"{self.tile.tokens} x {self.tile.outputs}{', by TMA' if self.tile.brought else ''}"
        if self.vector:
            return f"{self.tile.outputs} rows of {self.tile.step} bytes, a token at a time"
        return f"{'written in full, ' if self.decoded else ''}{'library' if self.library else tile}"


INTERPRETED = Way(Tile(32, 64))
_NO_TILE = Tile(0, 0)


def tiles(capability: int, bits: int, kind: torch.dtype, experts: int = 1) -> list[Tile]:
    """Tiles of the kernel of matmul.py tried on a GPU of that compute capability (90 for 9.0), best guess first."""
    hopper = 90 <= capability < 120  # RTX 50, 12.0, has the tensor cores and the shared memory of Ada
    if kind == torch.bfloat16:
        return [Tile(16, 32, False, 4, 4), Tile(16, 64, False, 4, 4), Tile(64, 64, False, 4, 3)]
    if bits == 8:
        step = 128 if hopper else 64
        return [Tile(64, 128, False, 4, 4, step), Tile(128, 128, False, 8, 4, step)]
    if bits == 4:
        return [Tile(128, 128, hopper, 8, 3), Tile(64, 64, hopper, 4, 3)] + [Tile(128, 64, False, 4, 3)] * (not hopper)
    planes = [Tile(128, 128, hopper, 8, 2), Tile(64, 64, hopper, 4, 2)] + [Tile(128, 64, False, 4, 2)] * (not hopper)
    # With the rows of experts to look up, the largest tile would take more registers than Ampere has.
    return planes[1:] if experts > 1 and capability < 89 else planes


def brought_tiles(capability: int) -> list[Tile]:
    """Tiles of tma_matmul.py; two programs of the first fit on a multiprocessor of Hopper."""
    if capability < 90:
        return []
    warps = 8 if capability // 10 == 10 else 4  # on a B200 four would spill
    return [Tile(128, 128, False, warps, 3, 128, True), Tile(64, 128, False, 4, 4, 128, True)]


def ways(
    capability: int, bits: int, kind: torch.dtype, tokens: int, experts: int = 1, whole_rows: bool = False
) -> list[Way]:
    """What is tried for that many tokens. whole_rows: of a plain product of 8-bit inputs with a scale a token and a row."""
    found = [Way(tile) for tile in tiles(capability, bits, kind, experts)]
    if tokens < MANY:
        return found
    if kind == torch.bfloat16:
        return [*found, Way(_NO_TILE, decoded=True, library=True)]
    decoded = bits < 8
    of_rows = [Way(tile, decoded) for tile in brought_tiles(capability)] if whole_rows else []
    if whole_rows and kind == E4M3 and capability >= 89:
        of_rows.append(Way(_NO_TILE, decoded, library=True))
    plain = [Way(tile, decoded=True) for tile in tiles(capability, 8, kind, experts)] if decoded else []
    return [*of_rows, *found, *plain]


def bucket(tokens: int) -> int:
    """Numbers of tokens that share a way: up to the next power of two, or one and a half of the one before."""
    power = 1 << max(0, tokens - 1).bit_length()
    return power * 3 // 4 if power >= 4 and tokens <= power * 3 // 4 else power


def label(
    stored: StoredWeight,
    kind: torch.dtype,
    tokens: int,
    experts: int = 1,
    whole_rows: bool = False,
    activation: str = "",
) -> str:
    """What a way is kept under."""
    form = [name for name, given in ((f"{experts} experts", experts > 1), ("rows", stored.table_a_row),
                                     ("multipliers", stored.multiplier is not None),
                                     ("scales", stored.scale.dim() == 2), ("plain", whole_rows),
                                     (activation, activation)) if given]  # fmt: skip
    shape = f"{bucket(tokens)}x{stored.rows // experts}x{stored.columns}"
    return " ".join([f"w{stored.bits}", str(kind).removeprefix("torch."), shape, *form])


def cache_file(gpu: str) -> Path:
    """Where the ways of a kind of GPU are kept, for these kernels."""
    folder = Path(os.environ.get(FOLDER) or Path.home() / ".cache" / "ditq")
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return folder / f"ways-{GENERATION}-{name}-triton-{triton.__version__}.json"


class Tuner:
    """The ways of one GPU: what was found before, and what is measured now."""

    def __init__(self, gpu: str, capability: int) -> None:
        self.gpu, self.capability = gpu, capability
        self.path = cache_file(gpu)
        self.known: dict[str, Way] = _read(self.path)

    def way(
        self,
        key: str,
        tried: Sequence[Way],
        run: Callable[[Way], Tensor],
        right: Callable[[Tensor], bool],
        cost: Callable[[Way], float],
    ) -> Way:
        """The fastest way whose result is right, measured the first time and known under `key` afterwards.

        run: compute with a way; right: whether what it gave is the product; cost: the time that it takes.

        Raises:
            DitqError: no way gives the right result on this GPU.
        """
        if key not in self.known:
            times: dict[Way, float] = {}
            for way in tried:
                try:
                    if right(run(way)):
                        times[way] = cost(way)
                except triton.runtime.OutOfResources:  # a tile for a larger GPU of the same generation
                    continue
                except RuntimeError:
                    if not way.library:
                        raise
                    continue  # a product that the vendor's library does not have for this GPU
            if not times:
                raise DitqError(
                    f"no kernel of Triton {triton.__version__} computes {key} rightly on this GPU ({self.gpu}); "
                    "install another version of triton"
                )
            self.known[key] = min(times, key=lambda way: times[way])
            _write(self.path, self.known)
        return self.known[key]


def _read(path: Path) -> dict[str, Way]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {key: Way(Tile(**entry.pop("tile")), **entry) for key, entry in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):  # none yet, or of another form: measured anew
        return {}


def _write(path: Path, known: dict[str, Way]) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps({key: asdict(way) for key, way in known.items()}, indent=1), encoding="utf-8")
        beside.replace(path)
    except OSError:  # a home that cannot be written to: measured again next time
        beside.unlink(missing_ok=True)
