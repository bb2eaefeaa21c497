#!/bin/sh
# Say what the pipeline will miss here, and how to give it, before work starts. Warnings go to stderr; then the command
# runs as it was given. Only what makes every command fail ends the container (exit code 2).
set -eu

warn() { echo "warning: $*" >&2; }
fail() { echo "error: $*" >&2; exit 2; }

[ -w . ] || fail "$PWD is not writable by uid $(id -u). Run with --user \$(id -u):\$(id -g) of the folder's owner."
[ -w "$HOME" ] || fail "$HOME is not writable by uid $(id -u). Mount a writable folder: -v dspo-cache:$HOME"

if [ ! -e dvc.yaml ]; then
  warn "$PWD holds no dvc.yaml. Mount a clone of the repository: -v \"\$PWD\":/workspace"
elif ! problem=$(git rev-parse --git-dir 2>&1 >/dev/null); then
  case "$problem" in
    *"dubious ownership"*)
      fail "git does not trust $PWD, which belongs to uid $(stat -c %u .). Run with --user $(stat -c %u:%g .), or mount at /workspace." ;;
    *)
      fail "$PWD is no Git repository, and DVC needs one: $problem. Mount a clone, with its .git, not a bare copy." ;;
  esac
fi

if command -v nvidia-smi >/dev/null 2>&1; then
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || driver=
  case "$driver" in
    '') warn "nvidia-smi finds no driver. Check the host's driver and the NVIDIA container toolkit." ;;
    *) [ "${driver%%.*}" -ge 580 ] || warn "driver $driver is older than 580, which CUDA 13 needs: torch will not see the GPU." ;;
  esac
else
  warn "no GPU: everything runs on the CPU. The world 'shapes' is made for that; 'sdxl' needs --gpus all."
fi

if [ -e params.yaml ]; then
  missing=$(python - <<'PYTHON'
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from dspo.errors import UserError
from dspo.params import load_params

try:
    base = load_params(Path("params.yaml")).active.base
    if base.revision is None:
        if not Path(base.model).exists():
            print(f"{base.model}: the base model is not here. `git status` says whether the clone is whole.")
    elif not isinstance(try_to_load_from_cache(base.model, "model_index.json", revision=base.revision), str):
        print(f"{base.model} is not in the hub's cache and will be downloaded. Keep it: -v dspo-cache:/cache")
except UserError as error:
    print(error)
PYTHON
  ) || missing="the packages do not load; see above"
  [ -z "$missing" ] || warn "$missing"
fi

exec "$@"
