# Run inside gdb by tests/lab_doors.rs: what each door answers, as one line of JSON behind "@@@". Judges nothing.
import json

import gdb
import kstub


def typed(line):
    try:
        return gdb.execute(line, to_string=True)
    except gdb.error as error:
        return "error: %s" % error


def number(text):
    return int(gdb.parse_and_eval(text)) & ((1 << 64) - 1)


def in_every_thread(line):
    found = {}
    for thread in gdb.selected_inferior().threads():
        thread.switch()
        found[str(thread.ptid[1] - 1)] = {"rsp": "%#x" % number("$rsp"), "text": typed(line)}
    return found


def own_read(address, length):
    """What gdb itself reads, byte by byte, up to the first that it cannot."""
    inferior, data = gdb.selected_inferior(), b""
    try:
        return bytes(inferior.read_memory(address, length)).hex()
    except gdb.MemoryError:
        while len(data) < length:
            try:
                data += bytes(inferior.read_memory(address + len(data), 1))
            except gdb.MemoryError:
                break
    return data.hex()


def rows(values):
    return [[address, int(value["pid"]), value["comm"].string(errors="replace")] for address, value in values]


first = gdb.selected_thread()
answer = {"typed": {line: typed(line) for line in TYPED}}
answer["apply"] = typed("thread apply all -q why $rsp")
answer["apply_regs"] = typed("thread apply all -q regs")
answer["each"] = in_every_thread("why $rsp")
first.switch()
cpus = range(len(answer["each"]))
answer["own"] = {
    "list": typed("help list"),
    "p": typed("p 1+1"),
    "info": typed("info threads"),
    "kstub p": typed("kstub p init_task.pid"),
    "kstub list": typed("kstub help list"),
}
answer["rq_cpu"] = [number("$percpu(&runqueues, %d)->cpu" % cpu) for cpu in cpus]
answer["rq_pid"] = [number("$percpu(&runqueues, %d)->curr->pid" % cpu) for cpu in cpus]
answer["no_cpu"] = typed("p $percpu(&runqueues, %d)" % len(cpus))
copies = [number("$percpu(&runqueues, %d)" % cpu) for cpu in cpus]
gdb.set_convenience_variable("planted", gdb.Value(DYNAMIC).cast(gdb.lookup_type("unsigned long").pointer()))
answer["percpu"] = {
    "copies": copies,
    "address": typed("percpu &runqueues"),
    "member": typed("percpu runqueues.cpu 0-1"),
    "pointer": typed("percpu -x $planted") if DYNAMIC else None,
    "page": [typed("page &runqueues"), typed("page %#x" % copies[first.ptid[1] - 1])],
}
answer["nothing"] = [typed("log -l emerg"), kstub.run("log -l emerg"), list(kstub.read_many([(0, 8)]))[0].hex()]
answer["task"] = {str(pid): gdb.parse_and_eval("$task(%d)->comm" % pid).string() for pid in PIDS}
answer["no_task"] = typed("p $task(4000000)")

end = number("(unsigned long) &init_task") & ~0xFFF
pieces = [(number("(unsigned long) &linux_banner"), 64), (number("(unsigned long) &init_task"), 4096), (0, 8)]
pieces += [(end, 3 * 4096), (0xFFFF800000000000 - 16, 32), (number("(unsigned long) init_task.stack"), 100)]
pieces += [(one, 8) for one in range(end, end + 8 * 5000, 8)]
answer["read_many"] = [data.hex() for data in kstub.read_many(pieces)]
answer["read_gdb"] = [own_read(*piece) for piece in pieces]

values = list(kstub.tasks())
before = rows(values)
gdb.selected_inferior().threads()[0].switch()
gdb.execute("maintenance flush dcache", to_string=True)
answer["tasks"], answer["tasks_after_switch"] = before, rows(values)
first.switch()
answer["pages"] = [
    [number("$page(&init_task)"), number("$page($page(&init_task))"), number("$page(init_task)")],
    [address for address, _ in kstub.pages([number("(unsigned long) &init_task"), number("$page(&init_task)")])],
]
answer["typed_page"] = typed("page &init_task")
answer["modules"] = [value["name"].string() for _, value in kstub.modules()]
answer["os"] = {name: typed(("info os " + name).strip()) for name in OS}
print("@@@" + json.dumps(answer))
