"""The guest's initramfs: busybox, the lab's init and programs, a kernel's modules."""

import shutil
import subprocess

import kernels
import modules
from common import CHECKOUT, LAB, LabError, fresh_directory, is_current, recipe_hash, run, step

QEMU_SOURCES = CHECKOUT / "qemu"
PROGRAMS = sorted((QEMU_SOURCES / "programs").glob("*.c"))
BUSYBOX = "/bin/busybox"
CC_FLAGS = ["-O1", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Wno-format-truncation", "-static", "-pthread"]


def _sources():
    return [QEMU_SOURCES / "init", *sorted((QEMU_SOURCES / "programs").iterdir())]


def recipe():
    """The hash of all that decides what the guest does."""
    return recipe_hash(*_sources(), *CC_FLAGS, *kernels.MODULES, modules.recipe())


def pack(tree, archive):
    """cpio in the kernel's format. Not compressed: unpacking is slow where the CPU is emulated."""
    with open(archive, "wb") as out, subprocess.Popen(["find", "."], cwd=tree, stdout=subprocess.PIPE) as names:
        packed = subprocess.run(
            ["cpio", "--quiet", "-o", "-H", "newc", "-R", "0:0"], cwd=tree, stdin=names.stdout, stdout=out, check=False
        )
    if packed.returncode != 0:
        raise LabError("cpio could not pack the initramfs", "run: scripts/lab packages; is the disk full?")


def _build_tree(kernel, tree):
    (tree / "bin").mkdir(parents=True)
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    shutil.copy(QEMU_SOURCES / "init", tree / "init")
    for source in PROGRAMS:
        run(["gcc", *CC_FLAGS, "-o", tree / "bin" / source.stem, source])
    for path in (kernel / "lib").rglob("*"):
        if path.is_file() and path.suffix != ".debug":
            target = tree / path.relative_to(kernel)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def _build_kexec_part(kernel, base, tree):
    """What kexec-load reads: the kernel, and the base initramfs as a file."""
    (tree / "boot").mkdir(parents=True)
    shutil.copy(kernel / "vmlinuz", tree / "boot/vmlinuz")
    shutil.copy(base, tree / "boot/initrd")


def crowd_recipe():
    """The hash of what the guest with many tasks has besides."""
    return recipe_hash(*sorted((QEMU_SOURCES / "crowd").iterdir()))


def build_crowd(kernel):
    """The initramfs of the guest with many tasks, as a file: everyone's, and behind it /crowd."""
    base = build(kernel) / "base.cpio"
    final = LAB / "initramfs" / f"{kernel.name}-crowd"
    stamp = recipe() + crowd_recipe() + (kernel / "kernel.json").read_text(encoding="utf-8")
    if not is_current(final, stamp):
        with step(f"initramfs with a crowd for {kernel.name}"), fresh_directory(final, stamp) as work:
            own = work / "tree/crowd"
            own.mkdir(parents=True)
            shutil.copy(QEMU_SOURCES / "crowd/init", own / "init")
            for source in (QEMU_SOURCES / "crowd").glob("*.c"):
                run(["gcc", *CC_FLAGS, "-o", own / source.stem, source])
            pack(work / "tree", work / "part.cpio")
            with open(work / "crowd.cpio", "wb") as out:
                for part in (base, work / "part.cpio"):
                    with open(part, "rb") as source:
                        shutil.copyfileobj(source, out)
    return final / "crowd.cpio"


def build(kernel):
    """Builds both images of a kernel; returns the directory.

    `base.cpio` boots the guest; `kexec.cpio` is the same with a kernel and an initramfs
    inside for the guest to load (the kernel unpacks concatenated archives).
    """
    modules.build(kernel)
    final = LAB / "initramfs" / kernel.name
    stamp = recipe() + (kernel / "kernel.json").read_text(encoding="utf-8")
    if is_current(final, stamp):
        return final
    with step(f"initramfs for {kernel.name}"), fresh_directory(final, stamp) as work:
        _build_tree(kernel, work / "base")
        pack(work / "base", work / "base.cpio")
        _build_kexec_part(kernel, work / "base.cpio", work / "kexec")
        pack(work / "kexec", work / "kexec-part.cpio")
        with open(work / "kexec.cpio", "wb") as out:
            for part in ("base.cpio", "kexec-part.cpio"):
                with open(work / part, "rb") as source:
                    shutil.copyfileobj(source, out)
        (work / "kexec-part.cpio").unlink()
        shutil.rmtree(work / "kexec")
        (work / "base").rename(work / "tree")
    return final
