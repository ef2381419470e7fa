"""Kernels that unwind without ORC: built small from Debian's source as the sample's is, panicked and dumped by QEMU.

They lie in $LAB/small/<name>, not among the sets: their guest says little of itself and plants little.
"""

import os
import re
import shutil

import sample
from common import (
    LAB,
    STAMP,
    LabError,
    fresh_directory,
    is_current,
    make_sparse,
    note_progress,
    read_json,
    recipe_hash,
    run,
    step,
    write_json,
)
from sets import panic_facts

SMALL = LAB / "small"
BUILD = LAB / "small-build"
SERIES = sample.SOURCE_PACKAGE.rpartition("-")[2]
# What each has in place of CONFIG_UNWINDER_ORC.
UNWINDERS = {f"qemu-fp-{SERIES}": "CONFIG_UNWINDER_FRAME_POINTER", f"qemu-guess-{SERIES}": "CONFIG_UNWINDER_GUESS"}
NAMES = list(UNWINDERS)
JOBS = 2
SCHEMA = 1


def _options(unwinder):
    """The sample's configuration with another unwinder."""
    lines = [line for line in sample.lines("config") if "CONFIG_UNWINDER_ORC" not in line]
    # The allocator's debugging keeps stacks, for which guesses are not good enough.
    guess = ["# CONFIG_SLUB_DEBUG is not set"] if unwinder.endswith("GUESS") else []
    return [*lines, "# CONFIG_UNWINDER_ORC is not set", f"{unwinder}=y", *guess]


def _stamp(unwinder):
    return recipe_hash(SCHEMA, *_options(unwinder), sample.RECIPE / "init.c", sample.COMMAND_LINE)


def build_kernel(name, unwinder):
    """Builds vmlinux and bzImage outside the source; returns (directory, package version)."""
    stamp = _stamp(unwinder)
    source, version = sample.fetch_source(BUILD)
    build = BUILD / name
    if is_current(build, stamp) and (build / "vmlinux").exists():
        return build, version
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    environment = os.environ | {
        "KBUILD_BUILD_USER": "kstub",
        "KBUILD_BUILD_HOST": "kstub",
        "KBUILD_BUILD_TIMESTAMP": sample.TIMESTAMP,
        "LC_ALL": "C",
    }
    make = ["make", f"O={build}"]
    options = _options(unwinder)
    fragment = build / "kstub.config"
    fragment.write_text("".join(f"{line}\n" for line in options), encoding="utf-8")
    with step(f"kernel of {name}"):
        run([*make, "-s", "tinyconfig"], cwd=source, env=environment)
        merge = [source / "scripts/kconfig/merge_config.sh", "-m", "-O", build, build / ".config", fragment]
        run(merge, cwd=build, env=environment)
        run([*make, "-s", "olddefconfig"], cwd=source, env=environment)
        got = (build / ".config").read_text(encoding="utf-8").splitlines()
        # "Is not set" is as good as not being there at all.
        missing = [line for line in options if line not in got and not line.startswith("#")]
        if missing:
            raise LabError(f"not in the kernel's configuration: {' '.join(missing)}", "see what they depend on (Kconfig)")
        run([*make, f"-j{JOBS}", "vmlinux", "bzImage"], cwd=source, env=environment)
    (build / STAMP).write_text(stamp, encoding="utf-8")
    return build, version


def make(name):
    """Builds a kernel and makes its dump unless both are there."""
    if name not in UNWINDERS:
        raise LabError(f"no small kernel is called {name}", f"there are: {' '.join(NAMES)}")
    unwinder = UNWINDERS[name]
    stamp = _stamp(unwinder)
    final = SMALL / name
    if is_current(final, stamp):
        return
    build, version = build_kernel(name, unwinder)
    with step(f"set {name}"), fresh_directory(final, stamp, keep_failed=True) as work:
        console = sample.panic_and_dump(build, work)
        make_sparse(work / "dump.elf")
        shutil.copy(build / "vmlinux", work / "vmlinux")
        shutil.copy(build / ".config", work / "config")
        write_json(
            work / "set.json",
            {
                "schema": SCHEMA,
                "name": name,
                "kind": "qemu-small",
                "unwinder": unwinder,
                "release": re.search(r"Linux version (\S+)", console)[1],
                "package_version": version,
                "vmlinux": f"small/{name}/vmlinux",
                "cmdline": sample.COMMAND_LINE,
                "smp": 2,
                "dumps": [
                    {
                        "file": "dump.elf",
                        "maker": "qemu",
                        "format": "elf",
                        "compression": None,
                        "flattened": False,
                        "filter_level": None,
                        "paging": False,
                        "vmcoreinfo": True,
                        "complete": True,
                    }
                ],
                "panic": panic_facts(console),
                "truth": {"registers": "registers.txt", "console": "console.log"},
            },
        )
    note_progress(f"small kernel {name}")


def listing():
    """(name, manifest) of each that is complete."""
    return [
        (path.parent.name, read_json(path))
        for path in sorted(SMALL.glob("[!.]*/set.json"))
        if (path.parent / STAMP).exists()
    ]
