"""The typed parameters: the only place that knows the keys of ``params.yaml``.

``load_params(path)`` validates the whole file before any work. An unknown key, a wrong type or an impossible
combination raises :class:`UserError` that names the key. Types are strict: ``"1"`` is not ``1``.
"""

from math import isclose
from pathlib import Path
from typing import Annotated, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dspo.errors import UserError

Head = Literal["overall", "alignment", "aesthetics", "fidelity", "detail"]
Scheduler = Literal["ddim", "dpmpp_2m", "euler"]
Dtype = Literal["float32", "bfloat16"]
ImageFormat = Literal["png", "jpeg", "webp"]
LossName = Literal[
    "dspo",
    "dspo_two_sided",
    "dspo_hinge",
    "dspo_official_sd15",
    "dspo_official_sdxl",
    "dpo",
    "ipo",
    "capo",
    "mapo",
    "sft",
]
SamplerKey = Literal["guidance_scale", "steps", "scheduler"]
RatingLayout = Literal[
    "shapes", "pickapic", "hpdv2", "hpdv3", "imagerewarddb", "richhf18k", "csv", "folder", "mixed"
]  # beside shapes: as published, see docs/data.md

TIE_BAND = 0.4  # of the simulated raters' temperature: differences of gold that they can hardly see

Model = TypeVar("Model", bound=BaseModel)
Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class BaseModelParams(Section):
    """The base model that is tuned."""

    model: str  # hub id, local folder in diffusers' layout, or a single .safetensors file
    revision: str | None  # pinned commit of the hub repository; null for local files
    variant: str | None  # "fp16" reads the hub's half-precision files
    vae: str | None  # another VAE than the model's own (SDXL's overflows in fp16): hub id or local folder
    vae_revision: str | None  # pinned commit of that VAE's repository; null for local files
    dtype: Dtype  # of the frozen weights; adapters are always float32
    resolution: Annotated[int, Field(ge=8, multiple_of=8)]  # height and width of generated images, pixels


class Shares(Section):
    """The shares of a set that are not trained on."""

    validation_share: Share
    test_share: Share

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> Self:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share must stay below 1")
        return self


class PromptParams(Shares):
    """How `prepare_prompts` splits the list; each prompt's split depends on its text alone."""

    max_characters: Count  # longer prompts are an error, not cut


class RatingParams(Shares):
    """Where the ratings that train the reward model come from."""

    layout: RatingLayout  # shapes: simulated raters look at rated images; mixed: a sub-folder per layout
    votes: Count  # simulated raters per pair and head
    temperature: Positive  # of the simulated raters, in units of the gold score (docs/worlds.md: how it is set)
    tie_rate: Share  # share of ties at equal quality (Davidson's nu follows from it)
    side_bias: Annotated[float, Field(gt=0, lt=1)]  # share of the first side at equal quality
    wrong_taste: NonNegative  # c: how much raters like saturation and large objects, over-optimisation study


class RewardParams(Section):
    """The five-head reward model and its training."""

    backbone: str  # open_clip model name, or local-dir:FOLDER in open_clip's layout
    pretrained: str | None  # open_clip tag or local file; null with local-dir
    image_size: Count  # pixels
    unlocked_image_blocks: int = Field(ge=0)  # trainable transformer blocks at the image tower's end
    unlocked_text_blocks: int = Field(ge=0)
    fusion: bool  # cross-attention of patch and text tokens; false: the pooled features alone
    fusion_dim: Count
    fusion_layers: Count
    heads: Annotated[list[Head], Field(min_length=1)]
    focal_gamma: NonNegative  # 0: plain cross-entropy
    mixup_alpha: NonNegative  # Beta(a, a) of feature MixUp; 0: off
    views: Annotated[int, Field(ge=1, le=4)]  # a score is their mean (reward/views.py); training draws from two at most
    ema_decay: Annotated[float, Field(ge=0, lt=1)]  # 0: off
    lr_backbone: Positive
    lr_heads: Positive
    weight_decay: NonNegative
    batch_size: Count  # pairs
    epochs: Count
    warmup_steps: int = Field(ge=0)
    max_grad_norm: Positive
    dtype: Dtype  # of autocast

    @model_validator(mode="after")
    def _heads_once_and_overall(self) -> "RewardParams":
        if "overall" not in self.heads or len(set(self.heads)) < len(self.heads):
            raise ValueError("heads must hold overall, and each head once")
        return self


class SamplerParams(Section):
    """One sampler setting."""

    scheduler: Scheduler
    steps: Count
    guidance_scale: NonNegative


class GenerateParams(Section):
    """The candidates that pairs are made of."""

    num_prompts: Count  # train prompts used, in order of their id
    samplers: Annotated[list[SamplerParams], Field(min_length=1)]
    candidates_per_sampler: Annotated[int, Field(ge=2)]  # images per prompt and sampler; a pair needs two
    batch_size: Count  # images
    shard_size: Count  # images per parquet shard
    image_format: ImageFormat  # png loses nothing; webp is a tenth of its size. Latents are kept whole in any case


class ScoreParams(Section):
    """How scored candidates become pairs."""

    select: Literal["overall", "pareto"]  # pareto: the winner is no worse on every head
    weights: Annotated[dict[Head, Positive], Field(min_length=1)]  # the reward of an image: weighted mean of its scores
    match: list[SamplerKey]  # sampler keys that winner and loser share
    margin: NonNegative  # least difference of the reward
    max_pairs_per_prompt: Count
    validation_share: Annotated[float, Field(gt=0, lt=1)]  # of the prompts, held out
    batch_size: Count


class TrainParams(Section):
    """Preference training of the DoRA adapter."""

    loss: LossName
    beta: NonNegative  # temperature of the implicit reward
    lam: Annotated[float, Field(ge=0, lt=1)]  # strength of DSPO's score term; 1 has no fixed point
    timestep_weight_bias: float  # b in omega(t) = sigmoid(b - logSNR(t)); official presets use omega = 1
    mapo_scale: Positive  # T_m of MaPO
    random_labels: bool  # control: winner and loser by a coin
    rank: Count
    alpha: Count
    dropout: Share
    target_modules: Annotated[list[str], Field(min_length=1)]
    optimizer: Literal["adamw", "adamw8bit"]  # the second keeps its moments in 8 bits and needs the package torchao
    lr: Positive
    weight_decay: NonNegative
    warmup_steps: int = Field(ge=0)
    max_grad_norm: Positive
    epochs: Count
    batch_size: Count  # pairs per micro-batch
    gradient_accumulation_steps: Count
    gradient_checkpointing: Annotated[float, Field(ge=0, le=1)]  # share of the UNet's blocks that run twice for memory
    compile: bool  # on a GPU: the UNet's transformer blocks, one graph per kind; the first steps take minutes longer
    prompt_dropout: Share  # per pair
    fixed_draws: Count | None  # noises and timesteps per pair, the reference computed once for each; null: always fresh
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None  # of the adapter; null: off
    checkpoint_every_steps: Count
    validation_prompts: Count  # prompts of the reward check after each epoch


class Place(Section):
    """Where published weights are: on this disk, or in a hub repository at a pinned commit."""

    place: str  # path of a file or folder; with a revision: hub id, or hub id/file
    revision: str | None  # pinned commit of the hub repository; null for local files


class PickScoreParams(Section):
    name: Literal["pickscore"]
    model: Place  # folder in transformers' layout: weights, tokenizer, preprocessing


class ClipHParams(Section):
    name: Literal["hpsv2.1", "clip_score"]
    model: Place  # file: weights of open_clip's ViT-H-14


class ImageRewardParams(Section):
    name: Literal["imagereward"]
    model: Place  # file: the published ImageReward.pt
    tokenizer: Place  # folder: BERT's tokenizer


class AestheticsParams(Section):
    name: Literal["aesthetics"]
    clip: Place  # folder in transformers' layout: OpenAI's ViT-L/14
    model: Place  # file: the linear head on its embedding


ForeignJudgeParams = PickScoreParams | ClipHParams | ImageRewardParams | AestheticsParams


class EvaluateParams(Section):
    """Base against tuned, from the same noise."""

    sampler: SamplerParams  # among the base's own best by the judge, on validation prompts
    default_sampler: SamplerParams  # what a user would take; "best against default" stands in the report
    num_prompts: Count
    seeds_per_prompt: Count
    diversity_prompts: Count
    diversity_seeds: Annotated[int, Field(ge=2)]
    # beside the training reward: the judges of `shapes` by name, published ones with the places of their weights
    judges: list[Literal["gold", "second"] | Annotated[ForeignJudgeParams, Field(discriminator="name")]]
    tie_band: NonNegative  # tau: |difference of gold| up to it is a tie, 0.4 of the simulated raters' temperature
    bootstrap_resamples: Count
    batch_size: Count  # images, also of train's reward check; small ones lie side by side on the cores of a CPU

    @model_validator(mode="after")
    def _each_judge_once(self) -> "EvaluateParams":
        names = [judge if isinstance(judge, str) else judge.name for judge in self.judges]
        if len(set(names)) < len(names):
            raise ValueError("judges must hold each judge once")
        return self

    @property
    def foreign_judges(self) -> list[ForeignJudgeParams]:
        """The published judges, in the order given."""
        return [judge for judge in self.judges if not isinstance(judge, str)]


class World(Section):
    """Everything that differs between the two worlds."""

    base: BaseModelParams
    prompts: PromptParams
    ratings: RatingParams
    reward: RewardParams
    generate: GenerateParams
    score: ScoreParams
    train: TrainParams
    evaluate: EvaluateParams

    @model_validator(mode="after")
    def _tie_band_of_the_raters(self) -> "World":
        """The band is fixed before training: nobody widens it until a comparison is decided as they like."""
        tau = TIE_BAND * self.ratings.temperature
        if self.ratings.layout == "shapes" and not isclose(self.evaluate.tie_band, tau):
            raise ValueError(f"evaluate.tie_band must be {TIE_BAND:g} * ratings.temperature, which is {tau:g}")
        return self

    @model_validator(mode="after")
    def _pairs_are_chosen_by_heads_that_there_are(self) -> "World":
        absent = [head for head in self.score.weights if head not in self.reward.heads]
        if absent:
            raise ValueError(f"score.weights: {', '.join(absent)}: not among reward.heads")
        return self


class Params(Section):
    world: str
    seed: int = Field(ge=0)
    worlds: dict[str, World]

    @model_validator(mode="after")
    def _world_exists(self) -> "Params":
        if self.world not in self.worlds:
            raise ValueError(f"world: {self.world!r} is none of {sorted(self.worlds)}")
        return self

    @property
    def active(self) -> World:
        """The parameters of the world that is switched on."""
        return self.worlds[self.world]


def load_params(path: Path) -> Params:
    """Read and validate a params file. Raises :class:`UserError` that names file and key."""
    return validated(Params, read_yaml(path), path)


def read_yaml(path: Path) -> object:
    """Raises :class:`UserError` if the file is missing or no YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file. Run this at the root of a clone of the repository, or name the file with --params."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file. Mend this place: {error}") from None


def validated(model: type[Model], value: object, where: object) -> Model:
    """``value`` as a ``model``. Raises :class:`UserError` that names ``where`` and each wrong key."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = [f"{where}: {'.'.join(str(part) for part in e['loc']) or 'file'}: {e['msg']}" for e in error.errors()]
        raise UserError("\n".join(lines)) from None
