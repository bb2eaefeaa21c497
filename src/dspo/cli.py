"""``dspo …``: the pipeline's library functions without DVC."""

import logging
from pathlib import Path
from typing import Annotated

import typer

from dspo.errors import UserError
from dspo.options import check_reward, check_writable, output_file, output_folder, read_config
from dspo.params import BaseModelParams, Params, load_params
from dspo.stages.runner import run

HELP = """Preference tuning of SDXL. The whole pipeline is `dvc repro`; these commands are its parts, without DVC.

Examples:

    dspo check
    dspo train --prompts prompts.csv --dry-run
    dspo train --prompts prompts.csv --output outputs/mine
    dspo batch-generate --model outputs/mine --prompts prompts.csv --output images
    dspo compare models/adapter outputs/mine --prompts prompts.csv --output compared
    dspo explain "a red star" picture.png

Every command explains itself: dspo train --help. Your shell completes them after dspo --install-completion.
"""
BEGIN, TRAIN, USE, LOOK, KEEP = "Begin", "Train", "Use what was trained", "Look closely", "Keep records"
# In a panel of its own, since beside longer texts an 80 column terminal cuts --gradient-accumulation-steps.
HOW, WORLDS = "How it is trained", "default: the world's"

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="rich", pretty_exceptions_enable=False)

ParamsFile = Annotated[
    Path, typer.Option("--params", dir_okay=False, help="parameters; every default comes from its active world")
]
ModelName = Annotated[
    str | None, typer.Option(help="base model: a folder, a .safetensors file, or HUB_ID@COMMIT; default: the world's")
]
RewardFolder = Annotated[Path, typer.Option("--reward-model", file_okay=False, help="folder that train_reward wrote")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done and what it takes; do nothing")]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        dir_okay=False,
        is_eager=True,
        callback=read_config,
        help="YAML file of these options: `num-pairs: 200`",
    ),
]


@app.command(rich_help_panel=BEGIN, epilog="Example: dspo check --prompts prompts.csv")
def check(
    params: ParamsFile = Path("params.yaml"),
    prompts: Annotated[Path, typer.Option(dir_okay=False, help="prompt list")] = Path("data/prompts.csv"),
    reward_model: RewardFolder = Path("models/reward"),
) -> None:
    """Say what is there, what is missing, and the command that mends it. Exit code 0 if nothing is missing, else 1."""
    from dspo.check import check_setup  # costly

    missing = False
    for result in check_setup(params, prompts, reward_model):
        missing |= not result.ok
        typer.echo(f"{'ok     ' if result.ok else 'MISSING'}  {result.name}: {result.found}")
        if result.remedy:
            typer.echo(f"         -> {result.remedy}")
    raise typer.Exit(int(missing))


@app.command(rich_help_panel=TRAIN, epilog="Example: dspo train --prompts prompts.csv --num-pairs 400 --output mine")
def train(
    prompts: Annotated[Path, typer.Option(dir_okay=False, help="CSV with the columns prompt and, if wanted, weight")],
    output: Annotated[
        Path, typer.Option(callback=output_folder, help="folder for adapter, training state, pairs and logs")
    ] = Path("outputs/dspo_dora"),
    reward_model: RewardFolder = Path("models/reward"),
    model_name: ModelName = None,
    num_pairs: Annotated[int, typer.Option(min=2, help="preference pairs to make, at most")] = 200,
    epochs: Annotated[int | None, typer.Option(min=1, metavar="N", rich_help_panel=HOW, help=WORLDS)] = None,
    lr: Annotated[float | None, typer.Option(rich_help_panel=HOW, help=f"learning rate; {WORLDS}")] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", rich_help_panel=HOW, help=WORLDS)
    ] = None,
    config: Config = None,
    dry_run: DryRun = False,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Make images of the prompts, score and pair them, and train a DoRA adapter on the pairs."""
    given = {"epochs": epochs, "lr": lr, "gradient_accumulation_steps": gradient_accumulation_steps}
    if lr is not None and not 0 < lr < 1:
        raise UserError(f"--lr {lr}: expected a number above 0 and below 1")
    settings = load_params(params)
    world = settings.active
    training = world.train.model_copy(update={name: value for name, value in given.items() if value is not None})
    from dspo.data.prompts import read_prompts

    read_prompts(prompts, world.prompts.max_characters)
    check_reward(reward_model)
    changed = _with(settings, base=_with_model(world.base, model_name), train=training)
    if dry_run:
        from dspo.dry_run import plan_training  # costly

        typer.echo(plan_training(changed, prompts, reward_model, num_pairs, output))
        return
    from dspo.quick_train import quick_train  # costly; mistakes above are told at once

    change = quick_train(changed, prompts, reward_model, num_pairs, output)
    typer.echo(f"adapter: {output / 'dora_weights'}")
    typer.echo(f"mean reward of {change.images} held-out images: {change.reward_base:.4f} -> {change.reward_tuned:.4f}")
    typer.echo("The reward model is no proof that the images are better: `dvc repro` asks judges that it never saw.")


@app.command(
    rich_help_panel=USE,
    epilog="Example: dspo batch-generate --model mine --prompts prompts.csv --output images",
)
def batch_generate(
    model: Annotated[Path, typer.Option(help="output folder of `dspo train`, or an adapter folder")],
    prompts: Annotated[Path, typer.Option(dir_okay=False, help="CSV with the column prompt")],
    output: Annotated[
        Path, typer.Option(callback=output_folder, help="folder for images and manifest; run again to go on")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="images per prompt")] = 1,
    model_name: ModelName = None,
    dry_run: DryRun = False,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Make one image per prompt and seed with a tuned model."""
    from dspo.data.prompts import read_prompts

    settings = load_params(params)
    world = settings.active
    wanted = read_prompts(prompts, world.prompts.max_characters)
    base = _with_model(world.base, model_name)
    from dspo.batch import adapter_folder, generate  # costly; mistakes above are told at once
    from dspo.preference.dora import check_base

    adapter = adapter_folder(model)
    if model_name is None:
        check_base(adapter, base)
    if dry_run:
        from dspo.dry_run import plan_generation

        typer.echo(plan_generation(settings, base, adapter, wanted, seeds, output))
        return
    sampler, batch_size = world.evaluate.sampler, world.evaluate.batch_size
    generate(base, adapter, wanted, seeds, sampler, settings.seed, batch_size, output)


@app.command(rich_help_panel=TRAIN, epilog="Example: dspo import-pairs --input pairs.csv")
def import_pairs(
    source: Annotated[
        Path, typer.Option("--input", help="winners/ and losers/, a CSV of image paths, or Pick-a-Pic's shards")
    ],
    output: Annotated[Path, typer.Option(callback=output_folder, help="folder of pairs; replaced")] = Path(
        "data/pairs"
    ),
    layout: Annotated[str | None, typer.Option(help="layout of the input, docs/data.md; default: by its looks")] = None,
    reward_model: Annotated[
        Path | None, typer.Option(file_okay=False, help="score the images with this reward model as well")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="pairs of this list's test prompts are left out; default: data/prompts.csv, if there"
        ),
    ] = None,
    model_name: ModelName = None,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Bring pairs that people made elsewhere into the form that preference training reads."""
    from dspo.data.readers import READERS, guess_layout  # costly

    if layout not in (None, "mixed", *READERS):
        raise UserError(f"--layout {layout}: expected one of {', '.join(READERS)}, mixed")
    layout = layout or guess_layout(source)
    if reward_model is not None:
        check_reward(reward_model)
    settings = load_params(params)
    changed = _with(settings, base=_with_model(settings.active.base, model_name))
    from dspo.import_pairs import import_pairs as bring  # costly; mistakes above are told at once

    check_writable(output.absolute().parent)
    summary = bring(changed, source, layout, reward_model, prompts, output)
    left = summary["left_out"]
    typer.echo(
        f"{output}: {summary['pairs_train']} pairs to train on, {summary['pairs_validation']} held out; "
        f"left out: {left['ties']} ties, {left['repeated']} repeated, {left['test_prompts']} of test prompts"
    )


@app.command(rich_help_panel=USE, epilog="Example: dspo export --adapter mine --format kohya --output mine.safetensors")
def export(
    adapter: Annotated[Path, typer.Option(help="output folder of `dspo train`, or an adapter folder")],
    format: Annotated[str, typer.Option(help="peft, diffusers, merged-unet, pipeline or kohya: docs/export.md")],
    output: Annotated[Path, typer.Option(help="FILE.safetensors (diffusers, kohya) or a folder; must not exist yet")],
    rank: Annotated[int | None, typer.Option(min=1, help="kohya's; default: twice the adapter's")] = None,
    model_name: ModelName = None,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Write a tuned model for other programs, and say how close it comes once they have loaded it."""
    base = load_params(params).active.base
    from dspo.batch import adapter_folder  # costly
    from dspo.environment import device
    from dspo.export.run import export as write
    from dspo.export.run import formats
    from dspo.preference.dora import check_base

    if format not in formats():
        raise UserError(f"--format {format}: expected one of {', '.join(formats())}")
    if rank is not None and format != "kohya":
        raise UserError(f"--rank {rank}: only --format kohya has a rank of its own. Leave --rank out.")
    check_writable(output.parent)
    folder = adapter_folder(adapter)
    if model_name is None:
        check_base(folder, base)
    done = write(_with_model(base, model_name), folder, formats(rank)[format], output, device())
    far = done.residual
    weights, change = (
        ("exact", "exact") if done.exact else (f"{far.weights:.2g}", f"{far.output:.2g} of {far.effect:.2g}")
    )
    row = "{:<40} {:>12} {:>16} {:>20}"
    typer.echo(row.format("output", "size", "weights' error", "UNet output"))
    typer.echo(row.format(str(output), f"{done.size / 1e6:.1f} MB", weights, change))


@app.command(rich_help_panel=LOOK, epilog="Example: dspo compare mine yours --prompts prompts.csv --output compared")
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="output folder of `dspo train`, or an adapter folder")],
    second: Annotated[Path, typer.Argument(metavar="B", help="the other one")],
    prompts: Annotated[Path, typer.Option(dir_okay=False, help="CSV with the column prompt")],
    output: Annotated[Path, typer.Option(callback=output_folder, help="folder for index.html and results.json")],
    seeds: Annotated[int | None, typer.Option(min=1, help="images per prompt; default: the world's")] = None,
    reward_model: RewardFolder = Path("models/reward"),
    second_judge: Annotated[Path, typer.Option(file_okay=False, help="read where the world has this judge")] = Path(
        "models/shapes-judge"
    ),
    model_name: ModelName = None,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Make images of two adapters from the same noise, judge them, and show them on one page."""
    from dspo.data.prompts import read_prompts

    settings = load_params(params)
    world = settings.active
    wanted = read_prompts(prompts, world.prompts.max_characters)
    check_reward(reward_model)
    from dspo.batch import adapter_folder  # costly; mistakes above are told at once
    from dspo.preference.dora import check_base

    adapters = adapter_folder(first), adapter_folder(second)
    if model_name is None:
        for adapter in adapters:
            check_base(adapter, world.base)
    changed = _with(settings, base=_with_model(world.base, model_name))
    from dspo.compare import compare_adapters

    each = seeds or world.evaluate.seeds_per_prompt
    said = compare_adapters(changed, adapters, wanted, each, reward_model, second_judge, output)
    typer.echo(f"A is {first}, B is {second}. {said}")
    typer.echo(f"the page: {output / 'index.html'}")


@app.command(rich_help_panel=LOOK, epilog="Example: dspo explain 'a red star' picture.png")
def explain(
    prompt: Annotated[str, typer.Argument(help="the text that the image was made of")],
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP file")],
    output: Annotated[Path, typer.Option(callback=output_file, help="picture to write (PNG)")] = Path(
        "outputs/explanation.png"
    ),
    reward_model: RewardFolder = Path("models/reward"),
) -> None:
    """Score one image by the reward model's heads, and draw where its fusion looked."""
    check_reward(reward_model)
    from dspo.explain import explain as draw  # costly

    said = draw(prompt, image, reward_model, output)
    for head, score in said.scores.items():
        found = "untrained" if head in said.untrained else f"{score:8.3f}"
        typer.echo(f"{head:<11} {found:>9}   {said.on_image[head]:4.0%} of its attention on the image")
    typer.echo(f"where they looked: {output}")


@app.command(rich_help_panel=KEEP, epilog="Example: dspo promote 3")
def promote(
    version: Annotated[
        int | None, typer.Argument(min=1, help="of the registered model; default: that of the workspace's adapter")
    ] = None,
    params: ParamsFile = Path("params.yaml"),
) -> None:
    """Make a version of the world's adapter MLflow's champion, if its gold win rate's interval is above one half."""
    world = load_params(params).world
    from dspo.environment import repository_root, tracking_uri
    from dspo.tracking.champion import promote as move  # costly
    from dspo.tracking.record import adapter_here

    adapter = adapter_here(repository_root(), world) if version is None else None
    typer.echo(move(tracking_uri(), world, version, adapter))


@app.command(rich_help_panel=KEEP, epilog="Example: dspo rollback")
def rollback(params: ParamsFile = Path("params.yaml")) -> None:
    """Give MLflow's champion back to the version that held it before."""
    world = load_params(params).world
    from dspo.environment import tracking_uri
    from dspo.tracking.champion import rollback as move  # costly

    typer.echo(move(tracking_uri(), world))


@app.command(rich_help_panel=KEEP, epilog="Example: dspo sync")
def sync() -> None:
    """Bring MLflow up to date with the files on disk; it may be run as often as one likes."""
    from dspo.tracking.sync import sync as send  # costly

    typer.echo(f"runs sent: {len(send())}")


def _with(settings: Params, **sections: object) -> Params:
    """Parameters whose active world has other sections."""
    world = settings.active.model_copy(update=sections)
    return settings.model_copy(update={"worlds": {settings.world: world}})


def _with_model(base: BaseModelParams, name: str | None) -> BaseModelParams:
    """The world's base model, or another of the same kind. Raises :class:`UserError` for a hub id without a commit."""
    if name is None or name == base.model:
        return base
    if Path(name).exists():
        return base.model_copy(update={"model": name, "revision": None, "variant": None})
    model, _, revision = name.partition("@")
    if not revision:
        raise UserError(f"--model-name {name}: no such folder or file; for a hub model give HUB_ID@COMMIT")
    return base.model_copy(update={"model": model, "revision": revision})


def main() -> None:
    run(_main)


def _main(argv: list[str]) -> None:
    logging.getLogger().setLevel(logging.WARNING)  # open_clip tells every step of loading a model
    logging.getLogger("dspo").setLevel(logging.INFO)
    app(args=argv)


if __name__ == "__main__":
    main()
