"""What each CPU runs and how many wait:  kstub gdb DUMP -- -batch -x runqueues.py"""
import gdb
import kstub

print("CPU  RUNNABLE     PID  COMM              SWITCHES  RUNQUEUE")
for cpu in (one["cpu"] for one in kstub.run("info")["cpus"]):
    rq = gdb.parse_and_eval("$percpu(&runqueues, %d)" % cpu)
    task = rq["curr"].dereference()
    fields = (cpu, int(rq["nr_running"]), int(task["pid"]), task["comm"].string(), int(rq["nr_switches"]), int(rq))
    print("%3d  %8d  %6d  %-16s  %8d  %#x" % fields)
