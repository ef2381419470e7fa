"""What scripts/bench has drgn do, as JSON on standard output. Nothing but what is asked is imported or read.

  drgn_rival.py start DUMP VMLINUX     opens the dump (qmp:SOCKET: a guest) with its debug info
  drgn_rival.py tasks DUMP VMLINUX     pid, name and state of every task
  drgn_rival.py pages DUMP VMLINUX     how many pages have each flag: the struct pages read in bulk, counted by word
  drgn_rival.py page-objects …         the same by an object for each page
  drgn_rival.py stacks DUMP VMLINUX    pid and the pcs of every task that has a stack, inlined frames left out
  drgn_rival.py stacks-text …          every stack as drgn prints it, with inlined functions and lines
"""

import collections
import json
import sys

import drgn


def open_dump(dump, vmlinux):
    prog = drgn.Program()
    if dump.startswith("qmp:"):
        prog.set_qemu_qmp(dump.removeprefix("qmp:"))
    else:
        prog.set_core_dump(dump)
    prog.load_debug_info([vmlinux])
    return prog


def tasks(prog):
    from drgn.helpers.linux.pid import for_each_task
    from drgn.helpers.linux.sched import task_state_to_char

    return [
        [task.pid.value_(), task.comm.string_().decode(errors="replace"), task_state_to_char(task)]
        for task in for_each_task(prog, idle=True)
    ]


def flag_bits(prog):
    enumerators = prog.type("enum pageflags").enumerators
    return {one.name.removeprefix("PG_"): one.value for one in enumerators if one.name.startswith("PG_")}


def ranges(prog):
    """(address, count) of the struct pages."""
    from drgn.helpers.linux.mm import for_each_valid_page_range

    size = prog.type("struct page").size
    return [(mem_map.value_() + start * size, end - start) for start, end, mem_map in for_each_valid_page_range(prog)]


def pages(prog):
    size = prog.type("struct page").size
    words = collections.Counter()
    for at, count in ranges(prog):
        # flags is the first word.
        words.update(memoryview(prog.read(at, count * size)).cast("Q")[:: size // 8])
    return {name: sum(n for word, n in words.items() if word >> bit & 1) for name, bit in flag_bits(prog).items()}


def page_objects(prog):
    bits = flag_bits(prog)
    counts = dict.fromkeys(bits, 0)
    page = prog.type("struct page")
    for at, count in ranges(prog):
        for i in range(count):
            flags = drgn.Object(prog, page, address=at + i * page.size).flags.value_()
            for name, bit in bits.items():
                if flags >> bit & 1:
                    counts[name] += 1
    return counts


def traces(prog):
    """(task, stack trace) of every task but those that drgn cannot unwind."""
    from drgn.helpers.linux.pid import for_each_task

    for task in for_each_task(prog):
        try:
            yield task, prog.stack_trace(task)
        except (LookupError, ValueError, drgn.FaultError, OverflowError):
            pass


def stacks(prog):
    return [
        [task.pid.value_(), [frame.pc for frame in trace if not frame.is_inline]] for task, trace in traces(prog)
    ]


def stacks_text(prog):
    return [f"{task.pid.value_()}\n{trace}" for task, trace in traces(prog)]


WHAT = {"stacks": stacks, "stacks-text": stacks_text, "start": lambda prog: None, "tasks": tasks, "pages": pages, "page-objects": page_objects}

if __name__ == "__main__":
    print(json.dumps(WHAT[sys.argv[1]](open_dump(*sys.argv[2:4]))))
