"""A loaded engine is called, and placed into a pipeline, like the diffusers transformer that it came from."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from ditq.errors import DitqError
from ditq.export import EngineTransformer, load_engine
from ditq.export.loader import _checked
from ditq.nn import ActivationFormat
from tests.export.quantized import engine_of, quantize_blocks, quantized, relative
from tests.families_small import forward, small_inputs
from tests.small_checkpoint import small_flux, write_pipeline


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> EngineTransformer:
    folder = tmp_path_factory.mktemp("engines") / "flux"
    engine_of(quantize_blocks(small_flux(), weight_only=True), folder)
    return load_engine(folder, threads=1)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return small_inputs(small_flux())


def test_positions_and_keywords_give_the_same(flux: EngineTransformer, inputs: dict[str, Any]) -> None:
    by_keyword = flux(**inputs).sample
    by_position = flux(
        inputs["hidden_states"], inputs["encoder_hidden_states"], inputs["pooled_projections"], inputs["timestep"],
        inputs["img_ids"], inputs["txt_ids"], None, return_dict=False,
    )  # fmt: skip
    assert isinstance(by_position, tuple)
    assert torch.equal(by_position[0], by_keyword)


def test_empty_extras_are_ignored_and_real_ones_refused(flux: EngineTransformer, inputs: dict[str, Any]) -> None:
    flux(**inputs, joint_attention_kwargs=None, guidance=None)
    flux(**inputs, joint_attention_kwargs={})
    with pytest.raises(DitqError, match="joint_attention_kwargs"):
        flux(**inputs, joint_attention_kwargs={"scale": 0.5})
    with pytest.raises(DitqError, match="guidance"):
        flux(**inputs, guidance=torch.ones(2))
    with pytest.raises(DitqError, match="no argument 'colour'"):
        flux(**inputs, colour="red")


def test_a_missing_tensor_is_named(flux: EngineTransformer, inputs: dict[str, Any]) -> None:
    with pytest.raises(DitqError, match="pooled_projections"):
        flux(**{name: value for name, value in inputs.items() if name != "pooled_projections"})


def test_shapes_outside_the_axes_are_named(flux: EngineTransformer, inputs: dict[str, Any]) -> None:
    with pytest.raises(DitqError, match=r"hidden_states has shape .* takes \[batch, image_tokens, 32\]"):
        flux(**inputs | {"hidden_states": torch.zeros(2, 64, 31)})
    with pytest.raises(DitqError, match="axis 'image_tokens'"):
        flux(**inputs | {"img_ids": torch.zeros(9, 3)})


def test_whole_numbers_are_taken_in_any_dtype_and_no_others() -> None:
    """An engine whose example had int64, as DiT's once did, must not cut off what a scheduler gives it."""
    inputs = [{"name": name, "dtype": "int64", "shape": ["batch"]} for name in ("timestep", "class_labels")]
    given = {"timestep": torch.tensor([500.0, 499.0]), "class_labels": torch.tensor([3, 4], dtype=torch.int32)}
    found = _checked(given, inputs, "engine")
    assert found["timestep"].tolist() == [500, 499] and found["class_labels"].dtype == torch.int64
    for name, value, says in (
        ("timestep", 500.9, "use a scheduler of whole timesteps, or compile it again"),
        ("class_labels", float("nan"), "give such"),
    ):
        with pytest.raises(
            DitqError, match=f"^engine: {name} holds {value:g}, but the engine takes int64 there; {says}$"
        ):
            _checked({**given, name: torch.tensor([3.0, value])}, inputs, "engine")
    mask = [{"name": "mask", "dtype": "bool", "shape": ["tokens"]}]
    assert _checked({"mask": torch.tensor([1.0, 0.0])}, mask, "engine")["mask"].tolist() == [True, False]


def test_decoded_weights_are_refused_where_there_is_one_form(flux: EngineTransformer) -> None:
    for name in ("onnxruntime-cpu", "torch"):
        with pytest.raises(
            DitqError, match=f"^target '{name}' holds weights in one form; decoded weights are of target 'cuda'$"
        ):
            load_engine(flux.engine.folder, name, decoded=True)


def test_half_precision_goes_in_and_comes_out(flux: EngineTransformer, inputs: dict[str, Any]) -> None:
    halves = {name: value.bfloat16() for name, value in inputs.items()}
    y = flux(**halves).sample
    assert y.dtype == torch.bfloat16
    exact = flux(**{name: value.float() for name, value in halves.items()}).sample
    assert relative(y.float(), exact) < 2**-8  # half a unit of bfloat16's eight bits


def test_it_stands_in_for_the_transformer_of_a_pipeline(flux: EngineTransformer, tmp_path: Path) -> None:
    pipeline = diffusers.FluxPipeline.from_pretrained(write_pipeline(tmp_path / "pipeline"), transformer=flux)
    pipeline.set_progress_bar_config(disable=True)
    pipeline = pipeline.to("cpu", torch.float32)
    assert pipeline.transformer is flux
    assert pipeline.transformer.config.in_channels == flux.config["in_channels"] == 32
    assert (flux.dtype, flux.device.type) == (torch.float32, "cpu")
    arguments = {
        "prompt": "red apple, fluent 3d", "height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 2.0,
        "negative_prompt": "", "guidance_scale": 0.0, "max_sequence_length": 16, "output_type": "latent",
    }  # fmt: skip
    drawn = pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images
    pipeline.transformer = quantize_blocks(small_flux(), weight_only=True)
    expected = pipeline(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert relative(drawn, expected) < 1e-4  # 1e-5 a call, over four calls and guidance


def test_without_quantized_activations_it_agrees_to_rounding_for_every_size(flux: EngineTransformer) -> None:
    model = quantize_blocks(small_flux(), weight_only=True)
    for batch, side, text in ((2, 8, 16), (1, 6, 5), (3, 4, 33)):
        inputs = small_inputs(model, batch, seed=2)
        inputs["hidden_states"] = inputs["hidden_states"][:, : side * side]
        inputs["img_ids"] = inputs["img_ids"][: side * side]
        inputs["encoder_hidden_states"] = torch.randn(batch, text, inputs["encoder_hidden_states"].shape[-1])
        inputs["txt_ids"] = torch.zeros(text, 3)
        assert relative(flux(**inputs).sample, forward(model, inputs)) < 1e-5


def test_an_engine_is_pickled_as_where_it_lies(flux: EngineTransformer, inputs: dict[str, Any]) -> None:
    again = pickle.loads(pickle.dumps(flux))
    assert torch.equal(again(**inputs).sample, flux(**inputs).sample) and again.target == flux.target
    assert copy.deepcopy(flux) is flux and copy.copy(flux) is flux


def test_calls_of_several_threads_wait_for_each_other(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Of an engine whose input has a scale for each bin of timesteps: each call has its own. And what surrounds it in less than
    float32 is not for it."""
    model = small_flux()
    linear = model.get_submodule("transformer_blocks.0.ff.net.0.proj")
    assert isinstance(linear, torch.nn.Linear)
    site, form = "transformer_blocks.0.ff.net.0.proj", ActivationFormat(8, "timestep", edges=(0.5,))
    model.set_submodule(site, quantized(linear, site, activation=form))
    engine_of(model, tmp_path / "engine")
    exact = load_engine(tmp_path / "engine", target="torch")
    calls = [{**inputs, "timestep": torch.full_like(inputs["timestep"], time)} for time in (0.9, 0.1)]
    expected = [exact(**call).sample for call in calls]
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda number: exact(**calls[number % 2]).sample, range(24)))
    assert all(torch.equal(sample, expected[number % 2]) for number, sample in enumerate(found))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(exact(**calls[0]).sample, expected[0])


def test_an_engine_is_not_saved_as_a_diffusers_model(flux: EngineTransformer, tmp_path: Path) -> None:
    with pytest.raises(DitqError, match="copy its folder"):
        flux.save_pretrained(tmp_path)


def test_the_torch_target_is_the_exact_meaning(flux: EngineTransformer, inputs: dict[str, Any]) -> None:
    exact = load_engine(flux.engine.folder, target="torch")
    expected = forward(quantize_blocks(small_flux(), weight_only=True), inputs)
    found = exact(**inputs).sample
    assert relative(found, expected) < 1e-6
    assert torch.equal(found.mul_(1.0).requires_grad_(), found)  # an answer is a tensor like any other
