"""Transformers that no file in ditq/families describes: compiled by the calls that their pipeline makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import nn

import ditq
from ditq import recorded_family
from ditq.calibration.calibrate import calibrate
from ditq.calibration.record import Trajectories
from ditq.calibration.sampling import SamplingSettings, sample
from ditq.calibration.statistics import TRAJECTORIES
from ditq.checkpoint import BUILT_IN, Checkpoint
from ditq.compile_checks import check_recipe
from ditq.errors import DitqError
from ditq.export import model_agreement
from ditq.export.engine import EXAMPLE
from ditq.export.fusion import prove_fusion
from ditq.export.targets import target
from ditq.inspection import example_inputs
from ditq.report.engine_report import report_on, run_engine_once, run_original_once
from tests.command_line import assert_refused, run
from tests.export.quantized import means_torch
from tests.small_checkpoint import write_pipeline

SAMPLING = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 2.0, "max_sequence_length": 16}


def write_auraflow(folder: Path) -> Path:
    """A pipeline of a class that has no family: a small AuraFlow among the text encoder and VAE of the built-in PixArt."""
    parts = BUILT_IN["mini-pixart"]
    for name in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(parts / name, folder / name)
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    channels = json.loads((parts / "vae" / "config.json").read_text())["latent_channels"]
    text = json.loads((parts / "text_encoder" / "config.json").read_text())["d_model"]
    torch.manual_seed(0)
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=text,
        caption_projection_dim=64, pos_embed_max_size=64,
    )  # fmt: skip
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.2)
    model.save_pretrained(folder / "transformer")
    index = json.loads((parts / "model_index.json").read_text())
    index |= {
        "_class_name": "AuraFlowPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "AuraFlowTransformer2DModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "sampling.json").write_text(json.dumps(SAMPLING))
    return folder


def test_it_is_compiled_whole_by_the_calls_of_its_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_auraflow(tmp_path / "auraflow")
    assert_refused(capsys, "give --stats of a calibration", "inspect", path)
    ditq.compile(path, tmp_path / "engine", options=ditq.CompileOptions(limit=1))
    transformer = ditq.load_engine(tmp_path / "engine")
    engine, made_for = transformer.engine, transformer.engine.example
    assert engine.manifest["family"] == recorded_family.NAME and EXAMPLE in engine.files
    assert made_for is not None and made_for["hidden_states"].shape == (2, 8, 8, 8)
    assert prove_fusion(engine).complete and model_agreement(engine, made_for).holds
    means_torch(engine, dict(made_for))
    tensors = {name: value for name, value in made_for.items() if isinstance(value, torch.Tensor)}
    three = {name: value[:1].expand(3, *value.shape[1:]) for name, value in tensors.items()}
    assert transformer(**three, return_dict=False)[0].shape == (3, 8, 8, 8)
    evaluation = report_on(tmp_path / "engine", str(path), limit=1, speed=False)
    assert evaluation.sites and evaluation.summary["psnr"] > 30
    for once in (run_engine_once, run_original_once):  # whose memory is measured
        once(str(tmp_path / "engine"), str(path))
    assert run(capsys, "doctor", tmp_path / "engine").code == 0


def test_its_structure_is_shown_with_a_calibration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_auraflow(tmp_path / "auraflow")
    calibrate(path, tmp_path / "stats", conditions=["red apple"])
    ran = run(capsys, "inspect", path, "--stats", tmp_path / "stats", "--json")
    assert ran.code == 0 and json.loads(ran.out)["family"] == recorded_family.NAME


def test_a_recording_tells_what_a_family_file_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pipeline(tmp_path / "flux")
    calibrate(path, tmp_path / "stats", conditions=["red apple", "a blue car"])
    known = Checkpoint.open(path)
    family = known.family
    trajectories = Trajectories.open(tmp_path / "stats" / TRAJECTORIES)
    assert recorded_family.with_family(known, trajectories) is known
    monkeypatch.setattr("ditq.checkpoint.family_of", lambda class_name: None)
    unknown = Checkpoint.open(path)
    told = recorded_family.with_family(unknown, trajectories).family
    assert told is not None and family is not None
    assert unknown.family is None and told.changing == family.changing and told.condition == "prompt"
    for name, shape in family.axes.items():
        if name in told.axes:  # guidance is not given to this one
            wanted = "batch" if shape[0] == "batch" else None  # both prompts are as long
            assert told.axes[name] == (wanted, *[None] * (len(shape) - 1)), name
    inputs = example_inputs(recorded_family.with_family(unknown, trajectories), batch=3)
    assert set(inputs) >= {"hidden_states", "encoder_hidden_states", "img_ids"} and len(inputs["hidden_states"]) == 3
    with torch.no_grad():
        assert len(unknown.load_model()(**inputs, return_dict=False)[0]) == 3


def test_sizes_that_differ_between_prompts_are_axes() -> None:
    def call(text: int, frames: int) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(1, 8, 4), "text": torch.zeros(1, text, 6), "mask": torch.zeros(1, text),
                "video.0": torch.zeros(1, 2, frames)}  # fmt: skip

    found = recorded_family._varying([call(3, 5), call(7, 5), call(7, 2)])
    assert found == {("text", 1): "text_1", ("mask", 1): "text_1", ("video.0", 2): "video_0_2"}
    assert recorded_family._told_apart(call(1, 5), found) < recorded_family._told_apart(call(3, 5), found)


def test_a_plain_number_that_changes_from_step_to_step_is_refused() -> None:
    x = torch.zeros(1)
    calls: list[Any] = [SimpleNamespace(arguments={"x": x, "t": time, "return_dict": False}) for time in (0.9, 0.1)]
    recorded: Any = SimpleNamespace(places_of_calls=lambda: [(0, 0), (0, 1)], steps=2, calls=lambda chosen: calls)
    with pytest.raises(DitqError, match="model: its argument 't' changes from step to step and is not a tensor"):
        recorded_family._changing("model", recorded)
    calls[1].arguments["t"], calls[1].arguments["x"] = 0.9, x + 1
    assert recorded_family._changing("model", recorded) == ("x",)
    with pytest.raises(DitqError, match="one recorded step does not show what changes"):
        recorded_family._changing("model", SimpleNamespace(steps=1))  # type: ignore[arg-type]


def test_a_vae_that_decodes_in_tiles_alone_does(tmp_path: Path) -> None:
    """Allegro's refuses to decode a video as a whole, which neither its pipeline nor its class prevents."""
    parts = Checkpoint.open("mini-pixart").load_pipeline()
    made = diffusers.AllegroPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=diffusers.AutoencoderKLAllegro(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
        ),
        transformer=diffusers.AllegroTransformer3DModel(
            num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=48,
            sample_width=4, sample_height=4, sample_frames=2, caption_channels=parts.text_encoder.config.d_model,
        ),
        scheduler=diffusers.EulerAncestralDiscreteScheduler(),
    )  # fmt: skip
    made.save_pretrained(tmp_path / "allegro")
    pipeline = Checkpoint.open(tmp_path / "allegro").load_pipeline()
    drawn = sample(
        pipeline,
        ["a dog"],
        SamplingSettings(
            {"height": 32, "width": 32, "num_frames": 8, "num_inference_steps": 1, "max_sequence_length": 16}
            | {"clean_caption": False}
        ),
    )
    assert drawn[0].image.size == (32, 32)


def test_complex_arguments_are_refused_before_the_passes() -> None:
    inputs = {"x": torch.zeros(1), "rotary": {"emb": torch.zeros(2, dtype=torch.complex64)}}
    with pytest.raises(
        DitqError, match=r"^mini: its argument rotary\.emb holds complex numbers, which no engine's graph"
    ):
        check_recipe(ditq.load_recipe("w4a16"), Checkpoint.open("mini"), inputs, target("onnxruntime-cpu"), (), None)
