# SPDX-License-Identifier: GPL-2.0-or-later
"""A .deb as its user meets it: in a fresh chroot it is installed, walked through, and purged without a trace."""

import shutil
from pathlib import Path

from releasing.chroots import Chroot

_WALK = """\
list() { find / -xdev -path /var/lib/dpkg -prune -o -path /var/lib/apt -prune -o -path /var/cache -prune \\
    -o -path /var/log -prune -o -path /root -prune -o -print | sort; }
show() { printf '# %s\\n' "$*"; "$@"; }
apt-get -qq update
wanted=$(dpkg-deb -f /root/*.deb Depends)
apt-get -qq -o Dpkg::Use-Pty=0 satisfy -y --no-install-recommends "$wanted" >/run/said 2>&1 || cat /run/said
list >/run/before
show dpkg -i /root/*.deb
show dpkg -L pkramfs | grep -v -e /dist-packages/ | while read -r path; do [ -d "$path" ] || echo "$path"; done
show pkramctl install || [ $? -eq 8 ]
show pkramctl doctor
show sh /root/seven-steps
show dpkg --purge pkramfs
list >/run/after
if ! diff /run/before /run/after; then echo "these files are left after the purge"; exit 1; fi
echo "nothing is left"
"""
_LINTIAN = 'cd /root/lintian; lintian --allow-root --display-info --pedantic --fail-on error "$@"'


def walk(deb: Path, system: Chroot) -> None:
    """Install, use and purge a .deb in a fresh system; BuildError says which step failed."""
    shutil.copy(deb, system.root / "root")
    shutil.copy(Path(__file__).parents[1] / "debian/tests/seven-steps", system.root / "root")
    system.run(_WALK, shown=True)


def lintian(files: list[Path], system: Chroot) -> str:
    """Return what Debian's checker has to say of a source package and its .deb; BuildError if it finds errors."""
    place = system.root / "root/lintian"
    place.mkdir()
    for path in files:
        shutil.copy(path, place)
    return system.run(_LINTIAN, *(path.name for path in files if path.suffix in (".dsc", ".deb")))
