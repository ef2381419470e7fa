"""Kernels with what Debian's have not: built small from its source as the sample's is, panicked and dumped by QEMU.

Two unwind without ORC, and two have page_owner: stacks are kept in another form since v6.9 or so.

They lie in $LAB/small/<name>, not among the sets: their guest says little of itself and plants little.
"""

import os
import re
import shutil

import sample
from common import (
    CHECKOUT,
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
OWNERS = [f"qemu-owner-{SERIES}", "qemu-owner-6.12"]
OWNER_INIT = CHECKOUT / "qemu/small/page-owner.c"
NAMES = [*UNWINDERS, *OWNERS]
JOBS = 2
SCHEMA = 1


def _options(name):
    """The sample's configuration with another unwinder, or with page_owner."""
    if name in OWNERS:
        return [*sample.lines("config"), "CONFIG_PAGE_OWNER=y"]
    unwinder = UNWINDERS[name]
    lines = [line for line in sample.lines("config") if "CONFIG_UNWINDER_ORC" not in line]
    # The allocator's debugging keeps stacks, for which guesses are not good enough.
    guess = ["# CONFIG_SLUB_DEBUG is not set"] if unwinder.endswith("GUESS") else []
    return [*lines, "# CONFIG_UNWINDER_ORC is not set", f"{unwinder}=y", *guess]


def _programs(name):
    """What the initramfs has."""
    init = sample.RECIPE / "init.c"
    return {"init": OWNER_INIT, "sample": init} if name in OWNERS else {"init": init}


def _command_line(name):
    return f"{sample.COMMAND_LINE} page_owner=on" if name in OWNERS else sample.COMMAND_LINE


def _stamp(name):
    return recipe_hash(SCHEMA, *_options(name), *_programs(name).values(), _command_line(name))


def _owner_facts(console, work):
    """What the guest said of its pages: the kernel's records, and frames that were freed."""
    text = console.replace("\r", "")
    records = re.findall(r"^KSTUB-OWNER\n(.*?)^KSTUB-END$", text, re.MULTILINE | re.DOTALL)
    # The log goes to the same console, also into the middle of a line.
    records = [record for record in records if not re.search(r"\[ *\d+\.\d{6}\]", record)]
    freed = re.findall(r"^KSTUB-FREED (\d+)$", text, re.MULTILINE)
    if not records or not freed:
        raise LabError("the guest has not said who owns its pages", "see console.log")
    (work / "page_owner.txt").write_text("".join(records), encoding="utf-8")
    (work / "freed.txt").write_text("".join(f"{pfn}\n" for pfn in freed), encoding="utf-8")


def build_kernel(name):
    """Builds vmlinux and bzImage outside the source; returns (directory, package version)."""
    stamp = recipe_hash(SCHEMA, *_options(name))
    package = f"linux-source-{name.rpartition('-')[2]}"
    source, version = sample.fetch_source(BUILD / package, name=package)
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
    options = _options(name)
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
    if name not in NAMES:
        raise LabError(f"no small kernel is called {name}", f"there are: {' '.join(NAMES)}")
    stamp = _stamp(name)
    final = SMALL / name
    if is_current(final, stamp):
        return
    build, version = build_kernel(name)
    with step(f"set {name}"), fresh_directory(final, stamp, keep_failed=True) as work:
        console = sample.panic_and_dump(build, work, _programs(name), _command_line(name))
        truth = {"registers": "registers.txt", "console": "console.log"}
        if name in OWNERS:
            _owner_facts(console, work)
            truth |= {"page_owner": "page_owner.txt", "freed": "freed.txt"}
        make_sparse(work / "dump.elf")
        shutil.copy(build / "vmlinux", work / "vmlinux")
        shutil.copy(build / ".config", work / "config")
        write_json(
            work / "set.json",
            {
                "schema": SCHEMA,
                "name": name,
                "kind": "qemu-small",
                "unwinder": UNWINDERS.get(name, "CONFIG_UNWINDER_ORC"),
                "release": re.search(r"Linux version (\S+)", console)[1],
                "package_version": version,
                "vmlinux": f"small/{name}/vmlinux",
                "cmdline": _command_line(name),
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
                "truth": truth,
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
