"""What crash says of a dump, as JSON on standard output.

  crash_facts.py CRASH DUMP VMLINUX MODULES_DIRECTORY [DRGN_FACTS...]

A referee, not the truth: a dump that crash refuses gives {"refused": reason}. What is easy to take apart
is under a name of its own; what crash printed is under "raw". With DRGN_FACTS (the JSON of drgn_facts.py and
pages_facts.py) crash is asked about the same pages and addresses.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TIMEOUT = 600
PAGES = 240
OF_SLABS = 60
# Whose slabs are shown object by object: one with a red zone or constructor each, small, large, of a module.
CACHES = ["kmalloc-64", "dentry", "task_struct", "filp", "mm_struct", "kstub_cache", "kstub_constructed"]
ADDRESSES_OF_A_KIND = 12
# File name -> command. `kmem -s` walks every slab, so it comes last: a crash that dies in it has told the rest.
COMMANDS = {
    "sys": "sys",
    "ps": "ps",
    "mod": "mod",
    "log": "log -T",
    "runq": "runq",
    "mount": "mount",
    "irq": "irq",
    "timer": "timer",
    "swap": "swap",
    "net": "net",
    "dev": "dev",
    "mach": "mach",
    "files": "foreach user files",
    "kmem_f": "kmem -f",
    "kmem_z": "kmem -z",
    "kmem_v": "kmem -v",
    "kmem_o": "kmem -o",
    "kmem_i": "kmem -i",
    "kmem_V": "kmem -V",
    "kmem_h": "kmem -h",
    **{f"kmem_S_{name}": f"kmem -S {name}" for name in CACHES},
    "kmem_s": "kmem -s",
}


def questions(drgn_facts):
    """More commands: the pages and addresses that drgn was asked about."""
    found = {}
    rows = drgn_facts.get("pages", [])
    whole = [row for row in rows if row["slab"] is True or "buddy" in row["lists"]]
    for command, some in (("kmem -p", spread(rows, PAGES)), ("kmem", spread(whole, OF_SLABS))):
        for row in some:
            found[f"page_{row['pfn']:x}"] = f"{command} {row['page'][2:]}"
    seen = {}
    for row in drgn_facts.get("translations", []):
        kind = (row["kind"], row["pid"])
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] > ADDRESSES_OF_A_KIND:
            continue
        # `set` and not `-c`: it takes the same number for every vtop that follows.
        where = f"-c {row['pid']} " if row["pid"] else ""
        found[f"vtop_{len(found)}_{row['pid'] or 0}_{row['virtual']}"] = f"vtop {where}{row['virtual'][2:]}"
    return found


def spread(all_of_them, count):
    """So many of them, from the first to the last."""
    if len(all_of_them) <= count:
        return all_of_them
    return [all_of_them[i * (len(all_of_them) - 1) // (count - 1)] for i in range(count)]


def ask(crash, dump, vmlinux, modules, commands):
    """Runs crash once; returns (texts by name, what crash said on the way)."""
    with tempfile.TemporaryDirectory(prefix="kstub-crash.") as work:
        lines = [f"mod -S {modules} > {work}/mod_load"]
        lines += [f"{command} > {work}/{name}" for name, command in commands.items()]
        script = Path(work, "commands")
        script.write_text("\n".join([*lines, "quit", ""]), encoding="utf-8")
        argv = [crash, "-s", "--no_scroll", "-i", script, vmlinux, dump]
        try:
            result = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TIMEOUT,
                check=False,
                cwd=work,
            )
            said = result.stdout.decode(errors="backslashreplace")
        except subprocess.TimeoutExpired:
            said = f"crash did not end within {TIMEOUT} s"
        texts = {}
        for name in commands:
            path = Path(work, name)
            if path.exists():
                texts[name] = path.read_bytes().decode(errors="backslashreplace")
        return texts, said


def tasks(text):
    """   PID    PPID  CPU       TASK        ST  %MEM      VSZ      RSS  COMM, active ones marked with >"""
    row = re.compile(
        r"^(>?)\s+(\d+)\s+(\d+)\s+(\d+)\s+([0-9a-f]{8,})\s+(\S+)\s+([\d.]+)\s+(\d+)\s+(\d+)\s+(.*)$", re.MULTILINE
    )
    return [
        {
            "active": bool(active),
            "pid": int(pid),
            "ppid": int(ppid),
            "cpu": int(cpu),
            "task": f"0x{task}",
            "state": state,
            "vsz_kb": int(vsz),
            "rss_kb": int(rss),
            "comm": comm.strip("[]"),
            "kthread": comm.startswith("["),
        }
        for active, pid, ppid, cpu, task, state, _, vsz, rss, comm in row.findall(text)
    ]


def modules(text):
    row = re.compile(r"^\s*([0-9a-f]{16})\s+(\S+)\s+([0-9a-f]{16})\s+(\d+)\s", re.MULTILINE)
    return [
        {"module": f"0x{module}", "name": name, "base": f"0x{base}", "size": int(size)}
        for module, name, base, size in row.findall(text)
    ]


def slabs(text):
    """CACHE             OBJSIZE  ALLOCATED     TOTAL  SLABS  SSIZE  NAME"""
    row = re.compile(r"^([0-9a-f]{16})\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)k\s+(\S+)", re.MULTILINE)
    return [
        {
            "cache": f"0x{cache}",
            "object_size": int(size),
            "allocated": int(allocated),
            "total": int(total),
            "slabs": int(count),
            "slab_kb": int(kilobytes),
            "name": name,
        }
        for cache, size, allocated, total, count, kilobytes, name in row.findall(text)
    ]


def slab_problems(text):
    return [line for line in text.splitlines() if line.startswith("kmem:")]


def page(text):
    """The row of `kmem -p`, and of `kmem` for a slab or a free block also whose it is."""
    found = {}
    row = re.search(
        r"^\s*([0-9a-f]{16})\s+([0-9a-f]+)\s+([0-9a-f]+)\s+([0-9a-f]+)\s+(-?\d+)\s+([0-9a-f]+)[ \t]*(.*)$",
        text.partition("      PAGE")[2],
        re.MULTILINE,
    )
    if row:
        names = ("page", "physical", "mapping", "index")
        found = {name: f"0x{value}" for name, value in zip(names, row.groups(), strict=False)}
        found |= {"refcount": int(row[5]), "flags": f"0x{row[6]}", "flag_names": row[7].split(",") if row[7] else []}
    cache = slabs(text)
    if cache:
        found["slab"] = cache[0]["name"]
    return found


def physical(text):
    """Of vtop: the physical address, null when crash says that it is not mapped."""
    found = re.search(r"VIRTUAL\s+PHYSICAL\s*\n[0-9a-f]+\s+(\S+)", text)
    if not found:
        return {"error": text.strip().splitlines()[-1] if text.strip() else "no answer"}
    return f"0x{found[1]}" if re.fullmatch("[0-9a-f]+", found[1]) else None


def zones(text):
    """kmem -z: size, watermarks and counters of each zone that has memory"""
    found = {}
    for part in text.split("NODE: ")[1:]:
        name = re.search(r'NAME: "([^"]*)"', part)
        size = re.search(r"SIZE: (\d+)(?:\s+PRESENT: (\d+))?\s+MIN/LOW/HIGH: (\d+)/(\d+)/(\d+)", part)
        if name and size:
            spanned, present, *marks = size.groups()
            found[name[1]] = {
                "spanned": int(spanned),
                "present": int(present) if present else None,
                "watermarks": [int(mark) for mark in marks],
                "counters": {key: int(value) for key, value in re.findall(r"^\s*(NR_\w+): (-?\d+)$", part, re.M)},
            }
    return found


def free_blocks(text):
    """kmem -f: blocks by order of each zone"""
    found = {}
    for part in re.split(r"^ZONE  NAME", text, flags=re.M)[1:]:
        name = re.search(r"^\s*\d+\s+(\S+)\s+\d+\s+\d+ ", part, re.M)
        if not name:
            continue
        blocks = {}
        for order, count in re.findall(r"^\s*(\d+)\s+\d+k\s+[0-9a-f]+\s+(\d+)\s+\d+\s*$", part, re.M):
            blocks[order] = blocks.get(order, 0) + int(count)
        found[name[1]] = blocks
    return found


def counters(text):
    """kmem -V"""
    return {name: int(value) for name, value in re.findall(r"^\s*([A-Z][A-Z0-9_]+): (-?\d+)\s*$", text, re.M)}


def huge_pools(text):
    """kmem -h:      HSTATE        SIZE    FREE   TOTAL  NAME"""
    row = re.compile(r"^\s*([0-9a-f]{16})\s+\S+\s+(\d+)\s+(\d+)\s+(\S+)$", re.MULTILINE)
    return {name: {"free": int(free), "total": int(total)} for _, free, total, name in row.findall(text)}


def objects(text):
    """kmem -S: objects of each slab, behind "FREE / [ALLOCATED]"; behind a free one may stand whose it is"""
    found = {}
    for part in text.split("FREE / [ALLOCATED]")[1:]:
        for line in part.splitlines()[1:]:
            row = re.match(r"^\s+(\[?)([0-9a-f]{16})\]?(?:  \(cpu \d+ cache\))?$", line)
            if not row:
                break
            found[f"0x{row[2]}"] = bool(row[1])
    return found


def usage(text):
    """kmem -i: PAGES by name"""
    return {
        name.strip(): int(pages)
        for name, pages in re.findall(r"^\s*([A-Z][A-Z ]+?)\s{2,}(\d+)\s", text, re.MULTILINE)
    }


def system(text):
    return {key.strip(): value for key, value in re.findall(r"^\s*([A-Z ]+): (.*)$", text, re.MULTILINE)}


def parse(texts):
    facts = {
        "system": system(texts.get("sys", "")),
        "tasks": tasks(texts.get("ps", "")),
        "modules": modules(texts.get("mod", "")),
        "slabs": slabs(texts.get("kmem_s", "")),
        "slab_problems": slab_problems(texts.get("kmem_s", "")),
        "memory_pages": usage(texts.get("kmem_i", "")),
        "zones": zones(texts.get("kmem_z", "")),
        "free_blocks": free_blocks(texts.get("kmem_f", "")),
        "counters": counters(texts.get("kmem_V", "")),
        "huge_pools": huge_pools(texts.get("kmem_h", "")),
        "objects": {name: objects(texts.get(f"kmem_S_{name}", "")) for name in CACHES},
        "pages": {},
        "translations": [],
        "raw": {},
    }
    for name, text in texts.items():
        if name.startswith("page_"):
            facts["pages"][str(int(name[5:], 16))] = page(text)
        elif name.startswith("vtop_"):
            _, _, pid, virtual = name.split("_")
            facts["translations"].append({"pid": int(pid) or None, "virtual": virtual, "physical": physical(text)})
        elif not name.startswith("kmem_S_"):
            facts["raw"][name] = text
    return facts


def main():
    crash, dump, vmlinux, module_directory, *more = sys.argv[1:]
    version = subprocess.run([crash, "--version"], stdout=subprocess.PIPE, text=True, check=False).stdout
    facts = {"who": version.strip().splitlines()[0] if version.strip() else "crash"}
    drgn_facts = {}
    for path in more:
        drgn_facts |= json.loads(Path(path).read_text(encoding="utf-8"))
    start = time.monotonic()
    texts, said = ask(crash, dump, vmlinux, module_directory, COMMANDS | questions(drgn_facts))
    if texts.get("sys"):
        facts |= parse(texts)
        facts["said"] = said.strip()
    else:
        lines = [line for line in said.strip().splitlines() if line.strip()]
        facts["refused"] = " | ".join(lines[-5:]) or "no answer"
    facts["seconds"] = round(time.monotonic() - start, 1)
    json.dump(facts, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
