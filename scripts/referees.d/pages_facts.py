"""What drgn says of the pages of memory, as JSON on standard output.

  pages_facts.py DUMP VMLINUX [MODULE.ko.debug...]

Apart from drgn_facts.py because it takes as long as all the rest. drgn has no census of pages: samples are taken of
every combination of flags, type, count and mapping that occurs, and from the kernel's own lists where there are some
(free pages, per-CPU pages, page tables, huge pages, vmalloc). Addresses are hexadecimal text, all else numbers.
"""

import collections
import importlib.metadata
import json
import struct
import sys
import time

import drgn
from drgn.helpers.linux import cpumask, hugetlb, list as lists, mm, percpu, slab, vmstat
from drgn.helpers.linux.boot import pgtable_l5_enabled
from drgn_common import address, attempt, first, number, open_dump, symbol_name, text, with_memory

SAMPLES = 10  # of each combination
LISTED = 60  # from each of the kernel's lists
SLABS = 160
OBJECTS = 4  # of each slab


class Pages:
    """Every struct page of the dump, read in bulk."""

    def __init__(self, prog):
        self.prog = prog
        self.page = prog.type("struct page")
        self.size = drgn.sizeof(self.page)
        self.flag_bits = {
            enumerator.name.removeprefix("PG_"): enumerator.value
            for enumerator in prog.type("enum pageflags").enumerators
            if not enumerator.name.startswith("__")
        }
        self.ranges = []
        for start, end, mem_map in mm.for_each_valid_page_range(prog):
            base = number(mem_map)
            try:
                data = prog.read(base + start * self.size, (end - start) * self.size)
            except drgn.FaultError:
                continue
            self.ranges.append((start, end, base, data))
        self.refcount = drgn.offsetof(self.page, "_refcount")
        self.mapcount = drgn.offsetof(self.page, "_mapcount")
        self.mapping = drgn.offsetof(self.page, "mapping")
        self.head = first(
            lambda: drgn.offsetof(self.page, "compound_head"), lambda: drgn.offsetof(self.page, "compound_info")
        )
        self.memcg = first(
            lambda: drgn.offsetof(self.page, "memcg_data"),
            lambda: drgn.offsetof(self.page, "mem_cgroup"),
            lambda: None,
        )

    def kinds(self):
        """pfns by what the page looks like: flags by name, tail or not, type, counts, mapping."""
        named = sum(1 << bit for bit in set(self.flag_bits.values()))
        found = collections.defaultdict(list)
        words = self.size // 8
        for start, _, _, data in self.ranges:
            for pfn, row in enumerate(struct.iter_unpack(f"<{words}Q", data), start):
                counts = row[self.mapcount // 8]
                mapped, references = counts & 0xFFFFFFFF, counts >> 32
                mapping = row[self.mapping // 8]
                found[
                    row[0] & named,
                    row[self.head // 8] & 1,
                    mapped >> 24 if mapped >> 31 and mapped != 0xFFFFFFFF else min(mapped + 1 & 0xFFFFFFFF, 3),
                    min(references, 3),
                    mapping & 3 if mapping >> 63 else None,
                ].append(pfn)
        return found

    def row(self, pfn):
        for start, end, base, data in self.ranges:
            if start <= pfn < end:
                at = (pfn - start) * self.size
                return base + pfn * self.size, data[at : at + self.size]
        return None

    def pfn(self, page):
        for start, end, base, _ in self.ranges:
            pfn, rest = divmod(page - base, self.size)
            if start <= pfn < end and rest == 0:
                return pfn
        return None


def spread(all_of_them, count):
    """So many of them, from the first to the last."""
    if len(all_of_them) <= count:
        return list(all_of_them)
    return [all_of_them[i * (len(all_of_them) - 1) // (count - 1)] for i in range(count)]


def page_facts(pages, pfn):
    prog = pages.prog
    at, data = pages.row(pfn)
    page = drgn.Object(prog, "struct page *", at)
    word = lambda offset: struct.unpack_from("<Q", data, offset)[0]
    flags = word(0)
    head = number(mm.compound_head(page))
    order = attempt(lambda: int(mm.compound_order(drgn.Object(prog, "struct page *", head))))
    facts = {
        "pfn": pfn,
        "page": f"{at:#x}",
        "physical": f"{number(mm.page_to_phys(page)):#x}",
        "virtual": f"{number(mm.page_to_virt(page)):#x}",
        "flags": f"{flags:#x}",
        "flag_names": attempt(lambda: sorted(mm.decode_page_flags(page).replace("PG_", "").split("|"))),
        "refcount": struct.unpack_from("<i", data, pages.refcount)[0],
        "mapcount": struct.unpack_from("<i", data, pages.mapcount)[0],
        "mapping": f"{word(pages.mapping):#x}",
        "index": attempt(lambda: number(mm.page_index(page))),
        "head_pfn": pages.pfn(head),
        "order": order,
        "slab": attempt(lambda: bool(mm.PageSlab(drgn.Object(prog, "struct page *", head)))),
    }
    if order and isinstance(order, int):
        facts["entire_mapcount"] = attempt(lambda: entire_mapcount(prog, head, pages.size))
    if pages.memcg is not None:
        facts["memcg_data"] = f"{word(pages.memcg):#x}"
    return facts


def entire_mapcount(prog, head, size):
    return 1 + first(
        lambda: number(drgn.Object(prog, "struct folio *", head)._entire_mapcount.counter),
        lambda: number(drgn.Object(prog, "struct page *", head + size).compound_mapcount.counter),
    )


def cache_of(prog, pfn):
    """The cache that owns a slab's page, as drgn finds it from an address inside."""
    cache = slab.find_containing_slab_cache(mm.pfn_to_virt(prog, pfn))
    return {"name": text(cache.name), "cache": address(cache)} if cache else None


def backing(prog, mapping):
    """What page->mapping leads to, where that is a file."""
    space = drgn.Object(prog, "struct address_space *", mapping)
    return {
        "inode": address(space.host),
        "ino": number(space.host.i_ino),
        "fstype": text(space.host.i_sb.s_type.name),
        "swap": symbol_name(prog, space.a_ops) == "swap_aops",
    }


def free_pages(prog, pages):
    """pfn of the first page of each free block, with its order, from the zones' own lists; and of the per-CPU lists."""
    buddy, pcp = {}, {}
    node = first(lambda: prog["node_data"][0], lambda: prog["contig_page_data"].address_of_())
    for z in range(number(node.nr_zones)):
        zone = node.node_zones[z]
        for order in range(len(zone.free_area)):
            for heads in zone.free_area[order].free_list:
                for page in lists.list_for_each_entry("struct page", heads.address_of_(), "lru"):
                    buddy[pages.pfn(number(page))] = order
        for cpu in cpumask.for_each_possible_cpu(prog):
            own = first(
                lambda: percpu.per_cpu_ptr(zone.per_cpu_pageset, cpu),
                lambda: percpu.per_cpu_ptr(zone.pageset, cpu).pcp,
            )
            for heads in own.lists:
                # struct page has pcp_list in its union where it is not lru.
                for page in lists.list_for_each_entry("struct page", heads.address_of_(), "lru"):
                    pcp[pages.pfn(number(page))] = cpu
    return buddy, pcp


def table_pages(prog):
    """pfn -> level of page tables reached from some tasks' roots; level 1 is a page of PTEs."""
    levels = 5 if pgtable_l5_enabled(prog) else 4
    found = {}
    for task in with_memory(prog):
        root = number(mm.virt_to_phys(task.mm.pgd)) >> 12
        pending = [(root, levels)]
        while pending:
            pfn, level = pending.pop()
            if pfn in found:
                continue
            found[pfn] = level
            if level == 1:
                continue
            entries = struct.unpack("<512Q", prog.read(pfn << 12, 4096, True))
            # Of the root only the user half: the kernel half is shared and has other kinds of pages.
            for entry in entries[:256] if level == levels else entries:
                if entry & 1 and not entry & 0x80:
                    pending.append(((entry & 0xFFFFFFFFFF000) >> 12, level - 1))
    return found


def huge_pages(prog, pages):
    found = []
    for state in hugetlb.for_each_hstate(prog):
        heads = [state.hugepage_activelist, *state.hugepage_freelists]
        kind, member = first(
            lambda: (prog.type("struct folio"), "lru"), lambda: (prog.type("struct page"), "lru")
        )
        for head in heads:
            found += [pages.pfn(number(one)) for one in lists.list_for_each_entry(kind, head.address_of_(), member)]
    return found


def vmalloc_pfns(prog, pages):
    for area in mm.for_each_vmap_area(prog):
        vm = first(lambda: area.vm, lambda: drgn.NULL(prog, "struct vm_struct *"))
        if vm and vm.pages:
            for i in range(number(vm.nr_pages)):
                yield pages.pfn(number(vm.pages[i]))


def listed(prog, pages):
    """Pages that the kernel's lists tell of: {list: {pfn: what the list says}}, and what went wrong."""
    free = attempt(lambda: free_pages(prog, pages))
    found = {
        "buddy": free[0] if isinstance(free, tuple) else free,
        "pcp": free[1] if isinstance(free, tuple) else free,
        "table": attempt(lambda: table_pages(prog)),
        "hugetlb": attempt(lambda: dict.fromkeys(huge_pages(prog, pages), 0)),
        "vmalloc": attempt(lambda: dict.fromkeys(vmalloc_pfns(prog, pages), 0)),
    }
    errors = {name: value["error"] for name, value in found.items() if "error" in value}
    return {name: value for name, value in found.items() if name not in errors}, errors


def mapped(prog, at):
    """pfn behind a kernel address, by the page tables: virt_to_pfn() is right for the direct map only."""
    return number(mm.follow_phys(prog["init_mm"].address_of_(), at)) >> 12


def kernel_tables(prog):
    """pfns of the page tables that map the kernel's half."""
    root = mapped(prog, number(prog["init_mm"].pgd))
    found, pending = {}, [(root, 5 if pgtable_l5_enabled(prog) else 4)]
    while pending:
        pfn, level = pending.pop()
        if pfn in found:
            continue
        found[pfn] = level
        if level > 1:
            entries = struct.unpack("<512Q", prog.read(pfn << 12, 4096, True))
            for entry in entries[256:] if pfn == root else entries:
                if entry & 1 and not entry & 0x80:
                    pending.append(((entry & 0xFFFFFFFFFF000) >> 12, level - 1))
    return sorted(found)


def ftrace_pages(prog):
    """First and last page of each piece of ftrace's records."""
    group = prog["ftrace_pages_start"]
    found = []
    while group:
        records = number(group.records)
        size = first(
            lambda: 4096 << number(group.order),
            lambda: number(group.size) * drgn.sizeof(prog.type("struct dyn_ftrace")),
        )
        found += [number(mm.virt_to_pfn(prog, at)) for at in (records, records + size - 1)]
        group = group.next.read_()
    return found


def holders(prog, pages):
    """Pages that no struct page tells the use of, by who holds them: {kind: [pfn]}"""
    names = ("init_task", "linux_banner", "vfs_read", "init_net")
    structs = [base + pfn * pages.size for start, end, base, _ in pages.ranges for pfn in range(start, end, 977)]
    own = lambda cpu: number(percpu.per_cpu(prog["runqueues"], cpu).address_of_())
    return {
        "kernel-image": [mapped(prog, prog.symbol(name).address) for name in names],
        "vmemmap": attempt(lambda: [mapped(prog, at) for at in structs]),
        "percpu": attempt(lambda: [mapped(prog, own(cpu)) for cpu in cpumask.for_each_possible_cpu(prog)]),
        "zero": attempt(lambda: [mapped(prog, prog.symbol("empty_zero_page").address)]),
        "ftrace": attempt(lambda: ftrace_pages(prog)),
        "page-table": attempt(lambda: spread(kernel_tables(prog), LISTED)),
    }


def objects(prog, pages, kinds):
    """Objects of some slabs: where each begins, of which cache it is, whether it is in use."""
    slabs = sorted(
        pfn
        for rows in kinds.values()
        if not pages.row(rows[0])[1][pages.head] & 1
        and mm.PageSlab(drgn.Object(prog, "struct page *", pages.row(rows[0])[0]))
        for pfn in rows
    )
    found = []
    for pfn in spread(slabs, SLABS):
        virtual = number(mm.pfn_to_virt(prog, pfn))
        info = slab.slab_object_info(prog, virtual)
        if not info:
            continue
        size, count = number(info.slab_cache.size), number(info.slab.objects)
        for i in spread(range(count), OBJECTS):
            # A few bytes behind the beginning: of an object that has a red zone before it, too.
            at = virtual + i * size + size // 2
            info = slab.slab_object_info(prog, at)
            found.append(
                {
                    "at": f"{at:#x}",
                    "object": f"{info.address:#x}",
                    "cache": text(info.slab_cache.name),
                    "allocated": info.allocated,
                }
            )
    return found


def counters(prog):
    kinds = [
        ("zone", "enum zone_stat_item", "NR_VM_ZONE_STAT_ITEMS", vmstat.global_zone_page_state),
        ("node", "enum node_stat_item", "NR_VM_NODE_STAT_ITEMS", vmstat.global_node_page_state),
        ("event", "enum vm_event_item", "NR_VM_EVENT_ITEMS", vmstat.global_vm_event_state),
    ]
    found = {}
    for name, kind, end, read in kinds:
        values = {e.name: e.value for e in prog.type(kind).enumerators}
        found[name] = {
            item: attempt(lambda read=read, value=value: int(read(prog, value)))
            for item, value in values.items()
            if value < values[end]
        }
    return found


def zones(prog):
    node = first(lambda: prog["node_data"][0], lambda: prog["contig_page_data"].address_of_())
    found = []
    for zone in node.node_zones:
        found.append(
            {
                "name": text(zone.name),
                "at": address(zone.address_of_()),
                "start_pfn": number(zone.zone_start_pfn),
                "spanned": number(zone.spanned_pages),
                "present": number(zone.present_pages),
                "managed": number(zone.managed_pages.counter),
                "watermarks": [number(mark) for mark in zone._watermark][:3],
                "nr_free": [number(area.nr_free) for area in zone.free_area],
                "counters": [number(one.counter) for one in zone.vm_stat],
            }
        )
    return found


def facts_of(prog):
    start = time.monotonic()
    pages = Pages(prog)
    kinds = pages.kinds()
    seconds = {"kinds": round(time.monotonic() - start, 3)}
    by_list, errors = listed(prog, pages)
    seconds["lists"] = round(time.monotonic() - start, 3)
    wanted = {pfn for rows in kinds.values() for pfn in spread(rows, SAMPLES)}
    for rows in by_list.values():
        wanted.update(pfn for pfn in spread(sorted(pfn for pfn in rows if pfn is not None), LISTED))
    known, rows = {}, []
    for pfn in sorted(pfn for pfn in wanted if pages.row(pfn)):
        row = page_facts(pages, pfn)
        row["lists"] = {name: rows[pfn] for name, rows in by_list.items() if pfn in rows}
        mapping = int(row["mapping"], 16)
        if row["slab"] is True:
            row["cache"] = attempt(lambda pfn=pfn: cache_of(prog, pfn))
        # Of pages that are on an LRU list, the word is a mapping; others have something else there.
        elif mapping >> 63 and not mapping & 3 and "lru" in row["flag_names"]:
            if mapping not in known:
                known[mapping] = attempt(lambda mapping=mapping: backing(prog, mapping))
            row["file"] = known[mapping]
        rows.append(row)
    seconds["pages"] = round(time.monotonic() - start, 3)
    facts = {
        "release": attempt(lambda: prog["UTS_RELEASE"].string_().decode()),
        "struct_page_size": pages.size,
        "flag_bits": pages.flag_bits,
        "listed": {name: len(rows) for name, rows in by_list.items()},
        "pages": rows,
        "holders": attempt(lambda: holders(prog, pages)),
        "objects": attempt(lambda: objects(prog, pages, kinds)),
        "counters": attempt(lambda: counters(prog)),
        "zones": attempt(lambda: zones(prog)),
        "possible_and_not_online": sorted(
            set(cpumask.for_each_possible_cpu(prog)) - set(cpumask.for_each_online_cpu(prog))
        ),
        "errors": errors,
    }
    seconds["all"] = round(time.monotonic() - start, 3)
    return facts | {"seconds": seconds}


def main():
    path, *debug_files = sys.argv[1:]
    facts = {"who": f"drgn {importlib.metadata.version('drgn')}"}
    try:
        prog, how, _ = open_dump(path, debug_files)
    except Exception as error:  # noqa: BLE001
        facts["refused"] = f"{type(error).__name__}: {error}"
    else:
        facts |= {"vmcoreinfo": how} | facts_of(prog)
    json.dump(facts, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
