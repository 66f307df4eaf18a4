"""How `quantize` codes one linear and its input: what it says of all, with what its rules say of some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ditq.errors import DitqError
from ditq.formats import NVFP4
from ditq.numerics.carrier import BLOCK, FLOAT4, INT8
from ditq.passes.activation_formats import ActivationSettings
from ditq.passes.choose_codebook import TRIED, check_codebook, check_codebooks
from ditq.suggest import unknown_key

ROUNDINGS = ("nearest", "gptq")
BRANCHES = ("integer", "float")


@dataclass(frozen=True)
class SiteSettings(ActivationSettings):
    """How one linear is coded, and its input; the fields of a rule override those of the pass."""

    codebook: str = "twin_log_shared"
    codebooks: list[str] = field(default_factory=lambda: list(TRIED))
    rounding: str = "gptq"
    group_size: int = 0
    rank: int = 0
    rank_share: float = 0.0
    branch: str = "integer"
    keep: bool = False

    @property
    def has_branch(self) -> bool:
        return bool(self.rank or self.rank_share)

    def words(self) -> list[str]:
        """For `ditq inspect`."""
        ranked = [f"rank {self.rank}"] if self.rank else []
        if self.format == NVFP4:
            return [self.format, self.rounding, *ranked]
        carrier = [] if self.carrier == INT8.name else [self.carrier]
        return [self.format, self.codebook, self.rounding, *carrier, *ranked, *self.activation_words()]

    def ranked(self, out_features: int, in_features: int) -> SiteSettings:
        """With the rank that `rank_share` means for a weight of these sides: a multiple of 8 from 8 on, as products want it."""
        if not self.rank_share:
            return self
        wanted = self.rank_share * min(out_features, in_features)
        rank = max(1, round(wanted)) if wanted < 8 else 8 * round(wanted / 8)
        return replace(self, rank=rank, rank_share=0.0)

    def settled(self) -> SiteSettings:
        """With what the format says of itself: nvfp4 has FP4 levels, blocks of 16, and a calibrated scale of the input."""
        if self.format != NVFP4:
            return self
        return replace(self, carrier=FLOAT4.name, codebook="e2m1", group_size=BLOCK, activation="tensor")


def overrides(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rule.items() if key != "select"}


def check_rule(rule: Any) -> None:
    known = vars(SiteSettings())
    if not isinstance(rule, Mapping) or "select" not in rule:
        raise DitqError(f"pass 'quantize': the rule {rule} has no select; write {{select: pattern, ...}}")
    where, patterns = f"pass 'quantize': the rule for {rule['select']!r}", rule["select"]
    if not isinstance(patterns, str) and not (isinstance(patterns, list) and all(isinstance(p, str) for p in patterns)):
        raise DitqError(f"{where}: select must be a pattern or a list of patterns, see `ditq inspect`")
    for key, value in rule.items():
        if key not in (*known, "select"):
            raise DitqError(unknown_key(where, key, known))
        wanted = type(known.get(key, ""))
        if key != "select" and type(value) is not wanted and not (wanted is float and type(value) is int):
            kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", list: "a list"}[
                wanted
            ]
            raise DitqError(f"{where}: {key} is {value!r}, must be {kind}")


def check_site_settings(settings: SiteSettings, where: str = "pass 'quantize'") -> None:
    if settings.rounding not in ROUNDINGS:
        raise DitqError(unknown_key(f"{where}: rounding", settings.rounding, list(ROUNDINGS)))
    settings.check()
    if settings.format == NVFP4:
        _check_nvfp4(settings)
    if settings.group_size < 0:
        raise DitqError(f"{where}: group_size is {settings.group_size!r}, must be a whole number, 0 for none")
    if settings.rank < 0:
        raise DitqError(f"{where}: rank is {settings.rank!r}, must be a whole number, 0 for none")
    if not 0 <= settings.rank_share <= 1 or (settings.rank and settings.rank_share):
        raise DitqError(
            f"{where}: rank_share is {settings.rank_share!r}, must be from 0 to 1, and 0 where rank is given"
        )
    if settings.branch not in BRANCHES:
        raise DitqError(unknown_key(f"{where}: branch", settings.branch, list(BRANCHES)))
    carrier = settings.settled().carrier
    if carrier != INT8.name and settings.has_branch and settings.bits < 16 and settings.branch == "integer":
        raise DitqError(
            f"{where}: a branch of int8 rows cannot read inputs on the carrier {carrier}; set branch: float, or rank: 0"
        )
    check_codebooks(where, settings.codebooks)
    check_codebook(where, settings.codebook, settings.format, settings.group_size, settings.codebooks)


def _check_nvfp4(settings: SiteSettings) -> None:
    if settings.group_size not in (0, BLOCK):
        raise DitqError(
            f"pass 'quantize': nvfp4 has blocks of {BLOCK}, not {settings.group_size}; leave group_size out"
        )
    if settings.codebook not in (SiteSettings.codebook, "e2m1"):
        raise DitqError(
            f"pass 'quantize': nvfp4 has levels of its own, e2m1, not {settings.codebook}; leave codebook out, or give linears "
            "that have one another format"
        )
