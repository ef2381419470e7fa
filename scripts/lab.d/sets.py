"""Dump sets: one guest, one moment, several dump files, and the truth to compare them with.

qemu-<kernel>-<levels>l[-novmcoreinfo][-split][-pti]   a running guest, dumped by QEMU
qemu-chain[-<how>]-<kernel>[-5l]                 ended by kstub_chain, dumped by QEMU
qemu-panic-<kernel>[-5l]                         panicked with no crash kernel, dumped by QEMU
qemu-tasks-<kernel>[-5l]                         a running guest with ten thousand tasks, dumped by QEMU
qemu-kexec-<kernel>[-5l]                         a second kernel after kexec, dumped by QEMU
kdump-<kernel>[-5l]                              a real kdump: /proc/vmcore and makedumpfile
"""

import re
import shutil
import time
from dataclasses import asdict, dataclass

import initramfs
import kdump
import kernels
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
    say,
    step,
    write_json,
)
from machine import Machine, boots_again

SETS = LAB / "sets"
SCHEMA = 1
SMP = 4
MEMORY = "1G"
BUSY_USER_CPU, BUSY_KERNEL_CPU = 1, 2  # as in qemu/init
BOOT_TIMEOUT = 300
CROWD_TIMEOUT = 600
NAME = re.compile(
    r"qemu-(?P<kernel>[\d.]+|newest)-(?P<levels>[45])l(?P<novmcoreinfo>-novmcoreinfo)?(?P<split>-split)?(?P<pti>-pti)?$"
    r"|(?P<kind>kdump|qemu-panic|qemu-kexec|qemu-tasks"
    r"|qemu-chain(?:-(?P<how>irq|fault|kprobe|graph|bpf|nested|overflow|locks))?)"
    r"-(?P<other_kernel>[\d.]+|newest)(?P<five>-5l)?$"
)


@dataclass(frozen=True)
class Recipe:
    """What a set's name says, and whether the rarer formats are wanted too."""

    name: str
    kind: str
    kernel: str
    levels: int
    vmcoreinfo: bool
    split: bool
    pti: bool
    how: str
    extra: bool

    @staticmethod
    def parse(name, extra=False):
        match = NAME.match(name)
        if not match:
            raise LabError(f"no set is called {name}", "names are explained by: scripts/lab set --help")
        kind = match["kind"] or "qemu"
        how = None
        if kind.startswith("qemu-chain"):
            kind, how = "qemu-chain", match["how"] or "nmi"
        return Recipe(
            name=name,
            kind=kind,
            kernel=match["kernel"] or match["other_kernel"],
            levels=5 if match["levels"] == "5" or match["five"] else 4,
            how=how,
            vmcoreinfo=kind in ("qemu", "qemu-panic", "qemu-chain", "qemu-tasks") and not match["novmcoreinfo"],
            split=bool(match["split"]),
            pti=bool(match["pti"]),
            extra=extra,
        )

    @property
    def panics(self):
        """Whether the guest has panicked when QEMU dumps it."""
        return self.kind in ("qemu-panic", "qemu-chain") and self.how != "locks"

    def command_line(self):
        words = ["console=ttyS0", "panic=0"]
        if self.pti:
            words += ["pti=on"]
        if self.kind == "kdump":
            return " ".join(words + kdump.command_line())
        if self.kind == "qemu-panic":
            words += ["kstub.then=panic"]
        elif self.kind == "qemu-chain":
            words += ["oops=panic", f"kstub.then=chain-{self.how}"]
        elif self.kind == "qemu-tasks":
            words += ["rdinit=/crowd/init"]
        elif self.kind == "qemu-kexec":
            words += ["kstub.then=kexec", "kstub.crash_args=console=ttyS0,panic=0,kstub.then=stay"]
        return " ".join(words)

    def machine_options(self):
        cpu = "max" if self.levels == 5 else "max,la57=off"
        locks = self.how == "locks"
        return {
            # Below a hypervisor a kernel without its help spins on a plain flag and has no queue.
            "cpu": f"{cpu},hypervisor=off" if locks else cpu,
            "memory": "3G" if self.split else MEMORY,
            "machine_properties": ",max-ram-below-4g=1G" if self.split else "",
            "smp": SMP + 2 if locks else SMP,
            "vmcoreinfo": self.vmcoreinfo,
        }


def _dump_file(file, maker, dump_format, **more):
    """One entry of the manifest's `dumps`."""
    entry = {
        "file": file,
        "maker": maker,
        "format": dump_format,
        "compression": None,
        "flattened": False,
        "filter_level": None,
        "paging": False,
        "vmcoreinfo": False,
        "complete": True,
    }
    entry.update(more)
    return entry


def _qemu_dumps(machine, work, recipe):
    """Has the stopped guest's memory written in QEMU's formats; returns the manifest entries."""
    known = {"vmcoreinfo": recipe.vmcoreinfo}
    plan = [
        ("dump.elf", "elf", False, {}),
        ("dump.kdump-zlib.flat", "kdump-zlib", False, {"compression": "zlib", "flattened": True}),
    ]
    if recipe.extra:
        plan += [
            ("dump.kdump-lzo.flat", "kdump-lzo", False, {"compression": "lzo", "flattened": True}),
            ("dump.kdump-snappy.flat", "kdump-snappy", False, {"compression": "snappy", "flattened": True}),
            ("dump.paging.elf", "elf", True, {"paging": True}),
        ]
    supported = machine.dump_formats()
    entries = []
    for file, dump_format, paging, more in plan:
        if dump_format not in supported:
            say(f"    this QEMU cannot write {dump_format}: skipped")
            continue
        machine.dump(work / file, dump_format, paging)
        make_sparse(work / file)
        entries.append(_dump_file(file, "qemu", "elf" if dump_format == "elf" else "kdump", **known, **more))
    return entries


def _save_ram(machine, work):
    """The raw truth: every range of guest RAM, as QEMU's pmemsave writes it."""
    entries = []
    for first, end in machine.memory_ranges():
        file = f"ram-{first:x}.bin"
        machine.save_memory(first, end - first, work / file)
        make_sparse(work / file)
        entries.append({"start": f"{first:#x}", "size": end - first, "file": file})
    return entries


def panic_facts(console, how="sysrq-c"):
    """What the kernel's own panic message says: the truth for `how did it die`."""
    message = re.search(r"Kernel panic - not syncing: (.*)", console)
    where = re.search(r"CPU: (\d+) (?:UID: \d+ )?PID: (\d+) Comm: (.+?) (?:Not tainted|Tainted|Kdump)", console)
    if not message or not where:
        raise LabError("the console shows no panic message that the lab understands", "see console.log in the set")
    return {"how": how, "message": message[1], "cpu": int(where[1]), "pid": int(where[2]), "comm": where[3]}


def _chain_facts(console, how):
    """What kstub_chain said before it began: the functions on the stack, innermost first; for locks what spins."""
    frames = re.search(r"kstub_chain: frames=(\S+)", console)
    numbers = re.findall(r"(?:spinlock|bit_lock)=(0x[0-9a-f]+)", console)
    spinners = re.findall(r"kstub_chain: spinner pid=(\d+) cpu=(\d+) what=(\S+)", console)
    return {
        "how": how,
        "frames": frames[1].split(",") if frames else [],
        "locks": numbers,
        "spinners": [{"what": what, "pid": int(pid), "cpu": int(cpu)} for pid, cpu, what in spinners],
    }


def _planted_levels(work):
    """The page-table levels that the guest itself found in use."""
    text = (work / "facts/planted/memory.txt").read_text(encoding="utf-8")
    return int(re.search(r"^page_table_levels=(\d)", text, re.MULTILINE)[1])


def _check_levels(work, recipe):
    found = _planted_levels(work)
    if found != recipe.levels:
        raise LabError(
            f"{recipe.name}: the guest uses {found} page-table levels, not {recipe.levels}",
            "does this kernel have CONFIG_X86_5LEVEL, and this QEMU la57?",
        )


def _wait_until_interesting(machine, recipe):
    """Leaves the guest stopped at the moment the set is about; returns its registers."""
    if recipe.panics:
        # A panic before that is none of ours.
        machine.wait_for("KSTUB-GUEST-READY", BOOT_TIMEOUT)
        # In an NMI 5.10 does not get as far as its last line.
        machine.wait_for("Kernel Offset:" if recipe.how == "nmi" else "end Kernel panic", BOOT_TIMEOUT)
        machine.unpack_facts()
        time.sleep(1)
        return machine.stop_where({})
    boots = 2 if recipe.kind == "qemu-kexec" else 1
    timeout = CROWD_TIMEOUT if recipe.kind == "qemu-tasks" else BOOT_TIMEOUT * boots
    machine.wait_for("KSTUB-GUEST-READY", timeout, count=boots)
    machine.unpack_facts()
    if recipe.how:
        machine.wait_for("kstub_chain: all spin", BOOT_TIMEOUT)
    time.sleep(1)
    busy = {} if recipe.kind == "qemu-tasks" else {BUSY_USER_CPU: 3, BUSY_KERNEL_CPU: 0}
    return machine.stop_where(busy, others_halt=bool(busy) and not recipe.how, others_calm=bool(recipe.how))


def _make_qemu(recipe, kernel, work):
    """Boots, stops and dumps; returns what the manifest has to say beyond the common part."""
    if recipe.kind == "qemu-tasks":
        initrd = initramfs.build_crowd(kernel)
    else:
        initrd = initramfs.build(kernel) / ("kexec.cpio" if recipe.kind == "qemu-kexec" else "base.cpio")
    with Machine(work, kernel / "vmlinuz", initrd, recipe.command_line(), **recipe.machine_options()) as machine:
        with step("guest boots and plants"):
            registers = _wait_until_interesting(machine, recipe)
        (work / "registers.txt").write_text(registers, encoding="utf-8")
        (work / "mtree.txt").write_text(machine.qmp.human("info mtree -f"), encoding="utf-8")
        with step("dumps"):
            ram = _save_ram(machine, work)
            dumps = _qemu_dumps(machine, work, recipe)
    if recipe.kind != "qemu-tasks":
        _check_levels(work, recipe)
    return {
        "dumps": dumps,
        "panic": panic_facts(machine.console_text(), recipe.how or "sysrq-c") if recipe.panics else None,
        "chain": _chain_facts(machine.console_text(), recipe.how) if recipe.how else None,
        "boots": 2 if recipe.kind == "qemu-kexec" else 1,
        "truth": {
            "registers": "registers.txt",
            "console": "console.log",
            "facts": "facts",
            "ram": ram,
            "memory_tree": "mtree.txt",
        },
    }


def _make_kdump(recipe, kernel, work):
    console, dumps = kdump.make(kernel, work, recipe.command_line(), recipe.machine_options(), recipe.extra, BUSY_USER_CPU)
    _check_levels(work, recipe)
    return {
        "dumps": [_dump_file(**entry) for entry in dumps],
        "panic": panic_facts(console),
        "chain": None,
        "boots": 1,
        "truth": {"registers": None, "console": "console.log", "facts": "facts", "ram": [], "memory_tree": None},
    }


def _stamp(recipe, kernel):
    """The recipe's hash; `extra` is left out, a set with more formats serves both."""
    kernel_facts = (kernel / "kernel.json").read_text(encoding="utf-8")
    shape = {key: value for key, value in asdict(recipe).items() if key != "extra"}
    own = [initramfs.crowd_recipe()] if recipe.kind == "qemu-tasks" else []
    machine = recipe.machine_options()
    return recipe_hash(SCHEMA, shape, recipe.command_line(), machine, initramfs.recipe(), kernel_facts, *own)


@boots_again
def make(name, extra=False):
    """Makes one set unless it is there and its recipe is unchanged."""
    recipe = Recipe.parse(name, extra)
    kernel = kernels.fetch(recipe.kernel)
    final = SETS / name
    stamp = _stamp(recipe, kernel)
    if is_current(final, stamp) and (not extra or read_json(final / "set.json")["extra"]):
        say(f"    set {name} is there")
        return
    start = time.monotonic()
    with step(f"set {name}"), fresh_directory(final, stamp, keep_failed=True) as work:
        details = (_make_kdump if recipe.kind == "kdump" else _make_qemu)(recipe, kernel, work)
        release = kernels.info(kernel)["release"]
        for entry in details["dumps"]:
            (work / entry["file"]).chmod(0o644)  # tests need not run as root
        (work / f"vmlinux-{release}").symlink_to(f"../../kernels/{release}/vmlinux")
        write_json(
            work / "set.json",
            {
                "schema": SCHEMA,
                "name": name,
                "kind": recipe.kind,
                "kernel": recipe.kernel,
                "release": release,
                "package_version": kernels.info(kernel)["package_version"],
                "vmlinux": f"kernels/{release}/vmlinux",
                "modules": f"kernels/{release}/lib/modules/{release}",
                "cmdline": recipe.command_line(),
                "page_table_levels": recipe.levels,
                "smp": recipe.machine_options()["smp"],
                "memory": recipe.machine_options()["memory"],
                "vmcoreinfo_device": recipe.vmcoreinfo,
                "pti": recipe.pti,
                "extra": extra,
                "busy_user_cpu": BUSY_USER_CPU,
                "busy_kernel_cpu": BUSY_KERNEL_CPU,
                "seconds": round(time.monotonic() - start, 1),
                **details,
            },
        )
    note_progress(f"set {name}: {time.monotonic() - start:.0f} s")


def drop_outdated():
    """Removes sets of an earlier recipe: what tests expect of them, and the modules they ran, are of today's."""
    for name, _ in listing():
        try:
            recipe = Recipe.parse(name)
            kernel = kernels.KERNELS / recipe.kernel
            current = (kernel / "kernel.json").is_file() and is_current(SETS / name, _stamp(recipe, kernel.resolve()))
        except LabError:
            current = False
        if not current:
            say(f"    set {name} is of an earlier recipe and removed; anew: scripts/lab set {name}")
            shutil.rmtree(SETS / name)


def listing():
    """(name, manifest) of every set that is complete."""
    return [
        (path.parent.name, read_json(path))
        for path in sorted(SETS.glob("[!.]*/set.json"))
        if (path.parent / STAMP).exists()
    ]
