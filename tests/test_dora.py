"""The adapter against stock peft: outputs, gradients, files; and exactness of the untrained policy."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from disk import Killed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_trainer import make_pairs
from tiny import TEXT_WIDTH, TOKENS, tiny_unet

from dspo.data.keys import keyed_seed
from dspo.errors import UserError
from dspo.params import TrainParams, load_params
from dspo.preference import trainer
from dspo.preference.dataset import Batch, epoch_order, make_batch, training_draw
from dspo.preference.dora import Adapter, FastDora, add_dora, add_lora, load_adapter
from dspo.preference.schedule import NoiseSchedule

TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"]


def params(**changes: object) -> TrainParams:
    shapes = load_params(Path("params.yaml")).worlds["shapes"].train
    return shapes.model_copy(update={"rank": 4, "alpha": 6, "dropout": 0.0, **changes})


def unet(seed: int = 0) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tiny_unet().eval().requires_grad_(False)  # trained weights may be multiplied in another order


def inputs(dtype: torch.dtype = torch.float32, n: int = 2) -> dict[str, object]:
    g = torch.Generator().manual_seed(7)
    conditions = {
        "text_embeds": torch.randn(n, TEXT_WIDTH, generator=g).to(dtype),
        "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]]).repeat(n, 1),
    }
    return {
        "sample": torch.randn(n, 4, 4, 4, generator=g).to(dtype),
        "timestep": torch.tensor([10, 700])[:n],
        "encoder_hidden_states": torch.randn(n, TOKENS, 2 * TEXT_WIDTH, generator=g).to(dtype),
        "added_cond_kwargs": conditions,
    }


def output(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return model(**inputs(dtype), return_dict=False)[0]


def perturb(adapter: Adapter, scale: float = 0.05) -> None:
    g = torch.Generator().manual_seed(3)
    adapter.load({name: t + scale * torch.randn(t.shape, generator=g) for name, t in adapter.state().items()})


def stock_peft(adapter: Adapter, dropout: float = 0.0) -> PeftModel:
    """peft's own DoRA with the same parameters."""
    config = LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=TARGETS, use_dora=True)
    model = get_peft_model(unet(), config)
    state = adapter.state()
    trained = {name: p for name, p in model.base_model.model.named_parameters() if p.requires_grad}
    assert trained.keys() == state.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[name])
    return model


def train_adapter_alone(model: PeftModel) -> None:
    """Dropout in stock peft's adapter, and the base as under ours: in evaluation mode."""
    model.eval()
    for module in model.modules():
        if hasattr(module, "lora_variant"):
            module.training = True
            module.lora_dropout.train()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_untrained_policy_is_the_reference_to_the_bit(dtype: torch.dtype, dropout: float) -> None:
    model = unet().to(dtype)
    before = output(model, dtype)
    adapter = add_dora(model, params(dropout=dropout), seed=0)
    assert all(p.dtype == torch.float32 for p in adapter.parameters.values())
    for training in (False, True):
        adapter.train(training)
        assert torch.equal(output(model, dtype), before)
        with adapter.disabled():
            assert torch.equal(output(model, dtype), before)


def test_every_target_gets_a_b_and_magnitude() -> None:
    adapter = add_dora(unet(), params(), seed=0)
    linear = [n for n, m in unet().named_modules() if isinstance(m, torch.nn.Linear)]
    targets = [name for name in linear if any(name.endswith(f".{target}") for target in TARGETS)]
    assert len(adapter.layers) == len(targets)
    assert len(adapter.parameters) == 3 * len(targets)


def test_disabled_is_the_base_model_and_the_adapter_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = unet()
    base = output(model)
    adapter = add_dora(model, params(), seed=0)
    perturb(adapter)
    tuned = output(model)
    for walk in ("modules", "named_modules"):  # of SDXL's thousands, twice in every micro-batch
        monkeypatch.setattr(torch.nn.Module, walk, None)
    with adapter.disabled():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), tuned)
    assert not torch.allclose(tuned, base, atol=1e-3)


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_stock_peft(training: bool) -> None:
    adapter = add_dora(unet(), params(), seed=0)
    perturb(adapter)
    stock = stock_peft(adapter)
    stock.train(training)
    adapter.train(training)
    ours, theirs = output(adapter.unet), output(stock)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    expected = dict(stock.base_model.model.named_parameters())
    for name, parameter in adapter.parameters.items():
        gradient = expected[name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=2e-5 * gradient.abs().max().item() + 1e-7)


@pytest.mark.parametrize("bias", [False, True])
def test_gradients_in_bfloat16_are_as_near_to_the_truth_as_those_of_stock_peft(bias: bool) -> None:
    """The truth: float32 over the same values. A layer over many tokens, since a whole UNet's error is mostly luck.

    m's is summed over one kept tensor of the output's size, which was rounded once more than peft's two.
    """
    g = torch.Generator().manual_seed(1)
    W, b, x, d_out, A, B, m = (
        torch.randn(*shape, generator=g).bfloat16()
        for shape in [(48, 64), (48,), (8192, 64), (8192, 48), (4, 64), (48, 4), (48,)]
    )

    def gradients(dtype: torch.dtype, fast: bool) -> list[torch.Tensor]:
        linear = torch.nn.Linear(64, 48, bias=bias, dtype=dtype)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True)
        model = get_peft_model(torch.nn.Sequential(linear), config)
        layer = model.base_model.model[0]
        parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        parameters.append(layer.lora_magnitude_vector["default"].weight)
        with torch.no_grad():
            linear.weight.copy_(W / 8)
            if bias:
                linear.bias.copy_(b)
            for parameter, value in zip(parameters, (A / 8, B / 8, 1 + m / 20), strict=True):
                parameter.copy_(value)
        if fast:
            layer.lora_variant["default"] = FastDora(layer, exact_dropout=False)
            layer.cast_input_dtype_enabled = False
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16 and not fast):
            model(x.to(dtype)).backward(d_out.to(dtype))
        return [parameter.grad for parameter in parameters]

    truth = gradients(torch.float32, fast=False)
    ours, theirs = gradients(torch.bfloat16, fast=True), gradients(torch.bfloat16, fast=False)
    for exact, own, stock, bound in zip(truth, ours, theirs, (1.1, 1.1, 1.35), strict=True):
        assert (own - exact).norm() <= bound * (stock - exact).norm()


def test_exact_dropout_is_that_of_stock_peft() -> None:
    adapter = add_dora(unet(), params(dropout=0.3), seed=0, exact_dropout=True)
    perturb(adapter)
    stock = stock_peft(adapter, dropout=0.3)
    train_adapter_alone(stock)
    adapter.train(True)
    torch.manual_seed(5)
    ours = output(adapter.unet)
    torch.manual_seed(5)
    torch.testing.assert_close(ours, output(stock), rtol=1e-5, atol=2e-6)


LOSS_TOLERANCE = 1e-5  # the loss starts at ln 2
CHANGE_TOLERANCE = 1e-4  # length of the difference over the length of what training changed, per kind of parameter


def fifty_steps(**changes: object) -> TrainParams:
    small = {"loss": "dpo", "beta": 30.0, "lr": 1e-3, "epochs": 5, "batch_size": 2, "ema_decay": None}
    return params(**{**small, "checkpoint_every_steps": 8, "prompt_dropout": 0.1, **changes})


def schedule() -> NoiseSchedule:
    return NoiseSchedule.of(DDIMScheduler(), torch.device("cpu"))


def train_stock_peft(model: PeftModel, p: TrainParams, n: int) -> list[float]:
    """Diffusion-DPO written plainly on stock peft, on the pairs, noise and timesteps that our trainer draws."""
    pairs, per_step = make_pairs(n), p.batch_size * p.gradient_accumulation_steps
    noise = schedule()
    omega = noise.omega(p.timestep_weight_bias)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [[q for q in trained if q.ndim == 2], [q for q in trained if q.ndim == 1]]
    decays = (p.weight_decay, 0.0)
    optimizer = torch.optim.AdamW([{"params": g, "weight_decay": d} for g, d in zip(groups, decays, strict=True)])
    losses = []
    for step in range(50):
        epoch, place = divmod(step, n // per_step)
        rows = epoch_order(pairs, 0, epoch)[place * per_step : (place + 1) * per_step]
        total = 0.0
        for start in range(0, per_step, p.batch_size):
            micro = rows[start : start + p.batch_size]
            draws = [training_draw(pairs, row, 0, epoch, noise.n_timesteps, p.prompt_dropout) for row in micro]
            b = make_batch(pairs, draws, noise, torch.float32, torch.device("cpu"))

            def margin(b: Batch = b) -> torch.Tensor:
                conditions = {"text_embeds": b.pooled.repeat(2, 1), "time_ids": b.time_ids.repeat(2, 1)}
                text, noisy = b.embeds.repeat(2, 1, 1), torch.cat([b.noisy_w, b.noisy_l])
                out = model(noisy, b.t.repeat(2), encoder_hidden_states=text, added_cond_kwargs=conditions).sample
                winner, loser = ((out - torch.cat([b.target_w, b.target_l])) ** 2).mean(dim=(1, 2, 3)).chunk(2)
                return winner - loser

            with torch.no_grad(), model.disable_adapter():
                reference = margin()
            torch.manual_seed(keyed_seed(0, "adapter dropout", step, start))
            policy = margin()
            per_pair = -torch.nn.functional.logsigmoid(-p.beta / 2 * omega[b.t] * (policy - reference))
            loss = (b.weight * per_pair).sum() / (per_step * pairs.weight.mean())
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, p.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = p.lr * min(1.0, (step + 1) / p.warmup_steps)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def clip_or_die_at(step: int) -> Callable[..., torch.Tensor]:
    clip, steps = torch.nn.utils.clip_grad_norm_, count(1)

    def clip_or_die(*args: object, **keywords: object) -> torch.Tensor:
        if next(steps) == step:
            raise Killed
        return clip(*args, **keywords)

    return clip_or_die


RECOMPUTED = {"gradient_accumulation_steps": 2, "gradient_checkpointing": 1.0, "dropout": 0.2}


@pytest.mark.parametrize(("n", "changes", "killed"), [(20, {}, False), (40, RECOMPUTED, True)])
def test_fifty_steps_of_training_are_those_of_stock_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int, changes: dict[str, object], killed: bool
) -> None:
    p = fifty_steps(**changes)
    untrained = add_dora(unet(), p, seed=0)
    stock = stock_peft(untrained, p.dropout)
    train_adapter_alone(stock)
    losses = train_stock_peft(stock, p, n)
    stock.eval()

    def ours() -> tuple[Adapter, trainer.Trained]:
        adapter = add_dora(unet(), p, seed=0, exact_dropout=True)
        return adapter, trainer.train(adapter, schedule(), make_pairs(n), make_pairs(1, 1), p, 0, tmp_path)

    if killed:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clip_or_die_at(29))  # no checkpoint's step
            ours()
    adapter, trained = ours()
    assert len(trained.log) == len(losses) == 50
    assert [row["loss"] for row in trained.log] == pytest.approx(losses, abs=LOSS_TOLERANCE)
    assert_same_change(adapter, stock, untrained.state())
    adapter.save(tmp_path / "adapter", "models/base")
    torch.testing.assert_close(output(load_adapter(unet(), tmp_path / "adapter")), output(stock), rtol=0, atol=1e-4)


def assert_same_change(adapter: Adapter, stock: PeftModel, before: dict[str, torch.Tensor]) -> None:
    theirs = dict(stock.base_model.model.named_parameters())
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
        names = [name for name in before if kind in name]
        change = torch.cat([(theirs[name].detach() - before[name]).flatten() for name in names])
        apart = torch.cat([(theirs[name].detach() - adapter.parameters[name].detach()).flatten() for name in names])
        assert change.norm() > 0.1
        assert apart.norm() < CHANGE_TOLERANCE * change.norm()


def test_fast_dropout_differs_only_while_training() -> None:
    adapter = add_dora(unet(), params(dropout=0.3), seed=0)
    perturb(adapter)
    still = output(adapter.unet)
    adapter.train(True)
    torch.manual_seed(1)
    assert not torch.equal(output(adapter.unet), still)
    adapter.train(False)
    assert torch.equal(output(adapter.unet), still)


def test_cached_norm_is_that_of_the_whole_weight() -> None:
    adapter = add_dora(unet(), params(), seed=0)
    perturb(adapter)
    for layer in adapter.layers:
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        dense = (layer.get_base_layer().weight.double() + 1.5 * B @ A).norm(dim=1)
        torch.testing.assert_close(layer.lora_variant["default"].norm.double(), dense, rtol=1e-6, atol=0)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        adapter = add_dora(unet(), params(dropout=0.2), seed=0)
        perturb(adapter)
        if checkpointing:
            adapter.unet.enable_gradient_checkpointing()
        adapter.train(True)
        torch.manual_seed(2)
        output(adapter.unet).square().sum().backward()
        gradients.append({name: p.grad for name, p in adapter.parameters.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_initial_weights_depend_on_the_seed_and_nothing_else() -> None:
    torch.manual_seed(1)
    first = add_dora(unet(), params(), seed=0).state()
    torch.manual_seed(2)
    second = add_dora(unet(), params(), seed=0).state()
    other = add_dora(unet(), params(), seed=1).state()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_saved_weights_are_to_the_byte_what_peft_saves(tmp_path: Path) -> None:
    adapter = add_dora(unet(), params(), seed=0)
    perturb(adapter)
    adapter.save(tmp_path / "ours", "models/base")
    stock_peft(adapter).save_pretrained(tmp_path / "theirs")
    name = "adapter_model.safetensors"
    assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    ours, theirs = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    differing = {key for key in ours if ours[key] != theirs[key]} - {"target_modules"}
    assert differing <= {"base_model_name_or_path", "auto_mapping"}
    assert ours["target_modules"] == sorted(TARGETS)
    assert ours["base_model_name_or_path"] == "models/base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_adapter_loads_through_stock_peft(tmp_path: Path, dtype: torch.dtype) -> None:
    adapter = add_dora(unet().to(dtype), params(dropout=0.1), seed=0)
    perturb(adapter)
    adapter.save(tmp_path, "models/base")
    expected = output(adapter.unet, dtype)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-2
    stock = output(PeftModel.from_pretrained(unet().to(dtype), tmp_path), dtype)
    torch.testing.assert_close(stock, expected, rtol=1e-5, atol=tolerance)
    assert torch.equal(output(load_adapter(unet().to(dtype), tmp_path), dtype), stock)


def test_a_loaded_adapter_takes_no_device_but_the_base_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_dora(unet(), params(), seed=0).save(tmp_path, "models/base")
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: pytest.fail("peft chose a device by itself"))
    load_adapter(unet(), tmp_path)


def test_config_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import test_dora as t\n"
        "t.add_dora(t.unet(), t.params(), 0).save(Path(sys.argv[1]), 'base')"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], env=environment, check=True)
    add_dora(unet(), params(), 0).save(tmp_path / "own", "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "own" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_lora_baseline_starts_at_the_base_model(tmp_path: Path) -> None:
    model = unet()
    before = output(model)
    adapter = add_lora(model, params(), seed=0)
    assert torch.equal(output(model), before)
    perturb(adapter)
    adapter.save(tmp_path, "models/base")
    torch.testing.assert_close(output(load_adapter(unet(), tmp_path)), output(model))


def test_unknown_target_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="to_kk"):
        add_dora(unet(), params(target_modules=["to_k", "to_kk"]), seed=0)


def test_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    adapter = add_dora(unet(), params(), seed=0)
    adapter.save(tmp_path, "models/some-base")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(name for name in tensors if name.endswith("lora_A.weight"))

    save_file({n: t for n, t in tensors.items() if n != name}, weights)
    with pytest.raises(UserError, match=r"lacks it.*models/some-base"):
        load_adapter(unet(), tmp_path)

    save_file({**tensors, name: torch.zeros(4, 7)}, weights)
    with pytest.raises(UserError, match="expected"):
        load_adapter(unet(), tmp_path)

    save_file({**tensors, "base_model.model.other.lora_A.weight": torch.zeros(4, 7)}, weights)
    with pytest.raises(UserError, match="the UNet does not"):
        load_adapter(unet(), tmp_path)


def test_damaged_or_missing_adapter_files_are_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file"):
        load_adapter(unet(), tmp_path)
    add_dora(unet(), params(), seed=0).save(tmp_path, "base")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_adapter(unet(), tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no such file"):
        load_adapter(unet(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="not the configuration"):
        load_adapter(unet(), tmp_path)
