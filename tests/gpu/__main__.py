"""Run Python modules as on a GPU, on a machine that has none.

    python tests/gpu checked "dspo.stages.train --params params.yaml …" …
    python -O tests/gpu hollow "bench --rounds 0 --output bench"

``checked``: tensors hold a CPU's data and say that they are on a GPU. What a GPU would refuse is an error, results
are a CPU's, and the file that ``WAITS`` names gets the places at which the program waits for the device
(:mod:`checked`). Nothing is compiled.

``hollow``: kernels do nothing, so that no value means anything; ``-O`` leaves assertions about values out. All else is
real: torch's allocator, what compiles, and the compiled code's calls (:mod:`hollow`).

Needs a C compiler; the headers are Triton's.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
BUILT = "DSPO_TEST_RUNTIME"  # folder of the built runtime, in the environment of the process that it is loaded into


def build(folder: str) -> Path:
    """runtime.c as a library that is found wherever CUDA's driver is looked for."""
    triton = find_spec("triton")
    assert triton is not None and triton.origin is not None, "Triton comes with torch on Linux alone"
    headers = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    library = Path(folder) / "libcuda.so.1"
    options = ("-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{library.name}", f"-I{headers}")
    compiler = os.environ.get("CC") or shutil.which("gcc") or "clang"
    subprocess.run([compiler, *options, HERE / "runtime.c", "-o", library], check=True)
    return library


def main(kind: str, commands: list[str]) -> None:
    if BUILT not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            library = str(build(folder))
            environment = {BUILT: folder, "LD_PRELOAD": library, "LD_LIBRARY_PATH": folder, "DSPO_DEVICE": "cuda"}
            optimised = ["-O"] if sys.flags.optimize else []
            again = subprocess.run([sys.executable, *optimised, *sys.argv], env=os.environ | environment, check=False)
        sys.exit(again.returncode)
    if kind == "checked":
        import checked

        os.environ["CC"] = "none"  # without a compiler nothing is compiled
        checked.install()
    else:
        import hollow

        hollow.install()
    sys.path.insert(0, str(Path.cwd()))
    for command in commands:
        module, *arguments = shlex.split(command)
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
