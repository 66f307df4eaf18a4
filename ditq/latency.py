"""How long parts of a model take as an engine runs them: linears in 8 bits, in ONNX Runtime on this processor."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ditq.export.session import open_session, session_options
from ditq.export.write import write_engine
from ditq.nn import ActivationFormat, QuantLinear
from ditq.numerics.codebooks import CODEBOOKS
from ditq.numerics.weight_code import encode

ROUNDS = 7


class _Alone(nn.Module):
    """A part as a model of its own."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, hidden_states: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (self.part(hidden_states),)


def coded(module: nn.Module, bits: int = 8) -> nn.Module:
    """The module with its linears in so many bits, in place, inputs in 8 with a scale a token; a router stays as it is."""
    codebook = CODEBOOKS["uniform" if bits == 8 else "twin_log_shared"]
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and not name.endswith("router"):
            code = encode(linear.weight.detach(), codebook(linear.weight.detach(), bits))
            module.set_submodule(name, QuantLinear(name, code, linear.bias, ActivationFormat(8, "token")))
    return module


def seconds_of(parts: Sequence[nn.Module], x: Tensor, rounds: int = ROUNDS) -> list[float]:
    """Seconds of one call of each part for x [B, T, C]: the median of rounds in which all take turns, on torch's threads.

    The parts, which are left as they are, take x and give one tensor.
    """
    x = x.detach().float().cpu()
    sessions = []
    with tempfile.TemporaryDirectory(prefix="ditq-latency-") as folder:
        for number, part in enumerate(parts):
            model = coded(_Alone(copy.deepcopy(part).float().cpu()).eval().requires_grad_(False))
            engine = write_engine(
                Path(folder) / str(number), model, name="part", config={}, class_name="Part", family=None,
                fingerprint="", recipe={}, inputs={"hidden_states": x}, axes={},
            )  # fmt: skip
            sessions.append(open_session(engine.folder / engine.graphs[0], session_options(torch.get_num_threads())))
        found: list[list[float]] = [[] for _ in sessions]
        for number in range(rounds + 1):
            for session, times in zip(sessions, found, strict=True):
                began = time.perf_counter()
                session.run(None, {"hidden_states": x.numpy()})
                if number:  # the first call is not counted
                    times.append(time.perf_counter() - began)
    return [statistics.median(times) for times in found]
