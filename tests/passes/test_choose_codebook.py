"""codebook: auto takes the codebook that loses least on inputs it was not fitted to, the same one every time."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from ditq.calibration.accumulate import InputAccumulator
from ditq.calibration.input_statistics import InputStatistics
from ditq.calibration.statistics import Statistics
from ditq.errors import DitqError
from ditq.nn import QuantLinear
from ditq.numerics.codebook import CODEBOOKS, encode
from ditq.passes import Context
from ditq.passes.choose_codebook import bits_a_weight, choose_codebook
from ditq.passes.judging import hold_out
from ditq.passes.quantize import Quantize, stored_bits
from ditq.recipe import Recipe
from ditq.site_cache import FolderSiteCache
from tests.families_small import small_graph, statistics_of
from tests.numerics.weights import skewed, student_t

SITE = "transformer_blocks.1.ff.net.2"  # 256 -> 64


@functools.cache
def _statistics() -> Statistics:
    return statistics_of(small_graph("dit"))


def _on_a_grid() -> torch.Tensor:
    """Whole numbers of 4 bits, each as likely as the others, times a scale of the row."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-8, 8, (64, 256), generator=generator) * torch.linspace(0.01, 0.03, 64)[:, None]


def _quantized(
    weight: torch.Tensor, cache: FolderSiteCache | None = None, **settings: Any
) -> tuple[QuantLinear, dict[str, Any]]:
    graph = small_graph("dit")
    graph.linear(SITE).weight.data.copy_(weight)
    step = Quantize(**{"codebook": "auto", "format": "w4a16", "select": [SITE], **settings})
    report = step.run(graph, Context(_statistics(), 0, cache))
    layer = graph.linear(SITE)
    assert isinstance(layer, QuantLinear)
    return layer, report.rows[0]


@pytest.mark.parametrize("rounding", ["nearest", "gptq"])
@pytest.mark.parametrize("codebooks", [["uniform", "nf", "twin_log_shared"], ["twin_log_shared", "nf", "uniform"]])
def test_weights_on_a_grid_get_the_uniform_one_and_heavy_tails_do_not(codebooks: list[str], rounding: str) -> None:
    settings = {"codebooks": codebooks, "rounding": rounding}
    layer, row = _quantized(_on_a_grid(), **settings)
    assert layer.codebook == layer.spec()["codebook"] == row["codebook"] == "uniform"
    layer, row = _quantized(0.02 * student_t(64, 256), **settings)
    assert layer.codebook == layer.spec()["codebook"] == row["codebook"] != "uniform"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"refine": 2, "activation_noise": True, "centred": True, "format": "w3a4"},
        {"rank": 8, "branch": "float", "format": "w3a4"},
        {"group_size": 32, "format": "w3a8", "activation": "tensor"},
    ],
)
def test_the_chosen_code_is_that_of_naming_it_and_comes_back_from_the_cache(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    weight = 0.02 * student_t(64, 256)
    chosen, row = _quantized(weight, FolderSiteCache(tmp_path, settings), **settings)
    for again, said in (
        _quantized(weight, FolderSiteCache(tmp_path, settings), **settings),
        _quantized(weight, **settings),
        _quantized(weight, **settings, codebook=chosen.codebook),
    ):
        assert again.spec() == chosen.spec() and said == row
        assert all(torch.equal(a, b) for a, b in zip(again.buffers(), chosen.buffers(), strict=True))


def test_a_cached_choice_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, _ = _quantized(_on_a_grid(), FolderSiteCache(tmp_path, {}))
    monkeypatch.setattr("ditq.passes.quantize.choose_codebook", lambda *_: pytest.fail("chosen again"))
    assert _quantized(_on_a_grid(), FolderSiteCache(tmp_path, {}))[0].codebook == chosen.codebook


def _rows_of_two_kinds(columns: int) -> torch.Tensor:
    """Every other row heavy-tailed, the others evenly spread, so that tables of their own suit them: [64, columns]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, columns, generator=generator)
    weight[::2] = weight[::2].abs() ** 2.5 * weight[::2].sign()
    weight[1::2] = torch.rand(32, columns, generator=generator) * 2 - 1
    return weight / weight.norm(dim=1, keepdim=True)


def test_tables_a_row_win_only_where_they_are_worth_their_bits() -> None:
    """16 levels a row of 256 are half a bit a weight, which would halve the error elsewhere; 8 levels a row of 1024 little."""
    names, narrow = ["twin_log_shared", "twin_log"], _rows_of_two_kinds(256)
    errors = [_quantized(narrow, codebook=name)[1]["output error"] for name in names]
    assert 0.5 * errors[0] < errors[1] < errors[0]
    assert _quantized(narrow, codebooks=names)[0].codebook == "twin_log_shared"
    seen = InputAccumulator("wide", 1024, 1, 512, 0)
    seen.add(torch.randn(512, 1024, generator=torch.Generator().manual_seed(1)), 0)
    chosen = choose_codebook(
        names,
        _rows_of_two_kinds(1024),
        InputStatistics(**seen.tensors()),
        lambda name, part, _: (encode(part, CODEBOOKS[name](part, 3)), torch.zeros(len(part))),
        lambda rows, _: rows,
    )
    assert chosen == "twin_log"


@pytest.mark.parametrize("codebook", ["twin_log", "lloyd_max"])
@pytest.mark.parametrize("group_size", [0, 32])
def test_bits_are_counted_as_the_layer_stores_them(codebook: str, group_size: int) -> None:
    if CODEBOOKS[codebook].refusal(3, group_size):
        return
    weight = skewed(64, 256)
    fit = CODEBOOKS[codebook](weight, 3, **({"group_size": group_size} if group_size else {}))
    code = encode(weight, fit)
    assert bits_a_weight(code, 64) == pytest.approx(stored_bits(QuantLinear("site", code, None)) / weight.numel())


def test_what_is_held_out_is_missing_from_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 8, generator=generator)
    seen = InputAccumulator("input", 8, 2, 64, 0)  # the sample is all rows: 20 of the first bin, 40 of the second
    seen.add(rows[:20], 0)
    seen.add(rows[20:], 1)
    statistics = InputStatistics(**seen.tensors())
    rest, places, worth = hold_out(statistics)
    others = torch.ones(60, dtype=torch.bool)
    others[places] = False
    kept = statistics.sample[others].double()
    assert rest.count.tolist() == [10, 20] and len(places) == 30
    # float32 sums of 60 rows: a relative error of some 2^-24 for each addition
    torch.testing.assert_close(rest.hessian().double(), kept.T @ kept / 30, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest.mean().double(), kept.mean(0), rtol=1e-5, atol=1e-5)
    assert torch.allclose(worth, torch.ones_like(worth))  # half of the rows of either bin


def test_inspect_says_auto_and_8_bits_stay_uniform() -> None:
    step = Quantize(codebook="auto", format="w8a8", select=[SITE])
    assert step.preview(small_graph("dit"))[SITE].split()[1] == "auto"
    assert _quantized(_on_a_grid(), format="w8a8")[0].codebook == "uniform"


def test_a_rule_may_ask_for_it_and_then_statistics_are_needed() -> None:
    plain = {"rounding": "nearest", "codebook": "uniform", "weighted": False, "bias_correction": False}
    rule = {"select": SITE, "codebook": "auto", "codebooks": ["uniform", "nf"]}
    assert not Quantize(**plain).requires_statistics
    assert Quantize(**plain, rules=[rule]).requires_statistics
    layer, row = _quantized(0.02 * student_t(64, 256), **plain, rules=[rule])
    assert layer.codebook == row["codebook"] == "nf"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codebook": "auto", "codebooks": []}, "codebooks is empty; name at least one"),
        ({"codebook": "auto", "codebooks": ["unifrm"]}, "codebooks: unknown 'unifrm'; did you mean 'uniform'"),
        ({"codebook": "auto", "codebooks": ["auto"]}, "codebooks: unknown 'auto'"),
        ({"codebook": "auto", "codebooks": ["nf", "nf"]}, "codebooks names one twice: nf, nf"),
        ({"codebook": "auto", "codebooks": ["nf", "e2m1"], "format": "w3a8"}, "'e2m1' is for weights of 4 bits, not 3"),
        ({"codebook": "auto", "codebooks": ["twin_log"], "group_size": 32}, "takes no group_size"),
        ({"codebooks": ["nf"]}, "codebooks is what codebook: auto chooses from"),
        ({"rules": [{"select": "*", "codebooks": "nf"}]}, "codebooks is 'nf', must be a list"),
        ({"rules": [{"select": "*", "codebook": "auto", "codebooks": [3]}]}, "codebooks: unknown '3'"),
    ],
)
def test_lists_that_nothing_can_be_chosen_from_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DitqError, match=words):
        Recipe.from_dict({"passes": [{"quantize": settings}]}, "test")
