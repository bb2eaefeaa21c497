"""Print the gigabytes that a training step takes at SDXL's true size, compiled, by CUDA's own allocator: one pair of
1024 px, every block computed twice."""

import torch
from bench.groups import settings
from bench.measure import distinct_bytes, peak_bytes
from bench.models import SIZES, build_pipeline
from bench.steps import Ours, our_dora

size, device = SIZES["full"], torch.device("cuda:0")
params = settings(size, micro_batch=1, pairs=1, checkpointing=True)
ours = Ours(build_pipeline(size, device), params, size.resolution, our_dora)
ours.step()  # compiles
print((peak_bytes(ours.step, device) + distinct_bytes(ours.tensors())) / 1e9)
