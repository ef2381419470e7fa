"""What drgn says of a dump, as JSON on standard output.

  drgn_facts.py DUMP VMLINUX [MODULE.ko.debug...]

A referee, not the truth: a section drgn cannot answer is named under "errors" with its reason, and a
dump it cannot open gives {"refused": reason}. Addresses are hexadecimal text, everything else a number.
"""

import importlib.metadata
import itertools
import json
import sys
import time

import drgn
from drgn.helpers.linux import cpumask, fs, irq, list as lists, mm, module, net, percpu, pid, printk, sched, slab, swap
from drgn.helpers.linux import timer
from drgn_common import address, attempt, first, number, open_dump, symbol_name, text, with_memory

LONGEST_LIST = 1 << 20
TRANSLATIONS_OF_A_KIND = 50
PF_KTHREAD = 0x200000


# Tasks, CPUs


def task_facts(task):
    kernel_thread = bool(number(task.flags) & PF_KTHREAD)
    return {
        "pid": number(task.pid),
        "tgid": number(task.tgid),
        "ppid": number(task.real_parent.tgid),
        "comm": text(task.comm),
        "task": address(task),
        "state": attempt(lambda: sched.task_state_to_char(task)),
        "cpu": attempt(lambda: int(sched.task_cpu(task))),
        "on_cpu": number(task.on_cpu),
        "flags": address(task.flags),
        "mm": address(task.mm),
        "active_mm": address(task.active_mm),
        "stack": address(task.stack),
        "start_time": number(task.start_time),
        "utime": number(task.utime),
        "stime": number(task.stime),
        "threads": attempt(lambda: number(task.signal.nr_threads)),
        "kthread": kernel_thread,
        "policy": number(task.policy),
        "prio": number(task.prio),
        "static_prio": number(task.static_prio),
        "nvcsw": number(task.nvcsw),
        "nivcsw": number(task.nivcsw),
        "cmdline": attempt(lambda: b" ".join(mm.cmdline(task) or []).decode(errors="backslashreplace")),
        "rss": attempt(lambda: rss(task)),
        "vsize": attempt(lambda: int(mm.task_vsize(task))),
    }


def rss(task):
    found = mm.task_rss(task)
    return found._asdict() if task.mm else None


def tasks(prog):
    return [attempt(lambda task=task: task_facts(task)) for task in pid.for_each_task(prog, idle=True)]


def cpus(prog):
    online = set(cpumask.for_each_online_cpu(prog))
    return [attempt(lambda cpu=cpu: cpu_facts(prog, cpu, cpu in online)) for cpu in cpumask.for_each_possible_cpu(prog)]


def cpu_facts(prog, cpu, online):
    rq = percpu.per_cpu(prog["runqueues"], cpu)
    return {
        "cpu": cpu,
        "online": online,
        "offset": address(prog["__per_cpu_offset"][cpu]),
        "runqueues": address(rq.address_of_()),
        "curr_pid": number(rq.curr.pid),
        "curr": address(rq.curr),
        "curr_comm": text(rq.curr.comm),
        "idle": address(rq.idle),
        "nr_running": number(rq.nr_running),
        "nr_switches": number(rq.nr_switches),
        "clock": number(rq.clock),
        "current_task": attempt(
            lambda: address(
                first(
                    lambda: percpu.per_cpu(prog["pcpu_hot"], cpu).current_task,
                    lambda: percpu.per_cpu(prog["current_task"], cpu),
                )
            )
        ),
        "cpu_number": attempt(
            lambda: number(
                first(
                    lambda: percpu.per_cpu(prog["pcpu_hot"], cpu).cpu_number,
                    lambda: percpu.per_cpu(prog["cpu_number"], cpu),
                )
            )
        ),
        "fair": attempt(lambda: [number(task.pid) for task in sched.rq_for_each_fair_task(rq.address_of_())]),
    }


def stacks(prog):
    """Of the tasks that do not run: pc and name of every frame."""
    found = []
    for task in pid.for_each_task(prog):
        if number(task.on_cpu):
            continue
        frames = attempt(
            lambda task=task: [
                {"pc": f"{frame.pc:#x}", "name": frame.name} for frame in prog.stack_trace(task)
            ]
        )
        found.append({"pid": number(task.pid), "comm": text(task.comm), "frames": frames})
    return found


# Modules, the log, interrupts, timers


def section_addresses(mod):
    """.text and the like, as the kernel keeps them for sysfs."""
    attributes = mod.sect_attrs
    count = first(lambda: number(attributes.nsections), lambda: null_terminated(attributes.grp.bin_attrs))
    found = {}
    for i in range(count):
        attribute = attributes.attrs[i]
        found[first(lambda: text(attribute.battr.attr.name), lambda: text(attribute.attr.name))] = first(
            lambda: address(attribute.address), lambda: address(attribute.private)
        )
    return found


def null_terminated(array):
    return next(i for i in itertools.count() if not array[i])


def module_facts(prog, mod):
    name = text(mod.name)
    percpu_base, percpu_size = module.module_percpu_region(mod)
    regions = module.module_address_regions(mod)
    return {
        "name": name,
        "module": address(mod),
        "state": number(mod.state),
        "regions": [[f"{start:#x}", size] for start, size in regions],
        "size": sum(size for _, size in regions),
        "percpu": f"{percpu_base:#x}",
        "percpu_size": percpu_size,
        "sections": attempt(lambda: section_addresses(mod)),
        "taints": attempt(lambda: module.module_taints(mod)),
        "taints_raw": attempt(lambda: number(mod.taints)),
        # The kernel's own count is one more: the module holds itself.
        "refcount": attempt(lambda: number(mod.refcnt.counter) - 1),
        "build_id": attempt(lambda: build_id(prog, mod)),
        "users": attempt(
            lambda: [
                text(use.source.name)
                for use in lists.list_for_each_entry("struct module_use", mod.source_list.address_of_(), "source_list")
            ]
        ),
    }


def build_id(prog, mod):
    try:
        return bytes(mod.build_id.value_()).hex()
    except AttributeError:
        return prog.linux_kernel_loadable_module(mod, create=False).build_id.hex()


def modules(prog):
    return [attempt(lambda mod=mod: module_facts(prog, mod)) for mod in module.for_each_module(prog)]


def log(prog):
    return [
        {
            "seq": record.seq,
            "ts_nsec": record.timestamp,
            "level": record.level,
            "facility": record.facility,
            "caller_tid": record.caller_tid,
            "caller_cpu": record.caller_cpu,
            "text": record.text.decode(errors="backslashreplace"),
        }
        for record in printk.get_printk_records(prog)
    ]


def irqs(prog):
    possible = list(cpumask.for_each_possible_cpu(prog))
    found = []
    for number_, desc in irq.for_each_irq_desc(prog):
        found.append(
            {
                "irq": number_,
                "desc": address(desc),
                "chip": attempt(lambda desc=desc: (irq.irq_desc_chip_name(desc) or b"").decode()),
                "actions": attempt(lambda desc=desc: [name.decode() for name in irq.irq_desc_action_names(desc)]),
                "counts": attempt(lambda desc=desc: [int(irq.irq_desc_kstat_cpu(desc, cpu)) for cpu in possible]),
            }
        )
    return found


def timers(prog):
    found = []
    names = timer.timer_base_names(prog)
    for cpu in cpumask.for_each_possible_cpu(prog):
        for base in range(len(names)):
            for one in timer.timer_base_for_each(percpu.per_cpu(prog["timer_bases"], cpu)[base].address_of_()):
                found.append(
                    {
                        "cpu": cpu,
                        "base": base,
                        "timer": address(one),
                        "expires": number(one.expires),
                        "function": symbol_name(prog, one.function),
                    }
                )
    return found


def hrtimers(prog):
    found = []
    for cpu in cpumask.for_each_possible_cpu(prog):
        base = percpu.per_cpu(prog["hrtimer_bases"], cpu)
        for i in range(len(base.clock_base)):
            for one in timer.hrtimer_clock_base_for_each(base.clock_base[i].address_of_()):
                found.append(
                    {
                        "cpu": cpu,
                        "base": i,
                        "timer": address(one),
                        "expires": number(one.node.expires),
                        "function": symbol_name(prog, one.function),
                    }
                )
    return found


# Slab


def cache_facts(prog, cache):
    usage = attempt(lambda: slab.slab_cache_usage(cache))
    facts = {
        "name": text(cache.name),
        "cache": address(cache),
        "object_size": number(cache.object_size),
        "size": number(cache.size),
        "flags": address(cache.flags),
        "refcount": number(cache.refcount),
        "align": number(cache.align),
        "order": attempt(lambda: int(slab.slab_cache_order(cache))),
        "objects_per_slab": attempt(lambda: int(slab.slab_cache_objects_per_slab(cache))),
    }
    if isinstance(usage, dict):
        return facts | {"usage": usage}
    return facts | {
        "slabs": int(usage.num_slabs),
        "objects": int(usage.num_objs),
        "free": int(usage.free_objs),
        "active": int(usage.active_objs),
        "cpus": [attempt(lambda cpu=cpu: cpu_slab(cache, cpu)) for cpu in cpumask.for_each_possible_cpu(prog)],
        "nodes": attempt(lambda: node_facts(cache)),
    }


def cpu_slab(cache, cpu):
    """What a CPU holds of a cache: its slab, its free list's head, its partial slabs; newer kernels have sheaves."""
    if not has_member(cache, "cpu_slab"):
        own = percpu.per_cpu_ptr(cache.cpu_sheaves, cpu)
        return {"cpu": cpu, "sheaves": {name: sheaf(getattr(own, name)) for name in ("main", "spare", "rcu_free")}}
    own = percpu.per_cpu_ptr(cache.cpu_slab, cpu)
    current = first(lambda: own.slab, lambda: own.page)
    partial = attempt(lambda: chain(own.partial))
    return {"cpu": cpu, "freelist": address(own.freelist), "slab": address(current), "partial": partial}


def has_member(thing, name):
    try:
        getattr(thing, name)
        return True
    except AttributeError:
        return False


def sheaf(pointer):
    """How many objects it holds, and which; null for none."""
    if not pointer:
        return None
    return {"sheaf": address(pointer), "objects": [address(pointer.objects[i]) for i in range(number(pointer.size))]}


def chain(pointer):
    found = []
    while pointer and len(found) < LONGEST_LIST:
        found.append(address(pointer))
        pointer = pointer.next
    return found


def node_facts(cache):
    node = first(lambda: cache.node[0], lambda: cache.per_node[0].node)
    slab_type, member = first(
        lambda: (cache.prog_.type("struct slab"), "slab_list"), lambda: (cache.prog_.type("struct page"), "slab_list")
    )
    return {
        "nr_partial": number(node.nr_partial),
        "nr_slabs": number(node.nr_slabs.counter),
        "total_objects": number(node.total_objects.counter),
        "partial": [
            address(one) for one in lists.list_for_each_entry(slab_type, node.partial.address_of_(), member)
        ],
    }


def slabs(prog):
    return [attempt(lambda cache=cache: cache_facts(prog, cache)) for cache in slab.for_each_slab_cache(prog)]


# Files, mounts, devices


def mounts(prog):
    return [
        {
            "mount": address(mount),
            "superblock": address(mount.mnt.mnt_sb),
            "fstype": attempt(lambda mount=mount: fs.mount_fstype(mount).decode()),
            "devname": attempt(lambda mount=mount: fs.mount_src(mount).decode()),
            "path": attempt(lambda mount=mount: fs.mount_dst(mount).decode()),
        }
        for mount in fs.for_each_mount(prog)
    ]


def file_facts(fd, file):
    if not file:
        # accept() takes its number first and waits then.
        return {"fd": fd, "file": "0x0"}
    inode = file.f_inode
    return {
        "fd": fd,
        "file": address(file),
        "inode": attempt(lambda: address(inode)),
        "ino": attempt(lambda: number(inode.i_ino)),
        "mode": attempt(lambda: f"{number(inode.i_mode):#o}"),
        "fstype": attempt(lambda: text(inode.i_sb.s_type.name)),
        "path": attempt(lambda: fs.d_path(file.f_path).decode(errors="backslashreplace")),
        "pos": attempt(lambda: number(file.f_pos)),
        "flags": attempt(lambda: address(file.f_flags)),
    }


def files(prog):
    return {
        str(number(task.pid)): attempt(
            lambda task=task: [
                attempt(lambda fd=fd, file=file: file_facts(fd, file)) for fd, file in fs.for_each_file(task)
            ]
        )
        for task in pid.for_each_task(prog)
        if task.pid == task.tgid and task.files
    }


def swaps(prog):
    return [
        {
            "info": address(info),
            "file": attempt(lambda info=info: swap.swap_file_path(info).decode()),
            "pages": number(info.pages),
            "used": attempt(lambda info=info: int(swap.swap_usage_in_pages(info))),
        }
        for info in swap.for_each_swap_info(prog)
    ]


def netdevs(prog):
    return [
        {"name": net.netdev_name(device).decode(), "device": address(device), "ifindex": number(device.ifindex)}
        for device in net.for_each_netdev(prog["init_net"].address_of_())
    ]


# Address translation


def follow(space, at):
    """Physical address, or null where nothing is mapped."""
    try:
        return f"{number(mm.follow_phys(space, at)):#x}"
    except drgn.FaultError:
        return None


def translate(kind, space, addresses, pid_=None):
    return [
        {"kind": kind, "pid": pid_, "virtual": f"{at:#x}", "physical": attempt(lambda at=at: follow(space, at))}
        for at in itertools.islice(addresses, TRANSLATIONS_OF_A_KIND)
    ]


def user_addresses(space):
    for vma in mm.for_each_vma(space):
        start, end = number(vma.vm_start), number(vma.vm_end)
        yield start
        if end - start > 0x1000:
            yield end - 0x1000 + 0x123
        if end - start >= 4 << 20:
            yield ((start + (2 << 20) - 1) & ~((2 << 20) - 1)) + 0x12345


def translations(prog):
    kernel = prog["init_mm"].address_of_()
    names = ["_text", "init_task", "linux_banner", "runqueues", "swapper_pg_dir", "jiffies", "panic", "schedule"]
    names += ["vfs_read", "kmalloc_caches", "sys_call_table", "__per_cpu_offset", "init_net", "empty_zero_page"]
    image = [prog.symbol(name).address for name in names if symbol_exists(prog, name) and name != "runqueues"]
    found = translate("image", kernel, [*image, *(at + 0x1234 for at in image)])
    direct = (number(task) for task in pid.for_each_task(prog))
    found += translate("direct", kernel, direct)
    areas = (number(area.va_start) + skip for area in mm.for_each_vmap_area(prog) for skip in (0, 0x1000))
    found += translate("vmalloc", kernel, areas)
    sections = (
        int(at, 16) + 8 for mod in module.for_each_module(prog) for at in list(section_addresses(mod).values())[:3]
    )
    found += translate("module", kernel, (at for at in sections if at >= 1 << 63))
    for task in with_memory(prog):
        try:
            found += translate("user", task.mm, user_addresses(task.mm), number(task.pid))
        except drgn.FaultError:
            continue  # its list of mappings was not dumped
    return found


def symbol_exists(prog, name):
    try:
        return bool(prog.symbol(name))
    except LookupError:
        return False


SECTIONS = {
    "tasks": tasks,
    "cpus": cpus,
    "modules": modules,
    "log": log,
    "slabs": slabs,
    "mounts": mounts,
    "files": files,
    "swaps": swaps,
    "netdevs": netdevs,
    "irqs": irqs,
    "timers": timers,
    "hrtimers": hrtimers,
    "translations": translations,
    "stacks": stacks,
}


def facts_of(path, debug_files):
    try:
        prog, how, missing = open_dump(path, debug_files)
    except Exception as error:  # noqa: BLE001
        return {"refused": f"{type(error).__name__}: {error}"}
    facts = {
        "release": attempt(lambda: prog["UTS_RELEASE"].string_().decode()),
        "vmcoreinfo": how,
        "missing_debug_info": missing,
        "errors": {},
        "seconds": {},
    }
    for name, section in SECTIONS.items():
        start = time.monotonic()
        value = attempt(lambda section=section: section(prog))
        facts["seconds"][name] = round(time.monotonic() - start, 3)
        if isinstance(value, dict) and set(value) == {"error"}:
            facts["errors"][name] = value["error"]
        else:
            facts[name] = value
    return facts


def main():
    path, *debug_files = sys.argv[1:]
    facts = {"who": f"drgn {importlib.metadata.version('drgn')}"}
    facts |= facts_of(path, debug_files)
    json.dump(facts, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
