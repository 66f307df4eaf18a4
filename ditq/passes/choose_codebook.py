"""Which codebook a linear gets: the check that a named one takes what is asked of it."""

from __future__ import annotations

from ditq.errors import DitqError
from ditq.formats import BitFormat
from ditq.numerics.codebook import CODEBOOKS
from ditq.suggest import unknown_key


def check_codebook(where: str, codebook: str, format: str, group_size: int = 0) -> None:
    """Raises DitqError for a name that no codebook has, and for bits or groups that the codebook does not take."""
    bits = BitFormat.parse(format).weight
    if codebook not in CODEBOOKS:
        raise DitqError(unknown_key(f"{where}: codebook", codebook, list(CODEBOOKS)))
    refusal = (
        CODEBOOKS[codebook].refusal(bits, group_size) if bits < 8 else None
    )  # 8 bits are uniform whatever the name
    if refusal:
        raise DitqError(f"{where}: {refusal}")
