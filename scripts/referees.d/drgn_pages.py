"""What drgn says of the pages of memory: counts over all of them, and samples of every kind.

drgn has no such census. Kinds come from the kernel's own lists where there are some (free pages, per-CPU pages,
page tables, huge pages, vmalloc), else from struct page.
"""

import bisect
import collections
import itertools
import struct

import drgn
from drgn.helpers.linux import cpumask, hugetlb, list as lists, mm, percpu, slab
from drgn.helpers.linux.boot import pgtable_l5_enabled
from drgn_common import address, attempt, first, number, symbol_name, text, with_memory

SAMPLES = 24  # of each kind


class Pages:
    """Every struct page of the dump, read in bulk; rows are (pfn, fields)."""

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
        self.refcount = self._offset("_refcount")
        self.mapcount = self._offset("_mapcount")
        self.mapping = self._offset("mapping")
        self.head = self._offset("compound_head", "compound_info")
        self.memcg = self._offset("memcg_data", "mem_cgroup", missing=None)

    def _offset(self, *names, missing=drgn):
        for name in names:
            try:
                return drgn.offsetof(self.page, name)
            except LookupError:
                pass
        if missing is drgn:
            raise LookupError(f"struct page has no {' or '.join(names)}")
        return missing

    def rows(self):
        """(pfn, page address, bytes)"""
        for start, end, base, data in self.ranges:
            for i in range(end - start):
                yield start + i, base + (start + i) * self.size, data[i * self.size : (i + 1) * self.size]

    def row(self, pfn):
        for start, end, base, data in self.ranges:
            if start <= pfn < end:
                at = (pfn - start) * self.size
                return pfn, base + pfn * self.size, data[at : at + self.size]
        return None

    def pfn(self, page):
        for start, end, base, _ in self.ranges:
            pfn, rest = divmod(page - base, self.size)
            if start <= pfn < end and rest == 0:
                return pfn
        return None

    def word(self, row, offset):
        return struct.unpack_from("<Q", row[2], offset)[0]

    def signed(self, row, offset):
        return struct.unpack_from("<i", row[2], offset)[0]

    def has(self, row, *names):
        flags = self.word(row, 0)
        return any(name in self.flag_bits and flags >> self.flag_bits[name] & 1 for name in names)

    def is_tail(self, row):
        return bool(self.word(row, self.head) & 1)

    def head_pfn(self, row):
        """Newer kernels keep a mask here and not the head's address: then drgn is asked, which is slow."""
        pointed = self.pfn(self.word(row, self.head) & ~1)
        if pointed is not None:
            return pointed
        return self.pfn(number(mm.compound_head(drgn.Object(self.prog, "struct page *", row[1]))))

    def is_head(self, row):
        return self.has(row, "head") and not self.is_tail(row)


def sampled(found, kind, row):
    rows = found.setdefault(kind, [])
    if len(rows) < SAMPLES:
        rows.append(row)


def page_facts(pages, row):
    prog = pages.prog
    pfn, at, _ = row
    page = drgn.Object(prog, "struct page *", at)
    flags = pages.word(row, 0)
    head = number(mm.compound_head(page))
    facts = {
        "pfn": pfn,
        "page": f"{at:#x}",
        "physical": f"{pfn << 12:#x}",
        "flags": f"{flags:#x}",
        "flag_bits": [bit for bit in sorted(set(pages.flag_bits.values())) if flags >> bit & 1],
        "drgn_flags": attempt(lambda: mm.decode_page_flags(page)),
        "refcount": pages.signed(row, pages.refcount),
        "mapcount_raw": pages.signed(row, pages.mapcount),
        "mapping": f"{pages.word(row, pages.mapping):#x}",
        "index": attempt(lambda: int(number(first(lambda: page.index, lambda: getattr(page, "__folio_index"))))),
        "head": f"{head:#x}",
        "head_pfn": pages.pfn(head),
        "order": attempt(lambda: int(mm.compound_order(drgn.Object(prog, "struct page *", head)))),
    }
    if pages.memcg is not None:
        facts["memcg_data"] = f"{pages.word(row, pages.memcg):#x}"
    return facts


def slab_of(pages, row):
    """The cache that owns a slab's page, as drgn finds it from an address inside."""
    virtual = mm.pfn_to_virt(pages.prog, row[0])
    cache = slab.find_containing_slab_cache(virtual)
    return {"name": text(cache.name), "cache": address(cache)} if cache else None


def mapping_kind(pages, row, known):
    """What page->mapping leads to: remembered, for few mappings have many pages."""
    mapping = pages.word(row, pages.mapping)
    low = mapping & 3
    if low == 1:
        return "anon"
    if low == 3:
        return "ksm"
    if low == 2 or mapping < 1 << 63:
        return None
    if mapping not in known:
        known[mapping] = attempt(lambda: backing(pages.prog, mapping))
    return known[mapping]


def backing(prog, mapping):
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


def page_census(prog):
    """Counts over all pages, and samples of each kind with everything drgn says of them."""
    pages = Pages(prog)
    buddy, pcp = free_pages(prog, pages)
    tables = attempt(lambda: table_pages(prog))
    huge = attempt(lambda: huge_pages(prog, pages))
    found, mappings, slab_heads, errors = {}, {}, {}, {}
    counts = {"pages": 0, "heads": 0, "tails": 0, "anon": 0, "ksm": 0, "file": 0, "shmem": 0, "swapcache": 0}
    flag_counts = dict.fromkeys(pages.flag_bits, 0)
    free = sorted(buddy)
    for row in pages.rows():
        pfn = row[0]
        counts["pages"] += 1
        flags = pages.word(row, 0)
        if pages.is_tail(row):
            counts["tails"] += 1
            head = pages.row(pages.head_pfn(row) or 0)
            if head and mapping_kind(pages, head, mappings) == "anon" and not slab_page(pages, head):
                sampled(found, "anon_thp_tail", row)
            elif head and slab_page(pages, head):
                sampled(found, "slab_tail", row)
            continue
        for name, bit in pages.flag_bits.items():
            if flags >> bit & 1:
                flag_counts[name] += 1
        if pages.is_head(row):
            counts["heads"] += 1
        if in_free_block(pfn, free, buddy):
            sampled(found, "buddy" if pfn in buddy else "buddy_inside", row)
            continue
        if pfn in pcp:
            sampled(found, "pcp", row)
            continue
        if slab_page(pages, row):
            sampled(found, "slab_head" if pages.is_head(row) else "slab", row)
            continue
        if pages.has(row, "reserved"):
            sampled(found, "reserved", row)
            continue
        kind = mapping_kind(pages, row, mappings) if page_is_lru_like(pages, row) else None
        if kind in ("anon", "ksm"):
            counts[kind] += 1
            sampled(found, "anon_thp_head" if kind == "anon" and pages.is_head(row) else kind, row)
        elif isinstance(kind, dict) and "fstype" in kind:
            backed = "shmem" if kind["fstype"] in ("tmpfs", "devtmpfs", "rootfs", "ramfs") else "file"
            counts[backed] += 1
            sampled(found, backed if not pages.has(row, "dirty") else f"{backed}_dirty", row)
        if pages.has(row, "swapcache") and pages.has(row, "swapbacked") and kind == "anon":
            counts["swapcache"] += 1
            sampled(found, "swapcache", row)
        if pages.has(row, "mlocked"):
            sampled(found, "mlocked", row)
        if pages.memcg is not None and pages.word(row, pages.memcg) and kind:
            sampled(found, "memcg", row)
    for kind, wanted in (("page_table", tables), ("hugetlb", huge)):
        if isinstance(wanted, dict) and "error" in wanted:
            errors[kind] = wanted["error"]
            continue
        for pfn in wanted:
            row = pages.row(pfn)
            if row:
                sampled(found, kind, row)
    for pfn in itertools.islice(vmalloc_pfns(prog, pages), SAMPLES):
        sampled(found, "vmalloc", pages.row(pfn))
    zero = attempt(lambda: pages.row(number(mm.virt_to_pfn(prog["empty_zero_page"].address_of_()))))
    if isinstance(zero, tuple):
        sampled(found, "zero", zero)
    samples = {
        kind: [
            page_facts(pages, row)
            | ({"slab": attempt(lambda row=row: slab_of(pages, row))} if kind.startswith("slab") else {})
            | ({"buddy_order": buddy[row[0]]} if kind == "buddy" else {})
            | ({"pcp_cpu": pcp[row[0]]} if kind == "pcp" else {})
            | ({"table_level": tables[row[0]]} if kind == "page_table" else {})
            for row in rows
        ]
        for kind, rows in found.items()
    }
    counts["flags"] = flag_counts
    counts["buddy_blocks"] = dict(sorted(collections.Counter(str(order) for order in buddy.values()).items()))
    counts["buddy_pages"] = sum(1 << order for order in buddy.values())
    counts["pcp_pages"] = len(pcp)
    counts["hugetlb"] = len(huge) if isinstance(huge, list) else huge
    return {
        "struct_page_size": pages.size,
        "flag_bits": pages.flag_bits,
        "ranges": [[start, end, f"{base:#x}"] for start, end, base, _ in pages.ranges],
        "counts": counts,
        "samples": samples,
        "errors": errors,
    }


def in_free_block(pfn, free, buddy):
    at = bisect.bisect_right(free, pfn) - 1
    return at >= 0 and pfn < free[at] + (1 << buddy[free[at]])


def slab_page(pages, row):
    """A flag up to 6.9 or so, a page type since."""
    if "slab" in pages.flag_bits:
        return pages.has(row, "slab")
    kind = struct.unpack_from("<I", row[2], pages.mapcount)[0]
    return kind >> 24 == pages.prog["PGTY_slab"].value_()


def page_is_lru_like(pages, row):
    """Whether page->mapping is a mapping: page tables, typed pages and others overlay it."""
    return pages.signed(row, pages.mapcount) >= -1 and pages.signed(row, pages.refcount) > 0
