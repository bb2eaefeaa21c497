"""``--config FILE``: a command's options from a YAML file; what the command line gives as well wins."""

from pathlib import Path

import typer
import yaml

from dspo.errors import UserError


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the command's defaults. Keys are the options' names, with ``-`` or ``_``.

    Raises :class:`UserError` for a file that is missing or no YAML, a key that is no option, a value that is no text or
    number. Types and bounds are checked as on the command line.
    """
    if path is None:
        return None
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: not a YAML file: {error}") from None
    known = {name.lstrip("-") for option in context.command.params for name in option.opts} - {"config", "help"}
    if not isinstance(raw, dict):
        raise UserError(f"--config {path}: expected lines of `option: value`, for example `num-pairs: 200`")
    defaults = {}
    for key, value in raw.items():
        name = str(key).replace("_", "-")
        if name not in known:
            raise UserError(f"--config {path}: {key}: no option of this command. It has: {', '.join(sorted(known))}")
        if not isinstance(value, str | int | float):
            raise UserError(f"--config {path}: {key}: expected a text, a number, true or false, not {value!r}")
        defaults[name.replace("-", "_")] = value
    context.default_map = defaults
    return path
