"""Compiling a UNet where it is called many times with few shapes."""

import logging
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from dspo.environment import c_compiler

# A latent size of SDXL has two kinds of transformer block. Training calls each with and without the adapter, with and
# without gradient, on winners alone and with losers, in whole batches and in the rest of the pairs; the images of the
# reward check come on top: 22 graphs at the most.
GRAPHS_PER_LATENT_SIZE = 32

# The graphs with and without the adapter are fused in different places, and an untrained policy has to be the reference
# to the bit. So a fused kernel rounds to 16 bits where uncompiled operations do, and layer norms stay torch's own
# kernel, since a fused one sums in an order that depends on what else is in it. Nor may a timing decide in what order a
# kernel sums: the next run could decide otherwise.
OPTIONS = {"emulate_precision_casts": True, "deterministic": True}

LAYER_NORM = torch.ops.aten.native_layer_norm.default

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
    unet.compile_repeated_blocks(backend=inductor, fullgraph=True, dynamic=False, recompile_limit=limit)


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """torch's own backend with our options, and with layer norms left whole."""
    from torch._inductor import compile_fx, lowering  # here, where something is compiled: it takes a second

    lowering.FALLBACK_ALLOW_LIST.add(LAYER_NORM.name())
    return compile_fx.compile_fx(graph, inputs, config_patches=OPTIONS, decompositions=Decompositions())


class Decompositions(dict[Any, Any]):
    """What Inductor takes operations apart into, without layer norms.

    Pickled by name: it is a part of the key by which a compiled graph is found on disk.
    """

    def __init__(self) -> None:
        from torch._inductor.decomposition import select_decomp_table

        super().__init__(select_decomp_table())
        del self[LAYER_NORM]

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Decompositions, ()
