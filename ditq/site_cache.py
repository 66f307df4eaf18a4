"""Codes of finished linears on disk, keyed by everything that they depend on, so an interrupted compile can resume."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ditq.calibration.storage import make_folder, writing
from ditq.numerics.codebook import LowRank, WeightCode
from ditq.numerics.rounding import GptqCode


class FolderSiteCache:
    """One safetensors file a site in `folder`; a file that is damaged is made again."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = folder / digest
        make_folder(self.folder)

    def get(self, site: str) -> WeightCode | None:
        tensors = self.get_tensors(site)
        if tensors is None or not {"codes", "table", "scale", "bits", "codebook"} <= tensors.keys():
            return None
        low_rank = LowRank(tensors["down"], tensors["up"], tensors["branch_scale"]) if "down" in tensors else None
        multiplier, bits = tensors.get("multiplier"), int(tensors["bits"])
        codebook = bytes(tensors["codebook"].tolist()).decode()
        found = (tensors["codes"], tensors["table"], tensors["scale"], multiplier, bits, low_rank, codebook)
        return GptqCode(*found, float(tensors["damping"])) if "damping" in tensors else WeightCode(*found)

    def adopt(self, site: str, other: FolderSiteCache) -> None:
        """Take over another cache's file of a site, whose code is known to be the same here."""
        found, place = other.folder / f"{site}.safetensors", self.folder / f"{site}.safetensors"
        if found.exists() and not place.exists():
            with writing(place) as beside:
                shutil.copyfile(found, beside)

    def put(self, site: str, code: WeightCode) -> WeightCode:
        tensors = {"codes": code.codes, "table": code.table, "scale": code.scale, "bits": torch.tensor(code.bits)}
        tensors["codebook"] = torch.tensor(list(code.codebook.encode()), dtype=torch.uint8)
        if isinstance(code, GptqCode):
            tensors["damping"] = torch.tensor(code.damping, dtype=torch.float64)
        if code.multiplier is not None:
            tensors["multiplier"] = code.multiplier
        if code.low_rank is not None:
            branch = code.low_rank
            tensors |= {"down": branch.down, "up": branch.up, "branch_scale": branch.scale}
        self.put_tensors(site, tensors)
        return code

    def get_tensors(self, name: str) -> dict[str, Tensor] | None:
        path = self.folder / f"{name}.safetensors"
        try:
            return load_file(path) if path.exists() else None
        except (SafetensorError, OSError):
            return None

    def put_tensors(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        with writing(self.folder / f"{name}.safetensors") as beside:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside)
        return tensors
