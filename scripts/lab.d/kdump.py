"""A real kdump: the guest's crash kernel copies /proc/vmcore out, makedumpfile makes the formats."""

import re
import shutil
import struct
import time

import initramfs
import tools
from common import LabError, make_sparse, run, say, step
from machine import Machine

BOOT_TIMEOUT = 300
CRASH_MEMORY = "256M"
MESSAGES = "22"  # common messages, errors and the report; no progress bars
SPLIT_BLOCK = "4096"  # KiB; the default of 1 GiB would put all of a small guest in one part
VMCORE_DISK_SIZE = 4 << 30  # sparse
MOST_CRASHES = 5
USER_CS = 0x33
# One CPU and no waiting for devices that the panic left in disorder.
CRASH_ARGUMENTS = "console=ttyS0 panic=1 nr_cpus=1 reset_devices irqpoll"


def command_line():
    arguments = CRASH_ARGUMENTS.replace(" ", ",")
    return [f"crashkernel={CRASH_MEMORY}", "kstub.then=crash", f"kstub.crash_args={arguments}"]


def _formats(extra):
    """(file, makedumpfile's options, manifest entry) for every dump made from the raw vmcore.

    No snappy: Debian builds makedumpfile without it.
    """
    plan = [
        ("vmcore.kdump-zlib-d31", ["-c", "-d", "31"], {"format": "kdump", "compression": "zlib", "filter_level": 31}),
        ("vmcore.kdump-raw-d0", ["-d", "0"], {"format": "kdump", "filter_level": 0}),
        ("vmcore.kdump-lzo-d31", ["-l", "-d", "31"], {"format": "kdump", "compression": "lzo", "filter_level": 31}),
        ("vmcore.kdump-zstd-d31", ["-z", "-d", "31"], {"format": "kdump", "compression": "zstd", "filter_level": 31}),
        ("vmcore.elf-d31", ["-E", "-d", "31"], {"format": "elf", "filter_level": 31}),
        (
            "vmcore.flat-zlib-d31",
            ["-F", "-c", "-d", "31"],
            {"format": "kdump", "compression": "zlib", "filter_level": 31, "flattened": True},
        ),
        ("vmcore.flat-elf-d31", ["-F", "-E", "-d", "31"], {"format": "elf", "filter_level": 31, "flattened": True}),
    ]
    if extra:
        plan += [
            ("vmcore.kdump-zlib-d1", ["-c", "-d", "1"], {"format": "kdump", "compression": "zlib", "filter_level": 1})
        ]
    return plan


def _crash_and_copy(kernel, work, cmdline, options):
    """Boots, lets the guest crash, and waits until its crash kernel has copied /proc/vmcore out."""
    images = initramfs.build(kernel)
    with Machine(
        work, kernel / "vmlinuz", images / "kexec.cpio", cmdline, vmcore_disk=VMCORE_DISK_SIZE, **options
    ) as machine:
        with step("guest boots and plants"):
            machine.wait_for("KSTUB-GUEST-READY", BOOT_TIMEOUT)
            machine.unpack_facts()
        with step("guest panics, its crash kernel copies /proc/vmcore"):
            console = machine.wait_for("KSTUB-VMCORE-DONE size=", BOOT_TIMEOUT)
            machine.wait_exit(60)
        size = int(re.search(r"KSTUB-VMCORE-DONE size=(\d+)", console)[1])
        vmcore = work / "vmcore"
        machine.vmcore_disk.rename(vmcore)
        with open(vmcore, "r+b") as file:
            file.truncate(size)
        make_sparse(vmcore)
        return console


def _code_segments(vmcore):
    """cs of every CPU, in the order of the notes (struct elf_prstatus of include/linux/elfcore.h, x86-64)."""
    with open(vmcore, "rb") as file:
        header = file.read(64)
        start, entry_size, entries = (*struct.unpack_from("<Q", header, 32), *struct.unpack_from("<HH", header, 54))
        found = []
        for index in range(entries):
            file.seek(start + index * entry_size)
            kind, _, offset, _, _, size = struct.unpack("<IIQQQQ", file.read(40))
            if kind != 4:  # PT_NOTE
                continue
            file.seek(offset)
            notes, at = file.read(size), 0
            while at + 12 <= len(notes):
                name_size, size, kind = struct.unpack_from("<III", notes, at)
                description = at + 12 + (name_size + 3 & ~3)
                if kind == 1 and notes[at + 12 : at + 16] == b"CORE":  # NT_PRSTATUS
                    found.append(struct.unpack_from("<Q", notes, description + 112 + 17 * 8)[0])
                at = description + (size + 3 & ~3)
    return found


def _crash_in_user_mode(kernel, work, cmdline, options, user_cpu):
    """As often as needed: until the panic finds the busy CPU in its program, and not in an interrupt."""
    for _ in range(MOST_CRASHES):
        console = _crash_and_copy(kernel, work, cmdline, options)
        segments = _code_segments(work / "vmcore")
        if segments[user_cpu : user_cpu + 1] == [USER_CS]:
            return console
        say(f"    CPU {user_cpu} was in the kernel (cs of each CPU: {segments}); once more")
        for path in work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    raise LabError(f"the panic never found CPU {user_cpu} in user mode", "try again; see qemu/init")


def _convert(makedumpfile, version, work, file, options, entry):
    """Makes one format; returns its manifest entry."""
    start = time.monotonic()
    if "-F" in options:
        # The flattened format goes to standard output.
        with open(work / file, "wb") as out, open(work / "makedumpfile.log", "ab") as log:
            run([makedumpfile, *options, work / "vmcore"], stdout=out, stderr=log, cure="see makedumpfile.log")
    else:
        output = run([makedumpfile, "--message-level", MESSAGES, *options, work / "vmcore", work / file])
        with open(work / "makedumpfile.log", "a", encoding="utf-8") as log:
            log.write(f"== {file}: {' '.join(options)}\n{output}\n")
    size = (work / file).stat().st_size >> 20
    say(f"    {file}: {size} MiB in {time.monotonic() - start:.1f} s")
    return {
        "file": file,
        "maker": f"makedumpfile {version}",
        "dump_format": entry.pop("format"),
        "vmcoreinfo": True,
        **entry,
    }


def _split(makedumpfile, version, work):
    """One dump in three files, as makedumpfile --split writes them."""
    files = [f"vmcore.split-{number}" for number in (1, 2, 3)]
    run(
        [
            makedumpfile,
            "--split",
            "--splitblock-size",
            SPLIT_BLOCK,
            "-c",
            "-d",
            "31",
            work / "vmcore",
            *(work / file for file in files),
        ]
    )
    return [
        {
            "file": file,
            "maker": f"makedumpfile {version}",
            "dump_format": "kdump",
            "compression": "zlib",
            "filter_level": 31,
            "vmcoreinfo": True,
            "split": files,
        }
        for file in files
    ]


def _incomplete(makedumpfile, version, work):
    """A dump cut off by a size limit: makedumpfile marks it as incomplete in the header."""
    # A small cut, so that the kernel itself is likely (KASLR) in the part that is there.
    whole = (work / "vmcore.kdump-zlib-d31").stat().st_size
    file = "vmcore.incomplete-zlib-d31"
    # makedumpfile exits with an error after writing such a file: that is the point.
    try:
        run([makedumpfile, "-L", str(whole * 9 // 10), "-c", "-d", "31", work / "vmcore", work / file])
    except LabError:
        if not (work / file).exists():
            raise
    return {
        "file": file,
        "maker": f"makedumpfile {version}",
        "dump_format": "kdump",
        "compression": "zlib",
        "filter_level": 31,
        "vmcoreinfo": True,
        "complete": False,
    }


def make(kernel, work, cmdline, options, extra, user_cpu):
    """Makes the raw vmcore and everything that makedumpfile can make of it."""
    makedumpfile, version = tools.install("makedumpfile")
    console = _crash_in_user_mode(kernel, work, cmdline, options, user_cpu)
    entries = [{"file": "vmcore", "maker": "/proc/vmcore", "dump_format": "elf", "vmcoreinfo": True}]
    with step("makedumpfile"):
        for file, arguments, entry in _formats(extra):
            entries.append(_convert(makedumpfile, version, work, file, arguments, entry))
        if extra:
            entries += _split(makedumpfile, version, work)
            entries.append(_incomplete(makedumpfile, version, work))
    return console, entries
