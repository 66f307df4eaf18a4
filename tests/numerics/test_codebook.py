import itertools

import pytest
import torch

from ditq.numerics.carrier import INT8
from ditq.numerics.codebook import CODEBOOKS, Fit, codebook, encode, fit_twin_log, fit_twin_log_shared, fit_uniform
from ditq.numerics.codebooks import counted
from ditq.numerics.codebooks.apot import fit_apot
from ditq.numerics.codebooks.nf import fit_nf
from ditq.numerics.codebooks.twin_log import CLIPS, OFFSETS
from ditq.numerics.codebooks.twin_log_shared import STRENGTHS, mu_law_table
from ditq.numerics.row_search import SortedRows
from tests.numerics.weights import gaussian, heavy_tailed, nearest_error, relative_error, student_t

torch.set_num_threads(1)


def twin_log_reference(row: torch.Tensor, sign: int, bits: int, importance: torch.Tensor | None = None) -> torch.Tensor:
    """The best magnitudes for one sign of one row by trying every offset and clip on every element."""
    keep = row * sign > 0
    magnitude, weights = row[keep].abs().double(), None if importance is None else importance[keep]
    largest, count = magnitude.max(), 1 << (bits - 1)
    best, best_error = None, torch.inf
    for offset in OFFSETS:
        for clip in CLIPS:
            low, high = torch.log2(largest * offset), torch.log2(largest * clip + largest * offset)
            step = (high - low) / (count - 0.5)
            levels = 2 ** (low + step / 2 + torch.arange(count) * step) - largest * offset
            error = float(nearest_error(magnitude, levels, weights))
            if error < best_error:
                best, best_error = levels, error
    assert best is not None
    return best


ALL = sorted(set(CODEBOOKS) - {"uniform_absmax"})  # those that search

# Relative squared errors x 1e-3 of a Gaussian 256 x 1152, measured with another program (numpy, levels not on a grid).
# Two such samples of 3e5 values differ by about 0.5 %.
GAUSSIAN = [
    (lambda w, b: fit_uniform(w, b, clip_search=False), 3, 112.0),
    (lambda w, b: fit_uniform(w, b, clip_search=False), 4, 20.5),
    (fit_uniform, 3, 40.4),
    (fit_uniform, 4, 11.7),
    (fit_twin_log, 2, 117.0),
    (fit_twin_log, 3, 34.2),
    (fit_twin_log, 4, 9.23),
    (fit_twin_log_shared, 2, 118.0),
    (fit_twin_log_shared, 3, 34.7),
    (fit_twin_log_shared, 4, 9.60),
    (fit_nf, 2, 149.0),
    (fit_nf, 3, 40.1),
    (fit_nf, 4, 9.49),
    (fit_apot, 3, 47.0),
    (fit_apot, 4, 11.7),
]
# The same of Student's t with 5 degrees of freedom.
STUDENT = [
    (fit_uniform, 3, 87.7),
    (fit_uniform, 4, 36.1),
    (fit_twin_log, 3, 58.4),
    (fit_twin_log, 4, 15.3),
    (fit_twin_log_shared, 3, 66.6),
    (fit_twin_log_shared, 4, 18.7),
    (fit_nf, 3, 69.0),
    (fit_nf, 4, 23.0),
    (fit_apot, 3, 84.0),
    (fit_apot, 4, 27.8),
]


@pytest.mark.parametrize(("fitter", "bits", "expected"), GAUSSIAN)
def test_gaussian_weights_have_the_known_error(fitter, bits: int, expected: float) -> None:
    weight = gaussian()
    assert 1e3 * relative_error(weight, fitter(weight, bits)) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("fitter", "bits", "expected"), STUDENT)
def test_heavy_tailed_weights_have_the_known_error(fitter, bits: int, expected: float) -> None:
    # few large values make most of it, so that two samples differ: by sqrt(2) standard errors, found from the rows
    weight = student_t()
    lost = (weight - encode(weight, fitter(weight, bits)).decode()).square().sum(1).double()
    energy = weight.square().sum(1).double()
    found = lost.sum() / energy.sum()
    noise = float((lost - found * energy).std() * len(weight) ** 0.5 / energy.sum())
    assert float(found) == pytest.approx(1e-3 * expected, abs=3 * 2**0.5 * noise)


@pytest.mark.parametrize("bits", [3, 4])
def test_group_scales_have_the_known_gain(bits: int) -> None:
    weight, expected = gaussian(96), {3: 29.5e-3, 4: 7.22e-3}[bits]
    scales = relative_error(weight, fit_twin_log_shared(weight, bits, group_size=64, float_group_scales=True))
    multipliers = relative_error(weight, fit_twin_log_shared(weight, bits, group_size=64))
    assert scales == pytest.approx(expected, rel=0.03) and multipliers == pytest.approx(scales, rel=0.03)


@pytest.mark.parametrize("fitter", [fit_twin_log, fit_twin_log_shared])
@pytest.mark.parametrize("bits", [3, 4])
def test_twin_log_beats_clipped_uniform(fitter, bits: int) -> None:
    for weight in (gaussian(64), heavy_tailed()):
        assert relative_error(weight, fitter(weight, bits)) < 0.9 * relative_error(weight, fit_uniform(weight, bits))


@pytest.mark.parametrize("importance", [None, torch.rand(300, generator=torch.Generator().manual_seed(5)) ** 4])
def test_the_fast_search_finds_what_trying_everything_finds(importance: torch.Tensor | None) -> None:
    weight = heavy_tailed(4, 300)
    fit = fit_twin_log(weight, 4, importance)
    for row, table, scale in zip(weight, fit.table, fit.scale, strict=True):
        positive = twin_log_reference(row, 1, 4, importance)
        negative = twin_log_reference(row, -1, 4, importance)
        largest = torch.maximum(positive[-1], negative[-1])
        assert float(scale) == pytest.approx(float(largest) / 64, rel=1e-5)
        levels = torch.cat((-negative.flip(0), positive)) / largest * 64
        assert float((table - levels).abs().max()) <= 0.5 + 1e-4


@pytest.mark.parametrize("sign", [-1, 0, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_of_sorted_rows_is_the_error_of_the_elements(sign: int, weighted: bool) -> None:
    rows = gaussian(3, 200)
    importance = torch.rand(3, 200) if weighted else None
    levels = gaussian(3, 2 * 6).view(3, 2, 6).sort(dim=2).values
    if sign:
        levels = (sign * levels.abs()).sort(dim=2).values
    errors = SortedRows(rows, importance).error(levels, sign)
    for i, row in enumerate(rows):
        keep = row * sign >= 0 if sign >= 0 else row < 0
        weights = importance[i, keep] if importance is not None else torch.ones(int(keep.sum()))
        energy = (weights.double() * row[keep].double().square()).sum()
        for j in range(2):
            expected = nearest_error(row[keep], levels[i, j], weights) - energy
            torch.testing.assert_close(errors[i, j], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bits", [3, 4])
def test_the_int8_grid_costs_less_than_two_percent(bits: int) -> None:
    weight = gaussian(16)
    free = torch.tensor(0.0, dtype=torch.float64)
    for row in weight:
        negative, positive = twin_log_reference(row, -1, bits), twin_log_reference(row, 1, bits)
        free += nearest_error(row, torch.cat((-negative.flip(0), positive)))
    snapped = relative_error(weight, fit_twin_log(weight, bits)) * float(weight.double().square().sum())
    assert snapped < 1.02 * float(free)

    fit = fit_twin_log_shared(weight, bits, mu=2.0)
    u = (torch.arange(1 << (bits - 1)) + 0.5) / ((1 << (bits - 1)) - 0.5)
    curve = 127 * (3.0**u - 1) / 2
    exact = Fit(torch.cat((-curve.flip(0), curve)), fit.scale, None, bits)
    assert relative_error(weight, fit) < 1.02 * relative_error(weight, exact)


@pytest.mark.parametrize("fitter", [fit_uniform, fit_twin_log, fit_twin_log_shared])
def test_the_error_does_not_depend_on_the_scale_of_the_weight(fitter) -> None:
    weight = gaussian(32)
    small, large = weight * 0.5, weight * 25  # standard deviations of 0.01 and 0.5
    assert relative_error(large, fitter(large, 3)) == pytest.approx(relative_error(small, fitter(small, 3)), rel=1e-3)
    exact = weight * 2.0**-20  # a power of two changes no bit of any mantissa
    assert torch.equal(encode(exact, fitter(exact, 3)).codes, encode(weight, fitter(weight, 3)).codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_twin_log_has_exactly_two_to_the_bits_codes_and_none_for_zero(bits: int) -> None:
    fits = [fit_twin_log(weight, bits) for weight in (gaussian(8), heavy_tailed(8))]
    for table in [row for fit in fits for row in fit.table] + [mu_law_table(bits, mu) for mu in STRENGTHS]:
        assert len(table) == 1 << bits and bool((table.int().diff() > 0).all())
        assert int((table > 0).sum()) == int((table < 0).sum()) == 1 << (bits - 1)
        assert int(table.abs().max()) == INT8.largest(bits)


def test_every_code_is_used_and_the_top_levels_are_reached() -> None:
    weight = gaussian(8)
    code = encode(weight, fit_twin_log(weight, 3))
    assert all(row.unique().tolist() == list(range(8)) for row in code.codes)


def test_the_signs_have_ranges_of_their_own() -> None:
    weight = gaussian(8).abs() * torch.where(gaussian(8, seed=1) < 0, -0.2, 1.0)
    fit = fit_twin_log(weight, 4)
    assert bool((fit.table[:, 0] > -40).all()) and bool((fit.table[:, -1] == INT8.largest(fit.bits)).all())
    assert relative_error(weight, fit) < 0.8 * relative_error(weight, fit_twin_log_shared(weight, 4))


@pytest.mark.parametrize("name", ALL)
def test_rows_without_a_sign_and_rows_of_zeros_are_coded(name: str) -> None:
    weight = gaussian(4, 256)
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2] = 0
    decoded = encode(weight, CODEBOOKS[name](weight, 4)).decode()
    assert bool(decoded.isfinite().all()) and float(decoded[2].abs().max()) < 1e-25
    for row in (0, 1, 3):
        assert float((decoded[row] - weight[row]).square().sum() / weight[row].square().sum()) < 0.02


@pytest.mark.parametrize("name", ALL)
def test_important_columns_are_kept_better(name: str) -> None:
    weight = heavy_tailed(32, 512)
    importance = torch.full((512,), 1e-3)
    importance[:64] = 1.0

    def loss(fit: Fit) -> float:
        return float(((weight - encode(weight, fit).decode()).square() * importance)[:, :].sum())

    bits = 4 if name == "e2m1" else 3
    assert loss(CODEBOOKS[name](weight, bits, importance=importance)) < 0.95 * loss(CODEBOOKS[name](weight, bits))


def meanings() -> dict[str, Fit]:
    weight = heavy_tailed(6, 128)
    return {
        "row table": fit_twin_log(weight, 3),
        "shared table": fit_twin_log_shared(weight, 4),
        "group multipliers": fit_twin_log_shared(weight, 3, group_size=32),
        "group scales": fit_twin_log_shared(weight, 4, group_size=64, float_group_scales=True),
        "normal float": fit_nf(weight, 3),
        "additive powers, multipliers": fit_apot(weight, 4, group_size=32),
        "fp4, group scales": CODEBOOKS["e2m1"](weight, 4, group_size=32, float_group_scales=True),
        "fitted, multipliers": CODEBOOKS["lloyd_max"](weight, 5, group_size=64),
        "uniform": fit_uniform(weight, 4),
        "uniform multipliers": fit_uniform(weight, 4, group_size=32),
        "uniform 8 bits": fit_uniform(weight, 8),
        "uniform 8 bits, multipliers": fit_uniform(weight, 8, group_size=64),
    }


@pytest.mark.parametrize("name", meanings())
def test_a_code_means_table_times_multiplier_times_scale_and_is_the_nearest_there_is(name: str) -> None:
    weight, fit = heavy_tailed(6, 128), meanings()[name]
    code = encode(weight, fit)
    carrier, decoded = code.carrier(), code.decode()
    assert code.codes.dtype == torch.uint8 and carrier.dtype == torch.int8 and decoded.dtype == torch.float32
    width = 128 // fit.groups
    for o, g in itertools.product(range(6), range(fit.groups)):
        levels = (fit.table[o] if fit.table.dim() == 2 else fit.table).tolist()
        if fit.multiplier is not None:
            levels = [round(entry * int(fit.multiplier[o, g]) / 255) for entry in levels]
        scale = float(fit.scale[o, g] if fit.scale.dim() == 2 else fit.scale[o])
        part = o, slice(g * width, (g + 1) * width)
        assert carrier[part].tolist() == [levels[c] for c in code.codes[part].tolist()]
        torch.testing.assert_close(decoded[part], carrier[part].float() * scale, rtol=1e-6, atol=0)
        best = (weight[part][:, None] - torch.tensor(levels) * scale).abs().amin(dim=1)
        assert bool(((decoded[part] - weight[part]).abs() <= best + 1e-6 * scale * 127).all())


@pytest.mark.parametrize("name", sorted(set(ALL) - {"e2m1"}))
def test_eight_bits_are_the_int8_grid_itself(name: str) -> None:
    weight = gaussian(4, 64)
    code = encode(weight, CODEBOOKS[name](weight, 8))
    assert code.table.tolist() == list(range(-128, 128))
    assert torch.equal(code.carrier().int(), code.codes.int() - 128)


def test_plain_absmax_never_clips() -> None:
    weight = heavy_tailed()
    code = encode(weight, fit_uniform(weight, 4, clip_search=False))
    assert bool(((code.decode() - weight).abs() <= code.scale[:, None] * 0.5001).all())


def test_levels_that_would_fall_together_move_apart() -> None:
    assert INT8.distinct(torch.tensor([0.1, 0.2, 0.3, 5.4, 126.8, 127.0]), 127).tolist() == [1, 2, 3, 5, 126, 127]
    assert INT8.distinct(torch.tensor([0.1, 126.9, 127.0, 127.0]), 127).tolist() == [1, 125, 126, 127]


def test_half_precision_weights_fit_like_their_float32_copies() -> None:
    weight = gaussian(8, 64).bfloat16()
    assert torch.equal(fit_twin_log(weight, 3).table, fit_twin_log(weight.float(), 3).table)


def test_fitting_is_the_same_whatever_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = heavy_tailed(12, 96)
    fitters = {name: lambda name=name: CODEBOOKS[name](weight, 4) for name in CODEBOOKS}
    whole = {name: fitters[name]() for name in fitters}
    monkeypatch.setattr("ditq.numerics.weight_code._AT_ONCE", 200)
    for name, fit in whole.items():
        again = fitters[name]()
        assert torch.equal(again.table, fit.table) and torch.equal(again.scale, fit.scale)
        assert torch.equal(encode(weight, again).codes, encode(weight, fit).codes)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: fit_uniform(torch.zeros(4), 4), r"\[O, I\]"),
        (lambda: fit_twin_log(torch.zeros(4, 4), 1), "2 to 8 bits"),
        (lambda: fit_twin_log(torch.full((4, 4), torch.inf), 4), "not finite"),
        (lambda: fit_twin_log(torch.ones(4, 4), 4, group_size=2), "no groups"),
        (lambda: fit_twin_log_shared(torch.ones(4, 6), 4, group_size=4), "groups of 4"),
        (lambda: fit_twin_log_shared(torch.ones(4, 4), 4, mu=-1.0), "positive mu"),
        (lambda: encode(torch.ones(4, 4), fit_uniform(torch.ones(5, 4), 4)), "not of a weight"),
        (lambda: CODEBOOKS["e2m1"](torch.ones(4, 4), 3), "4 bits, not 3"),
        (lambda: CODEBOOKS["lloyd_max"](torch.ones(4, 6), 4, group_size=4), "groups of 4"),
        (lambda: codebook("uniform")(fit_uniform), "two codebooks"),
    ],
)
def test_what_cannot_be_coded_is_refused(wrong, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()


def test_the_codebooks_have_their_names() -> None:
    named = {"twin_log": fit_twin_log, "twin_log_shared": fit_twin_log_shared, "uniform": fit_uniform}
    assert all(CODEBOOKS[name].fit is fitter and CODEBOOKS[name].name == name for name, fitter in named.items())


def test_a_codebook_says_before_it_is_called_what_it_does_not_take() -> None:
    assert CODEBOOKS["e2m1"].refusal(4, 32) is None and "4 bits, not 3" in str(CODEBOOKS["e2m1"].refusal(3))
    assert CODEBOOKS["twin_log"].refusal(4) is None and "no group_size" in str(CODEBOOKS["twin_log"].refusal(4, 32))


@pytest.mark.parametrize("seen", [32, 0])
@pytest.mark.parametrize("name", ALL)
def test_columns_whose_inputs_were_always_zero_are_still_coded(name: str, seen: int) -> None:
    weight, importance = gaussian(8, 64), torch.ones(64)
    importance[seen:] = 0
    groups = {"group_size": 32, "float_group_scales": True} if CODEBOOKS[name].groups else {}
    lost = []
    for given in (importance, torch.ones(64)):
        decoded = encode(weight, CODEBOOKS[name](weight, 4, importance=given, **groups)).decode()
        lost.append(float((decoded - weight)[:, seen:].square().sum() / weight[:, seen:].square().sum()))
    assert lost[0] < (1.1 if groups or not seen else 5) * lost[1]  # a row of one scale suits the others first


def test_importance_of_columns_that_were_seen_stays_as_it_is() -> None:
    importance = torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 20 + 1e-30
    assert torch.equal(counted(importance), importance)
    importance[3] = -1e-9
    assert torch.equal(counted(importance)[4:], importance[4:]) and 0 < float(counted(importance)[3]) < 1e-5


@pytest.mark.parametrize("bits", [4, 8])
def test_uniform_scales_do_not_depend_on_how_large_weights_are(bits: int) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    plain = CODEBOOKS["uniform"](weight, bits)
    for exponent in (-80, -3, 66):  # squares of 2^66 overflow, those of 2^-80 vanish
        scaled = CODEBOOKS["uniform"](weight * 2.0**exponent, bits)
        assert torch.equal(scaled.scale, plain.scale * 2.0**exponent)
