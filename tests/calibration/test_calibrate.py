"""The statistics folder appears whole or not at all, is the same for the same seed, and can be continued."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from ditq.calibration import calibrate as calibrate_module
from ditq.calibration import storage
from ditq.calibration.calibrate import calibrate, choose_conditions, default_conditions
from ditq.calibration.prompts import builtin_prompts
from ditq.calibration.statistics import Statistics
from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from tests.calibration.small_pipelines import ARGUMENTS, CONDITIONS, STEPS, mini, saved_checkpoint

LAST_STEP = 2 * STEPS


def make(out: Path, **changes: Any) -> Statistics:
    """Calibrate a small PixArt, the quickest of the pipelines."""
    settings = {"arguments": ARGUMENTS["pixart"], "bins": 2, "rows_per_bin": 8, **changes}
    conditions = settings.pop("conditions", CONDITIONS["pixart"])
    return calibrate(settings.pop("checkpoint"), out, conditions, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return saved_checkpoint("pixart", tmp_path_factory.mktemp("pixart") / "checkpoint")


@pytest.fixture(scope="module")
def finished(pixart: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "stats"
    make(out, checkpoint=pixart)
    return out


def interrupt_at(work: str, count: int, error: type[BaseException] = KeyboardInterrupt) -> Any:
    def progress(name: str, done: int, total: int) -> None:
        if name == work and done == count:
            raise error

    return progress


def test_the_built_in_checkpoint_needs_no_settings_but_its_size(tmp_path: Path) -> None:
    found = calibrate("mini", tmp_path / "stats", steps=STEPS, limit=1, bins=1, rows_per_bin=8)
    assert found.metadata["checkpoint"]["fingerprint"] == mini().fingerprint()
    assert found.metadata["sampling_arguments"] == {**mini().sampling, "num_inference_steps": STEPS}
    # 64 image and 16 text tokens, two branches, two steps
    assert int(found.groups["single_transformer_blocks.0.proj_out"].count.sum()) == (64 + 16) * 2 * STEPS
    assert sorted(contents(tmp_path)) == [
        "stats/statistics.json",
        "stats/statistics.safetensors",
        "stats/trajectories/00000.safetensors",
        "stats/trajectories/trajectories.json",
    ]


def test_a_picture_without_a_token_is_said_to_be_too_small(tmp_path: Path) -> None:
    with pytest.raises(DitqError, match=r"x_embedder: no token reaches it.* \[1, 0, 32\]: the pictures are too small"):
        calibrate("mini", tmp_path / "stats", arguments={"height": 4, "width": 4}, steps=1, limit=1, bins=1)


def test_the_same_seed_gives_the_same_bytes(pixart: Checkpoint, finished: Path, tmp_path: Path) -> None:
    make(tmp_path / "again", checkpoint=pixart)
    make(tmp_path / "other", checkpoint=pixart, seed=1)
    assert contents(tmp_path / "again") == contents(finished)
    name = "statistics.safetensors"
    assert (tmp_path / "other" / name).read_bytes() != (finished / name).read_bytes()


@pytest.mark.parametrize(
    ("work", "count"),
    [("recording trajectories", STEPS + 1), ("collecting statistics", 0), ("collecting statistics", 3)],
)
def test_an_interrupted_calibration_resumes_to_the_very_same_bytes(
    pixart: Checkpoint, finished: Path, tmp_path: Path, work: str, count: int
) -> None:
    out = tmp_path / "stats"
    with pytest.raises(KeyboardInterrupt):
        make(out, checkpoint=pixart, progress=interrupt_at(work, count))
    assert not out.exists()
    left = contents(tmp_path)
    assert "stats.partial/trajectories/00000.safetensors" in left
    assert not [name for name in left if name.endswith(".partial")]
    with pytest.raises(DitqError, match="an interrupted calibration; continue it with --resume"):
        make(out, checkpoint=pixart)
    make(out, checkpoint=pixart, resume=True)
    assert contents(tmp_path) == {f"stats/{name}": content for name, content in contents(finished).items()}


def test_an_interruption_before_anything_is_finished_leaves_nothing(pixart: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "stats", checkpoint=pixart, progress=interrupt_at("recording trajectories", 1))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="locks as Unix has them")
@pytest.mark.parametrize("chosen", [{}, {"force": True}, {"resume": True}])
def test_a_folder_that_another_calibration_makes_is_left_to_it(
    pixart: Checkpoint, tmp_path: Path, chosen: dict[str, bool]
) -> None:
    out, refused = tmp_path / "stats", []

    def progress(name: str, done: int, total: int) -> None:
        if name == "recording trajectories" and done == LAST_STEP:  # something is finished
            with pytest.raises(DitqError, match=r"stats: another process is making it; wait for that, or give another"):
                make(out, checkpoint=pixart, **chosen)
            refused.append(name)

    make(out, checkpoint=pixart, progress=progress)
    assert refused
    assert set(os.listdir(tmp_path)) == {"stats"}


def test_an_existing_folder_is_replaced_only_by_force(pixart: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "stats"
    make(out, checkpoint=pixart, conditions=["a"])
    before = contents(out)
    with pytest.raises(DitqError, match="exists already; replace it with --force"):
        make(out, checkpoint=pixart, conditions=["b"])
    with pytest.raises(KeyboardInterrupt):
        make(out, checkpoint=pixart, conditions=["b"], force=True, progress=interrupt_at("recording trajectories", 1))
    assert contents(tmp_path) == {f"stats/{name}": content for name, content in before.items()}
    make(out, checkpoint=pixart, conditions=["b"], force=True)
    assert contents(out).keys() == before.keys() and contents(out) != before


def test_a_finished_calibration_is_reused_and_never_mixed(pixart: Checkpoint, finished: Path) -> None:
    before = contents(finished)
    make(finished, checkpoint=pixart, resume=True, progress=interrupt_at("recording trajectories", 1))
    with pytest.raises(DitqError, match="was recorded with another seed"):
        make(finished, checkpoint=pixart, resume=True, seed=1)
    with pytest.raises(DitqError, match="was recorded with another checkpoint"):
        make(finished, checkpoint="mini", resume=True, arguments=None, steps=STEPS)
    assert contents(finished) == before


def test_a_folder_of_something_else_is_never_touched(pixart: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("a")
    (tmp_path / "file").write_text("b")
    (tmp_path / "hits").mkdir()
    (tmp_path / "hits" / "statistics.json").write_text('{"format": "of visitors", "hits": 3}')
    (tmp_path / "hits" / "statistics_mine.safetensors").write_bytes(b"c")
    before = contents(tmp_path)
    for name in ("photos", "file", "hits"):
        for how in ({"force": True}, {"resume": True}, {}):
            with pytest.raises(DitqError, match="was not made by `ditq calibrate`"):
                make(tmp_path / name, checkpoint=pixart, **how)
    with pytest.raises(DitqError, match=r"/file: cannot be written \(.*\); give another place"):
        make(tmp_path / "file" / "stats", checkpoint=pixart)
    for place in (".", "/", str(tmp_path / "photos" / "..")):
        with pytest.raises(DitqError, match=r"^out is '.*'; give the name of a folder to make"):
            make(Path(place), checkpoint=pixart, force=True)
    with pytest.raises(DitqError, match="give only one of them"):
        make(tmp_path / "stats", checkpoint=pixart, force=True, resume=True)
    assert contents(tmp_path) == before


def test_a_full_disk_is_named_and_leaves_no_half_file(
    pixart: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(DitqError, match=r"cannot be written .*; free some space, then go on with --resume"):
        make(tmp_path / "stats", checkpoint=pixart)
    assert not list(tmp_path.iterdir())


def test_an_error_behind_finished_samples_says_that_they_are_kept(
    pixart: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise DitqError("stats: cannot be written (File too large)")

    monkeypatch.setattr(calibrate_module, "collect_statistics", fails)
    with pytest.raises(
        DitqError, match=r"File too large\); finished samples are in .*stats.partial: run again with --resume"
    ):
        make(tmp_path / "stats", checkpoint=pixart)
    assert (tmp_path / "stats.partial").is_dir() and not (tmp_path / "stats").exists()


def test_a_class_conditional_pipeline_takes_labels_from_a_file(tmp_path: Path) -> None:
    checkpoint = saved_checkpoint("dit", tmp_path / "checkpoint")
    labels = tmp_path / "labels.txt"
    labels.write_text("7\n3\n9\n")
    found = calibrate(checkpoint, tmp_path / "stats", labels, steps=STEPS, bins=1, limit=2)
    assert (found.metadata["kind"], found.metadata["condition_count"]) == ("class", 2)
    # 16 tokens, both branches in one call
    assert int(found.groups["transformer_blocks.0.attn1.to_q"].count) == 16 * 2 * STEPS * 2
    assert default_conditions(checkpoint, 4) == [0, 250, 500, 750]
    with pytest.raises(DitqError, match="takes labels from 0 to 999"):
        calibrate(checkpoint, tmp_path / "wrong", [1000], steps=STEPS)
    assert not list(tmp_path.glob("wrong*"))


def test_the_default_conditions_fit_the_checkpoint(pixart: Checkpoint, tmp_path: Path) -> None:
    assert choose_conditions(mini(), None) == builtin_prompts("mini")[:16]
    everywhere = choose_conditions(pixart, None)
    assert len(everywhere) == 16 and everywhere[0] == builtin_prompts("vbench")[0]
    assert set(everywhere) <= set(builtin_prompts("vbench"))
    assert choose_conditions(mini(), "mini-heldout", 3) == builtin_prompts("mini-heldout")[:3]
    assert choose_conditions(mini(), ["a", "b"]) == ["a", "b"]
    with pytest.raises(DitqError, match="cannot be read"):
        choose_conditions(mini(), tmp_path / "none.txt")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bins": 0}, "bins is 0; give a whole number of at least 1"),
        ({"limit": 0}, "limit is 0"),
        ({"steps": 0}, "'num_inference_steps' is 0"),
        ({"arguments": {"guidance": 3}}, "has no sampling argument 'guidance'; did you mean 'guidance_scale'?"),
        ({"conditions": []}, "no prompts"),
    ],
)
def test_wrong_settings_are_named_and_leave_nothing(
    pixart: Checkpoint, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(DitqError) as caught:
        make(tmp_path / "stats", checkpoint=pixart, **settings)
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_transformer_alone_cannot_be_calibrated(tmp_path: Path) -> None:
    with pytest.raises(DitqError, match="a transformer alone cannot draw; give the pipeline folder"):
        calibrate(mini().root / "transformer", tmp_path / "stats")


def test_other_dtypes_are_recorded_and_gathered_alike(pixart: Checkpoint, tmp_path: Path) -> None:
    found = make(tmp_path / "stats", checkpoint=pixart, conditions=["a"], dtype=torch.bfloat16)
    assert found.metadata["dtype"] == "bfloat16"
    assert found.groups["transformer_blocks.0.attn1.to_q"].second_moment.dtype == torch.float32
