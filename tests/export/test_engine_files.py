"""A damaged or hostile engine folder is refused in one line; writing one never leaves a half behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from ditq.errors import DitqError
from ditq.export import load_engine
from ditq.export.engine import Engine
from ditq.export.engine_files import hash_file
from ditq.export.write import write_engine
from tests.export.quantized import engine_of, quantize_blocks, shallow_model
from tests.families_small import small_inputs


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "sound"
    engine_of(quantize_blocks(shallow_model("dit")), folder, name=str(folder.parent / "checkpoint"))
    return folder


@pytest.fixture
def engine(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "engine"))


def manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "engine.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(DitqError) as caught:
        load_engine(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def with_external_data(folder: Path, **entries: str) -> None:
    """Change where the first external tensor of the graph lies, with a hash that fits the change."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL)
    for item in tensor.external_data:
        item.value = entries.get(item.key, item.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    manifest(folder, lambda value: value["files"].update({"model.onnx": hash_file(folder / "model.onnx")}))


def test_an_engine_opened_as_a_dot_has_its_folders_name(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(engine)
    for path in (".", "../engine", "../engine/"):
        assert Engine.open(path).name == "engine"
    monkeypatch.chdir(engine.parent)
    opened = Engine.open("engine")
    assert (opened.name, opened.folder) == ("engine", Path("engine"))


def test_a_label_of_no_class_is_refused_in_one_line(sound: Path) -> None:
    inputs = small_inputs(shallow_model("dit"))
    for target in ("onnxruntime-cpu", "torch"):
        loaded = load_engine(sound, target)
        loaded(
            **inputs | {"class_labels": torch.tensor([9, 10])}
        )  # the last is that of no class, which guidance asks for
        for label in (11, -1):
            says = f"^sound: class_labels holds {label}, but the model knows classes 0 to 9, and 10 for none$"
            with pytest.raises(DitqError, match=says):
                loaded(**inputs | {"class_labels": torch.tensor([0, label])})


def test_plain_numbers_of_the_original_are_those_of_the_engine(engine: Path) -> None:
    """HunyuanDiT's pipeline makes its rotations from `inner_dim` and `num_heads`, which no config has."""
    loaded = load_engine(engine)
    assert (loaded.inner_dim, loaded.height) == (64, 8)
    with pytest.raises(AttributeError, match="no attribute 'num_heads'"):
        _ = loaded.num_heads
    manifest(engine, lambda value: value.pop("attributes"))  # as engines were before there were such
    assert not hasattr(load_engine(engine), "inner_dim")
    manifest(engine, lambda value: value.update(attributes={"inner_dim": [64]}))
    refused(engine, "damaged (no valid 'attributes')")


def test_a_sound_copy_opens(engine: Path) -> None:
    assert Engine.open(engine).sites


def test_an_engine_knows_no_path_of_this_machine_and_stores_each_weight_once(sound: Path) -> None:
    value = json.loads((sound / "engine.json").read_text())
    assert value["source"]["name"] == "checkpoint"
    assert str(sound.parent) not in (sound / "engine.json").read_text()
    stored = sum(tensor.nbytes for tensor in quantize_blocks(shallow_model("dit")).state_dict().values())
    # the header, and the position grid, which is no parameter
    assert value["files"]["weights.safetensors"]["bytes"] < 1.25 * stored
    assert value["files"]["model.onnx"]["bytes"] < stored


def test_no_engine(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no such engine")
    refused(tmp_path, "engine.json")


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
def test_a_missing_file(engine: Path, name: str) -> None:
    (engine / name).unlink()
    refused(engine, name, "missing")


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
def test_a_changed_byte(engine: Path, name: str) -> None:
    content = bytearray((engine / name).read_bytes())
    content[len(content) // 2] ^= 1
    (engine / name).write_bytes(content)
    refused(engine, name, "changed")


def test_a_truncated_file_is_seen_without_hashing(engine: Path) -> None:
    path = engine / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DitqError, match="changed"):
        Engine.open(engine, verify=False)


@pytest.mark.parametrize("text", ["", "{", "[]", '"engine"', "{}", '{"format_version": 1}', "\xff"])
def test_a_damaged_manifest(engine: Path, text: str) -> None:
    (engine / "engine.json").write_bytes(text.encode("latin-1"))
    refused(engine, "engine.json")


def test_another_format_version(engine: Path) -> None:
    manifest(engine, lambda value: value.update(format_version=99))
    refused(engine, "99")


@pytest.mark.parametrize("key", ["files", "inputs", "layout", "structure", "config"])
def test_a_manifest_entry_of_the_wrong_kind(engine: Path, key: str) -> None:
    manifest(engine, lambda value: value.update({key: "something"}))
    refused(engine, key)


def test_a_file_that_is_not_listed(engine: Path) -> None:
    manifest(engine, lambda value: value["files"].pop("weights.safetensors"))
    refused(engine, "weights.safetensors")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "C:\\secret", "..\\secret", "", "a\0", "a\ud800"]
)
def test_a_listed_file_outside_the_folder(engine: Path, name: str) -> None:
    (engine.parent / "secret").write_text("secret")
    manifest(engine, lambda value: value["files"].update({name: hash_file(engine.parent / "secret")}))
    refused(engine, "outside")


def test_a_link_out_of_the_folder(engine: Path) -> None:
    outside = engine.parent / "weights"
    (engine / "weights.safetensors").rename(outside)
    (engine / "weights.safetensors").symlink_to(outside)
    refused(engine, "outside")


@pytest.mark.parametrize("location", ["../weights", "/etc/hostname", "a/../../weights", "a\0"])
def test_external_data_outside_the_folder(engine: Path, location: str) -> None:
    with_external_data(engine, location=location)
    refused(engine, "outside")


def test_external_data_in_a_file_that_is_not_listed(engine: Path) -> None:
    (engine / "other.bin").write_bytes(bytes(1 << 20))
    with_external_data(engine, location="other.bin")
    refused(engine, "other.bin")


@pytest.mark.parametrize(
    "entry", [{"offset": "999999999"}, {"length": "999999999"}, {"offset": "-1"}, {"offset": "9" * 5000}]
)
def test_external_data_beyond_the_file(engine: Path, entry: dict[str, str]) -> None:
    with_external_data(engine, **entry)
    refused(engine, "weights.safetensors")


def test_a_graph_that_is_none(engine: Path) -> None:
    (engine / "model.onnx").write_bytes(b"\xff" * 100)
    manifest(engine, lambda value: value["files"].update({"model.onnx": hash_file(engine / "model.onnx")}))
    refused(engine, "model.onnx", "damaged")


def test_an_unknown_target(engine: Path) -> None:
    with pytest.raises(DitqError, match="onnxruntime-cpu"):
        load_engine(engine, target="abacus")


def write(folder: Path, **settings: Any) -> Engine:
    """A write that never gets to the export."""
    model = shallow_model("dit")
    return write_engine(
        folder, model, name="", config={}, class_name="", family=None, fingerprint="", recipe={}, inputs={}, axes={},
        **settings,
    )  # fmt: skip


def test_an_existing_engine_is_replaced_only_by_force(engine: Path) -> None:
    before = (engine / "engine.json").read_bytes()
    with pytest.raises(DitqError, match="--force"):
        write(engine)
    assert (engine / "engine.json").read_bytes() == before


def test_force_does_not_remove_what_is_no_engine(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"cat")
    with pytest.raises(DitqError, match="not an engine"):
        write(tmp_path / "photos", force=True)
    (tmp_path / "photos" / "engine.json").write_text('{"engine": "of a train"}')
    with pytest.raises(DitqError, match="not an engine"):
        write(tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "cat.png").exists()


@pytest.mark.parametrize(
    ("place", "failure"),
    [("export_what_varies", KeyboardInterrupt()), ("ir.save", OSError(28, "No space left on device"))],
    ids=["stopped", "disk full"],
)
def test_a_failed_write_leaves_the_old_engine_and_nothing_else(
    engine: Path, place: str, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(f"ditq.export.write.{place}", fail)
    model = quantize_blocks(shallow_model("dit"))
    with pytest.raises(DitqError if isinstance(failure, OSError) else KeyboardInterrupt) as caught:
        engine_of(model, engine, force=True)
    if isinstance(failure, OSError):
        assert "No space left" in str(caught.value)
    assert Engine.open(engine).sites
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]
