"""What options have in common: ``--config FILE``, and what is tried before the work, not after it."""

import tempfile
from pathlib import Path

import typer
import yaml

from dspo.errors import UserError


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make a YAML file's values the command's defaults; what the command line gives as well wins.

    Keys are the options' names, with ``-`` or ``_``.

    Raises :class:`UserError` for a file that is missing or no YAML, a key that is no option, a value that is no text or
    number. Types and bounds are checked as on the command line.
    """
    if path is None:
        return None
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"--config {path}: no such file. Give the path of a YAML file with lines of `option: value`."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a YAML file. Mend this place: {error}") from None
    options = {name.lstrip("-"): option for option in context.command.params for name in option.opts}
    known = options.keys() - {"config", "help"}
    if not isinstance(raw, dict):
        raise UserError(f"--config {path}: expected lines of `option: value`, for example `num-pairs: 200`")
    defaults = {}
    for key, value in raw.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise UserError(f"--config {path}: {key}: no option of this command. It has: {', '.join(sorted(known))}")
        switch = getattr(options[name], "is_flag", False)
        if not isinstance(value, str | int | float) or isinstance(value, bool) != switch:
            wanted = "true or false" if switch else "a text or a number"
            raise UserError(f"--config {path}: {key}: expected {wanted}, not {value!r}")
        defaults[name.replace("-", "_")] = value
    context.default_map = defaults
    return path


def output_folder(path: Path | None) -> Path | None:
    """Raises :class:`UserError` unless ``path`` is a folder that can be written to, or can become one."""
    if path is not None:
        check_writable(path)
    return path


def output_file(path: Path | None) -> Path | None:
    """Raises :class:`UserError` unless ``path`` is or can become a file."""
    if path is not None:
        if path.is_dir():
            raise UserError(f"--output {path}: a folder. Give the path of a file.")
        check_writable(path.parent)
    return path


def check_reward(folder: Path) -> None:
    """Raises :class:`UserError` unless ``folder`` holds a reward model."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no reward model here. `dvc repro train_reward` makes models/reward in a clone of the "
            "repository, and where a remote holds it `dvc pull models/reward` fetches it. Name another folder with "
            "--reward-model."
        )


def check_writable(folder: Path) -> None:
    """Raises :class:`UserError` unless files can be made in ``folder``, or in the nearest one above it that exists."""
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        message = f"--output {folder}: nothing can be written in {place} ({error.strerror}). Give another --output."
        raise UserError(message) from None
