"""What the scripts about drgn share: values as JSON has them, and what to do where a kernel lacks something."""

import re

import drgn
from drgn.helpers.linux import pid

WALKED_TASKS = 12  # whose page tables are followed


def number(thing):
    return int(thing.value_())


def address(thing):
    return f"{number(thing):#x}"


def text(thing):
    return thing.string_().decode(errors="backslashreplace")


def first(*attempts):
    """The first attempt that this kernel has: names move between versions."""
    for attempt in attempts[:-1]:
        try:
            return attempt()
        except (AttributeError, LookupError):
            pass
    return attempts[-1]()


def attempt(thing):
    """A value, or what stopped it: one broken object must not cost the rest."""
    try:
        return thing()
    except Exception as error:  # noqa: BLE001 - whatever drgn raises is its answer
        return {"error": f"{type(error).__name__}: {error}"}


def symbol_name(prog, pointer):
    try:
        return prog.symbol(pointer).name
    except LookupError:
        return None


def with_memory(prog):
    """One task of each of the first user address spaces, the lab's planting programs before others."""
    leaders = [task for task in pid.for_each_task(prog) if task.mm and task.pid == task.tgid]
    leaders.sort(key=lambda task: not text(task.comm).startswith("kstub"))
    return leaders[:WALKED_TASKS]


def vmcoreinfo_in(path):
    """The text of VMCOREINFO as it lies in guest RAM, for dumps whose maker did not have it."""
    window, overlap = 64 << 20, 1 << 16
    with open(path, "rb") as file:
        at = 0
        while True:
            file.seek(at)
            block = file.read(window + overlap)
            if not block:
                return None
            for match in re.finditer(rb"OSRELEASE=[\x20-\x7e]+\n", block):
                candidate = re.match(rb"[\x20-\x7e\n]+", block[match.start() : match.start() + overlap])[0]
                if b"KERNELOFFSET=" in candidate and b"SYMBOL(swapper_pg_dir)" in candidate:
                    return candidate
            at += window


def open_dump(path, debug_files):
    try:
        prog = drgn.Program()
        prog.set_core_dump(path)
        how = "dump"
        if not prog.flags & drgn.ProgramFlags.IS_LINUX_KERNEL:
            raise ValueError("not seen as a Linux kernel")
    except Exception as error:  # noqa: BLE001
        found = vmcoreinfo_in(path)
        if not found:
            raise
        prog = drgn.Program(vmcoreinfo=found)
        prog.set_core_dump(path)
        how = f"text in RAM (the dump alone: {error})"
    try:
        prog.load_debug_info(debug_files)
    except drgn.MissingDebugInfoError as error:
        return prog, how, str(error)
    return prog, how, None
