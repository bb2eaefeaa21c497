"""What is read from the machine around the program."""

from pathlib import Path

import pytest
import torch

from dspo.check import check_setup
from dspo.diffusion.compiled import lacks_compiler
from dspo.environment import device
from dspo.errors import UserError


@pytest.mark.parametrize("asked", ["cuda", None])
def test_every_process_of_a_launcher_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, asked: str | None) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, value in {"RANK": "9", "LOCAL_RANK": "77", "WORLD_SIZE": "16", "DSPO_DEVICE": asked or ""}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="DSPO_DEVICE=cuda:77: no such device"):
        device()
    monkeypatch.setenv("DSPO_DEVICE", "cpu")
    assert device().type == "cpu"


def test_what_a_gpu_needs_to_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lacks_compiler() == "no C compiler"
    (tmp_path / "clang").touch(mode=0o755)
    monkeypatch.setattr("dspo.diffusion.compiled.sysconfig.get_path", lambda _name: str(tmp_path))
    assert lacks_compiler() == f"{tmp_path / 'Python.h'}: no such file"
    (tmp_path / "Python.h").touch()
    assert lacks_compiler() is None
    monkeypatch.setenv("CC", "a compiler that is nowhere")
    assert lacks_compiler() == "no C compiler"


def test_a_gpu_without_a_compiler_is_told_and_lacks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspo.check.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _where: "a GPU")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _where: (20 * 2**30, 80 * 2**30))
    monkeypatch.setattr("dspo.check.lacks_compiler", lambda: "no C compiler")
    checks = check_setup(Path("params.yaml"), Path("data/prompts.csv"), Path("models/reward"))
    (found,) = [check for check in checks if check.name == "device"]
    assert found.ok and found.found.startswith(
        "a GPU, 20.0 of 80.0 GiB free; no C compiler, so that nothing is compiled"
    )
