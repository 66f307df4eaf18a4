"""A checkpoint opens from every layout that diffusers writes, is read lazily, and gives the same model from each."""

from __future__ import annotations

import json
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_model
from safetensors.torch import save_file
from torch import Tensor

from ditq.checkpoint import Checkpoint
from ditq.errors import DitqError
from ditq.inspection import example_inputs
from tests.families_small import forward
from tests.small_checkpoint import CONFIG, WEIGHTS, small_flux, write_pipeline, write_transformer

WIDTH = CONFIG["attention_head_dim"] * CONFIG["num_attention_heads"]


def _output(checkpoint: Checkpoint) -> Tensor:
    return forward(checkpoint.load_model(), example_inputs(checkpoint))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """The output of stock diffusers' own from_pretrained."""
    folder = write_transformer(tmp_path_factory.mktemp("stock"))
    model = type(small_flux()).from_pretrained(folder)
    return forward(model, example_inputs(Checkpoint.open(folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [False, True])
def test_every_dtype_and_layout_gives_the_same_model(
    tmp_path: Path, reference: Tensor, dtype: torch.dtype, shards: bool
) -> None:
    folder = write_transformer(tmp_path / "transformer", dtype, shards)
    checkpoint = Checkpoint.open(folder)
    assert len(checkpoint.files) > 1 if shards else len(checkpoint.files) == 1
    assert torch.equal(_output(checkpoint), reference)  # the weights are exact in each dtype


def test_the_pipeline_folder_and_its_transformer_folder_are_the_same_model(tmp_path: Path, reference: Tensor) -> None:
    root = write_pipeline(tmp_path / "pipeline")
    whole, alone = Checkpoint.open(root), Checkpoint.open(root / "transformer")
    assert torch.equal(_output(whole), reference)
    assert whole.fingerprint() == alone.fingerprint()
    assert whole.pipeline_root == root and alone.pipeline_root is None
    assert whole.sampling["num_inference_steps"] == 2 and not alone.sampling


@pytest.mark.parametrize("where", ["beside", "argument", "folder argument", "metadata"])
def test_a_single_file_finds_its_config(tmp_path: Path, reference: Tensor, where: str) -> None:
    folder = write_transformer(tmp_path / "transformer")
    file, config = folder / WEIGHTS, folder / "config.json"
    given: Path | None = None
    if where != "beside":
        moved = tmp_path / "elsewhere.json"
        config.rename(moved)
        given = moved
    if where == "folder argument":
        given = tmp_path / "config"
        given.mkdir()
        moved.rename(given / "config.json")
    if where == "metadata":
        save_file(small_flux().state_dict(), file, {"config": moved.read_text()})
        given = None
    assert torch.equal(_output(Checkpoint.open(file, given)), reference)


def test_the_fingerprint_tells_weights_and_config_apart(tmp_path: Path) -> None:
    folder = write_transformer(tmp_path / "transformer")
    first = Checkpoint.open(folder).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == first
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    second = Checkpoint.open(folder).fingerprint()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "guidance_embeds": True}))
    assert len({first, second, Checkpoint.open(folder).fingerprint()}) == 3


def test_opening_reads_headers_only_and_one_tensor_is_read_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_transformer(tmp_path / "transformer", torch.bfloat16)
    read: list[str] = []
    monkeypatch.setattr("ditq.safetensors_files.TensorFile.read", lambda _, name: read.append(name))
    checkpoint = Checkpoint.open(folder)
    infos = checkpoint.tensors()
    assert infos["x_embedder.weight"].shape == (WIDTH, 32) and infos["x_embedder.weight"].dtype == "BF16"
    assert read == []
    monkeypatch.undo()
    tensor = checkpoint.read("x_embedder.weight")
    assert tensor.dtype == torch.bfloat16
    assert torch.equal(tensor.float(), small_flux().state_dict()["x_embedder.weight"])
    with pytest.raises(DitqError, match="has no tensor y_embedder"):
        checkpoint.read("y_embedder.weight")


def test_the_skeleton_has_the_models_shapes_but_none_of_its_memory(tmp_path: Path) -> None:
    skeleton = Checkpoint.open(write_transformer(tmp_path / "transformer")).skeleton()
    expected = {name: value.shape for name, value in small_flux().state_dict().items()}
    assert {name: value.shape for name, value in skeleton.state_dict().items()} == expected
    assert all(value.untyped_storage().nbytes() <= 4 for value in skeleton.parameters())


def test_a_loaded_model_has_the_dtype_that_was_asked_for_and_no_gradients(tmp_path: Path) -> None:
    model = Checkpoint.open(write_transformer(tmp_path / "transformer", torch.bfloat16)).load_model(torch.float16)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float16}
    assert not model.training and not any(value.requires_grad for value in model.parameters())


# --- the authors' own naming of FLUX


def _halves_swapped(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def _original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """FLUX's published naming: q, k, v and the single blocks' MLP in one linear, the last modulation's halves swapped."""
    found: dict[str, Tensor] = {}

    def put(new: str, *old: str) -> None:
        for part in ("weight", "bias"):
            found[f"{new}.{part}"] = torch.cat([state[f"{name}.{part}"] for name in old])

    def put_norm(new: str, old: str) -> None:
        found[f"{new}.scale"] = state[f"{old}.weight"]

    for new, old in (("time_in", "timestep_embedder"), ("vector_in", "text_embedder")):
        put(f"{new}.in_layer", f"time_text_embed.{old}.linear_1")
        put(f"{new}.out_layer", f"time_text_embed.{old}.linear_2")
    put("img_in", "x_embedder")
    put("txt_in", "context_embedder")
    double, block = "double_blocks.0", "transformer_blocks.0"
    for stream, suffix, qkv, out, q, k in (
        ("img", "", ("to_q", "to_k", "to_v"), "to_out.0", "norm_q", "norm_k"),
        ("txt", "_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "norm_added_q", "norm_added_k"),
    ):
        put(f"{double}.{stream}_mod.lin", f"{block}.norm1{suffix}.linear")
        put(f"{double}.{stream}_attn.qkv", *(f"{block}.attn.{name}" for name in qkv))
        put(f"{double}.{stream}_attn.proj", f"{block}.attn.{out}")
        put_norm(f"{double}.{stream}_attn.norm.query_norm", f"{block}.attn.{q}")
        put_norm(f"{double}.{stream}_attn.norm.key_norm", f"{block}.attn.{k}")
        put(f"{double}.{stream}_mlp.0", f"{block}.ff{suffix}.net.0.proj")
        put(f"{double}.{stream}_mlp.2", f"{block}.ff{suffix}.net.2")
    single, block = "single_blocks.0", "single_transformer_blocks.0"
    put(f"{single}.modulation.lin", f"{block}.norm.linear")
    put(f"{single}.linear1", *(f"{block}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")))
    put(f"{single}.linear2", f"{block}.proj_out")
    put_norm(f"{single}.norm.query_norm", f"{block}.attn.norm_q")
    put_norm(f"{single}.norm.key_norm", f"{block}.attn.norm_k")
    put("final_layer.linear", "proj_out")
    for part in ("weight", "bias"):
        found[f"final_layer.adaLN_modulation.1.{part}"] = _halves_swapped(state[f"norm_out.linear.{part}"])
    return found


@pytest.fixture
def narrow_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' conversion has FLUX.1's width written into it; here it gets the small model's. All else is its own."""
    entry: dict[str, Any] = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    convert = entry["checkpoint_mapping_fn"]
    assert 3072 in convert.__code__.co_consts
    constants = tuple(WIDTH if value == 3072 else value for value in convert.__code__.co_consts)
    narrowed = FunctionType(convert.__code__.replace(co_consts=constants), convert.__globals__)
    monkeypatch.setitem(entry, "checkpoint_mapping_fn", narrowed)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_in_the_authors_naming_goes_through_diffusers_conversion(
    tmp_path: Path, reference: Tensor, narrow_conversion: None, prefix: str
) -> None:
    folder = write_transformer(tmp_path / "transformer")
    file = tmp_path / "flux1-small.safetensors"
    save_file({prefix + name: tensor for name, tensor in _original_names(small_flux().state_dict()).items()}, file)
    checkpoint = Checkpoint.open(file, folder / "config.json")
    assert torch.equal(_output(checkpoint), reference)


@pytest.mark.parametrize("damage", ["missing", "shape", "NaN"])
def test_a_damaged_file_in_the_authors_naming_is_refused(tmp_path: Path, narrow_conversion: None, damage: str) -> None:
    folder = write_transformer(tmp_path / "transformer")
    tensors = _original_names(small_flux().state_dict())
    if damage == "missing":
        del tensors["double_blocks.0.img_mlp.2.bias"]
    elif damage == "shape":
        tensors["img_in.weight"] = tensors["img_in.weight"][:, :-1].clone()
    else:
        tensors["img_in.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "flux1-small.safetensors")
    with pytest.raises(DitqError, match=r"img_mlp\.2\.bias|x_embedder\.weight|img_in\.weight holds NaN"):
        Checkpoint.open(tmp_path / "flux1-small.safetensors", folder).load_model()
