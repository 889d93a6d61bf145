# packages.sh: Debian packages that a script needs.  To be sourced.

# What the program needs to be built and run.
selectra_packages=(build-essential cmake ninja-build pkg-config openmpi-bin libopenmpi-dev libdnnl-dev
                   libopenblas-openmp-dev libyaml-dev libsentencepiece-dev libjansson-dev zlib1g-dev)

# Installs those of the packages named that are missing, as root or by sudo.  Without either (or without apt) it says
# which are missing and goes on: libraries may lie in prefixes of your own (CMAKE_PREFIX_PATH), tools on PATH.
need_packages() {
    local missing=() p sudo=()
    for p in "$@"; do
        dpkg-query -W -f='${Status}\n' "$p" 2>/dev/null | grep -q 'ok installed' || missing+=("$p")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    if ! command -v apt-get >/dev/null; then
        echo "no apt-get here; taking from PATH and CMAKE_PREFIX_PATH what Debian has as: ${missing[*]}" >&2
        return 0
    fi
    if [ "$(id -u)" -ne 0 ]; then
        if ! command -v sudo >/dev/null; then
            echo "neither root nor sudo; taking from PATH and CMAKE_PREFIX_PATH what these packages hold: ${missing[*]}" >&2
            return 0
        fi
        sudo=(sudo)
    fi
    echo "installing ${missing[*]}"
    if ! { "${sudo[@]}" apt-get update -qq &&
           "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
               -o Dpkg::Use-Pty=0 "${missing[@]}" >/dev/null; }; then
        echo "apt-get could not install: ${missing[*]}" >&2
        return 1
    fi
}
