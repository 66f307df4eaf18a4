"""Damaged checkpoints, and what is none: one clear line, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from tests.command_line import assert_refused
from tests.damage import Damage, Marker, cut, sound_checkpoints
from tests.small_checkpoint import (
    INDEX,
    WEIGHTS,
    change_config,
    change_header,
    change_weights,
    files_below,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return sound_checkpoints(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def copy_of(sound: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(sound[name], tmp_path / "ckpt")


def _opens_and_loads(path: Path) -> None:
    Checkpoint.open(path).load_model()


# --- what was done to a sound one, and what the line must say


def _set_header_length(path: Path, length: int) -> None:
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def _lie(**entry: Any) -> Damage:
    """Change what the header says of the first tensor."""
    return lambda folder: change_header(folder / WEIGHTS, lambda header: header[_first(header)].update(entry))


def _first(header: dict[str, Any]) -> str:
    return min(header.keys() - {"__metadata__"}, key=lambda name: header[name]["data_offsets"])


def _overlap(header: dict[str, Any]) -> None:
    """The second tensor of the first one's size lies where the first lies."""
    first = header[_first(header)]
    other = next(
        v for k, v in header.items() if k not in ("__metadata__", _first(header)) and v["shape"] == first["shape"]
    )
    other["data_offsets"] = first["data_offsets"]


def _pickle(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(Marker(folder.parent / "was-run")))


def _integers(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.int8)


def _complex(tensors: dict[str, torch.Tensor]) -> None:
    tensors["proj_out.weight"] = tensors["proj_out.weight"].to(torch.complex64)


def _with_a_scale(name: str) -> Damage:
    """As a quantizer leaves a checkpoint: a tensor more."""
    return lambda folder: change_weights(folder, lambda tensors: tensors.update({name: torch.ones(1)}))


def _spoil(value: float) -> Damage:
    return lambda folder: change_weights(folder, lambda tensors: tensors["proj_out.weight"].view(-1)[5:6].fill_(value))


ONE_FILE: dict[str, tuple[Damage, str]] = {
    "empty folder": (lambda f: [item.unlink() for item in f.iterdir()], "is empty; a checkpoint needs a config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"), "config.json: cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "should hold a JSON object, not list"),
    "no class": (lambda f: change_config(f, _class_name=None), "no _class_name"),
    "class a number": (lambda f: change_config(f, _class_name=7), "no _class_name"),
    "unknown class": (lambda f: change_config(f, _class_name="FluxTransformer9"), "FluxTransformer9 is not in diffusers"),
    "class no module": (lambda f: change_config(f, _class_name="FluxPipeline"), "FluxPipeline is not in diffusers"),
    "refused: word": (lambda f: change_config(f, num_attention_heads="two"), "refuses its config.json"),
    "refused: zero": (lambda f: change_config(f, num_attention_heads=0, num_layers=-1), "config.json"),
    "refused: null": (lambda f: change_config(f, in_channels=[]), "refuses its config.json"),
    "other config": (lambda f: change_config(f, num_layers=2), "tensor transformer_blocks.1.* needs is not in its files"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no .safetensors file"),
    "empty file": (lambda f: cut(f / WEIGHTS, 0), "damaged or not a safetensors file"),
    "truncated": (lambda f: cut(f / WEIGHTS, 100_000), "damaged or not a safetensors file"),
    "truncated header": (lambda f: cut(f / WEIGHTS, 60), "damaged or not a safetensors file"),
    "bytes after the end": (lambda f: (f / WEIGHTS).open("ab").write(b"more"), "damaged or not a safetensors file"),
    "header beyond file": (lambda f: _set_header_length(f / WEIGHTS, 10**7), "damaged or not a safetensors file"),
    "header of exabytes": (lambda f: _set_header_length(f / WEIGHTS, 2**63), "damaged or not a safetensors file"),
    "header of nothing": (lambda f: _set_header_length(f / WEIGHTS, 0), "damaged or not a safetensors file"),
    "header not JSON": (lambda f: (f / WEIGHTS).write_bytes(b"\x08" + bytes(7) + b"not json"), "damaged or not a"),
    "offsets beyond the data": (_lie(data_offsets=[0, 10**9]), "damaged or not a safetensors file"),
    "offsets backwards": (_lie(data_offsets=[256, 0]), "damaged or not a safetensors file"),
    "offsets negative": (_lie(data_offsets=[-256, 0]), "damaged or not a safetensors file"),
    "shape beyond offsets": (_lie(shape=[4096, 4096]), "damaged or not a safetensors file"),
    "shape that overflows": (_lie(shape=[2**40, 2**40]), "damaged or not a safetensors file"),
    "unknown dtype": (_lie(dtype="F999"), "damaged or not a safetensors file"),
    "overlapping": (lambda f: change_header(f / WEIGHTS, _overlap), "damaged or not a safetensors file"),
    "pickled .bin": (lambda f: _pickle(f, "diffusion_pytorch_model.bin"), "pickled weights are not read"),
    "pickle called safetensors": (lambda f: _pickle(f, WEIGHTS), "damaged or not a safetensors file"),
    "wrong shape": (
        lambda f: change_weights(f, lambda t: t.update({"proj_out.bias": torch.zeros(33)})),
        r"proj_out.bias has shape \[33\].*needs \[32\]",
    ),
    "missing tensor": (lambda f: change_weights(f, lambda t: t.pop("proj_out.bias")), "proj_out.bias .* is not in its"),
    "NaN": (_spoil(float("nan")), "proj_out.weight holds NaN or infinity"),
    "infinity": (_spoil(float("-inf")), "proj_out.weight holds NaN or infinity"),
    "complex numbers": (lambda f: change_weights(f, _complex), "proj_out.weight is stored as C64, but .* needs one of F32"),
    "integers": (lambda f: change_weights(f, _integers), "proj_out.weight is stored as I8"),
    **{
        name: (_with_a_scale(name), "is a scale of weights that are quantized already; give the checkpoint before")
        for name in ("proj_out.scale_weight", "proj_out.weight_scale_inv", "scaled_fp8", "proj_out.weight.absmax",
                     "proj_out.weight.quant_state.bitsandbytes__nf4", "proj_out.qweight", "proj_out.wscales")
    },
    "impossible rotary axes": (lambda f: change_config(f, axes_dims_rope=[8, 12, 16]), "does not run with its config"),
}  # fmt: skip


def _index(change: Callable[[dict[str, str]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / INDEX
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def _name_outside(name: str) -> Damage:
    """The index names a real safetensors file that lies outside the folder."""

    def damage(folder: Path) -> None:
        outside = folder.parent / "outside.safetensors"
        save_file({"proj_out.bias": torch.zeros(32)}, outside)
        target = str(outside) if name == "absolute" else name
        _index(lambda places: places.update({"proj_out.bias": target}))(folder)

    return damage


def _shard_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def _drop_from_shard(folder: Path) -> None:
    shard = _shard_of(folder, "proj_out.bias")
    tensors = load_file(shard)
    del tensors["proj_out.bias"]
    save_file(tensors, shard)


SHARDS: dict[str, tuple[Damage, str]] = {
    "shard missing": (lambda f: _shard_of(f, "proj_out.bias").unlink(), "shard .* is missing; fetch it again"),
    "shard truncated": (lambda f: cut(_shard_of(f, "proj_out.bias"), 500), "damaged or not a safetensors file"),
    "tensor not in its shard": (_drop_from_shard, "says that proj_out.bias is in .*, but it is not"),
    "outside by ..": (_name_outside("../outside.safetensors"), "outside the folder"),
    "outside by /": (_name_outside("absolute"), "outside the folder"),
    "the folder itself": (_name_outside(""), "outside the folder"),
    "the folder above": (_name_outside(".."), "outside the folder"),
    "a pickled shard": (_index(lambda places: places.update({"proj_out.bias": "x.bin"})), "x.bin"),
    "a number": (_index(lambda places: places.update({"proj_out.bias": 5})), "weight_map should map"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "not a safetensors index"),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), "not a safetensors index"),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "not a safetensors index"),
    "empty weight_map": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "needs is not in its files"),
}


def _pickle_text_encoder(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    place = folder / "text_encoder" / "pytorch_model.bin"
    place.write_bytes(pickle.dumps(Marker(folder.parent / "was-run")))


PIPELINE: dict[str, tuple[Damage, str]] = {
    "model_index not JSON": (lambda f: (f / "model_index.json").write_text("{"), "model_index.json: not valid JSON"),
    "no transformer named": (
        lambda f: (f / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": []}'),
        "names no transformer",
    ),
    "no transformer there": (lambda f: shutil.rmtree(f / "transformer"), "there is no folder transformer/"),
    "unknown pipeline": (
        lambda f: (f / "model_index.json").write_text('{"_class_name": "NoPipeline", "transformer": []}'),
        "no pipeline class of diffusers",
    ),
    "sampling.json not JSON": (lambda f: (f / "sampling.json").write_text("{"), "sampling.json: not valid JSON"),
    "sampling.json unknown": (lambda f: (f / "sampling.json").write_text('{"heigth": 32}'), "did you mean 'height'"),
    "text encoder pickled": (_pickle_text_encoder, "the pipeline does not load"),
    "text encoder truncated": (lambda f: cut(f / "text_encoder" / "model.safetensors", 500), "does not load"),
    "text encoder gone": (lambda f: shutil.rmtree(f / "text_encoder"), "the pipeline does not load"),
    "tokenizer damaged": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{"), "the pipeline does not load"),
    "vae config damaged": (lambda f: (f / "vae" / "config.json").write_text("{"), "the pipeline does not load"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "damage"), [*(("one", d) for d in ONE_FILE), *(("shards", d) for d in SHARDS)])
def test_a_damaged_checkpoint_is_one_line(
    kind: str, damage: str, copy_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, says = (ONE_FILE if kind == "one" else SHARDS)[damage]
    folder = copy_of(kind)
    apply(folder)
    # Values are read when the model is loaded, which here must not wait for a calibration that a transformer alone cannot have.
    plain = tmp_path / "plain.yaml"
    plain.write_text("passes: [{quantize: {format: w8a8, rounding: nearest, bias_correction: false, weighted: false}}]")
    recipe = ("-r", plain) if damage in ("NaN", "infinity") else ()
    before = files_below(tmp_path)
    if damage != "impossible rotary axes":  # a model that loads, but does not run
        with pytest.raises(DitqError, match=says):
            _opens_and_loads(folder)
    assert_refused(capsys, says, "compile", folder, "-o", tmp_path / "new" / "engine", *recipe)
    assert files_below(tmp_path) == before  # no engine, no work folder, nothing unpickled


@pytest.mark.parametrize("damage", PIPELINE)
def test_a_damaged_pipeline_is_one_line(
    damage: str, copy_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, says = PIPELINE[damage]
    folder = copy_of("pipeline")
    apply(folder)
    before = files_below(tmp_path)
    assert_refused(capsys, says, "compile", folder, "-o", tmp_path / "new" / "engine")
    assert_refused(capsys, says, "calibrate", folder, "-o", tmp_path / "new" / "stats")
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name", ["nothing-here", "weights.bin", "weights.pt", "weights.ckpt", "alone.safetensors"])
def test_files_that_are_no_checkpoint_are_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if name == "alone.safetensors":
        save_file({"x": torch.zeros(2)}, path)
    elif name != "nothing-here":
        path.write_bytes(pickle.dumps(Marker(tmp_path / "was-run")))
    says = {"nothing-here": "no such checkpoint", "alone.safetensors": "--config"}.get(name, "only .safetensors files")
    with pytest.raises(DitqError, match=says):
        _opens_and_loads(path)
    for command in (["compile", path, "-o", tmp_path / "engine"], ["inspect", path]):
        assert_refused(capsys, says, *command)
    assert files_below(tmp_path) == ([] if name == "nothing-here" else [name])


def test_a_transformer_alone_cannot_be_calibrated(
    sound: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, "a transformer alone cannot draw", "compile", sound["one"], "-o", tmp_path / "engine")
    assert files_below(tmp_path) == []
