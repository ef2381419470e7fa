"""The lab's own kernel modules (qemu/modules), built for a Debian kernel from its headers package.

The compiler, make and pahole come as a tree of their own, like the lab's newer tools: headers of a newer Debian
want its compiler, and their programs (modpost, objtool, resolve_btfids) want its C library.
"""

import os
import re
import shutil

import debian
import kernels
import tools
from common import CHECKOUT, LAB, LabError, fresh_directory, is_current, recipe_hash, run, step

SOURCES = CHECKOUT / "qemu/modules"
HEADERS = LAB / "headers"
BUILD = "kstub"  # below lib/modules/<release>
# Kernels of these suites are built with gcc 14 at the latest, and their programs need no newer C library.
STABLE = re.compile(r"(bullseye|bookworm|trixie)(-|$)")
STABLE_COMPILER = ("trixie", "gcc-14")
NEWEST_SUITE = "sid"


def names(sources=SOURCES):
    return [source.stem for source in sorted(sources.glob("*.c"))]


def recipe(sources=SOURCES):
    """The hash of the sources."""
    return recipe_hash(*sorted(sources.glob("*.c")))


def _stanza(package, version=None):
    """What the lists say of a package: of one version, or of the newest."""
    found = [stanza for stanza in debian.show([package]) if version in (None, stanza["Version"])]
    if not found:
        raise LabError(f"the lists have no {package} {version or ''}", "run with --refresh for new package lists")
    return max(found, key=lambda stanza: debian.version_key(stanza["Version"]))


def _compiler(suite, depends):
    """(suite, package) of a compiler that knows every option the kernel was configured with."""
    if STABLE.match(suite):
        return STABLE_COMPILER
    wanted = re.search(r"gcc-(\d+)", depends)
    return NEWEST_SUITE, f"gcc-{wanted[1]}" if wanted else "gcc"


def _make_run_anywhere(directory, toolchain):
    """Points programs at the toolchain's own loader and libraries."""
    loader = toolchain / "usr/lib64/ld-linux-x86-64.so.2"
    libraries = toolchain / "usr/lib/x86_64-linux-gnu"
    for path in directory.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        with open(path, "rb") as file:
            start = file.read(4096)
        if start.startswith(b"\x7fELF") and b"/ld-linux-x86-64.so.2\0" in start:
            path.chmod(0o755)
            run(["patchelf", "--set-interpreter", loader, "--force-rpath", "--set-rpath", libraries, path])


def _toolchain(suite, compiler):
    """gcc, binutils, make and pahole of a suite, in a tree; returns (directory, compiler's name)."""
    final = LAB / "tools" / suite / f"build-{compiler}"
    stamp = recipe_hash(suite, compiler, 1)
    if not is_current(final, stamp):
        with step(f"{compiler} of {suite}"):
            debian.update()
            _, packages = debian.download_with_dependencies(compiler, suite, "make", "pahole")
            with fresh_directory(final, stamp) as work:
                tools.unpack_tree(packages, work)
                # To the final place: the tree is moved there when it is whole.
                _make_run_anywhere(work, final)
    return final, compiler


def _headers(release, version, suite):
    """The headers and kbuild's programs; returns (directory, (suite, compiler))."""
    stanza = _stanza(f"linux-headers-{release}", version)
    depends = stanza["Depends"]
    toolchain = _compiler(suite, depends)
    final = HEADERS / release
    stamp = recipe_hash(version, *toolchain, 1)
    if not is_current(final, stamp):
        common = re.search(r"linux-headers-\S+-common", depends)[0]
        kbuild = re.search(r"linux-kbuild-[^\s,]+", depends)[0]
        packages = [(stanza["Package"], version), (common, version), (kbuild, _stanza(kbuild)["Version"])]
        with step(f"headers of {release}"), fresh_directory(final, stamp) as work:
            for file in debian.download_all(packages, work):
                run(["dpkg-deb", "-x", file, work])
                file.unlink()
            _make_run_anywhere(work / "usr/lib", _toolchain(*toolchain)[0])
            for makefile in (work / "usr/src").glob("linux-headers-*/Makefile"):
                text = makefile.read_text(encoding="utf-8")
                makefile.write_text(text.replace("/usr/src/", f"{final}/usr/src/"), encoding="utf-8")
    return final / "usr/src" / f"linux-headers-{release}", toolchain


def _compile(kernel, release, sources, headers, toolchain, work):
    """Runs kbuild in `work`."""
    tree, compiler = _toolchain(*toolchain)
    for source in sources.glob("*.c"):
        shutil.copy(source, work)
    objects = " ".join(f"{name}.o" for name in names(sources))
    (work / "Makefile").write_text(f"obj-m := {objects}\n", encoding="utf-8")
    # What kbuild makes a module's BTF on top of; without it there is none (newer headers bring it).
    base = headers / "vmlinux"
    if not base.exists():
        base.symlink_to(kernel / "vmlinux")
    # Does nothing to a module without lists of BTF ids; older headers come without it.
    resolve = headers / "tools/bpf/resolve_btfids/resolve_btfids"
    if not resolve.exists():
        resolve.parent.mkdir(parents=True)
        resolve.symlink_to("/bin/true")
    environment = {
        "PATH": f"{tree}/usr/bin:{os.environ['PATH']}",
        "LC_ALL": "C",
        "HOME": os.environ.get("HOME", "/"),
    }
    run(
        [
            tree / "usr/bin/make",
            "-C",
            headers,
            f"M={work}",
            f"CC=x86_64-linux-gnu-{compiler}",
            f"KCFLAGS=-g -Wno-error -ffile-prefix-map={work}/={sources.relative_to(CHECKOUT)}/",
            f"KERNELRELEASE={release}",
            "modules",
        ],
        env=environment,
    )


def _build(kernel, sources, target):
    """Leaves each module's .ko and .ko.debug in `target`."""
    facts = kernels.info(kernel)
    release, version = facts["release"], facts["package_version"]
    debian.update()
    headers, toolchain = _headers(release, version, facts["suite"])
    scratch = HEADERS / f"{release}.build"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _compile(kernel, release, sources, headers, toolchain, scratch)
    for name in names(sources):
        built = scratch / f"{name}.ko"
        run(["objcopy", "--only-keep-debug", built, target / f"{name}.ko.debug"])
        run(["objcopy", "--strip-debug", built, target / f"{name}.ko"])
    shutil.rmtree(scratch)


def build(kernel):
    """Builds the modules and puts them among the kernel's others unless they are there; returns what was built.

    Beside each .ko is its .ko.debug. A kernel whose configuration knows of modules' BTF (since 5.11) gets it.
    """
    facts = kernels.info(kernel)
    release = facts["release"]
    final = kernel / "lib/modules" / release / BUILD
    stamp = recipe_hash(recipe(), facts["package_version"], 1)
    if not is_current(final, stamp):
        with step(f"modules for {release}"), fresh_directory(final, stamp) as work:
            _build(kernel, SOURCES, work)
    return names()


def build_others(kernel, sources, target):
    """Builds the modules of another directory into `target`, and all of them every time."""
    _build(kernel, sources, target)
    return names(sources)
