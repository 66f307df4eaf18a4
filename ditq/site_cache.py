"""Codes of finished linears on disk, keyed by everything that they depend on, so an interrupted compile can resume."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ditq.calibration.storage import make_folder, writing
from ditq.numerics.codebook import LowRank, WeightCode


class FolderSiteCache:
    """One safetensors file a site in `folder`; a file that is damaged is made again."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.folder = folder / digest
        make_folder(self.folder)

    def get(self, site: str) -> WeightCode | None:
        path = self.folder / f"{site}.safetensors"
        if not path.exists():
            return None
        try:
            tensors = load_file(path)
            bits = int(tensors["bits"])
            low_rank = LowRank(tensors["down"], tensors["up"], tensors["branch_scale"]) if "down" in tensors else None
            multiplier = tensors.get("multiplier")
            return WeightCode(tensors["codes"], tensors["table"], tensors["scale"], multiplier, bits, low_rank)
        except (SafetensorError, OSError, KeyError):
            return None

    def put(self, site: str, code: WeightCode) -> WeightCode:
        tensors = {"codes": code.codes, "table": code.table, "scale": code.scale}
        if code.multiplier is not None:
            tensors["multiplier"] = code.multiplier
        if code.low_rank is not None:
            branch = code.low_rank
            tensors |= {"down": branch.down, "up": branch.up, "branch_scale": branch.scale}
        with writing(self.folder / f"{site}.safetensors") as beside:
            save_file({**{k: v.contiguous() for k, v in tensors.items()}, "bits": torch.tensor(code.bits)}, beside)
        return code
