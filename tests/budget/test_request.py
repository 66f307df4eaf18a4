"""What a budget may say, and the one line for what it may not."""

from __future__ import annotations

import pytest

from ditq.budget import Budget
from ditq.errors import DitqError


def test_sizes_bits_and_qualities_are_read() -> None:
    assert (Budget.parse("size=4.2MB").kind, Budget.parse("size=4.2MB").value) == ("size", 4.2e6)
    assert Budget.parse("size<=3MiB").value == 3 * 2**20 and Budget.parse("size = 512kb").value == 512e3
    assert (Budget.parse("bits=3.5").kind, Budget.parse("bits<=3.5").value) == ("bits", 3.5)
    assert (Budget.parse("psnr>=24").kind, Budget.parse("psnr>=24.5dB").value) == ("psnr", 24.5)
    assert Budget.parse("bits=4", "keep, w8,w3").candidates == ("w3", "w8", "keep")
    assert Budget.parse("bits=4", "w4r16,w4,w3r2,w4r8").candidates == ("w3r2", "w4", "w4r8", "w4r16")
    assert Budget.parse("bits=4", "w4g64,w4r8,w4g0,w4,w4g32r8,w3g64").candidates == (
        "w3g64", "w4", "w4g0", "w4g64", "w4r8", "w4g32r8"
    )  # fmt: skip
    assert Budget.parse("bits=4", "w4r10%,w4,w4r2%").candidates == ("w4", "w4r2%", "w4r10%")


@pytest.mark.parametrize("text", [
    "size=330KB", "size=1500GB", "size=1234567B", "size=4.2MB", "bits=.00001", "bits=4.1234567", "bits=4", "psnr>=100",
    "psnr>=24.5",
])  # fmt: skip
def test_what_is_written_is_read_as_the_same(text: str) -> None:
    budget = Budget.parse(text)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("4MB", "not understood; write size=4.2MB"),
        ("sise=4MB", "not understood"),
        ("size=", "not understood"),
        ("size=4", "needs a unit"),
        ("size=4XB", "needs a unit"),
        ("size>=4MB", "size takes = or <="),
        ("psnr<=24", "psnr takes = or >="),
        ("bits=3.5MB", "bits takes no unit"),
        ("bits=0", "above 0"),
        ("bits=-1", "not understood"),
    ],
)
def test_a_malformed_budget_is_one_line(text: str, says: str) -> None:
    with pytest.raises(DitqError, match=says) as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value) and repr(text) in str(caught.value)


def test_candidates_must_be_known_and_leave_a_choice() -> None:
    for name in ("w9", "w4r0", "w4r", "r8", "keepr2", "w4g", "w4r8g64", "w4g064"):
        with pytest.raises(DitqError, match=f"unknown candidate '{name}'; known: w2"):
            Budget.parse("bits=4", f"w3,{name}")
    with pytest.raises(DitqError, match="nothing to choose"):
        Budget.parse("bits=4", "w3")
    for odd in ([2, 3, 4], [["w2"], "w3"], [None, "w4"]):
        with pytest.raises(DitqError, match=r"a candidate is .*, must be a word such as w4"):
            Budget.parse("bits=4", odd)  # type: ignore[arg-type]
