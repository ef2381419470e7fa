"""Tasks in uninterruptible sleep, and for how long they have not run:  kstub gdb DUMP -- -batch -x blocked.py"""
import gdb
import kstub

TASK_UNINTERRUPTIBLE, TASK_NOLOAD = 2, 0x400  # include/linux/sched.h; idle kernel threads have both

# The scheduler's clocks, one for each CPU; the latest is nearest to the moment of the dump.
cpus = [one["cpu"] for one in kstub.run("info")["cpus"]]
now = max(int(gdb.parse_and_eval("$percpu(&runqueues, %d)->clock" % cpu)) for cpu in cpus)

rows = []
for address, task in kstub.tasks():
    # Since v5.14 it is __state, so that nobody uses it without thinking.
    state = int(task["__state" if "__state" in task.type else "state"])
    if state & TASK_UNINTERRUPTIBLE and not state & TASK_NOLOAD:
        last = int(task["sched_info"]["last_arrival"])
        rows.append((now - last, int(task["pid"]), task["comm"].string(), address))

for since, pid, comm, address in sorted(rows, reverse=True):
    print("%10.3f s  %6d  %-16s %#x" % (since / 1e9, pid, comm, address))
