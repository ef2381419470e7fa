"""What stacks crash sees in a dump, as JSON on standard output.

  crash_stacks_facts.py CRASH DUMP VMLINUX MODULES_DIRECTORY

{"tasks": {ADDRESS: {"pid", "comm", "cpu", "frames": [{"pc", "symbol"}], "user": whether it ends with user registers,
"notes": lines that are none of these}}}, frames innermost first.
"""

import json
import re
import sys

from crash_facts import ask

HEADING = re.compile(r'PID: (\d+)\s+TASK: ([0-9a-f]+)\s+CPU: (\d+)\s+COMMAND: "(.*)"')
FRAME = re.compile(r"\s*#\d+ \[([0-9a-f]+)\] (\S+) at ([0-9a-f]+)")
EXCEPTION = re.compile(r"\s*\[exception RIP: (\S+?)(?:\+\d+)?\]")
USER = re.compile(r"CS: (0033|0023)")


def parse(output):
    found, task = {}, None
    for line in output.splitlines():
        if match := HEADING.match(line):
            task = {"pid": int(match[1]), "comm": match[4], "cpu": int(match[3]), "frames": [], "user": False, "notes": []}
            found[f"0x{match[2]}"] = task
        elif task is None:
            continue
        elif match := FRAME.match(line):
            task["frames"].append({"pc": f"0x{match[3]}", "symbol": match[2]})
        elif match := EXCEPTION.match(line):
            task["frames"].append({"pc": None, "symbol": match[1]})
        elif USER.search(line):
            task["user"] = True
        elif line.strip() and not re.match(r"\s+(R|ORIG_RAX|CS)", line):
            task["notes"].append(line.strip())
    return found


def main():
    crash, dump, vmlinux, modules = sys.argv[1:]
    texts, said = ask(crash, dump, vmlinux, modules, {"bt": "foreach bt", "active": "bt -a"})
    found = parse(texts.get("bt", ""))
    found.update(parse(texts.get("active", "")))
    json.dump({"tasks": found} if found else {"refused": said}, sys.stdout)


if __name__ == "__main__":
    main()
