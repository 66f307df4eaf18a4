"""How much memory there is, and tensors that stand on disk in its place."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import psutil
import torch
from torch import Tensor, nn

CGROUPS = Path("/sys/fs/cgroup")
LEAST_FREE = 4 << 30  # bytes of the CPU's memory that are taken to be free in any case
SMALL = 1 << 20  # bytes of a tensor that is not worth a file


def free_memory(device: torch.device, cgroups: Path = CGROUPS) -> int:
    """Bytes that can be had there now; of the CPU's within what a container may have, and at least 4 GiB."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # by torch, for its next tensors
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    free = min([int(psutil.virtual_memory().available), *_left_to_containers(cgroups)])
    return max(free, LEAST_FREE)


def _left_to_containers(cgroups: Path) -> Iterator[int]:
    """Bytes below the limits of control groups, both versions; files in memory that can go at once count as free."""
    for folder, most, used in (
        (cgroups, "memory.max", "memory.current"),
        (cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError, KeyError):  # no such group here, or no limit: "max"
            limit, taken = (int((folder / name).read_text()) for name in (most, used))
            lines = (folder / "memory.stat").read_text().splitlines()
            yield limit - taken + int(dict(line.split() for line in lines)["inactive_file"])


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes, with pages of files that are seen as memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def on_disk(tensor: Tensor, folder: Path, dtype: torch.dtype) -> Tensor:
    """The same values as `dtype`, in a file of their own in `folder`, seen as memory: pages that others need go back to it.

    The file has no name any more when this returns, so that it is gone with the tensor, however the process ends. Small tensors
    stay in memory.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    size = tensor.numel() * dtype.itemsize
    if size < SMALL:
        return tensor.to(dtype)
    with NamedTemporaryFile(dir=folder) as file:
        _reserve(file.fileno(), size)
        storage = torch.UntypedStorage.from_file(file.name, True, size)
    found = torch.empty(0, dtype=dtype).set_(storage, 0, tensor.shape)  # type: ignore[call-overload]
    return found.copy_(tensor)  # type: ignore[no-any-return]  # nothing of this size is allocated beside it


def copied(module: nn.Module) -> nn.Module:
    """A deep copy, of which what stands on disk in the module stands there too, in files of its own in the same folder.

    Raises:
        OSError: as `on_disk`.
    """
    made: dict[int, Any] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        if (file := tensor.untyped_storage().filename) is not None:
            values = on_disk(tensor.detach(), Path(file).parent, tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
    return deepcopy(module, made)


def _reserve(file: int, size: int) -> None:
    """Give a new file its place on the disk now: once it is seen as memory, a full disk would end the process."""
    if sys.platform == "linux":
        os.posix_fallocate(file, 0, size)
    else:
        for start in range(0, size, SMALL):
            os.write(file, bytes(min(SMALL, size - start)))
