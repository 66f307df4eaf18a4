import json
import math

import pytest
import torch

from ditq.numerics.rotation import (
    BlockStep,
    HeadsStep,
    PermuteStep,
    Rotation,
    block_hadamard_rotation,
    hadamard_rotation,
    head_rotation,
    outlier_rotation,
    regular_block,
    regular_rotation,
)

torch.set_num_threads(1)


def outlier_sample(rows: int = 512, channels: int = 768) -> torch.Tensor:
    sample = torch.randn(rows, channels, generator=torch.Generator().manual_seed(1))
    sample[:, 5] *= 60
    sample[:, 90] += 100
    sample[:, 91] -= 40
    return sample


ROTATIONS = {
    "hadamard": lambda: hadamard_rotation(768),
    "hadamard 2240": lambda: hadamard_rotation(2240, seed=3),
    "hadamard 2": lambda: hadamard_rotation(2),
    "block": lambda: block_hadamard_rotation(768),
    "regular": lambda: regular_rotation(768, 64),
    "heads": lambda: head_rotation(1152, 72, seed=1),
    "outlier": lambda: outlier_rotation(outlier_sample(), steps=16),
    "outlier zigzag": lambda: outlier_rotation(outlier_sample(64, 240), steps=16, permutation="zigzag"),
}


@pytest.mark.parametrize("make", ROTATIONS.values(), ids=ROTATIONS)
def test_a_rotation_is_orthogonal(make) -> None:
    matrix = make().matrix()
    assert float((matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max()) < 1e-12


@pytest.mark.parametrize("make", ROTATIONS.values(), ids=ROTATIONS)
def test_the_steps_are_the_dense_matrix(make) -> None:
    rotation = make()
    x = torch.randn(2, 3, rotation.size, dtype=torch.float64)
    dense = x @ rotation.matrix()
    assert rotation.apply(x).shape == x.shape
    # a sum of n products of about 1 errs by some n epsilon at most
    assert float((rotation.apply(x) - dense).abs().max()) < rotation.size * 2.3e-16 * float(x.abs().max())
    assert float((rotation.apply(x.float()) - dense).abs().max()) < rotation.size * 1.2e-7 * float(x.abs().max())
    assert rotation.apply(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", ROTATIONS.values(), ids=ROTATIONS)
def test_rotating_input_and_weight_leaves_the_layer_unchanged(make) -> None:
    rotation = make()
    x = torch.randn(5, rotation.size, dtype=torch.float64)
    weight = torch.randn(7, rotation.size, dtype=torch.float64)
    rotated = rotation.apply(x) @ rotation.right_multiply(weight).T
    torch.testing.assert_close(rotated, x @ weight.T, rtol=1e-11, atol=1e-11)
    # one rounding to float32: the weight is rotated in float64
    exact = weight.float().double() @ rotation.matrix()
    assert torch.allclose(rotation.right_multiply(weight.float()), exact.float(), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize("make", ROTATIONS.values(), ids=ROTATIONS)
def test_a_rotation_is_remade_exactly_from_its_spec(make) -> None:
    rotation = make()
    spec, tensors = rotation.spec()
    remade = Rotation.from_spec(json.loads(json.dumps(spec)), tensors)
    assert torch.equal(remade.matrix(), rotation.matrix())
    assert bool(tensors) == (spec["kind"] == "steps")
    assert torch.equal(make().matrix(), rotation.matrix())


def test_the_signs_never_change_with_the_library() -> None:
    # an engine whose weights are rotated holds the seed only: these bits are a part of its format
    (step,) = block_hadamard_rotation(32, seed=0).steps
    assert isinstance(step, BlockStep)
    first_column = "".join("+" if value > 0 else "-" for value in step.matrix[:, 0])
    assert first_column == "-----+---+---++--+--++-++-++--+-"


def test_the_full_rotation_is_two_block_products_and_a_transpose() -> None:
    rotation = hadamard_rotation(1152)
    first, permute, second = rotation.steps
    assert isinstance(first, BlockStep) and isinstance(permute, PermuteStep) and isinstance(second, BlockStep)
    assert permute.stride == (32, 36) and first.matrix.shape == (36, 36) and second.matrix.shape == (32, 32)
    x = torch.randn(3, 1152)
    assert torch.equal(permute.apply(x), x[:, permute.index])
    assert rotation.multiply_adds() == 1152 * (32 + 36)
    assert torch.allclose(rotation.matrix().abs(), torch.tensor(1 / math.sqrt(1152), dtype=torch.float64))


@pytest.mark.parametrize("n", [64, 1024, 1152, 3072])
def test_an_offset_common_to_all_channels_does_not_pile_up_in_one(n: int) -> None:
    ones = torch.ones(1, n, dtype=torch.float64)
    # an unsigned Sylvester matrix would give sqrt(n); random signs give about 2 log n in each factor's place
    for seed in range(4):
        assert float(hadamard_rotation(n, seed).apply(ones).abs().max()) < min(6.0, math.sqrt(n) / 2)
        assert float(block_hadamard_rotation(n, 32, seed).apply(ones).abs().max()) < math.sqrt(32) / 2


def test_a_regular_rotation_leaves_an_offset_as_it_is() -> None:
    ones = torch.ones(1, 1152, dtype=torch.float64)
    assert torch.allclose(regular_rotation(1152, 64).apply(ones), ones, rtol=0, atol=1e-12)
    assert [regular_block(n) for n in (1152, 768, 96, 72, 9, 2)] == [64, 64, 16, 36, 1, 1]


def test_other_seeds_are_other_rotations() -> None:
    assert not torch.equal(hadamard_rotation(768, 0).matrix(), hadamard_rotation(768, 1).matrix())


@pytest.mark.parametrize(("n", "block"), [(3072, 128), (2432, 128), (2240, 64), (5600, 32), (1408, 128), (48, 16)])
def test_the_default_block_is_the_largest_power_of_two_up_to_128(n: int, block: int) -> None:
    (step,) = block_hadamard_rotation(n).steps
    assert isinstance(step, BlockStep) and len(step.matrix) == block


@pytest.mark.parametrize("permutation", ["stride", "zigzag"])
def test_the_outlier_rotation_lowers_the_peak(permutation: str) -> None:
    sample = outlier_sample()
    rotation = outlier_rotation(sample, steps=64, permutation=permutation)
    # a block of 128 can spread a lone peak to 1/sqrt(128) of it; several peaks and the noise share the block
    assert float(rotation.apply(sample).abs().max()) < float(sample.abs().max()) / 6


@pytest.mark.parametrize("channels", [240, 720, 96])
def test_the_outlier_rotation_takes_any_width_that_divides(channels: int) -> None:
    sample = outlier_sample(64, 768)[:, :channels]
    rotation = outlier_rotation(sample, steps=8)
    sizes = {len(step.matrix) for step in rotation.steps if isinstance(step, BlockStep)}
    assert sizes == {max(b for b in range(1, 129) if channels % b == 0)}
    assert float(rotation.apply(sample).abs().max()) <= float(sample.abs().max()) * (1 + 1e-5)


def test_a_sample_without_outliers_is_not_made_worse() -> None:
    sample = torch.ones(16, 64) * torch.where(torch.rand(16, 64) < 0.5, 1.0, -1.0)
    assert float(outlier_rotation(sample, block=32, steps=8).apply(sample).abs().max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: hadamard_rotation(50),
        lambda: block_hadamard_rotation(1152, 256),
        lambda: block_hadamard_rotation(51),
        lambda: head_rotation(1152, 1),
        lambda: regular_rotation(1152, 32),
        lambda: Rotation(4, (HeadsStep(torch.eye(2).repeat(2, 1, 1)),)).spec(),
        lambda: outlier_rotation(torch.randn(4, 64), permutation="random"),
        lambda: outlier_rotation(torch.full((4, 64), math.nan)),
        lambda: outlier_rotation(torch.randn(4, 131)),
        lambda: hadamard_rotation(64).apply(torch.randn(3, 32)),
        lambda: Rotation.from_spec({"kind": "spiral", "size": 4}, {}),
        lambda: Rotation.from_spec({"kind": "steps", "size": 4, "steps": ["permute"]}, {}),
        lambda: Rotation.from_spec({"kind": "steps", "size": 2, "steps": ["permute"]}, {"0.permute": torch.zeros(2)}),
        lambda: Rotation.from_spec({"kind": "steps", "size": 4, "steps": ["block"]}, {"0.block": torch.eye(3)}),
    ],
)
def test_what_cannot_be_rotated_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        wrong()
