import pytest
import torch

from ditq.numerics.packing import pack, packed_shape, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 15, 64])
def test_codes_survive_packing(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, columns)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == packed_shape(5, columns, bits)
    assert torch.equal(unpack(packed, bits, columns), codes)


@pytest.mark.parametrize(("bits", "size"), [(2, 2 * 3 * 8), (3, 3 * 3 * 8), (4, 3 * 32), (6, 6 * 3 * 8), (8, 3 * 64)])
def test_packing_spends_no_more_bits_than_the_codes_have(bits: int, size: int) -> None:
    assert pack(torch.zeros(3, 64, dtype=torch.uint8), bits).numel() == size == 3 * 64 * bits // 8


def test_the_even_column_is_the_low_nibble() -> None:
    assert pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist() == [[0x21, 0x03]]


def test_bit_planes_hold_column_8k_plus_j_in_bit_j() -> None:
    codes = torch.zeros(1, 10, dtype=torch.uint8)
    codes[0, 1], codes[0, 9] = 0b101, 0b010
    assert pack(codes, 3).tolist() == [[[0b10, 0]], [[0, 0b10]], [[0b10, 0]]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="code of 8 does not fit in 3 bits"):
        pack(torch.tensor([[8]], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="uint8"):
        pack(torch.zeros(2, 2), 4)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(torch.zeros(2, 2, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match="does not hold 9 columns of 4-bit"):
        unpack(torch.zeros(2, 4, dtype=torch.uint8), 4, 9)
    with pytest.raises(ValueError, match="does not hold"):
        unpack(torch.zeros(2, 2, 1, dtype=torch.uint8), 3, 8)
