"""What stacks drgn sees in a dump, as JSON on standard output.

  stacks_facts.py DUMP VMLINUX [MODULE.ko.debug...]

{"tasks": {ADDRESS: {"pid", "comm", "cpu", "frames": [{"pc", "symbol", "interrupted"}]}}}, frames innermost first, inlined
ones left out; "error" in place of "frames" where drgn cannot unwind.
"""

import json
import sys

from drgn.helpers.linux import cpumask, percpu, pid, sched
from drgn_common import address, attempt, number, open_dump, symbol_name, text

FRAMES_MAX = 2000


def frames(prog, task):
    found = []
    for frame in prog.stack_trace(task):
        if frame.is_inline or len(found) >= FRAMES_MAX:
            continue
        # A return address is behind the call: the name is that of the call.
        at = frame.pc if frame.interrupted else frame.pc - 1
        found.append({"pc": f"{frame.pc:#x}", "symbol": symbol_name(prog, at), "interrupted": frame.interrupted})
    return found


def tasks(prog):
    yield from pid.for_each_task(prog)
    runqueues = prog["runqueues"].address_of_()
    for cpu in cpumask.for_each_possible_cpu(prog):
        yield percpu.per_cpu_ptr(runqueues, cpu).idle


def main():
    try:
        prog, _, _ = open_dump(sys.argv[1], sys.argv[2:])
    except Exception as error:  # noqa: BLE001
        json.dump({"refused": f"{type(error).__name__}: {error}"}, sys.stdout)
        return
    found = {}
    for task in tasks(prog):
        one = {"pid": number(task.pid), "comm": text(task.comm), "cpu": attempt(lambda t=task: int(sched.task_cpu(t)))}
        stack = attempt(lambda t=task: frames(prog, t))
        one["error" if isinstance(stack, dict) else "frames"] = stack
        found[address(task)] = one
    json.dump({"tasks": found}, sys.stdout)


if __name__ == "__main__":
    main()
