# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: makes the virtual environment .venv beside the repository's
# files, once, installs raymaml into it, and puts it on PATH.
#
#   PYTHON         the interpreter to use (default python3; any version that Ray supports)
#   RAYMAML_VENV   where the environment lies (default .venv)
#   RAYMAML_TORCH  what to install as torch and torchvision, a matching pair, in pip's words, such as
#                  "torch torchvision --index-url https://download.pytorch.org/whl/cpu"
#   RAYMAML_RAY    the release of Ray to install, one of the range in setup.cfg (default: the newest)

PYTHON=${PYTHON:-python3}
RAYMAML_VENV=${RAYMAML_VENV:-.venv}
if [ -z "${RAYMAML_TORCH:-}" ]; then
    case "$(uname -m)" in
        aarch64 | arm64) RAYMAML_TORCH="torch==2.9.1 torchvision==0.24.1" ;;
        *) RAYMAML_TORCH="torch==2.14.1 torchvision==0.29.1" ;;
    esac
fi

raymaml_install() { # $1: "" or extras such as "[test]"
    "$PYTHON" -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10, 12) or (3, 11) <= v < (3, 11, 4))' || {
        echo "launch: $PYTHON is older than Python 3.10.12 or 3.11.4; set PYTHON to a newer one" >&2
        exit 2
    }
    [ -x "$RAYMAML_VENV/bin/python" ] || "$PYTHON" -m venv "$RAYMAML_VENV"
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if ! "$RAYMAML_VENV/bin/python" -c 'import torch, torchvision' 2>/dev/null; then
        # shellcheck disable=SC2086  # several words on purpose
        "$RAYMAML_VENV/bin/pip" install --quiet $RAYMAML_TORCH
    fi
    "$RAYMAML_VENV/bin/pip" install --quiet ".$1" ${RAYMAML_RAY:+"ray==$RAYMAML_RAY"}
    PATH="$(cd "$RAYMAML_VENV" && pwd)/bin:$PATH"
}
