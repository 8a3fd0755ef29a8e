# SPDX-License-Identifier: GPL-2.0-or-later
# What the tools share; sourced, not run. Expects $tool, the name that messages begin with.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$here/.venv # whose commands are ours

say() { printf '%s: %s\n' "$tool" "$*" >&2; }
die() { say "$*"; exit 1; }

# Can we be root, and how? Sets may_be_root and sudo. A password is asked for only where somebody sits
# who may give one.
find_root() {
    sudo=() may_be_root=yes
    [ "$(id -u)" -ne 0 ] || return 0
    sudo=(sudo)
    command -v sudo >/dev/null || { sudo=() may_be_root=; return 0; }
    sudo -n true 2>/dev/null && return 0
    if [ -t 0 ] && [ -t 2 ] && id -nG | tr ' ' '\n' | grep -qxE 'sudo|wheel|admin'; then return 0; fi
    sudo=() may_be_root=
}

# MiB that may be used: what the machine has available, or less where a control group says so.
available_mib() {
    local host limit=0 used=0 mine=/sys/fs/cgroup/memory.max
    host=$(awk '/^MemAvailable/ {print int($2 / 1024)}' /proc/meminfo)
    if [ -r "$mine" ] && read -r limit <"$mine" && [ "$limit" != max ]; then
        read -r used <"${mine%max}current"
        limit=$(((limit - used) >> 20))
        [ "$limit" -ge "$host" ] || host=$limit
    fi
    echo "$host"
}

helpers=(mount.pkramfs mount.fuse.pkramfs)

# Do both names in /sbin lead to our helper?
helpers_are_ours() {
    local name
    for name in "${helpers[@]}"; do
        [ "$(readlink -f "/sbin/$name" || true)" = "$venv/bin/mount.pkramfs" ] || return 1
    done
}

# In a mount namespace of our own, as root: have mount(8) find our helper, whatever the machine's /sbin
# says. A copy (some MiB, on a tmpfs) takes its place, because the names may not exist there yet.
bind_helpers() {
    local copy name
    ! helpers_are_ours || return 0
    copy=$(mktemp -d)
    mount -t tmpfs -o mode=755 pkramfs-sbin "$copy"
    cp -a /sbin/. "$copy"
    for name in "${helpers[@]}"; do ln -sfn "$venv/bin/mount.pkramfs" "$copy/$name"; done
    mount --bind "$copy" /sbin/
    umount "$copy"
    rmdir "$copy"
}
