"""What a budget asks for, read from one word: `size=4.2MB`, `bits=3.5`, `psnr>=24` or `attention_macs=0.3`; and the
candidates' names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from ditq.errors import DitqError
from ditq.suggest import unknown_key

Kind = Literal["size", "bits", "psnr", "attention_macs"]
ATTENTION = "attention_macs"

CANDIDATES = ("w2", "w3", "w4", "w5", "w6", "w8")
KEEP = "keep"
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_REQUEST = re.compile(
    r"\s*(?P<what>[a-z_]+)\s*(?P<sign>>=|<=|=)\s*(?P<number>[0-9]*\.?[0-9]+)\s*(?P<unit>[A-Za-z]*)\s*"
)
_CANDIDATE = re.compile(r"w(?P<bits>[2-8])(g(?P<group>0|[1-9][0-9]{0,3}))?(r(?P<rank>[1-9][0-9]{0,3})(?P<percent>%)?)?")
_SIGNS: dict[str, tuple[str, ...]] = {
    "size": ("=", "<="),
    "bits": ("=", "<="),
    "psnr": ("=", ">="),
    ATTENTION: ("=", "<="),
}
_EXAMPLES = "size=4.2MB, bits=3.5, psnr>=24 or attention_macs=0.3"


@dataclass(frozen=True)
class Budget:
    """At most `value` bytes of weights on disk ('size') or bits a weight ('bits'), or at least `value` dB ('psnr'); or at most
    that share of the multiply-adds of softmax attention ('attention_macs').

    candidates: what a linear may become: `w2` .. `w8`, bits of its weights; `w4g64`, the same with a scale for every 64
    columns; `w4r8`, beside a low-rank branch of rank 8, `w4r2%` of 2 % of the weight's shorter side; or `keep`, as it is.
    """

    kind: Kind
    value: float
    candidates: tuple[str, ...] = CANDIDATES

    def __post_init__(self) -> None:
        """Raises DitqError for an unknown kind, a value that is no number above 0, and candidates as `parse_candidates`."""
        if self.kind not in _SIGNS:
            raise DitqError(unknown_key("budget", str(self.kind), list(_SIGNS)))
        number = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        if not number or not self.value > 0 or not math.isfinite(self.value):
            raise DitqError(f"budget {self.kind}: is {self.value!r}; give a number above 0")
        object.__setattr__(self, "candidates", parse_candidates(self.candidates))

    @classmethod
    def parse(cls, text: str, candidates: str | Iterable[str] | None = None) -> Budget:
        """`size=4.2MB`, `bits=3.5`, `psnr>=24`, `attention_macs=0.3`; candidates as a list or as `w3,w4,keep`.

        Raises:
            DitqError: neither of these, an unknown unit, a value that is not above 0, or unknown candidates.
        """
        match = _REQUEST.fullmatch(text)
        if match is None or match["what"] not in _SIGNS:
            raise DitqError(f"budget {text!r}: not understood; write {_EXAMPLES}")
        kind: Kind = match["what"]  # type: ignore[assignment]
        if match["sign"] not in _SIGNS[kind]:
            raise DitqError(f"budget {text!r}: {kind} takes {' or '.join(_SIGNS[kind])}; write {_EXAMPLES}")
        value = float(match["number"])
        unit = match["unit"].upper()
        if kind == "size":
            if unit not in UNITS:
                raise DitqError(f"budget {text!r}: a size needs a unit: B, KB, MB, GB, KiB, MiB or GiB")
            value *= UNITS[unit]
        elif unit and (kind, unit) != ("psnr", "DB"):
            raise DitqError(f"budget {text!r}: {kind} takes no unit; write {_EXAMPLES}")
        if not value > 0 or not math.isfinite(value):
            raise DitqError(f"budget {text!r}: must be above 0")
        if kind == ATTENTION and value >= 1:
            raise DitqError(f"budget {text!r}: is a share of the multiply-adds of softmax attention, must be below 1")
        if kind == ATTENTION and candidates is not None:
            raise DitqError(
                f"budget {text!r}: candidates are formats of linears; what attentions may become the recipe says"
            )
        return cls(kind, value, parse_candidates(candidates))

    def __str__(self) -> str:
        """What `parse` reads as the same budget."""
        if self.kind == "size":
            in_short = f"{self.value / 1e6:g}"
            exact = "e" not in in_short and round(float(in_short) * 1e6) == round(self.value)
            return f"size={in_short}MB" if exact else f"size={round(self.value)}B"
        number = format(Decimal(f"{self.value!r}"), "f")  # never with an exponent
        number = number.rstrip("0").rstrip(".") if "." in number else number
        return f"psnr>={number}" if self.kind == "psnr" else f"{self.kind}={number}"


def parse_candidates(names: str | Iterable[str] | None) -> tuple[str, ...]:
    """Candidate formats of the weights, in the order of their bits, `keep` last.

    Raises:
        DitqError: an unknown name, or fewer than two of them.
    """
    if names is None:
        return CANDIDATES
    given = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    for name in given:
        if not isinstance(name, str):
            raise DitqError(f"budget: a candidate is {name!r}, must be a word such as w4")
        if name != KEEP:
            Candidate.parse(name)
    known = sorted({name for name in given if name != KEEP}, key=lambda name: Candidate.parse(name).order)
    chosen = (*known, *([KEEP] if KEEP in given else []))
    if len(chosen) < 2:
        raise DitqError("budget: there is nothing to choose between; give at least two candidates, such as w3,w4,w6")
    return chosen


@dataclass(frozen=True)
class Candidate:
    """Bits of weights; columns that share a scale, 0 for the whole row; and the branch beside them: of a rank, or of a share of
    the shorter side. What is None is as the recipe says."""

    bits: int
    group: int | None = None
    rank: int | None = None
    share: float | None = None

    @property
    def order(self) -> tuple[float, ...]:
        """By bits, then by what the branch and the scales take."""
        groups = -1.0 if self.group is None else 1 / self.group if self.group else 0.0
        return self.bits, self.share or 0.0, self.rank or 0, groups

    @classmethod
    def parse(cls, name: str) -> Candidate:
        """`w4`, `w4g64` with groups of columns, `w4r8` with the rank, `w4r2%` with one of 2 % of the shorter side, `w4g64r8`.

        Raises:
            DitqError: neither of these.
        """
        match = _CANDIDATE.fullmatch(name)
        if match is None:
            raise DitqError(
                f"budget: unknown candidate {name!r}; known: w2 to w8, keep, in groups of columns w4g64, "
                "and with a branch of any rank w4r8 or w4r2%"
            )
        bits, rank = int(match["bits"]), match["rank"]
        group = None if match["group"] is None else int(match["group"])
        if rank is None:
            return cls(bits, group)
        return cls(bits, group, share=int(rank) / 100) if match["percent"] else cls(bits, group, int(rank))
