#!/bin/sh
# Say what the pipeline will miss here, and the command that gives it, before work starts; all of it goes to stderr.
# Then the command runs as it was given. Only what makes every command fail ends the container (exit code 2).
set -eu
OLDEST_DRIVER=580 # torch's wheels bring CUDA 13.0

warn() { printf 'warning: %s\n  -> %s\n' "$1" "$2" >&2; } # what is missing, what mends it
fail() { printf 'error: %s\n  -> %s\n' "$1" "$2" >&2; exit 2; }

check_folder() { # what mends it if it is not there, the folder
  if [ ! -w "$2" ]; then
    owner=$(stat -c %u "$2" 2>/dev/null) || owner=nobody
    case "$owner" in
      nobody) fail "$2 is not there." "$1" ;;
      0 | "$(id -u)") fail "$2 is not writable by uid $(id -u)." "$1" ;;
      *) fail "$2 is not writable by uid $(id -u): it belongs to uid $owner." "docker run --user $(stat -c %u:%g "$2") …" ;;
    esac
  fi
}

check_clone() {
  if [ ! -e dvc.yaml ]; then
    warn "$PWD holds no dvc.yaml." "in a clone of the repository: docker run -v \"\$PWD\":/workspace …"
  elif ! problem=$(git rev-parse --git-dir 2>&1 >/dev/null); then
    case "$problem" in
      *"dubious ownership"*)
        fail "Git does not trust $PWD: \"dubious ownership\". It belongs to uid $(stat -c %u .), this is uid $(id -u)." \
          "docker run --user $(stat -c %u:%g .) …   or mount it at /workspace, which Git trusts here" ;;
      *)
        fail "$PWD is no Git repository, and DVC needs one ($(printf '%s\n' "$problem" | head -n 1))." \
          "mount a whole clone, with its .git: docker run -v \"\$PWD\":/workspace …" ;;
    esac
  fi
}

check_locks() {
  # DVC asks whether the process that it names there is alive, and in every container there is one of that number.
  if grep -qs '"pid"' .dvc/tmp/rwlock; then
    warn "a run of DVC in this folder goes on elsewhere, or was killed: .dvc/tmp/rwlock holds its locks." \
      "if none goes on: rm .dvc/tmp/rwlock"
  fi
}

check_gpu() {
  if ! command -v nvidia-smi >/dev/null 2>&1; then
    warn "no GPU in this container: all runs on the CPU, for which the world 'shapes' is made and 'sdxl' is not." \
      "docker run --gpus all …   (the host needs a driver and the NVIDIA container toolkit)"
    return
  fi
  said=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>&1) || said="fails: $said"
  driver=$(printf '%s\n' "$said" | head -n 1)
  case "${driver%%.*}" in
    '' | *[!0-9]*)
      warn "the GPU's driver does not answer: nvidia-smi $driver" \
        "on the host: nvidia-smi   If that works: sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker" ;;
    *)
      [ "${driver%%.*}" -ge "$OLDEST_DRIVER" ] || warn \
        "the host's driver $driver is older than $OLDEST_DRIVER, which CUDA 13 needs: torch will not see the GPU." \
        "on the host, for example: sudo apt install nvidia-driver-$OLDEST_DRIVER && sudo reboot" ;;
  esac
}

check_base_model() {
  [ -e params.yaml ] || return 0
  python - >&2 <<'PYTHON' || warn "the packages do not load; see above." "docker build --no-cache --tag dspo ."
from pathlib import Path

from dspo.diffusion.files import missing
from dspo.errors import UserError
from dspo.params import load_params

try:
    base = load_params(Path("params.yaml")).active.base
    for one in missing(base):
        hub = "docker run --rm -v dspo-cache:/cache dspo " if one.remedy.startswith("hf ") else ""
        print(f"warning: the base model is not whole: {one.what}\n  -> {hub}{one.remedy}")
except UserError as error:
    print(f"warning: {error}\n  -> correct params.yaml")
PYTHON
}

check_folder "mount it without :ro, and owned by you: sudo chown -R \"\$(id -u):\$(id -g)\" ." "$PWD"
check_folder "docker run -v dspo-cache:$HOME …" "$HOME"
check_folder "docker run --tmpfs /tmp …" /tmp
check_clone
check_locks
check_gpu
check_base_model
# With no network (--network none) the hub's client would ask again and again before it looks into its cache. The routes
# tell it, not the interfaces: some hosts put idle tunnels beside `lo`.
cat /proc/net/route /proc/net/ipv6_route 2>/dev/null | grep -Eqv '^Iface|[[:space:]]lo$' || export HF_HUB_OFFLINE=1
exec "$@"
