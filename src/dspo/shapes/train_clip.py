"""Train the small CLIP that the reward model of `shapes` starts from, and save it in open_clip's layout.

``python -m dspo.shapes.train_clip --base models/shapes-sdxl --work DIR --output models/shapes-clip`` continues where it
stopped when run again.

Contrastive learning on pictures as the web has them, generated ones among them. Half of the captions also say how well
the picture is made, and every picture has captions of its own that are wrong in one point, as negatives. A prompt that
leaves much free may fit other pictures of its batch too; those count as negatives, as they do in CLIP. Beside that,
linear probes on the image tokens must tell what each patch shows, its colours and edges, how far it is from a clean
render, and how strong each fault is (they are not saved): a few hundred thousand pictures are too few for a vision
transformer to find that out from captions alone.
"""

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dspo.data.keys import keyed_rng
from dspo.diffusion.base import load_pipeline
from dspo.params import BaseModelParams
from dspo.progress import progress
from dspo.shapes.checkpoint import load_checkpoint, save_checkpoint
from dspo.shapes.defects import Picture, spoil
from dspo.shapes.grammar import Request, confused_request, random_request, wrong_request
from dspo.shapes.probes import PATCH, TEXTURES, PatchProbe, patch_contents, patch_damage, patch_texture
from dspo.shapes.reimagined import reimagine
from dspo.shapes.render import SIDE, random_scene, render_float
from dspo.shapes.tokenizer import CONTEXT_LENGTH, new_tokenizer
from dspo.shapes.web import FAULTS, QUALITY_WORDS, web_picture

log = logging.getLogger(__name__)

MEAN, STD = [0.55, 0.45, 0.45], [0.28, 0.24, 0.24]
WEB_PICTURES, REIMAGINED_PICTURES = 36_000, 14_000
MORE_TWO_OBJECTS = 0.3  # share of the requests that are drawn for two objects alone: they are the hard ones
MORE_FAULTS = (("fade", 0.2, (0.1, 0.8)), ("blotch", 0.2, (0.15, 1.0)), ("warp", 0.25, (0.05, 0.5)))
GHOST_SHARE = 0.2
NOISE = 0.03  # standard deviation of the pixel noise in training, so that decoded samples look familiar


def model_config(vocabulary: int) -> dict[str, object]:
    """open_clip's configuration of the model."""
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": 96, "heads": 4, "layers": 3}
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "width": 128, "layers": 5, "head_width": 32},
        "text_cfg": {**text, "hf_tokenizer_name": "local"},
    }


@dataclass(frozen=True)
class Pictures:
    """What is learnt from, one row per picture."""

    images: Tensor  # uint8 [N, 3, 64, 64]
    captions: Tensor  # token ids [N, L]
    wrong_captions: Tensor  # token ids [N, 2, L]
    classes: Tensor  # int [N, 64, 3], as patch_contents has them; -100 where that is not known
    places: Tensor  # [N, 64, 3]
    damage: Tensor  # [N, 64] how far each patch is from a clean render
    faults: Tensor  # [N, len(FAULTS)] strengths; NaN where they are not known


def draw_pictures(base: Path, seed: int) -> Pictures:
    """Web pictures first, then those that the base drew over."""
    number = WEB_PICTURES + REIMAGINED_PICTURES
    requests, drawn, pixels = [], [], np.empty((number, SIDE, SIDE, 3), np.uint8)
    for i in progress(range(number), number, "draw"):
        rng = keyed_rng(seed, "clip-scene", i)
        requests.append(clip_request(rng))
        drawn.append(web_picture(requests[-1], rng))
        shown = with_more_faults(drawn[-1].pixels, rng) if i < WEB_PICTURES else drawn[-1].pixels
        pixels[i] = np.round(shown * 255)
    prompts = [request.prompt() for request in requests[WEB_PICTURES:]]
    drawn_over = reimagine(load_base(base), pixels[WEB_PICTURES:], prompts, seed)
    for i, over in enumerate(progress(drawn_over, REIMAGINED_PICTURES, "reimagine"), start=WEB_PICTURES):
        pixels[i] = over

    tokenizer = new_tokenizer(QUALITY_WORDS)
    captions, wrong_captions, classes, places, damage, faults = [], [], [], [], [], []
    for i, (request, picture) in enumerate(zip(requests, drawn, strict=True)):
        generated = i >= WEB_PICTURES
        right, *wrong = captions_of(request, None if generated else picture.words, keyed_rng(seed, "clip-caption", i))
        captions.append(right)
        wrong_captions += wrong
        what, where = patch_contents(picture.scene)
        if generated:
            what[..., 2] = -100  # the base often draws another pattern
        classes.append(what)
        places.append(where)
        damage.append(patch_damage(pixels[i] / 255, render_float(picture.scene)))
        faults.append([np.nan] * len(FAULTS) if generated else picture.strengths)

    def tokens(texts: list[str]) -> Tensor:
        return torch.as_tensor(
            tokenizer(texts, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt").input_ids
        )

    return Pictures(
        images=torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        captions=tokens(captions),
        wrong_captions=tokens(wrong_captions).unflatten(0, (number, 2)),
        classes=torch.from_numpy(np.stack(classes)),
        places=torch.from_numpy(np.stack(places)),
        damage=torch.from_numpy(np.stack(damage)),
        faults=torch.tensor(faults),
    )


def load_base(model: Path) -> StableDiffusionXLPipeline:
    parts = dict.fromkeys(("revision", "variant", "vae", "vae_revision"))
    return load_pipeline(
        BaseModelParams(model=str(model), dtype="float32", resolution=SIDE, **parts), torch.device("cpu")
    )


def clip_request(rng: np.random.Generator) -> Request:
    two = rng.random() < MORE_TWO_OBJECTS
    request = random_request(rng)
    while two and not request.relation:
        request = random_request(rng)
    return request


def with_more_faults(pixels: Picture, rng: np.random.Generator) -> Picture:
    """The picture, at times with the faults of generated pictures, or with something that no caption speaks of."""
    if rng.random() < GHOST_SHARE:
        other = render_float(random_scene(random_request(rng), rng))
        part = rng.uniform(0.2, 1.0) * ndimage.gaussian_filter(np.float64(rng.random((SIDE, SIDE)) < 0.002), 4.0)
        pixels = pixels + np.clip(part * 200, 0, 1)[..., None] * (other - pixels)
    for kind, share, (least, greatest) in MORE_FAULTS:
        if rng.random() < share:
            pixels = spoil(pixels, kind, float(rng.uniform(least, greatest)), rng)
    return pixels


def captions_of(request: Request, words: str | None, rng: np.random.Generator) -> tuple[str, str, str]:
    """A caption of the picture and two wrong ones; ``words`` about its making are in half of them, if they are known.

    The first wrong one differs in an attribute or in a word about the making, the second confuses what belongs where.
    """
    requests = (request, wrong_request(request, rng), confused_request(request, rng))
    right, wrong, confused = (each.prompt() for each in requests)
    if words is None or rng.random() < 0.5:
        return right, wrong, confused
    if rng.random() < 0.5:
        other_words = str(rng.choice([word for word in QUALITY_WORDS if word not in words]))
        return f"{right} {words}", f"{right} {other_words}", f"{confused} {words}"
    return f"{right} {words}", f"{wrong} {words}", f"{confused} {words}"


class Probes(nn.Module):
    """Linear readings of the image tower: patches from its tokens, faults from its embedding."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.patch = PatchProbe(width)
        self.damage = nn.Linear(width, 1)
        self.texture = nn.Linear(width, TEXTURES)
        self.fault = nn.Linear(embed_dim, len(FAULTS))

    def loss(self, pooled: Tensor, patches: Tensor, data: Pictures, rows: np.ndarray) -> Tensor:
        """The loss of the patches' contents, and the absolute errors of damage, texture and the faults' strengths."""
        texture = patch_texture(data.images[rows].float() / 255)
        strengths, known = self.fault(pooled).float(), data.faults[rows]
        errors: Tensor = (strengths - known).abs().nanmean()
        for probe, truth in ((self.damage, data.damage[rows, :, None]), (self.texture, texture)):
            errors = errors + F.l1_loss(probe(patches).float(), truth)
        return self.patch.loss(patches, data.classes[rows], data.places[rows]) + 4 * errors


def contrastive_loss(image: Tensor, text: Tensor, wrong: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss with the wrong captions [2B, D] as further negatives of the pictures; and the share found right."""
    same = torch.arange(len(image))
    logits = scale * image @ torch.cat([text, wrong]).T
    loss = (F.cross_entropy(logits, same) + F.cross_entropy(scale * text @ image.T, same)) / 2
    return loss, (logits.argmax(dim=1) == same).float().mean()


def train(base: Path, work: Path, output: Path, steps: int, batch_size: int, lr: float, seed: int) -> None:
    torch.manual_seed(seed)
    data = draw_pictures(base, seed)
    config = model_config(len(new_tokenizer(QUALITY_WORDS)))
    model = open_clip.model.CLIP(**config)
    model.visual.output_tokens = True
    probes = Probes(model.visual.transformer.width, model.visual.output_dim)
    both = nn.ModuleList([model, probes])
    optimizer = torch.optim.AdamW(both.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    start = load_checkpoint(work / "clip.pt", model=both, optimizer=optimizer, schedule=schedule)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for step in progress(range(start, steps), steps - start, "clip"):
        picked = keyed_rng(seed, "clip-batch", step).integers(0, len(data.images), batch_size)
        generator = torch.Generator().manual_seed(step)
        pixels = data.images[picked].float() / 255
        pixels = pixels + NOISE * torch.rand(len(picked), 1, 1, 1, generator=generator) * torch.randn(
            pixels.shape, generator=generator
        )
        # The fused attention's backward pass is several times slower than the plain one in bfloat16 on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            pooled, patches = model.visual((pixels - mean) / std)
            texts = model.encode_text(torch.cat([data.captions[picked], data.wrong_captions[picked].flatten(0, 1)]))
            probe = probes.loss(pooled, patches, data, picked)
        image, texts = F.normalize(pooled.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        text, wrong = texts.tensor_split([len(picked)])
        contrast, right = contrastive_loss(image, text, wrong, model.logit_scale.exp())
        loss = contrast + probe
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 50 == 0:
            log.info("step %d contrast %.4f probe %.4f top-1 %.3f", step, contrast.item(), probe.item(), right.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_checkpoint(work / "clip.pt", step + 1, model=both, optimizer=optimizer, schedule=schedule)
    save(model, output)


def save(model: nn.Module, output: Path) -> None:
    """Write open_clip's folder: config, 16-bit weights, tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = new_tokenizer(QUALITY_WORDS)
    tokenizer.save_pretrained(output)
    config = {"model_cfg": model_config(len(tokenizer)), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, output / "open_clip_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="the base model that draws pictures over")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch-size", type=int, default=160)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.work.mkdir(parents=True, exist_ok=True)
    train(args.base, args.work, args.output, args.steps, args.batch_size, args.lr, args.seed)


if __name__ == "__main__":
    main()
