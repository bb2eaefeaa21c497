"""Compiling a UNet where it is called many times with few shapes."""

import logging
import sysconfig
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from dspo.environment import c_compiler

# A latent size of SDXL has two kinds of transformer block. Training calls each with and without the adapter, with and
# without gradient, on winners alone and with losers, in whole batches and in the rest of the pairs; the images of the
# reward check come on top: 22 graphs at the most.
GRAPHS_PER_LATENT_SIZE = 32

# A fused kernel keeps in float32 what uncompiled operations round to 16 bits between them. The graphs with and without
# the adapter are fused in different places, so that an untrained policy would not be the reference.
OPTIONS = {"emulate_precision_casts": True}

GET_COMPILER = "apt-get install gcc libc6-dev python3-dev brings what is missing"

log = logging.getLogger(__name__)


def lacks_compiler() -> str | None:
    """What is missing of what Triton builds its launchers with on a GPU; None: nothing."""
    if c_compiler() is None:
        return "no C compiler"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return None if header.is_file() else f"{header}: no such file"


def compile_blocks(unet: UNet2DConditionModel, latent_sizes: int) -> None:
    """Compile the repeated blocks in place: one graph for each kind of block, way of calling it and shape.

    Left alone, torch makes 8 graphs and runs whatever comes after them uncompiled, without a word. Here there is room
    for ``latent_sizes``, and what does not compile whole, or compiles without end, is an error. On a GPU without a C
    compiler nothing is compiled, and the log says so.
    """
    if unet.device.type == "cuda" and (lacking := lacks_compiler()):
        log.warning("%s: the UNet stays uncompiled, which is slower. %s", lacking, GET_COMPILER)
        return
    limit = GRAPHS_PER_LATENT_SIZE * latent_sizes
    dynamo = torch._dynamo.config
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, limit)
    unet.compile_repeated_blocks(fullgraph=True, dynamic=False, recompile_limit=limit, options=OPTIONS)
