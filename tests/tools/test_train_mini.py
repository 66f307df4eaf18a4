"""The tool that trains the small checkpoints, on a handful of made-up pictures and without a network."""

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, PixArtSigmaPipeline
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from tools import choose_captions, emoji_data, mini_parts, train_mini, training_loop

ASSETS = Path(__file__).resolve().parent.parent.parent / "ditq" / "assets"
STYLES = ("noto", "twemoji", "fluent 3d")
DRAW = {
    "negative_prompt": "",
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
    "output_type": "np",
}


@pytest.fixture(autouse=True)
def one_thread():
    """Two test processes with a thread a core each would wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def give_few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six pictures of noise in place of the emoji."""
    pictures = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    captions = [f"{name}, {style}" for name in ("red apple", "grinning face") for style in STYLES]
    monkeypatch.setattr(train_mini, "load_data", lambda folder, size: emoji_data.EmojiData(pictures, captions))
    monkeypatch.setattr(train_mini, "VAE_BATCH", 2)


@pytest.fixture
def few_pictures(monkeypatch):
    give_few_pictures(monkeypatch)


def run_tool(*arguments: object) -> None:
    train_mini.run(["--data", "unused", "--device", "cpu", "--batch", "2", *map(str, arguments)])


def error_of(capsys, call) -> str:
    """What a failing call says; it must be one line, and the exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("Error: ")
    return lines[0]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}.{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def flux_folder(tmp_path_factory):
    """A Flux checkpoint that was trained from nothing, for two steps."""
    out = tmp_path_factory.mktemp("flux") / "mini"
    with pytest.MonkeyPatch.context() as monkeypatch:
        give_few_pictures(monkeypatch)
        run_tool("--family", "flux", "--steps", 2, "--vae-steps", 2, "--out", out)
    return out


def test_flux_from_nothing_is_a_stock_pipeline(flux_folder):
    pipeline = FluxPipeline.from_pretrained(flux_folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(prompt="red apple, noto", true_cfg_scale=3.0, guidance_scale=0.0, **DRAW).images[0]
    assert picture.shape == (64, 64, 3)
    assert picture.std() > 0
    assert {tensor.dtype for tensor in weights_of(flux_folder).values()} == {torch.bfloat16}
    assert json.loads((flux_folder / "sampling.json").read_text()) == json.loads(
        (ASSETS / "mini" / "sampling.json").read_text()
    )
    assert not flux_folder.with_name("mini.partial").exists()


def test_another_size_goes_on_from_a_pipeline_and_says_how_to_call_it(few_pictures, flux_folder, tmp_path):
    out = tmp_path / "larger"
    run_tool("--start-from", flux_folder, "--size", 96, "--steps", 1, "--out", out)
    told = json.loads((out / "sampling.json").read_text())
    assert told == json.loads((ASSETS / "mini" / "sampling.json").read_text()) | {"height": 96, "width": 96}
    before, after = weights_of(flux_folder), weights_of(out)
    assert all(torch.equal(after[name], tensor.float()) for name, tensor in before.items() if name.startswith("vae."))
    assert any(
        not torch.equal(after[name], tensor) for name, tensor in before.items() if name.startswith("transformer")
    )


@pytest.mark.parametrize("family", ["mini", "mini_pixart"])
def test_transformer_has_the_shape_of_the_checkpoint_that_is_shipped(family):
    shipped = json.loads((ASSETS / family / "transformer" / "config.json").read_text())
    build = mini_parts.build_flux_transformer if family == "mini" else mini_parts.build_pixart_transformer
    built = dict(build().config)
    assert {key: built[key] for key in shipped if not key.startswith("_")} == {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in shipped.items()
        if not key.startswith("_")
    }


def test_pixart_takes_vae_and_text_from_a_flux_folder(few_pictures, flux_folder, tmp_path):
    out = tmp_path / "pixart"
    run_tool("--family", "pixart", "--steps", 2, "--vae-from", flux_folder, "--text-from", flux_folder, "--out", out)
    pipeline = PixArtSigmaPipeline.from_pretrained(out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    binning = {"use_resolution_binning": False, "clean_caption": False}
    picture = pipeline(prompt="red apple, noto", guidance_scale=3.0, **binning, **DRAW).images[0]
    assert picture.shape == (64, 64, 3)
    before, after = weights_of(flux_folder), weights_of(out)
    for name, tensor in before.items():
        if name.startswith("vae."):
            assert torch.equal(after[name], tensor.float()), name
    assert json.loads((out / "sampling.json").read_text()) == json.loads(
        (ASSETS / "mini_pixart" / "sampling.json").read_text()
    )
    index = json.loads((out / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    for path in out.rglob("*.json"):
        assert str(flux_folder) not in path.read_text(), path
    # The pipeline has no shift, so the VAE's settings must not have one either.
    assert pipeline.vae.config.shift_factor is None


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_scheduler_undoes_the_noise_that_training_adds(name):
    family = train_mini.build_family(name, ["red apple, noto"], None, seed=0)
    scheduler = family.pipeline(train_mini.build_vae()).scheduler
    scheduler.set_timesteps(20)
    generator = torch.Generator().manual_seed(0)
    picture, noise = torch.randn((2, 2, 8, 16, 16), generator=generator)
    sample = noise
    for timestep in scheduler.timesteps:
        sample = scheduler.step(noise - picture, timestep, sample, return_dict=False)[0]
    torch.testing.assert_close(sample, picture, atol=0.01, rtol=0)


def test_flux_training_lays_squares_out_as_its_pipeline_does():
    family = train_mini.build_family("flux", ["red apple, noto"], None, seed=0)
    seen = {}

    def transformer(hidden_states, **others):
        seen.update(others, hidden_states=hidden_states)
        return (hidden_states,)

    family.transformer = torch.nn.Identity()
    family.transformer.forward = transformer
    latents = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    velocity = family(latents, torch.rand(2), family.tokenize(["red apple, noto", ""]))
    assert torch.equal(velocity, latents)
    assert torch.equal(seen["hidden_states"], FluxPipeline._pack_latents(latents, 2, 8, 16, 16))
    places = FluxPipeline._prepare_latent_image_ids(2, 8, 8, "cpu", torch.float32)
    assert torch.equal(seen["img_ids"], places)


def test_interrupted_training_ends_with_the_same_weights(few_pictures, flux_folder, tmp_path, monkeypatch, capsys):
    given = ("--family", "pixart", "--text-from", flux_folder, "--vae-steps", 3, "--checkpoint-every", 2)
    run_tool(*given, "--steps", 5, "--out", tmp_path / "straight")

    note = training_loop.Progress.note
    stops = [("vae", 3), ("transformer", 4)]

    def stop_once(self, loss):
        note(self, loss)
        partial = tmp_path / "stopped.partial"
        stage = "transformer" if (partial / "vae.checkpoint").exists() and self.step > 3 else "vae"
        if stops and (stage, self.step) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt

    monkeypatch.setattr(training_loop.Progress, "note", stop_once)
    for _ in range(2):
        with pytest.raises(SystemExit) as stop:
            run_tool(*given, "--steps", 5, "--out", tmp_path / "stopped")
        assert stop.value.code == 130
    run_tool(*given, "--steps", 5, "--out", tmp_path / "stopped")
    assert not stops
    assert "transformer: going on from step 2" in capsys.readouterr().out

    straight, stopped = weights_of(tmp_path / "straight"), weights_of(tmp_path / "stopped")
    assert straight.keys() == stopped.keys()
    for name, tensor in straight.items():
        assert torch.equal(stopped[name], tensor), name


def test_checkpoint_of_another_run_is_refused(tmp_path, capsys):
    path = tmp_path / "some.checkpoint"
    training_loop.write_checkpoint(path, {"settings": {"seed": 1}, "step": 3})
    with pytest.raises(training_loop.CheckpointError, match="seed 1, not 2"):
        training_loop.read_checkpoint(path, {"seed": 2})
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(training_loop.CheckpointError, match="cannot read"):
        training_loop.read_checkpoint(path, {"seed": 1})


def test_errors_of_use_are_one_line(few_pictures, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert "exists already" in error_of(capsys, lambda: run_tool("--out", file))
    assert str(file) in error_of(capsys, lambda: run_tool("--out", file / "below"))
    assert "--steps" in error_of(capsys, lambda: run_tool("--out", tmp_path / "a", "--steps", 0))
    assert "VAE" in error_of(capsys, lambda: run_tool("--out", tmp_path / "b", "--vae-from", tmp_path / "nowhere"))


def test_missing_data_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji_data.shutil, "which", lambda name: None)
    message = error_of(capsys, lambda: run_tool("--out", tmp_path / "out"))
    assert "emoji-datasource-google-16.0.0.tgz" in message


def write_packages(folder: Path) -> None:
    """Packages of two emoji, one of which has a skin tone."""
    records = [
        {"name": "RED APPLE", "unified": "1F34E", "image": "1f34e.png"},
        {"name": "KEYCAP 3", "unified": "0033-FE0F-20E3", "image": "0033-fe0f-20e3.png"},
    ]
    content = io.BytesIO()
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(content, "png")
    large = io.BytesIO()
    Image.new("RGBA", (128, 128), (0, 0, 255, 255)).save(large, "png")
    files = {
        emoji_data.FLUENT: {"assets/1f34e.webp": large.getvalue(), "assets/33-20e3.webp": large.getvalue()},
    }
    for package, key in ((emoji_data.GOOGLE, "google"), (emoji_data.TWITTER, "twitter")):
        names = [*(record["image"] for record in records), "1f34e-1f3fb.png"]
        files[package] = {f"img/{key}/64/{name}": content.getvalue() for name in names}
        files[package]["emoji.json"] = json.dumps(records).encode()
    for package, contents in files.items():
        with tarfile.open(folder / emoji_data.archive_name(package), "w:gz") as archive:
            for name, data in contents.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def test_base_emoji_of_three_sets_are_composed_on_white(tmp_path):
    write_packages(tmp_path)
    emoji_data.fetch_packages(tmp_path)
    found = emoji_data.load_emoji(tmp_path)
    expected = [f"{name}, {style}" for name in ("red apple", "keycap 3") for style in STYLES]
    assert sorted(found.captions) == sorted(expected)
    assert found.pictures.shape == (6, 3, 64, 64)
    assert (found.pictures[0] == 255).all()
    assert found.pictures[-1].float().mean((1, 2)).tolist() == [0, 0, 255]


def test_chosen_captions_share_no_name():
    captions = [f"thing {i}, {style}" for i in range(20) for style in STYLES] + ["of one style, noto"]
    first, second = choose_captions.choose(captions, [9, 6], seed=0)
    assert (len(first), len(second)) == (9, 6)
    assert set(first + second) <= set(captions)
    assert len({caption.rsplit(", ", 1)[0] for caption in first + second}) == 15
    assert choose_captions.choose(captions, [9, 6], seed=0) == [first, second]
    with pytest.raises(emoji_data.DataError, match="only 20 names"):
        choose_captions.choose(captions, [20, 6], seed=0)
