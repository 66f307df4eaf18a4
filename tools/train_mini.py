"""Train the small checkpoints again: a VAE, text encoders and a diffusion transformer that draw emoji from captions."""

import json
import os
import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

# What transformers remarks on when it is imported would hide the one line that an error here has.
os.environ["TRANSFORMERS_VERBOSITY"] = os.environ.get("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from diffusers import AutoencoderKL
from diffusers.utils import logging

from tools.emoji_data import PICTURE_SIZE, DataError, EmojiData, fetch_packages, load_emoji
from tools.mini_families import FAMILIES, Family
from tools.mini_parts import DiffusersModel, build_vae
from tools.training_loop import CheckpointError, Plan, train

VAE_BATCH = 32
CAPTIONS_DROPPED = 0.1
# Enough to keep the latents near a unit normal, too little to blur the pictures.
DIVERGENCE_WEIGHT = 1e-4


class TrainingError(click.ClickException):
    """Something the caller can put right, said in one line."""

    exit_code = 2


@dataclass(frozen=True)
class Device:
    """Where the work is done and in which precision."""

    name: str
    half: bool

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.name, torch.bfloat16, enabled=self.half)


def vae_loss(vae: DiffusersModel, pictures: Tensor) -> Tensor:
    """Absolute error of the picture and of its edges, and the latents' divergence from a unit normal."""
    posterior = vae.encode(pictures).latent_dist
    drawn = vae.decode(posterior.mode()).sample.float()
    loss = nn.functional.l1_loss(drawn, pictures)
    for axis in (2, 3):
        loss = loss + nn.functional.l1_loss(drawn.diff(dim=axis), pictures.diff(dim=axis))
    return loss + DIVERGENCE_WEIGHT * posterior.kl().mean() / posterior.mean[0].numel()


def train_vae(pictures: Tensor, plan: Plan, device: Device, settings: dict[str, object]) -> DiffusersModel:
    """A VAE from nothing."""
    torch.manual_seed(plan.seed)
    vae = build_vae().to(device.name)

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(pictures), (VAE_BATCH,), generator=generator)
        batch = as_values(pictures[chosen]).to(device.name)
        with device.autocast():
            return vae_loss(vae, batch)

    train(vae, loss_of, plan, settings)
    return vae


def as_values(pictures: Tensor) -> Tensor:
    """Bytes become values from -1 to 1, as the pipelines' image processors have them."""
    return pictures.float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(vae: DiffusersModel, pictures: Tensor, device: Device) -> Tensor:
    """The latents of all pictures, as the VAE gives them."""
    vae.eval()
    parts = [vae.encode(as_values(part).to(device.name)).latent_dist.mode().cpu() for part in pictures.split(64)]
    return torch.cat(parts)


def normalize_latents(vae: DiffusersModel, latents: Tensor, shifts: bool) -> Tensor:
    """Bring the latents to unit scale, and write how into the VAE's settings, from which pipelines undo it."""
    shift = latents.mean().item() if shifts else None
    moved = latents - (shift or 0.0)
    scale = 1.0 / moved.square().mean().sqrt().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    return moved * scale


def train_family(
    family: Family,
    latents: Tensor,
    captions: list[str],
    plan: Plan,
    *,
    batch: int,
    device: Device,
    settings: dict[str, object],
) -> None:
    """Rectified flow: the model learns the straight way from a picture to noise."""
    # The last row is the empty caption, which guidance compares with.
    text = family.tokenize([*captions, ""])
    family.to(device.name)

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (batch,), generator=generator)
        dropped = torch.rand(batch, generator=generator) < CAPTIONS_DROPPED
        rows = torch.where(dropped, len(captions), chosen)
        picture = latents[chosen]
        noise = torch.randn(picture.shape, generator=generator)
        sigma = torch.randn(batch, generator=generator).sigmoid()
        mixed = torch.lerp(picture, noise, sigma[:, None, None, None])
        with device.autocast():
            velocity = family(
                mixed.to(device.name),
                sigma.to(device.name),
                {name: tokens[rows].to(device.name) for name, tokens in text.items()},
            )
        return nn.functional.mse_loss(velocity.float(), (noise - picture).to(device.name))

    train(family, loss_of, plan, settings)


def load_vae(folder: Path) -> DiffusersModel:
    """The VAE of a pipeline folder, as it is."""
    try:
        return AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read a VAE from {folder}: {first_line(error)}") from error


def build_family(name: str, captions: list[str], text_from: Path | None, seed: int) -> Family:
    """The untrained transformer, with text encoders of its own or those of a pipeline folder."""
    torch.manual_seed(seed)
    try:
        return FAMILIES[name](captions, text_from)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read text encoders from {text_from}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def kept_latents(vae: DiffusersModel, latents: Tensor) -> Tensor:
    """The latents in the scale that the VAE's settings say already."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def load_transformer(family: Family, folder: Path) -> None:
    """Go on from the transformer of a pipeline folder of the same family."""
    transformer: Any = family.transformer
    try:
        found = type(transformer).from_pretrained(folder, subfolder="transformer", torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read a transformer from {folder}: {first_line(error)}") from error
    try:
        transformer.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise TrainingError(f"the transformer of {folder} is of another shape than --family makes") from error


def write_pipeline(family: Family, vae: DiffusersModel, keep_vae: bool, size: int, partial: Path, out: Path) -> None:
    """Write the stock pipeline, with how to call it for pictures of this size, beside its place and move it there whole.

    A VAE that was taken as it is keeps its precision; all else is stored in bf16.
    """
    family.to("cpu", torch.bfloat16)
    vae.to("cpu", torch.float32 if keep_vae else torch.bfloat16)
    written = partial / "pipeline"
    if written.exists():
        shutil.rmtree(written)
    family.pipeline(vae).save_pretrained(written)
    tidy_settings(written)
    sampling = {"height": size, "width": size, **family.sampling}
    (written / "sampling.json").write_text(json.dumps(sampling, indent=2) + "\n", encoding="utf-8")
    written.replace(out)


def tidy_settings(folder: Path) -> None:
    """Name the tokenizers as every release of transformers knows them, and leave out where the parts were read from."""
    names = ("model_index.json", "vae/config.json", "tokenizer*/tokenizer_config.json")
    for path in (found for name in names for found in folder.glob(name)):
        values = json.loads(path.read_text(encoding="utf-8"))
        for origin in ("_name_or_path", "is_local", "local_files_only"):
            values.pop(origin, None)
        for name in ("tokenizer", "tokenizer_2"):
            if name in values:
                values[name] = ["transformers", "PreTrainedTokenizerFast"]
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_data(folder: Path, size: int) -> EmojiData:
    try:
        fetch_packages(folder)
        return load_emoji(folder, size)
    except DataError as error:
        raise TrainingError(str(error)) from error


def choose_device(name: str, precision: str) -> Device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: there is no CUDA device here")
    # Most processors only imitate bf16, at a twentieth of the speed of fp32.
    return Device(name, precision == "bf16" or (precision == "auto" and name == "cuda"))


FOLDER = click.Path(path_type=Path)
COUNT = click.IntRange(min=1)


@click.command()
@click.option("--family", type=click.Choice(sorted(FAMILIES)), default="flux", show_default=True)
@click.option("--data", type=FOLDER, required=True, help="Folder of the npm packages; those it lacks are fetched.")
@click.option("--out", type=FOLDER, required=True, help="Pipeline folder to write; must not exist.")
@click.option("--steps", type=COUNT, default=4000, show_default=True, help="Steps of the transformer.")
@click.option("--batch", type=COUNT, default=64, show_default=True, help="Pictures a step.")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), default=1e-3, show_default=True)
@click.option("--vae-steps", type=COUNT, default=2000, show_default=True, help="Steps of the VAE.")
@click.option("--vae-from", type=FOLDER, help="Take the VAE of this pipeline folder as it is.")
@click.option("--text-from", type=FOLDER, help="Start from the tokenizers and text encoders of this pipeline folder.")
@click.option(
    "--start-from",
    type=FOLDER,
    help="Go on from this whole pipeline folder of the same family, for example at a new --size.",
)
@click.option(
    "--size",
    type=click.IntRange(min=16),
    default=PICTURE_SIZE,
    show_default=True,
    help="Width and height in pixels; a multiple of 16.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto", show_default=True)
@click.option("--threads", type=COUNT, help="Processor threads to use.")
@click.option("--checkpoint-every", type=COUNT, default=100, show_default=True, help="Steps.")
def main(
    *,
    family: str,
    data: Path,
    out: Path,
    steps: int,
    batch: int,
    learning_rate: float,
    vae_steps: int,
    vae_from: Path | None,
    text_from: Path | None,
    start_from: Path | None,
    size: int,
    seed: int,
    device: str,
    precision: str,
    threads: int | None,
    checkpoint_every: int,
) -> None:
    """Train a small text-to-image checkpoint and write it as a stock diffusers pipeline.

    Checkpoints are kept in OUT.partial; the same command goes on from them after an interruption.
    """
    if out.exists():
        raise TrainingError(f"{out} exists already: name a new folder")
    if size % 16:
        raise TrainingError(f"--size {size} is not a multiple of 16, as latents that are cut into squares need it")
    if start_from is not None and (vae_from or text_from):
        raise TrainingError("--start-from takes all parts of a pipeline; leave --vae-from and --text-from out")
    vae_from, text_from = vae_from or start_from, text_from or start_from
    place = choose_device(device, precision)
    if threads is not None:
        torch.set_num_threads(threads)
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    emoji = load_data(data, size)
    click.echo(f"{len(emoji.captions)} pictures with captions")

    settings: dict[str, object] = {"family": family, "seed": seed, "batch": batch, "pictures": len(emoji.captions)}
    if start_from is not None or size != PICTURE_SIZE:
        settings |= {"size": size, "start_from": start_from and start_from.name}
    try:
        if vae_from is None:
            plan = Plan("vae", vae_steps, 2e-3, seed, partial / "vae.checkpoint", checkpoint_every)
            vae = train_vae(emoji.pictures, plan, place, settings)
        else:
            vae = load_vae(vae_from).to(place.name)
        model = build_family(family, emoji.captions, text_from, seed)
        latents = encode_pictures(vae, emoji.pictures, place)
        if start_from is None:
            latents = normalize_latents(vae, latents, model.shifts_latents)
        else:
            load_transformer(model, start_from)
            latents = kept_latents(vae, latents)
        plan = Plan("transformer", steps, learning_rate, seed, partial / "transformer.checkpoint", checkpoint_every)
        train_family(model, latents, emoji.captions, plan, batch=batch, device=place, settings=settings)
    except CheckpointError as error:
        raise TrainingError(str(error)) from error
    write_pipeline(model, vae, vae_from is not None, size, partial, out)
    shutil.rmtree(partial)
    click.echo(f"wrote {out}")


def run(arguments: list[str] | None = None) -> None:
    """The command, with every error of use as one line."""
    logging.set_verbosity_error()
    try:
        main(arguments, standalone_mode=False)
    except click.Abort:
        click.echo("Stopped; the same command goes on from the last checkpoint.", err=True)
        sys.exit(130)
    except (click.ClickException, OSError) as error:
        message = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"Error: {message}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    run()
