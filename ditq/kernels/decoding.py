"""Codes to carriers in registers: the table look-up as byte permutations, four codes an instruction.

PTX's `prmt` picks any four of eight bytes by the four low nibbles of a selector. A table of eight carriers is two words and
one `prmt`; one of sixteen is four words, two `prmt` by the low three bits and a third that picks by the fourth. As a byte of
`data` holds codes of two runs (storage.py), the bytes come out as low, high, low, high and two more permutations part them.

Group multipliers follow in integers, exactly: round(t m / 255) is the top byte of t (65793 m) + 2^23, as
65793 / 2^24 = (1 / 255) (1 - 2^-24), |t m| < 2^15, and t m / 255 is never halfway between whole numbers.

Each instance of the assembly takes four bytes, whichever Triton hands it, so nothing depends on a layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

_MULTIPLIER = tl.constexpr(65793)
_PART = ("0x6420", "0x7531")  # even and odd bytes of two words
_SIGNED = ("0x8880", "0x9991", "0xAAA2", "0xBBB3")  # byte i of a word with its sign spread over the other three


def _selectors(bits: int, pair: int) -> list[str]:
    """Lines that put the codes of runs `pair` and `pair + 4`, or of both runs at 4 bits, into the nibbles of `low`.

    At 4 bits `low` keeps three bits of each, and `mask` selects between the table's halves by the fourth.
    """
    if bits == 4:
        return [
            "and.b32 low, {codes}, 0x77777777;",
            "shr.u32 mask, {codes}, 1;",
            "and.b32 mask, mask, 0x44444444;",
        ]
    lines = []
    for plane in range(bits):
        move, by = ("shr.u32", pair - plane) if pair >= plane else ("shl.b32", plane - pair)
        into = "low" if plane == 0 else "mask"
        lines += [f"{move} {into}, {{codes{plane}}}, {by};", f"and.b32 {into}, {into}, 0x{'1248'[plane] * 8};"]
        lines += [] if plane == 0 else ["or.b32 low, low, mask;"]
    return lines


def _look_up(bits: int, words: list[str], result: str) -> list[str]:
    """Lines that look up the nibbles 0-3 of `low` (and `mask`) in a table of words."""
    if bits < 4:
        return [f"prmt.b32 {result}, {words[0]}, {words[-1]}, low;"]
    return [
        f"prmt.b32 {result}, {words[0]}, {words[1]}, low;",
        f"prmt.b32 other, {words[2]}, {words[3]}, low;",
        "or.b32 choice, mask, 0x3210;",
        f"prmt.b32 {result}, {result}, other, choice;",
    ]


def _down(bits: int, by: int) -> list[str]:
    return [f"shr.u32 low, low, {by};"] + ([f"shr.u32 mask, mask, {by};"] if bits == 4 else [])


def _multiply(value: str, factors: list[str]) -> list[str]:
    """Lines that multiply the four bytes of a word by a factor each and keep what is above bit 24."""
    lines = []
    for byte, factor in enumerate(factors):
        lines += [
            f"prmt.b32 x{byte}, {value}, 0, {_SIGNED[byte]};",
            f"mad.lo.s32 x{byte}, x{byte}, {factor}, 8388608;",
        ]
    return [
        *lines,
        "prmt.b32 x0, x0, x1, 0x0073;",
        "prmt.b32 x2, x2, x3, 0x0073;",
        f"prmt.b32 {value}, x0, x2, 0x5410;",
    ]


def assembly(bits: int, pair: int, own_tables: bool, multiplied: bool) -> tuple[str, str]:
    """(PTX, constraints) that decode four bytes into four carriers of one run and four of another.

    Operands: $0, $1 the carriers; then the bytes (of each plane), the table's words, and the factors of both runs; what is
    32 bits wide comes as four registers, one for each of the four bytes. own_tables: they need not be the same in all four.
    """
    planes = 1 if bits == 4 else bits
    count = max(1, 2**bits // 4)
    register = iter(range(2, 2 + planes + 4 * (count + 2 * multiplied)))
    codes = [f"${next(register)}" for _ in range(planes)]
    words = [[f"${next(register)}" for _ in range(4)] for _ in range(count)]
    factors = [[f"${next(register)}" for _ in range(4)] for _ in range(2 * multiplied)]
    names = {"codes": codes[0]} | {f"codes{plane}": name for plane, name in enumerate(codes)}
    lines = [line.format(**names) for line in _selectors(bits, pair)]
    if own_tables:
        for byte in range(4):
            lines += _look_up(bits, [word[byte] for word in words], f"r{byte}") + (_down(bits, 8) if byte < 3 else [])
        lines += ["prmt.b32 r0, r0, r1, 0x5140;", "prmt.b32 r2, r2, r3, 0x5140;"]
        lines += ["prmt.b32 v0, r0, r2, 0x5410;", "prmt.b32 v1, r0, r2, 0x7632;"]
    else:
        table = [word[0] for word in words]
        lines += [*_look_up(bits, table, "r0"), *_down(bits, 16), *_look_up(bits, table, "r1")]
        lines += [f"prmt.b32 v{i}, r0, r1, {_PART[i]};" for i in range(2)]
    for value, factor in zip(("v0", "v1"), factors, strict=False):
        lines += _multiply(value, factor)
    lines += ["mov.b32 $0, v0;", "mov.b32 $1, v1;"]
    registers = ".reg .b32 low, mask, other, choice, r0, r1, r2, r3, v0, v1, x0, x1, x2, x3;"
    inputs = planes + 4 * (count + 2 * multiplied)
    return "\n".join(["{", registers, *lines, "}"]), ",".join(["=&r", "=&r", *["r"] * inputs])


# The kernels take them as constants of the compilation: {(bits, pair, own tables, multiplied): (PTX, constraints)}.
_FORMS = {
    (bits, pair, own, multiplied): assembly(bits, pair, own, multiplied)
    for bits in (2, 3, 4)
    for pair in range(1 if bits == 4 else 4)
    for own in (False, True)
    for multiplied in (False, True)
}


@triton.constexpr_function
def _text(bits, pair, own, multiplied):  # type: ignore[no-untyped-def]
    return _FORMS[bits, pair, own, multiplied][0]


@triton.constexpr_function
def _constraints(bits, pair, own, multiplied):  # type: ignore[no-untyped-def]
    return _FORMS[bits, pair, own, multiplied][1]


@triton.jit
def table_words(tables, number, row, inside, BITS: tl.constexpr, OWN: tl.constexpr):
    """The words of table `number`, as scalars, or of each row's own, [R, 1]; row: int64 [R, 1]. Four; unused ones repeat."""
    WORDS: tl.constexpr = 4 if BITS == 4 else BITS - 1
    if OWN:
        first = tables + row * WORDS
        w0 = tl.load(first, mask=inside, other=0)
        w1 = tl.load(first + 1 % WORDS, mask=inside, other=0)
        w2 = tl.load(first + 2 % WORDS, mask=inside, other=0)
        w3 = tl.load(first + 3 % WORDS, mask=inside, other=0)
    else:
        table = tables + number * WORDS
        w0 = tl.load(table)
        w1 = tl.load(table + 1 % WORDS)
        w2 = tl.load(table + 2 % WORDS)
        w3 = tl.load(table + 3 % WORDS)
    return w0, w1, w2, w3


@triton.jit
def factor(multiplier, row, inside, group, GROUPS: tl.constexpr):
    """What a run's carriers are multiplied by, int32 [R, 1]: 65793 m of the row and the run's group."""
    m = tl.load(multiplier + row * GROUPS + group, mask=inside & (row * 0 + group < GROUPS), other=0)
    return m.to(tl.int32) * _MULTIPLIER


@triton.jit
def decode_nibbles(codes, w0, w1, w2, w3, low, high, OWN: tl.constexpr, MULTIPLIED: tl.constexpr):
    """Bytes uint8 [R, run] of 4-bit codes -> the carriers of both runs, int8 [R, run] each."""
    text: tl.constexpr = _text(4, 0, OWN, MULTIPLIED)
    constraints: tl.constexpr = _constraints(4, 0, OWN, MULTIPLIED)
    if MULTIPLIED:
        both = tl.inline_asm_elementwise(
            text, constraints, [codes, w0, w1, w2, w3, low, high], (tl.int8, tl.int8), True, 4
        )
    else:
        both = tl.inline_asm_elementwise(text, constraints, [codes, w0, w1, w2, w3], (tl.int8, tl.int8), True, 4)
    return both


@triton.jit
def decode_planes(
    p0, p1, p2, w0, w1, low, high, PAIR: tl.constexpr, BITS: tl.constexpr, OWN: tl.constexpr, MULTIPLIED: tl.constexpr
):
    """Bytes uint8 [R, 32] of each plane -> the carriers of runs PAIR and PAIR + 4, int8 [R, 32] each; p2 is read at 3 bits."""
    text: tl.constexpr = _text(BITS, PAIR, OWN, MULTIPLIED)
    constraints: tl.constexpr = _constraints(BITS, PAIR, OWN, MULTIPLIED)
    if BITS == 3 and MULTIPLIED:
        both = tl.inline_asm_elementwise(
            text, constraints, [p0, p1, p2, w0, w1, low, high], (tl.int8, tl.int8), True, 4
        )
    elif BITS == 3:
        both = tl.inline_asm_elementwise(text, constraints, [p0, p1, p2, w0, w1], (tl.int8, tl.int8), True, 4)
    elif MULTIPLIED:
        both = tl.inline_asm_elementwise(text, constraints, [p0, p1, w0, low, high], (tl.int8, tl.int8), True, 4)
    else:
        both = tl.inline_asm_elementwise(text, constraints, [p0, p1, w0], (tl.int8, tl.int8), True, 4)
    return both
