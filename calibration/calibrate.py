"""From a checkpoint to a statistics folder: the work behind `ditq calibrate`.

The folder holds `trajectories/` (what the denoiser got, see record.py) and the statistics made of it (statistics.py).
It is made as FOLDER.partial beside its place and gets its name when complete; an interrupted one can be continued.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ditq.calibration.batches import moved
from ditq.calibration.collect import check_moments, collect_statistics
from ditq.calibration.further import record_further
from ditq.calibration.probing import measure_step_weights
from ditq.calibration.prompts import BUILTIN_SETS, builtin_prompts, read_conditions, spread
from ditq.calibration.record import FORMAT as TRAJECTORIES_FORMAT
from ditq.calibration.record import INDEX as TRAJECTORIES_INDEX
from ditq.calibration.record import Trajectories, record_trajectories
from ditq.calibration.sampling import SamplingSettings, check_arguments, check_conditions, class_count, condition_kind
from ditq.calibration.statistics import FORMAT as STATISTICS_FORMAT
from ditq.calibration.statistics import INDEX as STATISTICS_INDEX
from ditq.calibration.statistics import TRAJECTORIES, Statistics
from ditq.calibration.step_weights import StepWeights
from ditq.calibration.storage import PARTIAL, make_folder, remove_folder, rename
from ditq.checkpoint import BUILT_IN, Checkpoint, read_json
from ditq.devices import AUTO, device_of, dtype_on, place_pipeline
from ditq.errors import DitqError, Interrupted
from ditq.folders import without_new_parents
from ditq.given import check_named, check_seed, check_whole, followed, path_of
from ditq.graph import DiTGraph
from ditq.inspection import example_inputs
from ditq.locks import locked
from ditq.progress import ProgressSetting
from ditq.quiet import quiet_libraries

DEFAULT_CONDITIONS = 16
MODULATION_CONDITIONS = 64

Conditions = str | Path | Sequence[str | int]


def calibrate(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    conditions: Conditions | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    bins: int = 4,
    rows_per_bin: int = 512,
    limit: int | None = None,
    arguments: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    device: str = AUTO,
    moments: str = "auto",
    memory_limit: int | None = None,
    modulation_conditions: int = MODULATION_CONDITIONS,
    step_weights: bool = False,
    force: bool = False,
    resume: bool = False,
    progress: ProgressSetting = None,
) -> Statistics:
    """Draw samples with the checkpoint's own pipeline and write the statistics of every linear input into folder `out`.

    Args:
        checkpoint: a pipeline folder, a built-in name, or an opened checkpoint.
        out: the folder to make.
        conditions: prompts or class labels: a list, a file, or the name of a prompt set that comes with ditq. Default:
            `default_conditions(checkpoint)`.
        steps: denoising steps; default: the checkpoint's own, else the pipeline's.
        seed: of the noise (condition i: seed + i) and of the sampled rows. The same seed gives the same bytes on the
            same machine with the same number of threads.
        bins: timestep bins; the steps are divided equally among them.
        rows_per_bin: rows of each input that are kept as they are, a bin.
        limit: use at most so many of the conditions.
        arguments: further arguments of the pipeline's call, over the checkpoint's own defaults.
        dtype, device: of the model while it draws and while its inputs are read (see devices.py); sums are float32 there.
        moments: second moments by timestep bin or over all, see `collect_statistics`.
        memory_limit: bytes that the statistics may take at a time, None for half of what is free; where they need more, the
            model runs more often.
        modulation_conditions: conditions, with those that are drawn, whose modulation is read (further.py): further ones of the
            same list, file or set, evenly over it. 0: those that are drawn alone.
        step_weights: also measure what an error at each step is worth in the end (step_weights.py).
        force: replace an existing folder (made by this function; nothing else is ever removed).
        resume: continue an interrupted calibration with the same settings; a finished one is simply opened.
        progress: see ditq.progress.

    Raises:
        DitqError: bad conditions, arguments or settings, a checkpoint without pipeline, values that are not finite, an
            existing folder without `force` or `resume`, and when the folder cannot be written.
    """
    checkpoint = checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint.open(checkpoint)
    for name, needed in (("bins", bins), ("rows_per_bin", rows_per_bin)):
        check_whole(name, needed, 1, needed=True)
    for name, value in (("limit", limit), ("memory_limit", memory_limit)):
        check_whole(name, value, 1)
    check_whole("modulation_conditions", modulation_conditions, 0, needed=True)
    check_moments(moments)
    check_seed(seed)
    out = followed(path_of("out", out))
    check_named("out", out)
    place = device_of(device)
    dtype = dtype or dtype_on(place)
    settings = SamplingSettings.for_checkpoint(checkpoint, steps, seed, arguments)
    check_arguments(pipeline_class(checkpoint), settings.arguments)
    chosen = choose_conditions(checkpoint, conditions, limit)
    others = further_conditions(checkpoint, conditions, chosen, modulation_conditions)
    with _working_folder(out, force=force, resume=resume) as folder:
        pipeline = checkpoint.load_pipeline(dtype=dtype)
        check_conditions(pipeline, [*chosen, *others])
        place_pipeline(pipeline, place)
        trajectories = record_trajectories(
            checkpoint,
            chosen,
            settings,
            folder / TRAJECTORIES,
            progress,
            resume=(folder / TRAJECTORIES).exists(),
            pipeline=pipeline,
            dtype=dtype,
        )
        record_further(checkpoint.family, pipeline, others, settings, trajectories, progress)
        graph = DiTGraph(checkpoint.skeleton(), moved(_example_inputs(checkpoint, trajectories), "cpu", torch.float32))
        graph.model = pipeline.transformer  # looked at without weights, since these may come block by block
        if step_weights and StepWeights.read(folder) is None:
            linears = {name: graph.linear(name) for name, site in graph.sites.items() if site.role == "token"}
            measure_step_weights(pipeline, linears, chosen, settings, trajectories.steps, progress).write(folder)
        del pipeline  # the text encoders may be larger than the statistics
        collect_statistics(
            graph,
            trajectories,
            bins,
            rows_per_bin,
            seed=seed,
            moments=moments,
            memory_limit=memory_limit,
            folder=folder,
            device=place,
            progress=progress,
        )
    return Statistics.open(out, checkpoint.fingerprint())


def default_conditions(checkpoint: Checkpoint, limit: int = DEFAULT_CONDITIONS) -> Sequence[str | int]:
    """What to calibrate with when nothing is given: the built-in checkpoints' captions; VBench prompts or class labels,
    evenly spread, for others."""
    known = _known_conditions(checkpoint, None)
    return known[:limit] if checkpoint.name in BUILT_IN else spread(known, limit)


def choose_conditions(
    checkpoint: Checkpoint, conditions: Conditions | None, limit: int | None = None
) -> Sequence[str | int]:
    """The conditions as a list, at most `limit` of them: the given list, a file's, a built-in set's, or the default."""
    if conditions is None:
        return default_conditions(checkpoint, limit or DEFAULT_CONDITIONS)
    return _known_conditions(checkpoint, conditions)[:limit]


def further_conditions(
    checkpoint: Checkpoint, conditions: Conditions | None, drawn: Sequence[str | int], count: int
) -> list[str | int]:
    """Conditions of the same source that are not drawn, evenly over it, so that there are `count` together with those."""
    known = _known_conditions(checkpoint, conditions)
    if (wrong := next((one for one in known if not isinstance(one, str | int)), None)) is not None:
        raise DitqError(f"condition {known.index(wrong)} is {wrong!r}, neither a prompt nor a class label")
    seen = set(drawn)
    others = [one for one in dict.fromkeys(known) if one not in seen]
    return spread(others, max(0, count - len(drawn)))


def _known_conditions(checkpoint: Checkpoint, conditions: Conditions | None) -> Sequence[str | int]:
    """All that the source holds: the given list, file or built-in set; by default captions, prompts or classes."""
    if conditions is not None and not isinstance(conditions, str | Path):
        if not isinstance(conditions, Iterable):
            raise DitqError(f"conditions is {conditions!r}; give a list of prompts or class labels, or a file of them")
        return list(conditions)
    kind = condition_kind(pipeline_class(checkpoint))
    if conditions is None:
        if kind == "class":
            return range(class_count(checkpoint.config))
        return builtin_prompts("mini" if checkpoint.name in BUILT_IN else "vbench")
    if str(conditions) in BUILTIN_SETS and not Path(conditions).exists():
        if kind == "class":
            raise DitqError(
                f"{conditions} is a set of prompts, but {checkpoint.name} is asked by class labels; give a file of them"
            )
        return builtin_prompts(str(conditions))
    return read_conditions(conditions, kind)


def pipeline_class(checkpoint: Checkpoint) -> type:
    """The diffusers class of the checkpoint's pipeline, without loading it. Raises DitqError where there is none."""
    import diffusers

    if checkpoint.pipeline_root is None:
        raise DitqError(
            f"{checkpoint.name}: a transformer alone cannot draw; give the pipeline folder (with model_index.json)"
        )
    name = read_json(checkpoint.pipeline_root / "model_index.json").get("_class_name")
    with quiet_libraries():
        found = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(found, type):
        raise DitqError(f"{checkpoint.name}: model_index.json names no pipeline class of diffusers ({name!r})")
    return found


def _example_inputs(checkpoint: Checkpoint, trajectories: Trajectories) -> dict[str, Any]:
    """One call of the transformer to find its structure by."""
    if checkpoint.family is not None:
        return example_inputs(checkpoint)
    arguments = next(trajectories.calls()).arguments
    return {name: value for name, value in arguments.items() if name != "return_dict"}


@contextmanager
def _working_folder(out: Path, *, force: bool, resume: bool) -> Iterator[Path]:
    """The folder to work in: FOLDER.partial, which becomes `out` at the end, or `out` itself when that is resumed.

    What an interruption leaves is kept when there is a finished trajectory in it and removed otherwise.
    """
    if force and resume:
        raise DitqError("--force starts again and --resume continues; give only one of them")
    lock = out.absolute().with_name(f".{out.name}{PARTIAL}.lock")
    with without_new_parents(out), locked(lock, out):
        try:
            with _checked_folder(out, force=force, resume=resume) as folder:
                yield folder
        finally:
            with suppress(OSError):  # Windows removes nothing that is open
                lock.unlink()


@contextmanager
def _checked_folder(out: Path, *, force: bool, resume: bool) -> Iterator[Path]:
    partial = out.with_name(out.name + PARTIAL)
    for folder in (out, partial):
        if folder.exists() and not _is_ours(folder):
            raise DitqError(
                f"{folder}: exists and was not made by `ditq calibrate`, or is damaged beyond telling; choose another name"
            )
    used = out.exists() and any(out.iterdir())
    if used and not (force or resume):
        raise DitqError(f"{out}: exists already; replace it with --force, or continue or reuse it with --resume")
    if partial.exists() and not (force or resume):
        raise DitqError(f"{partial}: an interrupted calibration; continue it with --resume or start again with --force")
    if used and resume:
        yield out
        return
    if partial.exists() and force:
        remove_folder(partial)
    make_folder(partial)
    try:
        yield partial
    except BaseException as error:
        if not any((partial / TRAJECTORIES).glob("*.safetensors")):
            shutil.rmtree(partial, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            message = f"interrupted; run again with --resume to go on (finished samples are in {partial})"
            raise Interrupted(message) from error
        elif isinstance(error, DitqError) and not resume and "--resume" not in str(error):
            raise DitqError(f"{error}; finished samples are in {partial}: run again with --resume to go on") from error
        raise
    if out.exists():
        remove_folder(out)
    rename(partial, out)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty or was made by `calibrate`: its files say so, whatever they are called."""
    if not folder.is_dir():
        return False
    indices = {
        folder / STATISTICS_INDEX: STATISTICS_FORMAT,
        folder / TRAJECTORIES / TRAJECTORIES_INDEX: TRAJECTORIES_FORMAT,
    }
    return not os.listdir(folder) or any(_has_format(path, name) for path, name in indices.items())


def _has_format(path: Path, name: str) -> bool:
    try:
        return bool(read_json(path).get("format") == name)
    except DitqError:
        return False
