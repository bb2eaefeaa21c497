"""Train the UNet and the two text encoders of the `shapes` base, and save a whole StableDiffusionXLPipeline.

``python -m dspo.shapes.train_base --vae DIR --work DIR --output models/shapes-sdxl`` continues where it stopped when
run again. The objective is SDXL's own: predict the noise, uniform timesteps, prompts dropped for guidance; steps with
little noise weigh less (min-SNR).
"""

import logging
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dspo.data.keys import keyed_rng, keyed_seed
from dspo.progress import progress
from dspo.shapes.checkpoint import load_checkpoint, run_trainer, save_checkpoint
from dspo.shapes.grammar import random_request
from dspo.shapes.render import SIDE
from dspo.shapes.tokenizer import CONTEXT_LENGTH, new_tokenizer
from dspo.shapes.web import web_pixels

log = logging.getLogger(__name__)

TEXT_WIDTH = 96
CHANNELS = (64, 128)
TIME_WIDTH = 16
SCENES = 60_000
PROMPT_DROPOUT = 0.1
EMA_DECAY = 0.999
MIN_SNR_GAMMA = 2.0
WARMUP_STEPS = 150


def text_config(tokenizer: CLIPTokenizer, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def new_unet() -> UNet2DConditionModel:
    """SDXL's blocks, linear projections and text_time conditioning, for 8x8 latents."""
    return UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        norm_num_groups=16,
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * TIME_WIDTH,
    )


def load_vae(folder: Path) -> AutoencoderKL:
    """The trained VAE; its config does not name the folder that it came from."""
    trained = AutoencoderKL.from_pretrained(folder)
    vae = AutoencoderKL.from_config({name: value for name, value in trained.config.items() if name != "_name_or_path"})
    vae.load_state_dict(trained.state_dict())
    return vae


def new_pipeline(vae: AutoencoderKL) -> StableDiffusionXLPipeline:
    """The pipeline around a trained VAE; the empty prompt is encoded, not zeroed, in training and in sampling."""
    tokenizer = new_tokenizer()
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer, layers=2)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, layers=3)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=new_unet(),
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


@torch.inference_mode()
def training_set(pipe: StableDiffusionXLPipeline, cache: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Scaled latents [N, 4, 8, 8] and token ids [N, L] of rendered scenes; the last row of ids is the empty prompt."""
    if not cache.exists():
        prompts, latents = [], []
        for first in progress(range(0, SCENES, 500), SCENES // 500, "encode"):
            images = []
            for i in range(first, first + 500):
                rng = keyed_rng(seed, "base-scene", i)
                request = random_request(rng)
                prompts.append(request.prompt())
                images.append(web_pixels(request, rng))
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
            latents.append(pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor)
        tokens = pipe.tokenizer(
            [*prompts, ""], padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        save_file({"latents": torch.cat(latents).half().contiguous(), "tokens": tokens.input_ids}, cache)
    cached = load_file(cache)
    return cached["latents"], cached["tokens"]


def embed(pipe: StableDiffusionXLPipeline, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SDXL's text conditioning: penultimate states of both encoders [B, L, 2W], pooled output of the second [B, W]."""
    first = pipe.text_encoder(tokens, output_hidden_states=True)
    second = pipe.text_encoder_2(tokens, output_hidden_states=True)
    return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second[0]


def min_snr_weight(kept: Tensor) -> Tensor:
    """min(SNR, gamma) / SNR for noise prediction, [B] from alphas_cumprod [B] (Hang et al., ICCV 2023).

    Without it the steps with little noise rule, and what is where on the picture is learnt last.
    """
    snr = kept / (1 - kept)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def learning_rate_share(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(
    vae_folder: Path,
    work: Path,
    output: Path,
    steps: int = 15_300,
    batch_size: int = 64,
    lr: float = 1.5e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    pipe = new_pipeline(load_vae(vae_folder))
    latents, tokens = training_set(pipe, work / "latents.safetensors", seed)
    trained = torch.nn.ModuleList([pipe.unet, pipe.text_encoder, pipe.text_encoder_2])
    pipe.unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    ema = EMAModel(trained.parameters(), decay=EMA_DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    parts = {"model": trained, "optimizer": optimizer, "ema": ema}
    start = load_checkpoint(work / "base.pt", **parts)
    time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], dtype=torch.float32).expand(batch_size, -1)
    alphas = pipe.scheduler.alphas_cumprod
    trained.train()
    for step in progress(range(start, steps), steps - start, "base"):
        rng = keyed_rng(seed, "base-batch", step)
        generator = torch.Generator().manual_seed(keyed_seed(seed, "base-noise", step))
        picked = torch.from_numpy(rng.integers(0, SCENES, batch_size))
        dropped = torch.from_numpy(rng.random(batch_size) < PROMPT_DROPOUT)
        clean = latents[picked].float()
        timestep = torch.randint(0, len(alphas), (batch_size,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        kept = alphas[timestep][:, None, None, None]
        noisy = (kept.sqrt() * clean + (1 - kept).sqrt() * noise).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            text, pooled = embed(pipe, tokens[torch.where(dropped, SCENES, picked)])
            condition = {"text_embeds": pooled, "time_ids": time_ids}
            predicted = pipe.unet(noisy, timestep, text, added_cond_kwargs=condition).sample
        errors = F.mse_loss(predicted.float(), noise, reduction="none").mean(dim=(1, 2, 3))
        loss = (min_snr_weight(alphas[timestep]) * errors).mean()
        for group in optimizer.param_groups:
            group["lr"] = lr * learning_rate_share(step, steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        ema.step(trained.parameters())
        if step % 100 == 0:
            log.info("step %d loss %.4f", step, loss.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            save_checkpoint(work / "base.pt", step + 1, **parts)
    ema.copy_to(trained.parameters())
    trained.eval()
    pipe.unet.to(memory_format=torch.contiguous_format)
    # The text encoders stay in float32: transformers would load 16-bit files as 16-bit, beside a float32 UNet.
    pipe.unet.half()
    pipe.vae.half()
    pipe.save_pretrained(output, safe_serialization=True)


if __name__ == "__main__":
    run_trainer(__doc__, train, "vae")
