"""The parts of the small checkpoints, untrained: their shapes are stated here and nowhere else."""

from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, PixArtTransformer2DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

SEQUENCE_LENGTH = 16
VOCABULARY_SIZE = 1500
TEXT_WIDTH = 128
LATENT_CHANNELS = 8
LATENT_SIZE = 16

# Type checkers cannot see through the decorators that diffusers puts on its models.
DiffusersModel: TypeAlias = Any


def build_vae() -> DiffusersModel:
    """64x64 pictures become 16x16 latents of 8 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def build_flux_transformer() -> DiffusersModel:
    """The transformer of ditq/assets/mini; a token is a 2x2 square of latents."""
    return start_from_zero_output(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=LATENT_CHANNELS * 4,
            num_layers=3,
            num_single_layers=6,
            attention_head_dim=64,
            num_attention_heads=3,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(16, 24, 24),
        )
    )


def build_pixart_transformer() -> DiffusersModel:
    """The transformer of ditq/assets/mini_pixart: text by cross attention, and no learned variance."""
    return start_from_zero_output(
        PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=64,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=6,
            cross_attention_dim=192,
            sample_size=LATENT_SIZE,
            patch_size=2,
            caption_channels=TEXT_WIDTH,
            use_additional_conditions=False,
        )
    )


def start_from_zero_output(transformer: DiffusersModel) -> DiffusersModel:
    """Predict zero at first: training then starts at the loss of the plain mean instead of far above it."""
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_clip_text_encoder() -> CLIPTextModel:
    """The encoder of the pooled text; its numbers of special tokens are those of `train_clip_tokenizer`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=TEXT_WIDTH,
            intermediate_size=256,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=SEQUENCE_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def build_t5_text_encoder() -> T5EncoderModel:
    """The encoder of the text sequence."""
    return T5EncoderModel(
        T5Config(
            vocab_size=VOCABULARY_SIZE,
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            use_cache=False,
        )
    )


def train_clip_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """<|startoftext|> words <|endoftext|>, filled up with <|endoftext|>."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = train_byte_pairs(captions, [start, end], unknown=end)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start,
        eos_token=end,
        pad_token=end,
        unk_token=end,
        model_max_length=SEQUENCE_LENGTH,
    )


def train_t5_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """words </s>, filled up with <pad>."""
    padding, end, unknown = "<pad>", "</s>", "<unk>"
    tokenizer = train_byte_pairs(captions, [padding, end, unknown], unknown=unknown)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=end,
        pad_token=padding,
        unk_token=unknown,
        model_max_length=SEQUENCE_LENGTH,
    )


def train_byte_pairs(captions: list[str], special: list[str], unknown: str) -> Tokenizer:
    """Byte pair encoding of lower-case words, punctuation apart."""
    tokenizer = Tokenizer(models.BPE(unk_token=unknown, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer
