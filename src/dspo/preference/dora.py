"""DoRA adapters of a UNet: fast to train, exact at step 0, and in peft's own format on disk.

    W' = m * (W + s B A) / n,   n = ||W + s B A|| per row, detached,   s = alpha / rank        (Liu et al., ICML 2024)

peft injects the layers and owns names and files; :class:`FastDora` replaces its forward pass. n depends on A and B
alone, so it is computed once per optimizer step, in float32; m starts from the same function, so m / n is exactly 1 and
the untrained policy equals the reference to the bit. An adapter on disk is loaded through peft itself, and sampled from
with peft's own arithmetic (:class:`LoadedDora`), so that peft alone makes the same images.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from dspo.data.files import read_json, write_bytes, write_json
from dspo.data.keys import keyed_seed
from dspo.errors import UserError
from dspo.params import BaseModelParams, TrainParams

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NAME = "default"  # peft's name of the adapter
LEAST_NORM = 1e-12  # a row of zeros keeps m / n = 1

State = dict[str, Tensor]


class FastDora(DoraLinearVariant):
    """peft's DoRA for one Linear layer with the norm cached between optimizer steps.

    Dropout acts on the branch of A and B alone: equal to peft without dropout, and in expectation with it. With
    ``exact_dropout`` it also acts on the base weight's part, as in peft and the paper, at the price of a second product
    with the base weight.
    """

    norm: Tensor  # n [out], float32

    def __init__(self, layer: LoraLinear, exact_dropout: bool) -> None:
        self.A = layer.lora_A[NAME].weight  # [r, in]
        self.B = layer.lora_B[NAME].weight  # [out, r]
        self.W = layer.get_base_layer().weight  # [out, in]
        self.scaling: float = layer.scaling[NAME]
        self.exact_dropout = exact_dropout
        self.W_squared = self.W.float().square().sum(1)
        refresh_norms([self])

    def forward(self, module: LoraLinear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``x`` [..., in], ``result`` = W x + b [..., out] -> W' x + b."""
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        dropout = module.lora_dropout[active_adapter]
        dropped = dropout(x)
        low_rank = F.linear(F.linear(dropped, self.A.to(x.dtype)), self.B.to(x.dtype))
        if self.exact_dropout and dropout.training:
            g = magnitude / self.norm
            extra: Tensor = (g - 1) * F.linear(dropped, self.W) + g * (self.scaling * low_rank)
            return extra.to(result.dtype) + result
        bias = module.get_base_layer().bias
        keep = torch.is_grad_enabled()
        rescaled: Tensor = Rescale.apply(result, low_rank, magnitude, self.norm, bias, self.scaling, keep)
        return rescaled


class LoadedDora(DoraLinearVariant):
    """peft's DoRA of an adapter that no longer changes, equal to the bit: peft computes n, which is as large as W to
    compute, in every pass; here it does so once. Without gradient and dropout.
    """

    @torch.no_grad()
    def __init__(self, layer: LoraLinear) -> None:
        dora: Any = layer.lora_magnitude_vector[NAME]
        change = dora.get_lora_weight(lora_A=layer.lora_A[NAME], lora_B=layer.lora_B[NAME])
        norm = dora.get_weight_norm(layer.get_base_layer().weight.to(change.dtype), change, layer.scaling[NAME])
        self.g = (dora.weight / norm).view(1, -1)  # m / n
        self.g_less_1 = self.g - 1

    def forward(self, module: LoraLinear, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """``x`` [..., in], ``result`` = W x + b [..., out] -> W' x + b. Sums and products in peft's order."""
        low_rank = module.lora_B[active_adapter](module.lora_A[active_adapter](x)).mul_(self.g)
        if (scaling := module.scaling[active_adapter]) != 1:
            low_rank.mul_(scaling)
        bias = module.get_base_layer().bias
        extra: Tensor = self.g_less_1 * (result if bias is None else result - bias)
        return extra.add_(low_rank).add_(result)


@torch.no_grad()
def refresh_norms(layers: Sequence[FastDora]) -> None:
    """Compute n of layers that are alike in shape and scaling, for their present A and B.

    n^2 = ||W||^2 + 2 s sum_k B (W A^T) + s^2 sum_k (B A A^T) B, row by row: nothing of W's size but W is read. All but
    W A^T is computed for the layers together, since on a GPU the launch of so small an operation takes longer than it.
    """
    A, B = torch.stack([layer.A.float() for layer in layers]), torch.stack([layer.B.float() for layer in layers])
    cross = torch.empty_like(B)
    for layer, layer_A, layer_cross in zip(layers, A, cross, strict=True):
        torch.mm(layer.W.float(), layer_A.T, out=layer_cross)
    s = layers[0].scaling
    change = cross.baddbmm_(B, A @ A.mT, beta=2 * s, alpha=s * s).mul_(B).sum(-1)
    n_squared = torch.stack([layer.W_squared for layer in layers]).add_(change)
    for layer, norm in zip(layers, n_squared.clamp_min_(0).sqrt_().clamp_min_(LEAST_NORM), strict=True):
        layer.norm = norm


class Rescale(torch.autograd.Function):
    """base + (g - 1) (base - bias) + g s low_rank with g = m / n, evaluated in float32.

    In this form g = 1 and low_rank = 0 give ``base`` back to the bit. One tensor is kept for the gradient of m, if
    ``keep``: the output where there is no bias, since z = (base - bias) + s low_rank = output / g; else z.
    """

    @staticmethod
    def forward(
        ctx: Any, base: Tensor, low_rank: Tensor, m: Tensor, n: Tensor, bias: Tensor | None, s: float, keep: bool
    ) -> Tensor:
        g = m / n
        plain = base if bias is None else base - bias
        out = torch.addcmul(base, plain, g - 1).addcmul_(low_rank, g * s).to(base.dtype)
        ctx.has_bias, ctx.s = bias is not None, s
        if keep:
            ctx.save_for_backward(out if bias is None else plain.add_(low_rank, alpha=s), m, n)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (d_out,) = grads
        kept, m, n = ctx.saved_tensors
        # Products in float32, which compiled are never in memory; first, while nothing else of their size is there.
        d_m = (d_out.float() * kept).flatten(0, -2).sum(0) / (n if ctx.has_bias else m)
        g = m / n
        d_base = (d_out * g).to(d_out.dtype)
        d_low_rank = d_base if ctx.s == 1 else (d_out * (g * ctx.s)).to(d_out.dtype)  # rounded once, as d_base is
        return d_base, d_low_rank, d_m, None, None, None, None


class Adapter:
    """The adapter inside a UNet, which stays the caller's and can be called as before."""

    def __init__(self, unet: UNet2DConditionModel, config: LoraConfig, seed: int, exact_dropout: bool) -> None:
        self.unet = unet
        self.device, self.dtype = unet.device, unet.dtype  # of the base; the UNet finds them by a walk of its modules
        self.config = config
        self._peft = get_peft_model(unet, config, adapter_name=NAME)
        self.layers = [module for module in unet.modules() if isinstance(module, LoraLinear)]
        self._dropouts = [layer.lora_dropout[NAME] for layer in self.layers]
        self._initialise(seed)
        self._alike: dict[torch.Size, list[FastDora]] = defaultdict(list)  # by the weight's shape
        if config.use_dora:
            self._install(exact_dropout)
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad
        }
        self.train(False)

    def _initialise(self, seed: int) -> None:
        """A from U(-1/sqrt(in), 1/sqrt(in)), peft's own distribution, keyed by the module's name; B = 0."""
        for name, module in self.unet.named_modules():
            if isinstance(module, LoraLinear):
                A = module.lora_A[NAME].weight
                generator = torch.Generator().manual_seed(keyed_seed(seed, "adapter", name))
                bound = A.shape[1] ** -0.5
                A.data = torch.empty(A.shape).uniform_(-bound, bound, generator=generator).to(A.device)
                module.lora_B[NAME].weight.data = torch.zeros(module.lora_B[NAME].weight.shape, device=A.device)

    def _install(self, exact_dropout: bool) -> None:
        for layer in self.layers:
            fast = FastDora(layer, exact_dropout)
            # peft's own magnitude went through the base's dtype: in bfloat16 it would be off by up to 0.4 %.
            layer.lora_magnitude_vector[NAME].weight.data = fast.norm.clone()
            layer.lora_variant[NAME] = fast
            layer.cast_input_dtype_enabled = False  # the products with A and B run in the base's dtype
            self._alike[fast.W.shape].append(fast)

    def refresh(self) -> None:
        """Bring the cached norms up to date; call it after every change of the parameters."""
        for layers in self._alike.values():
            refresh_norms(layers)

    def train(self, mode: bool) -> None:
        """Switch the adapter's dropout; the base model stays in evaluation mode."""
        for dropout in self._dropouts:
            dropout.training = mode

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The UNet without the adapter, for a forward pass of the reference."""
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False

    def state(self) -> State:
        """A copy of the parameters by their names in the UNet."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def load(self, state: State) -> None:
        """Set the parameters from :meth:`state` of an adapter of the same shape."""
        for name, parameter in self.parameters.items():
            parameter.copy_(state[name])
        self.refresh()

    @contextmanager
    def holding(self, state: State) -> Iterator[None]:
        """The adapter with other parameters for the length of a block."""
        own = self.state()
        self.load(state)
        try:
            yield
        finally:
            self.load(own)

    def save(self, folder: Path, base: str) -> None:
        """Write peft's two files, to the byte the same for the same parameters. ``base`` names the base model.

        Raises :class:`UserError` if the disk is full.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = get_peft_model_state_dict(self._peft, adapter_name=NAME)
        content = save({name: t.cpu().contiguous() for name, t in tensors.items()}, metadata={"format": "pt"})
        write_bytes(content, folder / WEIGHTS)
        config = self.config.to_dict() | {"base_model_name_or_path": base, "inference_mode": True}
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        write_json(json.loads(json.dumps(plain)), folder / CONFIG)  # enums become their strings


def add_dora(unet: UNet2DConditionModel, params: TrainParams, seed: int, exact_dropout: bool = False) -> Adapter:
    """Put an untrained DoRA adapter into ``unet``, in place: its output stays the same to the bit.

    Raises :class:`UserError` if a target module is not in the UNet.
    """
    return _add(unet, params, seed, use_dora=True, exact_dropout=exact_dropout)


def add_lora(unet: UNet2DConditionModel, params: TrainParams, seed: int) -> Adapter:
    """As :func:`add_dora`, without magnitudes: the baseline."""
    return _add(unet, params, seed, use_dora=False, exact_dropout=False)


def _add(unet: UNet2DConditionModel, params: TrainParams, seed: int, use_dora: bool, exact_dropout: bool) -> Adapter:
    linear = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear)]
    for target in params.target_modules:
        if not any(_is_target(name, [target]) for name in linear):
            raise UserError(
                f"train.target_modules: {target!r} is no Linear module of the base model's UNet. "
                "Name some that it has, such as to_q or ff.net.2."
            )
    config = LoraConfig(
        r=params.rank,
        lora_alpha=params.alpha,
        lora_dropout=params.dropout,
        target_modules=list(params.target_modules),
        use_dora=use_dora,
    )
    return Adapter(unet, config, seed, exact_dropout)


def load_adapter(unet: UNet2DConditionModel, folder: Path) -> PeftModel:
    """Put the adapter in ``folder`` into ``unet``, which stays on its device, through stock peft, for sampling.

    Raises :class:`UserError` if files are missing or damaged, or the adapter was trained on a UNet of other shapes.
    """
    _check_fits(unet, _config(folder), tensor_shapes(folder), folder)
    model = PeftModel.from_pretrained(unet, folder, torch_device=str(unet.device))  # peft would take the first GPU
    for module in model.modules():
        if isinstance(module, LoraLinear) and NAME in module.lora_variant:
            module.lora_variant[NAME] = LoadedDora(module)
    return model


def check_base(adapter: Path, base: BaseModelParams) -> None:
    """Raise :class:`UserError` if the adapter names another base model than ``base``.

    Names are compared by their last part: a hub id and a local copy of it are the same model.
    """
    trained_on = _config(adapter).get("base_model_name_or_path") or ""
    if PurePath(trained_on).name != PurePath(base.model).name:
        raise UserError(
            f"{adapter}: the adapter was trained on {trained_on!r}, the base model here is {base.model!r}. "
            "Set `world` in params.yaml to the one it was trained in, or name the base model with --model-name."
        )


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(
            f"{folder / CONFIG}: not the configuration of a LoRA or DoRA adapter in PEFT's format. "
            "Give the folder of one."
        )
    return config


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of every tensor of an adapter. Raises :class:`UserError` if the file is missing or damaged."""
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  it has no __iter__
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Give a whole adapter folder.") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error}). Fetch or train the adapter again.") from None


def _check_fits(unet: UNet2DConditionModel, config: dict[str, Any], shapes: dict[str, list[int]], folder: Path) -> None:
    """Every target of the UNet has its A and B of the right size in the file, and the file has nothing else."""
    targets = config.get("target_modules") or []
    trained_on = f"it was trained on {config.get('base_model_name_or_path')!r}. Give the adapter of this base model."
    expected: dict[str, list[int]] = {}
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear) and _is_target(name, targets):
            layer = f"base_model.model.{name}"
            a = f"{layer}.lora_A.weight"
            # Where layers have ranks of their own, it is what A says; peft's default is 8.
            rank = shapes.get(a, [0])[0] if config.get("rank_pattern") else config.get("r", 8)
            expected |= {a: [rank, module.in_features], f"{layer}.lora_B.weight": [module.out_features, rank]}
            if config.get("use_dora"):
                expected[f"{layer}.lora_magnitude_vector"] = [module.out_features]
    odd = sorted(shapes.keys() ^ expected.keys())
    if odd or not expected:
        where = "the adapter has it, the UNet does not" if odd and odd[0] in shapes else "the adapter lacks it"
        which = f" ({odd[0]}: {where})" if odd else ""
        raise UserError(f"{folder}: the adapter does not fit the base model's UNet{which}; {trained_on}")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise UserError(
                f"{folder}: the adapter does not fit the base model's UNet, or not its own {CONFIG} "
                f"({name}: {shapes[name]}, expected {shape}); {trained_on}"
            )


def _is_target(name: str, targets: list[str]) -> bool:
    """peft's rule for lists: the whole name, or its end after a dot."""
    return any(name == target or name.endswith(f".{target}") for target in targets)
