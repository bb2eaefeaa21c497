"""Train the small CLIP that the reward model of `shapes` starts from, and save it in open_clip's layout.

``python -m dspo.shapes.train_clip --base models/shapes-sdxl --work DIR --output models/shapes-clip`` continues where it
stopped when run again. Beside the weights it leaves ``report.json``: how well it tells captions of fresh samples.

Contrastive learning on pictures as the web has them and on samples of the base, captioned by what is seen on them, half
of the batches in a mirror. Half of the web's captions also say how well the picture is made, and every picture has
captions of its own that are wrong in one point, as negatives. A caption that leaves much free may fit other pictures of
its batch too; those count as negatives, as they do in CLIP. Beside that, linear probes must tell from the image tokens
what each patch shows, its colours and edges and how far it is from a clean render, and from the embedding how strong
each fault is (they are not saved): a hundred thousand pictures are too few for a vision transformer to find that out
from captions alone.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
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
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from dspo.data.files import whole_file, write_json
from dspo.data.keys import keyed_rng, prompt_id
from dspo.data.prompts import Prompt
from dspo.diffusion.base import load_pipeline
from dspo.diffusion.sampling import SampleRequest, sample
from dspo.params import BaseModelParams, SamplerParams
from dspo.progress import progress
from dspo.shapes.analysis import Analysis
from dspo.shapes.checkpoint import load_checkpoint, run_trainer, save_checkpoint
from dspo.shapes.defects import Picture, spoil
from dspo.shapes.described import caption, describe
from dspo.shapes.grammar import Request, confused_request, random_request, wrong_request
from dspo.shapes.probes import (
    MEASURES,
    PATCH,
    PATCHES,
    TEXTURES,
    PatchProbe,
    patch_colours,
    patch_contents,
    patch_damage,
    patch_measures,
    patch_texture,
)
from dspo.shapes.render import SIDE, Scene, random_scene, render_float
from dspo.shapes.tokenizer import CONTEXT_LENGTH, new_tokenizer
from dspo.shapes.web import FAULTS, QUALITY_WORDS, web_picture

log = logging.getLogger(__name__)

MEAN, STD = [0.55, 0.45, 0.45], [0.28, 0.24, 0.24]
WEB_PICTURES, SAMPLED_PICTURES, HELD_OUT_PICTURES = 24_000, 72_000, 2_000
SAMPLERS = (
    *(SamplerParams(scheduler="ddim", steps=12, guidance_scale=scale) for scale in (1.0, 2.0, 3.0)),
    *(SamplerParams(scheduler="dpmpp_2m", steps=12, guidance_scale=scale) for scale in (1.0, 3.0)),
)
TELLINGS = 4  # captions of each picture; which one is taken is drawn anew each time
MORE_TWO_OBJECTS = 0.3  # share of the requests that are drawn for two objects alone: they are the hard ones
MORE_FAULTS = (("fade", 0.2, (0.1, 0.8)), ("blotch", 0.2, (0.15, 1.0)), ("warp", 0.25, (0.05, 0.5)))
GHOST_SHARE = 0.2


def model_config(vocabulary: int) -> dict[str, object]:
    """open_clip's configuration of the model."""
    text = {"context_length": CONTEXT_LENGTH, "vocab_size": vocabulary, "width": 96, "heads": 4, "layers": 3}
    return {
        "embed_dim": 96,
        "vision_cfg": {"image_size": SIDE, "patch_size": PATCH, "width": 128, "layers": 6, "head_width": 32},
        "text_cfg": {**text, "hf_tokenizer_name": "local"},
    }


@dataclass(frozen=True)
class Captioned:
    """A picture with captions, the scene that it shows or that is nearest, and its faults."""

    pixels: np.ndarray  # uint8 [64, 64, 3]
    captions: list[tuple[str, str, str]]  # TELLINGS of them: each a true one and two wrong ones
    scene: Scene
    faults: tuple[float, ...]  # strengths of FAULTS; NaN where they are not known
    seen: Analysis | None  # None: not analysed


@dataclass(frozen=True)
class Pictures:
    """What is learnt from, one row per picture."""

    images: Tensor  # uint8 [N, 3, 64, 64]
    captions: Tensor  # token ids [N, TELLINGS, 3, L]: a true one and two wrong ones; [N, 3, L] of a batch
    classes: Tensor  # int [N, 64, 3], as patch_contents has them
    places: Tensor  # [N, 64, 3]
    colours: Tensor  # [N, 64, 3], as patch_colours has them
    damage: Tensor  # [N, 64] how far each patch is from a clean render
    measures: Tensor  # [N, 64, MEASURES], as patch_measures has them; NaN where the picture was not analysed
    faults: Tensor  # [N, len(FAULTS)]


def web_pictures(seed: int) -> Iterator[Captioned]:
    for i in progress(range(WEB_PICTURES), WEB_PICTURES, "draw"):
        rng = keyed_rng(seed, "clip-scene", i)
        request = clip_request(rng)
        picture = web_picture(request, rng)
        pixels = np.round(with_more_faults(picture.pixels, rng) * 255).astype(np.uint8)
        rng = keyed_rng(seed, "clip-caption", i)
        captions = [captions_of(request, picture.words, rng) for _ in range(TELLINGS)]
        yield Captioned(pixels, captions, picture.scene, picture.strengths, None)


def sampled_pictures(base: Path, indices: range, seed: int) -> Iterator[Captioned]:
    """The base's samples of random prompts, those on which the analysis sees nothing that it is sure of left out."""
    pipe = load_base(base)
    for part, sampler in enumerate(SAMPLERS):
        mine = indices[part :: len(SAMPLERS)]
        texts = [clip_request(keyed_rng(seed, "clip-sample", i)).prompt() for i in mine]
        requests = [SampleRequest(Prompt(prompt_id(t), t, 1.0), i, i) for i, t in zip(mine, texts, strict=True)]
        with torch.autocast("cpu", torch.bfloat16):
            samples = sample(pipe, requests, sampler, SIDE, seed, batch_size=64)
            images = [one.image for one in progress(samples, len(requests), f"sample {part + 1} of {len(SAMPLERS)}")]
        for i, pixels in zip(mine, images, strict=True):
            rng = keyed_rng(seed, "clip-description", i)
            shown = describe(pixels)
            told = [caption(shown, rng) for _ in range(TELLINGS)] if shown else []
            captions = [captions_of(request, None, rng) for request in told if request]
            if shown and captions:
                yield Captioned(pixels, captions, shown.scene, (np.nan,) * len(FAULTS), shown.seen)


def pictures(base: Path, kept: Path, seed: int) -> Pictures:
    """All that is learnt from; ``kept``: the file that spares a second making."""
    if not kept.exists():
        made = as_tensors(chain(web_pictures(seed), sampled_pictures(base, range(SAMPLED_PICTURES), seed)))
        with whole_file(kept) as partial:
            torch.save(vars(made), partial)
    return Pictures(**torch.load(kept, weights_only=True))


def as_tensors(pictures: Iterable[Captioned]) -> Pictures:
    tokenizer = new_tokenizer(QUALITY_WORDS)
    images, captions, classes, places, colours, damage, measures, faults = [], [], [], [], [], [], [], []
    unknown = np.full((PATCHES**2, MEASURES), np.nan, np.float32)
    for picture in pictures:
        what, where = patch_contents(picture.scene)
        images.append(picture.pixels)
        texts = list(chain(*picture.captions))
        tokens = tokenizer(texts, padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt")
        captions.append(torch.as_tensor(tokens.input_ids).unflatten(0, (TELLINGS, 3)))
        classes.append(what)
        places.append(where)
        colours.append(patch_colours(picture.pixels / 255, picture.scene))
        damage.append(patch_damage(picture.pixels / 255, render_float(picture.scene)))
        measures.append(patch_measures(picture.seen, picture.scene) if picture.seen else unknown)
        faults.append(picture.faults)
    return Pictures(
        images=torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(),
        captions=torch.stack(captions),
        classes=torch.from_numpy(np.stack(classes)),
        places=torch.from_numpy(np.stack(places)),
        colours=torch.from_numpy(np.stack(colours)),
        damage=torch.from_numpy(np.stack(damage)),
        measures=torch.from_numpy(np.stack(measures)),
        faults=torch.tensor(faults),
    )


def drawn(data: Pictures, size: int, rng: np.random.Generator) -> Pictures:
    """A batch: rows at random, each with one of its captions."""
    rows = rng.integers(0, len(data.images), size)
    batch = Pictures(**{name: part[rows] for name, part in vars(data).items()})
    return replace(batch, captions=batch.captions[np.arange(size), rng.integers(0, TELLINGS, size)])


def mirrored(batch: Pictures, left: int, right: int) -> Pictures:
    """The pictures with left and right exchanged (``left``, ``right``: the words' token ids), and what is true of them
    then: every shape and every pattern of the renderer is its own mirror image."""

    def across(of_patches: Tensor) -> Tensor:
        turned: Tensor = of_patches.unflatten(1, (PATCHES, PATCHES)).flip(2).flatten(1, 2)
        return turned

    words = batch.captions
    return Pictures(
        images=batch.images.flip(-1),
        captions=torch.where(words == left, right, torch.where(words == right, left, words)),
        classes=across(batch.classes),
        places=across(batch.places) * torch.tensor([-1.0, 1.0, 1.0]),
        colours=across(batch.colours),
        damage=across(batch.damage),
        measures=across(batch.measures),
        faults=batch.faults,
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
        self.colour = nn.Linear(width, 3)
        self.damage = nn.Linear(width, 1)
        self.measures = nn.Linear(width, MEASURES)
        self.texture = nn.Linear(width, TEXTURES)
        self.fault = nn.Linear(embed_dim, len(FAULTS))

    def loss(self, pooled: Tensor, patches: Tensor, batch: Pictures) -> Tensor:
        """The loss of the patches' contents, and the absolute errors of all other readings."""
        texture = patch_texture(batch.images.float() / 255)
        errors: Tensor = (self.fault(pooled).float() - batch.faults).abs().nanmean()
        errors = errors + (self.colour(patches).float() - batch.colours).abs().nanmean()
        errors = errors + 3 * (self.measures(patches).float() - batch.measures).abs().nanmean()
        for probe, truth in ((self.damage, batch.damage[..., None]), (self.texture, texture)):
            errors = errors + F.l1_loss(probe(patches).float(), truth)
        return self.patch.loss(patches, batch.classes, batch.places) + 4 * errors


def contrastive_loss(image: Tensor, text: Tensor, wrong: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's loss with the wrong captions [2B, D] as further negatives of the pictures; and the share found right."""
    same = torch.arange(len(image))
    logits = scale * image @ torch.cat([text, wrong]).T
    loss = (F.cross_entropy(logits, same) + F.cross_entropy(scale * text @ image.T, same)) / 2
    return loss, (logits.argmax(dim=1) == same).float().mean()


def train(
    base: Path,
    work: Path,
    output: Path,
    steps: int = 25_000,
    batch_size: int = 160,
    lr: float = 1e-3,
    seed: int = 0,
) -> None:
    torch.manual_seed(seed)
    data = pictures(base, work / "pictures.pt", seed)
    tokenizer = new_tokenizer(QUALITY_WORDS)
    left, right = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("left", "right"))
    config = model_config(len(tokenizer))
    model = open_clip.model.CLIP(**config)
    model.visual.output_tokens = True
    probes = Probes(model.visual.transformer.width, model.visual.output_dim)
    both = nn.ModuleList([model, probes])
    muon, adamw = new_optimizers(model, probes, lr)
    schedules = [schedule(one, lr, steps) for one in (muon, adamw)]
    learning = {"muon": muon, "adamw": adamw, "muon_lr": schedules[0], "adamw_lr": schedules[1]}
    start = load_checkpoint(work / "clip.pt", model=both, **learning)
    for step in progress(range(start, steps), steps - start, "clip"):
        rng = keyed_rng(seed, "clip-batch", step)
        batch = drawn(data, batch_size, rng)
        if rng.random() < 0.5:
            batch = mirrored(batch, left, right)
        pixels = batch.images.float() / 255
        # The fused attention's backward pass is several times slower than the plain one in bfloat16 on a CPU.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            pooled, patches = model.visual(normalised(pixels))
            texts = model.encode_text(torch.cat([batch.captions[:, 0], batch.captions[:, 1:].flatten(0, 1)]))
            probe = probes.loss(pooled, patches, batch)
        image, texts = F.normalize(pooled.float(), dim=-1), F.normalize(texts.float(), dim=-1)
        text, wrong = texts.tensor_split([batch_size])
        contrast, found = contrastive_loss(image, text, wrong, model.logit_scale.exp())
        loss = contrast + probe
        both.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        muon.step()
        adamw.step()
        for one in schedules:
            one.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        if step % 50 == 0:
            log.info("step %d contrast %.4f probe %.4f top-1 %.3f", step, contrast.item(), probe.item(), found.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save_checkpoint(work / "clip.pt", step + 1, model=both, **learning)
    save(model, output)
    fresh = range(SAMPLED_PICTURES, SAMPLED_PICTURES + HELD_OUT_PICTURES)
    write_json(held_out(model.eval(), as_tensors(sampled_pictures(base, fresh, seed))), output / "report.json")


def new_optimizers(model: open_clip.model.CLIP, probes: Probes, lr: float) -> tuple[Optimizer, Optimizer]:
    """Muon for the matrices of both towers' blocks, AdamW for all else.

    Muon (K. Jordan et al. 2024) with AdamW's step length (Liu et al. 2025, arXiv 2502.16982) comes much farther here in
    as many steps than AdamW alone.
    """
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    matrices = [weight for block in blocks for weight in block.parameters() if weight.ndim == 2]
    chosen = set(map(id, matrices))
    others = [weight for weight in (*model.parameters(), *probes.parameters()) if id(weight) not in chosen]
    return (
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.05),
    )


def schedule(optimizer: Optimizer, lr: float, steps: int) -> OneCycleLR:
    """A tenth of the steps up to ``lr``, then down to nothing."""
    return OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False)


def normalised(pixels: Tensor) -> Tensor:
    """What the image tower takes, from pixels [B, 3, 64, 64] in [0, 1]."""
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.inference_mode()
def held_out(model: open_clip.model.CLIP, data: Pictures) -> dict[str, float | int]:
    """In what share of pictures the right caption is nearer than the wrong ones: that with one attribute changed; the
    confused one, which of a single object is another such; both."""
    images = F.normalize(model.visual(normalised(data.images.float() / 255))[0], dim=-1)
    texts = F.normalize(model.encode_text(data.captions[:, 0].flatten(0, 1)), dim=-1).unflatten(0, (-1, 3))
    right, *wrong = torch.einsum("nd,nkd->kn", images, texts)
    nearer = {name: right > other for name, other in zip(("changed", "confused"), wrong, strict=True)}
    nearer["both"] = nearer["changed"] & nearer["confused"]
    return {"pictures": len(images), **{name: share.float().mean().item() for name, share in nearer.items()}}


def save(model: nn.Module, output: Path) -> None:
    """Write open_clip's folder: config, 16-bit weights, tokenizer."""
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = new_tokenizer(QUALITY_WORDS)
    tokenizer.save_pretrained(output)
    config = {"model_cfg": model_config(len(tokenizer)), "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (output / "open_clip_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, output / "open_clip_model.safetensors")


if __name__ == "__main__":
    run_trainer(__doc__, train, "base")
