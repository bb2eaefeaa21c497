"""The nearest plain LoRA, in kohya's names: what ComfyUI and A1111 read without knowing DoRA.

W' - W = diag(m / n) (W + s B A) - W has full rank, so a LoRA of rank r is an approximation. The best one is the
truncated singular value decomposition (Eckart and Young, 1936). DoRA in kohya's names (``dora_scale``) is not written:
diffusers drops it, A1111 normalises along the other axis, and ComfyUI divides by another norm than was trained with.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dspo.errors import UserError
from dspo.export.residual import relative_error
from dspo.export.tuned import Tuned
from dspo.progress import progress

# A1111 takes a LoRA with metadata for one of SD 1.5, and hides it, unless this key says SDXL.
METADATA = {"ss_base_model_version": "sdxl_base_v1-0"}


def write_kohya(tuned: Tuned, path: Path, rank: int | None) -> float:
    """Returns the relative error of what was written, rounding to float16 included.

    ``rank`` None means twice the adapter's, as far as the layers are that wide.
    """
    smallest = min(min(tuned.base_weight(name).shape) for name in tuned.layers)
    rank = rank or min(2 * tuned.config.r, smallest)
    if rank > smallest:
        raise UserError(f"--rank {rank}: expected at most {smallest}, the width of the smallest adapted layer")
    tensors: dict[str, Tensor] = {}
    written: dict[str, tuple[Tensor, Tensor]] = {}
    per_block = tuned.pipe.unet.config.layers_per_block
    for name, layer in progress(tuned.layers.items(), len(tuned.layers), "layers"):
        W = tuned.base_weight(name)
        up, down = written[name] = truncated(layer.merged(W) - W, rank)
        key = kohya_name(name, per_block)
        tensors |= {
            f"{key}.lora_up.weight": up.cpu().contiguous(),
            f"{key}.lora_down.weight": down.cpu().contiguous(),
            f"{key}.alpha": torch.tensor(float(rank)),
        }
    save_file(tensors, path, metadata=METADATA)

    def approximate(name: str) -> Tensor:
        up, down = written[name]
        return tuned.base_weight(name) + up.float() @ down.float()

    return relative_error(tuned, approximate)


@torch.no_grad()
def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``delta`` [out, in] -> up [out, rank] and down [rank, in] in float16, each with the root of the singular values.

    Shared evenly, the factors stay well inside float16's range.
    """
    U, S, V = torch.linalg.svd(delta, full_matrices=False)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).half(), (root[:, None] * V[:rank]).half()


def kohya_name(module: str, layers_per_block: int) -> str:
    """``lora_unet_`` and the module's name in the UNet of Stability's own code, as kohya's trainer names it for SDXL.

    Each level of that UNet counts ``layers_per_block`` blocks and its down- or upsampler; the first input block is the
    first convolution. In a block the ResNet is 0 and the transformer 1.
    """
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)", module)
    if match:
        side, level, index, rest = match.groups()
        number = int(level) * (layers_per_block + 1) + int(index)
        block = f"input_blocks_{number + 1}_1" if side == "down" else f"output_blocks_{number}_1"
    elif module.startswith("mid_block.attentions.0."):
        block, rest = "middle_block_1", module.removeprefix("mid_block.attentions.0.")
    else:
        raise UserError(
            f"{module}: no layer of a transformer block, so kohya's names are not known for it here. "
            "Export with --format diffusers or merged-unet."
        )
    return f"lora_unet_{block}_{rest.replace('.', '_')}"
