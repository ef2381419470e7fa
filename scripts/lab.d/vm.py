"""What tests boot to look at it while it runs: a small initramfs (qemu/live) for each kernel.

It lies in $LAB/vm/<series>/: initramfs.cpio; debug/, for `kstub --debug-dir`, with the guest's own modules; vm.json,
which says where the kernel and its vmlinux are. tests/support/live.rs starts QEMU on them.
"""

import shutil

import initramfs
import kernels
import modules
from common import LAB, fresh_directory, is_current, read_json, recipe_hash, run, step, write_json

VM = LAB / "vm"
SOURCES = initramfs.QEMU_SOURCES / "live"
MODULES = SOURCES / "modules"
# Of the other guests' programs, those that are of use here.
PLANTING = ["spin-user", "spin-kernel", "threads", "memory"]
# Of the kernel's own modules, some to load while a debugger looks.
KERNEL_MODULES = ["dummy", "brd"]
SERIES = ["6.1", "6.12"]
SCHEMA = 2


def _programs():
    """(source, path in the guest)"""
    own = [source for source in sorted(SOURCES.glob("*.c")) if source.stem != "init"]
    planting = [initramfs.QEMU_SOURCES / "programs" / f"{name}.c" for name in PLANTING]
    return [(SOURCES / "init.c", "init"), *((source, f"bin/{source.stem}") for source in own + planting)]


def _stamp(kernel):
    sources = [source for source, _ in _programs()]
    header = initramfs.QEMU_SOURCES / "programs/planted.h"
    recipe = [*sources, header, *initramfs.CC_FLAGS, *KERNEL_MODULES, modules.recipe(MODULES)]
    return recipe_hash(SCHEMA, *recipe, kernel / "kernel.json")


def _fill(kernel, own, tree):
    (tree / "bin").mkdir(parents=True)
    (tree / "modules").mkdir()
    # The kernel opens it for the first process before that has made its own /dev.
    for name in ("dev", "proc", "sys", "run"):
        (tree / name).mkdir()
    for source, target in _programs():
        programs = initramfs.QEMU_SOURCES / "programs"
        run(["gcc", *initramfs.CC_FLAGS, "-I", programs, "-o", tree / target, source])
    for name in KERNEL_MODULES:
        shutil.copy(next((kernel / "lib").rglob(f"{name}.ko")), tree / "modules")
    for module in own.glob("*.ko"):
        shutil.copy(module, tree / "modules")


def make(series):
    """Makes what a series' guest needs unless it is there."""
    kernel = kernels.fetch(series)
    final = VM / series
    stamp = _stamp(kernel)
    if is_current(final, stamp):
        return
    release = kernels.info(kernel)["release"]
    with step(f"live guest of {release}"), fresh_directory(final, stamp) as work:
        own = work / "debug/lib/modules" / release
        own.mkdir(parents=True)
        modules.build_others(kernel, MODULES, own)
        _fill(kernel, own, work / "tree")
        initramfs.pack(work / "tree", work / "initramfs.cpio")
        shutil.rmtree(work / "tree")
        write_json(
            work / "vm.json",
            {
                "schema": SCHEMA,
                "kernel": series,
                "release": release,
                "vmlinuz": f"kernels/{release}/vmlinuz",
                "vmlinux": f"kernels/{release}/vmlinux",
                "initramfs": f"vm/{series}/initramfs.cpio",
                "debug_dir": f"vm/{series}/debug",
            },
        )


def listing():
    """(series, manifest) of each that is there."""
    return [(path.parent.name, read_json(path)) for path in sorted(VM.glob("[!.]*/vm.json"))]
