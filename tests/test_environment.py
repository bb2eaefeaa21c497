"""What is read from the machine around the program."""

from pathlib import Path

import pytest

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
