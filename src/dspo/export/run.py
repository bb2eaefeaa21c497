"""`dspo export`: write one format, load it as its users will, compare, and only then put it in its place."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from dspo.data.files import disk_errors, sync
from dspo.errors import UserError
from dspo.export.adapters import read_diffusers, read_peft, write_diffusers, write_peft
from dspo.export.merged import read_merged_unet, read_pipeline, write_merged_unet, write_pipeline
from dspo.export.residual import Residual, measure
from dspo.export.svd_lora import write_kohya
from dspo.export.tuned import Tuned, load_tuned
from dspo.params import BaseModelParams

ROUNDING = 1e-5  # of float32, through all layers of a UNet


@dataclass(frozen=True)
class Format:
    write: Callable[[Tuned, Path], float]  # returns the relative error of the weights as written
    read: Callable[[Tuned, Path], nn.Module]  # the tuned UNet, by the code of the program that the format is for
    suffix: str  # of the output: ".safetensors" for one file, "" for a folder


@dataclass(frozen=True)
class Exported:
    size: int  # bytes, of all files together
    residual: Residual
    exact: bool


def formats(rank: int | None = None) -> dict[str, Format]:
    """``rank``: of the kohya format's LoRA; default: twice the adapter's."""
    return {
        "peft": Format(write_peft, read_peft, ""),
        "diffusers": Format(write_diffusers, read_diffusers, ".safetensors"),
        "merged-unet": Format(write_merged_unet, read_merged_unet, ""),
        "pipeline": Format(write_pipeline, read_pipeline, ""),
        "kohya": Format(partial(write_kohya, rank=rank), read_diffusers, ".safetensors"),
    }


def export(base: BaseModelParams, adapter: Path, format: Format, output: Path, device: torch.device) -> Exported:
    """Write the adapter, or the tuned model, to ``output``, which appears whole or not at all.

    What was written is loaded by diffusers or peft themselves; unless that gives the model that was meant, nothing is
    left. Raises :class:`UserError` for that, for an ``output`` that exists or has another suffix than the format's,
    and as :func:`load_tuned` does.
    """
    if output.exists():
        raise UserError(f"{output}: exists already. Remove it, or give another --output.")
    if output.suffix != format.suffix and ".safetensors" in (output.suffix, format.suffix):
        kind = "one file, named *.safetensors" if format.suffix else "a folder"
        raise UserError(f"--output {output}: this format is {kind}")
    tuned = load_tuned(base, adapter, device)
    work = output.with_name(f".{output.name}.partial")
    _remove(work)
    try:
        with disk_errors(output):
            work.mkdir(parents=True)
            meant = format.write(tuned, work / output.name)
            residual = measure(tuned, format.read(tuned, work / output.name))
            _check(tuned, meant, residual, output)
            for path in work.rglob("*"):
                if path.is_file():
                    path.chmod(0o644)  # safetensors writes for its owner alone
                sync(path)
            os.rename(work / output.name, output)
            sync(output.parent)
    except SafetensorError as error:  # its writer says so of a full disk too
        raise UserError(f"{output}: cannot be written ({error}). Free some space and run again.") from None
    finally:
        _remove(work)
    paths = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
    return Exported(sum(path.stat().st_size for path in paths), residual, exact=meant == 0)


def _check(tuned: Tuned, meant: float, read: Residual, output: Path) -> None:
    same_weights = abs(read.weights - meant) <= ROUNDING + 0.01 * meant
    same_output = meant > 0 or read.output <= ROUNDING * float(tuned.output.abs().max())
    if not (same_weights and same_output):  # said so that NaN is not the same
        raise UserError(
            f"{output}: not written: read back, the weights' error is {read.weights:.2g} where {meant:.2g} was meant, "
            f"and the UNet's output differs by {read.output:.2g}. Use the package versions of requirements.lock."
        )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
