"""How each family of small checkpoints sees text, latents and time while it learns: as its stock pipeline does."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextModel, PreTrainedTokenizerFast, T5EncoderModel

from tools import mini_parts
from tools.mini_parts import DiffusersModel

TRAINING_TIMESTEPS = 1000


class Family(nn.Module, ABC):
    """A transformer and its text encoders, which learn together. Sigma runs from 0, the picture, to 1, the noise."""

    # Whether the pipeline moves latents by the mean of the data before it scales them.
    shifts_latents: bool
    # What its pipeline is called with beside the size of the picture, where nobody says otherwise.
    sampling: ClassVar[dict[str, Any]]

    @abstractmethod
    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        """What `forward` wants of each caption, a row each."""

    @abstractmethod
    def forward(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The velocity, noise minus picture, at latents [batch, channel, height, width]."""

    @abstractmethod
    def pipeline(self, vae: DiffusersModel) -> Any:
        """The stock pipeline of these parts."""


class FluxFamily(Family):
    """FluxPipeline: pooled text of CLIP, text sequence of T5."""

    shifts_latents = True
    sampling: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 20,
        "true_cfg_scale": 3.0,
        "guidance_scale": 0.0,
        "negative_prompt": "",
        "max_sequence_length": mini_parts.SEQUENCE_LENGTH,
    }

    def __init__(self, captions: list[str], text_from: Path | None) -> None:
        super().__init__()
        if text_from is None:
            self.tokenizer = mini_parts.train_clip_tokenizer(captions)
            self.tokenizer_2 = mini_parts.train_t5_tokenizer(captions)
            self.text_encoder = mini_parts.build_clip_text_encoder()
            self.text_encoder_2 = mini_parts.build_t5_text_encoder()
        else:
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(text_from / "tokenizer")
            self.tokenizer_2 = PreTrainedTokenizerFast.from_pretrained(text_from / "tokenizer_2")
            self.text_encoder = CLIPTextModel.from_pretrained(text_from / "text_encoder", dtype=torch.float32)
            self.text_encoder_2 = T5EncoderModel.from_pretrained(text_from / "text_encoder_2", dtype=torch.float32)
        self.transformer = mini_parts.build_flux_transformer()

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        return {
            "clip": tokens_of(self.tokenizer, captions)["input_ids"],
            "t5": tokens_of(self.tokenizer_2, captions)["input_ids"],
        }

    def forward(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
        batch, channels, height, width = latents.shape
        rows, columns = height // 2, width // 2
        squares = latents.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        places = torch.stack((torch.zeros_like(row), row, column), dim=-1).reshape(rows * columns, 3)
        sequence = self.text_encoder_2(text["t5"])[0]
        velocity = self.transformer(
            hidden_states=squares.reshape(batch, rows * columns, channels * 4),
            timestep=sigma,
            pooled_projections=self.text_encoder(text["clip"]).pooler_output,
            encoder_hidden_states=sequence,
            img_ids=places.to(latents),
            txt_ids=torch.zeros(sequence.shape[1], 3).to(latents),
            return_dict=False,
        )[0]
        squares = velocity.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return squares.reshape(batch, channels, height, width)

    def pipeline(self, vae: DiffusersModel) -> FluxPipeline:
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAINING_TIMESTEPS, shift=1.0),
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=self.tokenizer_2,
            transformer=self.transformer,
        )


class PixArtFamily(Family):
    """PixArtSigmaPipeline: text sequence of T5, its padding masked."""

    # PixArtSigmaPipeline divides by the VAE's scaling factor and knows no shift.
    shifts_latents = False
    sampling: ClassVar[dict[str, Any]] = {
        "num_inference_steps": 20,
        "guidance_scale": 3.0,
        "negative_prompt": "",
        "max_sequence_length": mini_parts.SEQUENCE_LENGTH,
        "use_resolution_binning": False,
        "clean_caption": False,
    }

    def __init__(self, captions: list[str], text_from: Path | None) -> None:
        super().__init__()
        if text_from is None:
            self.tokenizer = mini_parts.train_t5_tokenizer(captions)
            self.text_encoder = mini_parts.build_t5_text_encoder()
        else:
            # In the Flux layout T5 comes second; in the PixArt layout it is the only one.
            second = "_2" if (text_from / "text_encoder_2").is_dir() else ""
            self.tokenizer = PreTrainedTokenizerFast.from_pretrained(text_from / f"tokenizer{second}")
            self.text_encoder = T5EncoderModel.from_pretrained(text_from / f"text_encoder{second}", dtype=torch.float32)
        self.transformer = mini_parts.build_pixart_transformer()

    def tokenize(self, captions: list[str]) -> dict[str, Tensor]:
        tokens = tokens_of(self.tokenizer, captions)
        return {"t5": tokens["input_ids"], "mask": tokens["attention_mask"]}

    def forward(self, latents: Tensor, sigma: Tensor, text: dict[str, Tensor]) -> Tensor:
        return self.transformer(
            latents,
            encoder_hidden_states=self.text_encoder(text["t5"], attention_mask=text["mask"])[0],
            encoder_attention_mask=text["mask"],
            timestep=sigma * TRAINING_TIMESTEPS,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]

    def pipeline(self, vae: DiffusersModel) -> PixArtSigmaPipeline:
        return PixArtSigmaPipeline(
            tokenizer=self.tokenizer,
            text_encoder=self.text_encoder,
            vae=vae,
            transformer=self.transformer,
            scheduler=DPMSolverMultistepScheduler(
                num_train_timesteps=TRAINING_TIMESTEPS,
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                flow_shift=1.0,
            ),
        )


FAMILIES: dict[str, type[Family]] = {"flux": FluxFamily, "pixart": PixArtFamily}


def tokens_of(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> dict[str, Tensor]:
    """Token numbers and mask, filled up to the length that the text encoders were made for."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=mini_parts.SEQUENCE_LENGTH,
        truncation=True,
        return_tensors="pt",
    )
