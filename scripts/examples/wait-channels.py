"""How many tasks sleep in which function:  kstub gdb DUMP --threads all -- -batch -x wait-channels.py"""
import collections
import gdb

# Where every sleeper is; the caller of these says what it waits for.
SCHEDULER = {"context_switch", "__schedule", "__schedule_loop", "schedule", "schedule_idle", "schedule_timeout",
             "schedule_preempt_disabled", "schedule_hrtimeout_range", "schedule_hrtimeout_range_clock", "io_schedule"}

sleepers = collections.defaultdict(list)
for thread in gdb.selected_inferior().threads():
    if thread.ptid[1] < 1000000000:  # a CPU; thread 1000000000 + pid is a task
        continue
    thread.switch()
    frame = gdb.newest_frame()
    while frame.name() in SCHEDULER and frame.older() is not None:
        frame = frame.older()
    sleepers[frame.name() or "?"].append("%s/%d" % (thread.name, thread.ptid[1] - 1000000000))

for function, names in sorted(sleepers.items(), key=lambda item: (-len(item[1]), item[0])):
    print("%5d  %-32s %s" % (len(names), function, " ".join(names[:4]) + (" ..." if names[4:] else "")))
