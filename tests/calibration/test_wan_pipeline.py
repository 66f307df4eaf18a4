"""WanPipeline: its transformer is optional to diffusers, is called once a guidance branch, with an expanded timestep."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel

from ditq.calibration.calibrate import calibrate
from ditq.checkpoint import Checkpoint
from ditq.compiler import CompileOptions, compile
from ditq.errors import DitqError
from ditq.export import load_engine
from ditq.recipe import Recipe
from ditq.report.engine_report import draw
from ditq.report.evaluate import evaluate
from tests.calibration.small_pipelines import mini

ARGUMENTS = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 16, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    tokenizer = mini().load_pipeline().tokenizer_2
    text = UMT5Config(vocab_size=tokenizer.vocab_size + 100, d_model=64, d_kv=32, d_ff=64, num_layers=1, num_heads=2)
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=64,
        freq_dim=64, ffn_dim=128, num_layers=2, rope_max_seq_len=64,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("wan")
    diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text), vae=vae.eval(), transformer=transformer.eval(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    ).save_pretrained(folder)  # fmt: skip
    return Checkpoint.open(folder)


def test_the_transformer_that_is_given_is_the_one_that_draws(wan: Checkpoint) -> None:
    model = wan.load_model()
    assert wan.load_pipeline(model).transformer is model
    assert (
        next(wan.load_pipeline(dtype=torch.bfloat16).transformer.blocks[0].attn1.parameters()).dtype == torch.bfloat16
    )


def test_its_calls_are_recorded_and_its_engine_draws(wan: Checkpoint, tmp_path: Path) -> None:
    statistics = calibrate(wan, tmp_path / "stats", conditions=["a dog"], arguments=ARGUMENTS, progress=False)
    assert statistics.metadata["condition_count"] == 1
    recipe = Recipe.from_dict({"passes": [{"quantize": {"format": "w8a8"}}]}, "w8a8")
    compile(wan, tmp_path / "engine", recipe, CompileOptions(statistics=tmp_path / "stats", progress=False))
    calls: list[int] = []
    loaded = load_engine(tmp_path / "engine")
    loaded.register_forward_hook(lambda *_: calls.append(1))
    pipeline = wan.load_pipeline(loaded)
    video = pipeline(prompt="a dog", output_type="np", **ARGUMENTS).frames
    assert len(calls) == 4 and video.shape[1] == 5  # two steps, two guidance branches
    # as for the calibration, where nothing else is said, but for the number of steps
    assert loaded.engine.sampling == {name: value for name, value in ARGUMENTS.items() if name != "num_inference_steps"}
    drawn = draw(tmp_path / "engine", "a dog", checkpoint=wan, steps=1)
    assert drawn.size == (32, 32)
    found = evaluate(tmp_path / "engine", wan, conditions=["a dog"], steps=1, layers=False, progress=False)
    assert found.arguments == {**ARGUMENTS, "num_inference_steps": 1}
    assert draw(tmp_path / "engine", "a dog", checkpoint=wan, arguments={"width": 48}, steps=1).size == (48, 32)


def test_steps_that_a_second_transformer_draws_are_said(wan: Checkpoint, tmp_path: Path) -> None:
    """As of Wan 2.2: below half of the time another model, which is left as it is."""
    pipeline = wan.load_pipeline()
    pipeline.register_modules(transformer_2=wan.load_model())
    pipeline.register_to_config(boundary_ratio=0.5)
    pipeline.save_pretrained(tmp_path / "two")
    (tmp_path / "two" / "sampling.json").write_text(json.dumps({**ARGUMENTS, "num_inference_steps": 4}))
    two = Checkpoint.open(tmp_path / "two")
    found = evaluate(two.load_model(), two, conditions=["a dog"], layers=False, progress=False)
    (note,) = [note for note in found.notes if "denoiser" in note]
    assert note == "2 of 4 steps are drawn by another denoiser of the pipeline, which is as it was"
    with pytest.raises(DitqError, match="does not call its transformer at step 2, which another denoiser draws"):
        calibrate(two, tmp_path / "stats", ["a dog"], step_weights=True, progress=False)
