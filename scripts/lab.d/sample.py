"""The committed sample (tests/data/sample): a small kernel built from Debian's source, panicked, dumped, shrunk.

What is particular to it lies in qemu/sample; tests/data/sample/README.md says what came out.
"""

import gzip
import os
import re
import shutil
import struct
import subprocess
import time

import debian
import tools
from common import (
    CHECKOUT,
    LAB,
    LabError,
    fresh_directory,
    is_current,
    read_json,
    recipe_hash,
    run,
    say,
    step,
    write_json,
)
from machine import Machine

PACKAGES = ["bc", "bison", "build-essential", "dwarves", "dwz", "flex", "libelf-dev", "libssl-dev", "rsync"]
SOURCE_PACKAGE = "linux-source-6.1"
RECIPE = CHECKOUT / "qemu/sample"
OUTPUT = CHECKOUT / "tests/data/sample"
WORK = LAB / "sample"
JOBS = 2
MEMORY = "64M"
# Each CPU a socket of its own: SeaBIOS's MP table, which a kernel without ACPI reads, has one entry for a socket.
CPUS = "2,sockets=2"
COMMAND_LINE = "console=ttyS0 ignore_loglevel panic=0 qemu_fw_cfg.ioport=12@0x510:0:1:4"
BOOT_TIMEOUT = 120
# Zero and free pages are left out; page cache and user pages are kept.
FILTER_LEVEL = "17"
# What ends up in files must not say who built them, where or when; gdb looks for sources where Debian's package is.
SOURCE_PLACE = f"/usr/src/{SOURCE_PACKAGE}"
TIMESTAMP = "2026-01-01 00:00:00 UTC"
# Functions and lines for everything (qemu/sample/full-debug-info names what gets more), and nothing that only makes
# tables longer: columns, several lines for one address, views.
DEBUG_FLAGS = "-g1 -gno-column-info -gno-statement-frontiers -gno-variable-location-views"
INIT_FLAGS = [
    "-Os",
    "-static",
    "-nostdlib",
    "-ffreestanding",
    "-fno-stack-protector",
    "-mgeneral-regs-only",
    "-fno-pie",
    "-no-pie",
    "-Wall",
    "-Wextra",
    "-Wl,--build-id=none",
]


def lines(name):
    """The lines of a file of the recipe, without comments."""
    text = (RECIPE / name).read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def _source_version(package):
    """The newest version for this Debian release; backports of it to an older one (`~`) are the same source."""
    versions = [stanza["Version"] for stanza in debian.show([package]) if "~" not in stanza["Version"]]
    if not versions:
        raise LabError(f"the mirror has no {package}", "name another series in scripts/lab.d/sample.py")
    return max(versions, key=debian.version_key)


def fetch_source(place, refresh=False, name=SOURCE_PACKAGE):
    """Unpacks the kernel's source below `place` unless it is there; returns (directory, package version)."""
    final = place / "source"
    facts = final / "source.json"
    if facts.exists() and not refresh:
        return final / name, read_json(facts)["version"]
    debian.update(force=refresh)
    version = _source_version(name)
    with step(f"source {version}"), fresh_directory(final, version) as work:
        package = debian.download(name, version, work)
        run(
            [
                "bash",
                "-c",
                'set -o pipefail; dpkg-deb --fsys-tarfile "$1" | tar -xO "$3" | tar -xJ -C "$2"',
                "bash",
                package,
                work,
                f"./usr/src/{name}.tar.xz",
            ]
        )
        package.unlink()
        write_json(work / "source.json", {"package": name, "version": version})
    return final / name, version


def _configure(source):
    """tinyconfig and the recipe's options on top; an option that did not come out as asked is an error."""
    for arguments in (["tinyconfig"], None, ["olddefconfig"]):
        if arguments:
            run(["make", "-s", *arguments], cwd=source)
        else:
            run(["scripts/kconfig/merge_config.sh", "-m", ".config", RECIPE / "config"], cwd=source)
    got = (source / ".config").read_text(encoding="utf-8").splitlines()
    missing = [line for line in lines("config") if line not in got]
    if missing:
        raise LabError(f"not in the kernel's configuration: {' '.join(missing)}", "see what they depend on (Kconfig)")


def _ask_for_full_debug_info(source):
    """Everything is compiled with -g1; a makefile's own flag for an object comes later and wins."""
    for original in source.rglob("Makefile.original"):
        original.rename(original.with_name("Makefile"))
    for path in lines("full-debug-info"):
        if not (source / path).is_file():
            raise LabError(f"this kernel has no {path}", "update qemu/sample/full-debug-info")
        makefile = (source / path).parent / "Makefile"
        original = makefile.with_name("Makefile.original")
        if not original.exists():
            shutil.copy(makefile, original)
        with open(makefile, "a", encoding="utf-8") as file:
            file.write(f"\nCFLAGS_{(source / path).stem}.o += -g2\n")


def _build_kernel(source, version):
    """Builds vmlinux and bzImage below the source unless they are of this recipe."""
    stamp = recipe_hash(version, TIMESTAMP, DEBUG_FLAGS, SOURCE_PLACE, RECIPE / "config", RECIPE / "full-debug-info")
    if is_current(source, stamp) and (source / "vmlinux").exists():
        say("    the kernel is built")
        return
    prefix = f"-ffile-prefix-map={source}={SOURCE_PLACE}"
    environment = os.environ | {
        "KBUILD_BUILD_USER": "kstub",
        "KBUILD_BUILD_HOST": "kstub",
        "KBUILD_BUILD_TIMESTAMP": TIMESTAMP,
        "KCFLAGS": f"{DEBUG_FLAGS} {prefix}",
        "KAFLAGS": prefix,
        "LC_ALL": "C",
    }
    with step("kernel build"):
        _ask_for_full_debug_info(source)
        _configure(source)
        run(["make", f"-j{JOBS}", "vmlinux", "bzImage"], cwd=source, env=environment)
    (source / ".stamp").write_text(stamp, encoding="utf-8")


def _build_initramfs(work, programs):
    tree = work / "initramfs"
    tree.mkdir()
    for name, source in programs.items():
        run(["gcc", *INIT_FLAGS, "-o", tree / name, source])
    archive = work / "initramfs.cpio"
    script = 'set -e; cd "$1"; ls | cpio --quiet -o -H newc -R 0:0 > "$2"'
    run(["sh", "-c", script, "sh", tree, archive])
    return archive


def panic_and_dump(source, work, programs=None, command_line=COMMAND_LINE):
    """Boots what was built in `source`, waits for the panic, and leaves dump.elf, registers.txt and console.log in
    `work`; returns the console's text. `programs`: names and sources of what the initramfs has."""
    initramfs = _build_initramfs(work, programs or {"init": RECIPE / "init.c"})
    options = {"cpu": "max,la57=off", "memory": MEMORY, "smp": CPUS, "vmcoreinfo": True, "facts": False}
    with Machine(work, source / "arch/x86/boot/bzImage", initramfs, command_line, **options) as machine:
        with step("guest boots and panics"):
            machine.wait_for("end Kernel panic", BOOT_TIMEOUT)
            time.sleep(1)
            machine.qmp.command("stop")
        (work / "registers.txt").write_text(machine.registers(), encoding="utf-8")
        machine.dump(work / "dump.elf", "elf")
        console = machine.console_text()
    (work / "dump.elf").chmod(0o644)
    return console


def _move_program_headers(dump):
    """makedumpfile expects the program headers behind the file header, where QEMU 7.2 and later have section headers."""
    with open(dump, "r+b") as file:
        header = bytearray(file.read(64))
        (offset,) = struct.unpack_from("<Q", header, 32)
        (count,) = struct.unpack_from("<H", header, 56)
        file.seek(offset)
        program_headers = file.read(56 * count)
        struct.pack_into("<QQ", header, 32, 64, 0)  # e_phoff; no section headers
        struct.pack_into("<H", header, 52, 64)  # e_ehsize, which QEMU gets wrong
        struct.pack_into("<HHH", header, 58, 0, 0, 0)
        file.seek(0)
        file.write(header + program_headers)


def _shrink_dump(work):
    makedumpfile, _ = tools.install("makedumpfile")
    _move_program_headers(work / "dump.elf")
    run([makedumpfile, "--message-level", "4", "-c", "-d", FILTER_LEVEL, work / "dump.elf", work / "vmcore"])


def _shrink_vmlinux(source, work):
    """Keeps symbols and debug info: code and data are in the dump, relocations are the boot code's business."""
    whole, small = work / "vmlinux.whole", work / "vmlinux"
    run(["objcopy", "--remove-section=.rela*", source / "vmlinux", whole])
    run(["dwz", whole])
    run(["objcopy", "--only-keep-debug", "--compress-debug-sections=zlib", whole, small])
    _close_holes(small)
    small.chmod(0o644)


def _close_holes(path):
    """Moves what sections hold together: objcopy leaves room in the file for the code and data it has dropped."""
    old = path.read_bytes()
    header = bytearray(old[:64])
    program_offset, section_offset = struct.unpack_from("<QQ", header, 32)
    program_count, section_count = struct.unpack_from("<H", header, 56)[0], struct.unpack_from("<H", header, 60)[0]
    programs = bytearray(old[program_offset : program_offset + 56 * program_count])
    sections = bytearray(old[section_offset : section_offset + 64 * section_count])
    body, moved = bytearray(), {}
    for at in range(0, len(sections), 64):
        kind = struct.unpack_from("<I", sections, at + 4)[0]
        offset, size = struct.unpack_from("<QQ", sections, at + 24)
        align = max(struct.unpack_from("<Q", sections, at + 48)[0], 1)
        if kind in (0, 8) or size == 0:  # NULL, NOBITS
            struct.pack_into("<Q", sections, at + 24, 0)
            continue
        start = 64 + len(programs) + len(body)
        body += bytes(-start % align)
        moved[offset] = 64 + len(programs) + len(body)
        struct.pack_into("<Q", sections, at + 24, moved[offset])
        body += old[offset : offset + size]
    for at in range(0, len(programs), 56):
        if struct.unpack_from("<I", programs, at)[0] == 4:  # NOTE
            offset = struct.unpack_from("<Q", programs, at + 8)[0]
            struct.pack_into("<Q", programs, at + 8, moved[offset])
        else:
            struct.pack_into("<Q", programs, at + 8, 0)
            struct.pack_into("<Q", programs, at + 32, 0)  # nothing of it is in the file
    body += bytes(-(64 + len(programs) + len(body)) % 8)
    struct.pack_into("<QQ", header, 32, 64, 64 + len(programs) + len(body))
    path.write_bytes(header + programs + body + sections)


def _facts_file(console):
    """What the guest said of itself, sorted."""
    facts = sorted(re.findall(r"^KSTUB-FACT (\S+=.*)$", console, re.MULTILINE))
    return "".join(f"{fact}\n" for fact in facts)


def _write_output(work, console, version):
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name in ("vmcore", "vmlinux", "registers.txt"):
        shutil.copy(work / name, OUTPUT / name)
        (OUTPUT / name).chmod(0o644)
    log = [line for line in console.splitlines() if not line.startswith("KSTUB-")]
    (OUTPUT / "console.log").write_text("".join(f"{line.rstrip()}\n" for line in log), encoding="utf-8")
    (OUTPUT / "facts.txt").write_text(_facts_file(console), encoding="utf-8")
    (OUTPUT / "origin.txt").write_text(_origin(console, version), encoding="utf-8")
    for path in sorted(OUTPUT.iterdir()):
        packed = len(gzip.compress(path.read_bytes()))
        say(f"    {path.name}: {path.stat().st_size / 1e6:.2f} MB, {packed / 1e6:.2f} MB in git")


def _origin(console, version):
    """What the sample is made of."""
    first_line = {name: run([name, "--version"]).splitlines()[0] for name in ("gcc", "pahole", "qemu-system-x86_64")}
    facts = {
        "source": f"{SOURCE_PACKAGE} {version}",
        "release": re.search(r"Linux version (\S+)", console)[1],
        "compiler": first_line["gcc"],
        "pahole": first_line["pahole"],
        "qemu": first_line["qemu-system-x86_64"],
        "makedumpfile": tools.install("makedumpfile")[1],
        "made": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return "".join(f"{key}={value}\n" for key, value in facts.items())


def make(refresh=False):
    """Makes tests/data/sample anew."""
    source, version = fetch_source(WORK, refresh)
    _build_kernel(source, version)
    work = WORK / "guest"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    console = panic_and_dump(source, work)
    with step("shrinking"):
        _shrink_dump(work)
        _shrink_vmlinux(source, work)
    # Before anything was compressed.
    files = [work / "dump.elf", work / "vmlinux.whole"]
    if subprocess.run(["grep", "-q", "-a", "-F", str(WORK), *files], check=False).returncode == 0:
        raise LabError("a file of the sample names this machine's directories", "see -ffile-prefix-map in sample.py")
    _write_output(work, console, version)
