# Sourced by the other scripts. It sets $root, the repository, and $python, the interpreter of its .venv;
# `prepare_environment [EXTRA]` makes that environment, or returns at once where nothing has changed since.
# $PYTHON names the interpreter to make it with; without it, python3.

root="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"

prepare_environment() {
    local extra="${1:-}" base="${PYTHON:-python3}" stamp="$root/.venv/popmtl-stamp" hash torch
    hash="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
    if [[ -x $python && -f $stamp ]]; then
        local made with
        { IFS= read -r made && IFS= read -r with; } <"$stamp" || true
        # With an extra, it serves those who ask for none.
        if [[ ${made:-} == "$hash" && (-z $extra || ${with:-} == "$extra") ]]; then
            return
        fi
    fi

    if ! "$python" -m pip --version >/dev/null 2>&1; then
        if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "PopMTL needs Python 3.10 or newer, and $base is none: name one, as in PYTHON=python3.12 $0" >&2
            exit 2
        fi
        "$base" -m venv --clear "$root/.venv"
    fi
    echo "Installing PopMTL into $root/.venv; the first time it takes some minutes, most of them for torch" >&2
    # Without the stamp, an install that is cut short is done again.
    rm -f -- "$stamp"
    local pip=("$python" -m pip install --quiet --disable-pip-version-check)
    # torch first and pinned: a build of it that lies on this machine, such as one for CPUs, is then taken.
    torch="$(grep '^torch==' "$root/constraints.txt")"
    "${pip[@]}" "$torch"
    "${pip[@]}" --constraint "$root/constraints.txt" --editable "$root${extra:+[$extra]}"
    printf '%s\n%s\n' "$hash" "$extra" >"$stamp"
}
