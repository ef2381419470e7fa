"""Newer debuggers and makedumpfile than this machine's Debian has, as trees of their own; drgn from PyPI.

A tool comes with its whole library closure, its own loader included, so it runs beside
any other Debian release: $LAB/tools/bin/<tool>-new starts it.
"""

import sys

import debian
from common import LAB, LabError, fresh_directory, is_current, read_json, run, say, step, write_json

TOOLS = LAB / "tools"
SUITE = "sid"
# What each program needs said to find its own data inside the tree.
ARGUMENTS = {
    "gdb": ["--data-directory={tree}/usr/share/gdb"],
    "qemu": ["-L", "{tree}/usr/share/qemu", "-L", "{tree}/usr/share/seabios"],
}
NAMES = ["makedumpfile", "gdb", "crash", "lldb", "qemu", "drgn"]
# Packages and programs that are called otherwise.
PACKAGES = {"qemu": ["qemu-system-x86", "seabios"]}
PROGRAMS = {"qemu": "qemu-system-x86_64"}
# Not from Debian: its wheel on PyPI has libkdumpfile inside.
DRGN_VERSION = "0.3.0"


def _find(tree, pattern, what):
    for path in sorted(tree.rglob(pattern)):
        if path.exists() and not path.is_dir():
            return path
    raise LabError(f"{what} is not in the unpacked packages", "report this: the packages' layout changed")


def _wrapper(name, tree):
    """A script that starts the tool with the tree's loader and libraries, and python's files there."""
    loader = _find(tree, "ld-linux-x86-64.so.2", "the dynamic loader").relative_to(tree)
    binary = _find(tree, f"bin/{PROGRAMS.get(name, name)}", name).relative_to(tree)
    library_directories = sorted(
        {
            str(path.parent.relative_to(tree))
            for path in tree.rglob("*.so.*")
            if "x86_64-linux-gnu" in str(path) or "/llvm-" in str(path)
        }
    )
    arguments = " ".join(f'"{word.format(tree="$tree")}"' for word in ARGUMENTS.get(name, []))
    libraries = ":".join(f"$tree/{directory}" for directory in library_directories)
    return f"""#!/bin/sh
# {name} of Debian {SUITE}, with that release's loader and libraries.
tree='{tree}'
export PYTHONHOME="$tree/usr" PYTHONDONTWRITEBYTECODE=1 QEMU_MODULE_DIR="$tree/usr/lib/x86_64-linux-gnu/qemu"
exec "$tree/{loader}" --library-path "{libraries}" "$tree/{binary}" {arguments} "$@"
"""


def unpack_tree(packages, work):
    """Unpacks .deb files into one tree, and removes them."""
    # One Debian for all paths: /lib and /lib64 are links into /usr.
    for link in ("bin", "lib", "lib64", "sbin"):
        (work / "usr" / link).mkdir(parents=True, exist_ok=True)
        (work / link).symlink_to(f"usr/{link}")
    script = 'dpkg-deb --fsys-tarfile "$1" | tar -x --keep-directory-symlink -C "$2"'
    for package in packages:
        run(["sh", "-c", script, "sh", package, work])
        package.unlink()


def drgn_directory():
    """What belongs on PYTHONPATH: wheels are for one version of Python."""
    return TOOLS / f"drgn-{DRGN_VERSION}-{sys.implementation.cache_tag}"


def _install_drgn():
    """Installs drgn for this very Python unless it is there; returns (wrapper, version)."""
    final = drgn_directory()
    wrapper = TOOLS / "bin/drgn-new"
    if not is_current(final, DRGN_VERSION):
        with step(f"tool drgn {DRGN_VERSION}"), fresh_directory(final, DRGN_VERSION) as work:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
            run(
                [*pip, "--only-binary=:all:", "--no-deps", "--target", work, f"drgn=={DRGN_VERSION}"],
                cure="it needs pip (Debian: python3-pip) and a package index that has drgn's wheel for this Python",
            )
    text = f"""#!/bin/sh
# drgn {DRGN_VERSION}
PYTHONPATH='{final}' exec '{sys.executable}' -m drgn "$@"
"""
    if not wrapper.exists() or wrapper.read_text(encoding="utf-8") != text:
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        wrapper.write_text(text, encoding="utf-8")
        wrapper.chmod(0o755)
        say(f"    {wrapper}")
    return wrapper, DRGN_VERSION


def install(name, refresh=False):
    """Unpacks a tool unless it is there; returns (wrapper, version)."""
    if name not in NAMES:
        raise LabError(f"no tool is called {name}", f"the tools are: {' '.join(NAMES)}")
    if name == "drgn":
        return _install_drgn()
    final = TOOLS / SUITE / name
    wrapper = TOOLS / "bin" / f"{name}-new"
    if not refresh and wrapper.exists() and (final / "tool.json").exists():
        return wrapper, read_json(final / "tool.json")["version"]
    with step(f"tool {name} of {SUITE}"):
        debian.update(force=refresh)
        package, *more = PACKAGES.get(name, [name])
        version, packages = debian.download_with_dependencies(package, SUITE, *more)
        with fresh_directory(final, version) as work:
            unpack_tree(packages, work)
            upstream = version.partition(":")[2] or version
            write_json(work / "tool.json", {"name": name, "version": upstream.partition("-")[0], "package": version})
        wrapper.parent.mkdir(parents=True, exist_ok=True)
        wrapper.write_text(_wrapper(name, final), encoding="utf-8")
        wrapper.chmod(0o755)
    say(f"    {wrapper}")
    return wrapper, read_json(final / "tool.json")["version"]
