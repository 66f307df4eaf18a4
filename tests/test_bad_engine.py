"""An engine that is missing, changed or hostile is refused by every command that takes one, before anything of it runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import ditq
from ditq.errors import DitqError
from ditq.export.engine_files import hash_file
from ditq.export.write import write_engine
from ditq.nn import QuantLinear
from ditq.numerics.codebook import CODEBOOKS
from ditq.numerics.rounding import round_nearest
from tests.command_line import assert_refused, run
from tests.small_checkpoint import files_below

WEIGHTS, GRAPH, MANIFEST = "weights.safetensors", "model.onnx", "engine.json"


class _Toy(nn.Module):
    """The smallest model that has something of everything in its engine: a quantized linear and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
        self.first = QuantLinear("first", round_nearest(weight, CODEBOOKS["uniform"](weight, 4)), None)
        self.second = nn.Linear(64, 64)

    def forward(self, hidden_states: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.second(self.first(hidden_states)),)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "engine"
    torch.manual_seed(0)
    write_engine(
        folder, _Toy().eval().requires_grad_(False), name="toy", config={"_class_name": "DiTTransformer2DModel"},
        class_name="DiTTransformer2DModel", family="dit", fingerprint="0" * 64, recipe={"name": "w4a16"},
        inputs={"hidden_states": torch.randn(2, 8, 64)}, axes={"hidden_states": ("batch", None, None)},
    )  # fmt: skip
    return folder


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return damage


def _flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-10] ^= 1
        (folder / name).write_bytes(content)

    return damage


def _forged(change: Callable[[onnx.ModelProto], Any]) -> Callable[[Path], None]:
    """The graph is changed and its new hash written down, as whoever wants to deceive would do."""

    def damage(folder: Path) -> None:
        model = onnx.load(folder / GRAPH, load_external_data=False)
        change(model)
        (folder / GRAPH).write_bytes(model.SerializeToString())
        _edit(lambda manifest: manifest["files"].update({GRAPH: hash_file(folder / GRAPH)}))(folder)

    return damage


def _external(key: str, value: str) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return change


def _garbage(folder: Path) -> None:
    (folder / GRAPH).write_bytes(b"\xff" * 1000)
    _edit(lambda manifest: manifest["files"].update({GRAPH: hash_file(folder / GRAPH)}))(folder)


def _link(folder: Path) -> None:
    """The weights are a link to the same bytes outside the folder."""
    outside = folder.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def _list(name: str) -> Callable[[Path], None]:
    """engine.json lists a file by this name, which exists and has the hash that is written down."""

    def damage(folder: Path) -> None:
        secret = folder.parent / "secret"
        secret.write_text("secret")
        listed = str(secret) if name == "absolute" else name
        _edit(lambda manifest: manifest["files"].update({listed: hash_file(secret)}))(folder)

    return damage


def _plan(**entries: Any) -> Callable[[Path], None]:
    """engine.json has a plan whose files are those of the engine itself, but for these entries; there is a secret above."""
    sound = {
        "gpu": "sm89",
        "library": "tensorrt",
        "version": "10",
        "sizes": {},
        "files": {GRAPH: GRAPH},
        "layers": GRAPH,
    }

    def damage(folder: Path) -> None:
        (folder.parent / "secret").write_text("secret")
        _edit(lambda manifest: manifest.update(plans=[{**sound, **entries}]))(folder)

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "gone": (shutil.rmtree, "no such engine folder|no such checkpoint"),
    "empty": (lambda f: [item.unlink() for item in f.iterdir()], "it has no engine.json|is empty"),
    "no engine.json": (lambda f: (f / MANIFEST).unlink(), "it has no engine.json|no config.json"),
    "engine.json not JSON": (lambda f: (f / MANIFEST).write_text("{"), "engine.json: damaged"),
    "engine.json not UTF-8": (lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe"), "engine.json: damaged"),
    "engine.json a list": (lambda f: (f / MANIFEST).write_text("[]"), "engine format None is not known"),
    "later format": (_edit(lambda m: m.update(format_version=99)), "engine format 99 is not known here"),
    "no source": (_edit(lambda m: m.pop("source")), "damaged .no valid 'source'"),
    "sampling of no names": (_edit(lambda m: m["source"].update(sampling=[1])), "damaged .no valid 'source'"),
    "source without name": (_edit(lambda m: m["source"].pop("name")), "damaged .no valid 'source'"),
    "structure without parts": (_edit(lambda m: m["structure"].pop("quantized")), "damaged .no valid 'structure'"),
    "a layer without bits": (_edit(lambda m: m["structure"]["quantized"]["first"].pop("bits")), "no valid 'structure'"),
    "input without shape": (_edit(lambda m: m["inputs"][0].pop("shape")), "damaged .no valid 'inputs'"),
    "input of no dtype": (_edit(lambda m: m["inputs"][0].update(dtype="float33")), "no valid 'inputs'"),
    "input of no shape": (_edit(lambda m: m["inputs"][0].update(shape=None)), "no valid 'inputs'"),
    "layout of something else": (_edit(lambda m: m["layout"].update(hidden_states=5)), "no valid 'layout'"),
    "layout of no tensor": (_edit(lambda m: m["layout"].update(hidden_states={"list": [{}]})), "no valid 'layout'"),
    "a list without end": (
        _edit(lambda m: m["layout"].update(x={"repeated": {"constant": 1}, "times": 10**10})), "no valid 'layout'"
    ),
    "plans that are none": (_edit(lambda m: m.update(plans=5)), "no valid 'plans'"),
    "plan without files": (_plan(files=5), "a plan is not of the engine's graphs"),
    "plan of other graphs": (_plan(files={"other.onnx": GRAPH}), "a plan is not of the engine's graphs"),
    "plan of no file": (_plan(files={GRAPH: 5}), "a plan in engine.json names 5, which is outside"),
    "plan above": (_plan(files={GRAPH: "../secret"}), "a plan in engine.json names '../secret', which is outside"),
    "layers above": (_plan(layers="../secret"), "a plan in engine.json names '../secret', which is outside"),
    "layers of a number": (_plan(layers=[]), r"a plan in engine.json names \[\], which is outside"),
    "plan not listed": (_plan(files={GRAPH: MANIFEST}), "a plan reads 'engine.json', which engine.json does not list"),
    "attentions that are none": (_edit(lambda m: m["structure"].update(attentions=[1])), "no valid 'structure'"),
    "figures that are none": (_edit(lambda m: m.update(measured=5)), "no valid 'measured'"),
    "engine.json too deep": (lambda f: (f / MANIFEST).write_text("[" * 100_000), "engine.json: damaged"),
    "bins that rise": (
        _edit(lambda m: m.update(schedule={"edges": [1, 2], "graphs": ["model.onnx"] * 3})), "no valid 'schedule'"
    ),
    "bins without end": (
        _edit(lambda m: m.update(schedule={"edges": [10**400], "graphs": ["model.onnx"] * 2})), "no valid 'schedule'"
    ),
    "tiles of no place": (
        _edit(lambda m: m["structure"].update(structural=[{"kind": "sparse_attention", "place": "x", "spec": []}])),
        "no valid 'layout'",
    ),
    "an order of nothing": (
        _edit(lambda m: m["structure"].update(structural=[
            {"kind": "token_order", "place": "", "spec": {"layout": {"patch": 0}, "entry": "a", "exit": "b"}}
        ])), "no valid 'layout'",
    ),
    "plan of another kind": (_edit(lambda m: m.update(planned=["first"])), "damaged .no valid 'planned'"),
    "weights gone": (lambda f: (f / WEIGHTS).unlink(), "weights.safetensors is missing; copy the whole engine"),
    "graph gone": (lambda f: (f / GRAPH).unlink(), "model.onnx is missing"),
    "weights changed": (_flip(WEIGHTS), "weights.safetensors was changed since the engine was written"),
    "graph changed": (_flip(GRAPH), "model.onnx was changed"),
    "weights truncated": (lambda f: (f / WEIGHTS).write_bytes(b"x"), "weights.safetensors was changed"),
    "weights not listed": (_edit(lambda m: m["files"].pop(WEIGHTS)), "does not list weights.safetensors"),
    "no hash": (_edit(lambda m: m["files"][WEIGHTS].pop("sha256")), "no size and hash of weights.safetensors"),
    "lists a file above": (_list("../secret"), "'../secret', which is outside the engine folder"),
    "lists an absolute file": (_list("absolute"), "secret', which is outside the engine folder"),
    "lists by backslash": (_list("..\\secret"), "outside the engine folder"),
    "weights a link outside": (_link, "weights.safetensors', which is outside the engine folder"),
    "graph reads above": (_forged(_external("location", "../secret")), "'../secret', which is outside"),
    "graph reads an absolute file": (_forged(_external("location", "/etc/passwd")), "'/etc/passwd', which is outside"),
    "graph reads engine.json": (_forged(_external("location", MANIFEST)), "which engine.json does not list"),
    "graph reads beyond the end": (_forged(_external("offset", str(10**9))), "lies beyond the end"),
    "graph reads before the start": (_forged(_external("offset", "-8")), "lies beyond the end"),
    "graph is garbage": (_garbage, "model.onnx is damaged"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_command_refuses_it_in_one_line(
    damage: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, says = DAMAGES[damage]
    folder = shutil.copytree(sound, tmp_path / "engine")
    apply(folder)
    before = files_below(tmp_path)
    for command in (
        ["sample", folder, "3", "-o", tmp_path / "picture.png"], ["evaluate", folder, "-o", tmp_path / "report"],
        ["bench", folder], ["inspect", folder], ["doctor", folder],
    ):  # fmt: skip
        assert_refused(capsys, says, *command)
    for target in ("auto", "onnxruntime-cpu", "torch"):
        with pytest.raises(DitqError, match=says):
            ditq.load_engine(folder, target)
    assert files_below(tmp_path) == before


def test_the_sound_one_is_taken(sound: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "inspect", sound).code == 0
    x = torch.randn(3, 8, 64)
    assert ditq.load_engine(sound)(hidden_states=x, return_dict=False)[0].shape == (3, 8, 64)


def test_an_engine_is_not_compared_with_another_model(
    sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["sample", sound, "3", "-o", tmp_path / "p.png"], ["evaluate", sound], ["bench", sound]):
        option = "--checkpoint" if command[0] == "sample" else "--against"
        assert_refused(capsys, f"was compiled from toy; say where that is with {option}", *command)
        assert_refused(capsys, "was compiled from toy, which is not mini", *command, "--against", "mini")
    assert files_below(tmp_path) == []
