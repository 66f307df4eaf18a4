"""The choice of a product's way: the fastest of those that compute rightly, kept for later runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ditq.errors import DitqError
from ditq.kernels.storage import store_carrier
from ditq.kernels.tuning import FOLDER, Tuner, Way, bucket, label, tiles, ways

STORED = store_carrier(torch.zeros(64, 64, dtype=torch.int8), torch.ones(64))
TRIED = ways(90, 8, torch.int8, 1000, whole_rows=True)
KEY = label(STORED, torch.int8, 1000, 1, True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def find(tuner: Tuner, cost: Callable[[Way], float], right: Callable[[Way], bool]) -> Way:
    """With results that are the way's number among those tried."""

    def run(way: Way) -> Tensor:
        return torch.tensor(TRIED.index(way))

    return tuner.way(KEY, TRIED, run, lambda found: right(TRIED[int(found)]), cost)


def test_the_fastest_way_is_taken_and_known_to_the_next_run() -> None:
    assert len(TRIED) > 2
    best = TRIED[1]
    assert find(Tuner("Some GPU", 90), lambda way: 1.0 if way == best else 2.0, lambda way: True) == best
    assert find(Tuner("Some GPU", 90), lambda way: pytest.fail("measured again"), lambda way: True) == best
    assert find(Tuner("Another GPU", 90), TRIED.index, lambda way: True) == TRIED[0]


def test_a_way_with_a_wrong_result_is_never_used_however_fast() -> None:
    wrong = TRIED[0]
    found = find(Tuner("Some GPU", 90), TRIED.index, lambda way: way != wrong)
    assert found == TRIED[1]
    with pytest.raises(
        DitqError, match=r"no kernel of Triton .* computes w8 int8 1024x64x64 plain rightly on this GPU"
    ):
        find(Tuner("Another GPU", 90), lambda way: 1.0, lambda way: False)


def test_a_product_that_the_library_has_not_is_left_out_and_a_kernel_that_fails_is_not() -> None:
    library, kernel = Way(TRIED[0].tile, library=True), TRIED[1]

    def failing(bad: Way) -> Callable[[Way], Tensor]:
        def run(way: Way) -> Tensor:
            if way == bad:
                raise RuntimeError("not supported")
            return torch.zeros(())

        return run

    cost = {library: 1.0, kernel: 2.0}.__getitem__
    assert Tuner("Some GPU", 90).way("a", [library, kernel], failing(library), lambda _: True, cost) == kernel
    with pytest.raises(RuntimeError, match="not supported"):
        Tuner("Some GPU", 90).way("b", [library, kernel], failing(kernel), lambda _: True, cost)


def test_a_damaged_file_is_measured_anew(folder: Path) -> None:
    tuner = Tuner("Some GPU", 90)
    for text in ("{", "[]", '{"w8 int8 1024x64x64 plain": {"tile": {"tokens": "x"}, "other": 1}}'):
        tuner.path.write_text(text)
        assert find(Tuner("Some GPU", 90), TRIED.index, lambda way: True) == TRIED[0]


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 100, 4096, 4097, 4608, 6145])
def test_a_bucket_holds_numbers_of_tokens_within_a_half(tokens: int) -> None:
    assert tokens <= bucket(tokens) <= 1.5 * tokens + 1
    assert bucket(bucket(tokens)) == bucket(tokens)


def test_every_format_has_tiles_for_every_generation() -> None:
    for capability in (80, 86, 89, 90, 100, 120):
        for bits in (2, 3, 4, 8):
            for kind in (torch.int8, torch.float8_e4m3fn, torch.bfloat16):
                assert len(set(tiles(capability, bits, kind))) > 1
                assert len(set(tiles(capability, bits, kind, experts=12))) > 1
