"""A QEMU process that is always cleaned up, its QMP socket, its console and its disks."""

import ctypes
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from common import LabError, make_sparse, run, warn

QEMU = "qemu-system-x86_64"
PR_SET_PDEATHSIG = 1
FACTS_DISK_SIZE = 128 << 20
PAGES_DISK_SIZE = 256 << 20
FAILURE_MARKERS = ("KSTUB-GUEST-FAILED",)
# Up to version 8.0, QEMU may run an int3 on one emulated CPU when another has put the instruction back already, while a guest
# boots and changes its own code; once in some hundred boots the guest dies of that.
DEATH_MARKER = "int3: 0000 [#"
BOOTS = 3


class DiedOfQemu(LabError):
    """A guest died of its QEMU, not of what it was told to do."""


def boots_again(make):
    """Has `make` begin again if its guest died of its QEMU."""

    @functools.wraps(make)
    def wrapper(*arguments, **options):
        for left in reversed(range(BOOTS)):
            try:
                return make(*arguments, **options)
            except DiedOfQemu as error:
                if not left:
                    raise
                warn(f"another boot after: {error}")

    return wrapper


class Qmp:
    """QEMU's monitor protocol: one JSON object a line."""

    def __init__(self, path, timeout=30):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(timeout)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rwb")
        json.loads(self.file.readline())
        self.command("qmp_capabilities")

    def command(self, name, timeout=600, **arguments):
        """Sends a command, skips events, and returns what the command returned."""
        self.socket.settimeout(timeout)
        self.file.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self.file.flush()
        while True:
            line = self.file.readline()
            if not line:
                raise LabError(f"QEMU went away during {name}", "see qemu.log beside the console log")
            answer = json.loads(line)
            if "error" in answer:
                raise LabError(f"QMP {name}: {answer['error']['desc']}", "report this with the QEMU version")
            if "return" in answer:
                return answer["return"]

    def human(self, text):
        """A command of the human monitor."""
        return self.command("human-monitor-command", **{"command-line": text}).replace("\r\n", "\n")

    def close(self):
        self.socket.close()


def _die_with_parent():
    """In the child: QEMU must not outlive the lab, even when the lab is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Machine:
    """One guest. Its files (console.log, qemu.log, disks) lie in `directory`."""

    def __init__(
        self,
        directory,
        kernel,
        initrd,
        cmdline,
        *,
        memory,
        cpu="max",
        smp=4,
        vmcoreinfo=False,
        vmcore_disk=0,
        serial=True,
        facts=True,
        machine_properties="",
    ):
        self.directory = Path(directory)
        self.console = self.directory / "console.log"
        self.facts_disk = self.directory / "facts.disk"
        self.pages_disk = self.directory / "pages.disk"
        self.vmcore_disk = self.directory / "vmcore.disk"
        # A socket's path has a small limit, whatever $LAB is.
        self.sockets = Path(tempfile.mkdtemp(prefix="kstub-lab."))
        self.process = None
        self.qmp = None
        self.argv = [
            QEMU,
            "-no-user-config",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-machine",
            f"q35{machine_properties}",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            cpu,
            "-smp",
            str(smp),
            "-m",
            memory,
            "-kernel",
            str(kernel),
            "-initrd",
            str(initrd),
            "-append",
            cmdline,
            "-qmp",
            f"unix:{self.sockets}/qmp,server=on,wait=off",
        ]
        if facts:
            self.argv += self._disk(self.facts_disk, "facts", FACTS_DISK_SIZE)
            self.argv += self._disk(self.pages_disk, "pages", PAGES_DISK_SIZE)
        if vmcore_disk:
            self.argv += self._disk(self.vmcore_disk, "vmcore", vmcore_disk)
        if vmcoreinfo:
            self.argv += ["-device", "vmcoreinfo"]
        if serial:
            self.argv += ["-serial", f"file:{self.console}"]

    @staticmethod
    def _disk(path, serial, size):
        with open(path, "wb") as file:
            file.truncate(size)
        return [
            "-drive",
            f"file={path},format=raw,if=none,id={serial}",
            "-device",
            f"virtio-blk-pci,drive={serial},serial={serial}",
        ]

    def start(self, keep=False):
        """Starts QEMU; with `keep` it outlives this process."""
        self.console.touch()
        with open(self.directory / "qemu.log", "wb") as log:
            self.process = subprocess.Popen(
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=keep,
                preexec_fn=None if keep else _die_with_parent,
            )
        deadline = time.monotonic() + 30
        while not self.qmp:
            try:
                self.qmp = Qmp(self.sockets / "qmp")
            except OSError as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise LabError(f"QEMU did not start:\n{self._qemu_log()}", "run: scripts/lab packages") from error
                time.sleep(0.1)

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_):
        self.kill()
        self.facts_disk.unlink(missing_ok=True)
        self.pages_disk.unlink(missing_ok=True)
        self.vmcore_disk.unlink(missing_ok=True)

    def kill(self):
        if self.qmp:
            self.qmp.close()
        if self.process:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.sockets, ignore_errors=True)

    def _qemu_log(self):
        path = self.directory / "qemu.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def console_text(self):
        return self.console.read_bytes().decode(errors="replace").replace("\r", "")

    def wait_for(self, marker, timeout, count=1):
        """Waits until `marker` is `count` times on the console; gives up on time, exit or failure."""
        deadline = time.monotonic() + timeout
        while True:
            gone = self.process.poll() is not None
            text = self.console_text()
            if text.count(marker) >= count:
                return text
            if DEATH_MARKER in text:
                raise DiedOfQemu(f"the guest died of a race in QEMU ({DEATH_MARKER})", "use QEMU 8.1 or newer, or try again")
            problem = None
            if any(failure in text for failure in FAILURE_MARKERS):
                problem = "the guest says that it failed"
            elif gone:
                problem = f"QEMU ended\n{self._qemu_log()}"
            elif time.monotonic() > deadline and not text:
                raise DiedOfQemu(f"nothing has come from the guest within {timeout} s", "use a newer QEMU, or try again")
            elif time.monotonic() > deadline:
                problem = f"no {marker} within {timeout} s"
            if problem:
                tail = "\n".join(text.splitlines()[-15:])
                raise LabError(
                    f"{problem}; the console's last lines:\n{tail}", f"the whole console is in {self.console}"
                )
            time.sleep(0.25)

    def wait_exit(self, timeout):
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"the guest did not power off within {timeout} s", f"see {self.console}") from error

    def unpack_facts(self):
        """The tar the guest wrote on its facts disk, as a directory of the same name."""
        (self.directory / "facts").mkdir()
        run(["tar", "-x", "-f", self.facts_disk, "-C", self.directory / "facts"])
        self._unpack_page_truth()

    def _unpack_page_truth(self):
        """What page-truth wrote on its disk, as the files of /proc it was read from."""
        with open(self.pages_disk, "rb") as disk:
            for line in disk.read(4096).rstrip(b"\0").decode().splitlines():
                name, offset, size = line.split()
                disk.seek(int(offset))
                path = self.directory / "facts/proc" / name
                path.write_bytes(disk.read(int(size)))
                make_sparse(path)

    def registers(self):
        return self.qmp.human("info registers -a")

    def stop_where(self, wanted, tries=100, others_halt=False, others_calm=False):
        """Stops the guest at a moment when each CPU in `wanted` runs at the given privilege level, with interrupts on,
        and no other CPU does anything if `others_halt`, or is in the midst of an interrupt or of a switch of tasks if
        `others_calm`.

        A stop comes at any instruction; the busy programs' CPUs are in a timer interrupt
        some of the time. Returns the registers of that very moment.
        """
        for _ in range(tries):
            self.qmp.command("stop")
            text = self.registers()
            levels = {int(cpu): int(level) for cpu, level in re.findall(r"CPU#(\d+)\n.*?CPL=(\d)", text, re.DOTALL)}
            flags = {int(cpu): int(flags, 16) for cpu, flags in re.findall(r"CPU#(\d+)\n.*?RFL=([0-9a-f]+)", text, re.DOTALL)}
            halted = {int(cpu): halt == "1" for cpu, halt in re.findall(r"CPU#(\d+)\n.*?HLT=(\d)", text, re.DOTALL)}
            as_wanted = all(levels.get(cpu) == level and flags.get(cpu, 0) & 0x200 for cpu, level in wanted.items())
            others = [cpu for cpu in levels if cpu not in wanted]
            halt = all(halted[cpu] for cpu in others)
            calm = all(halted[cpu] or flags[cpu] & 0x200 for cpu in others)
            if as_wanted and (halt or not others_halt) and (calm or not others_calm):
                return text
            self.qmp.command("cont")
            time.sleep(0.2)
        raise LabError(f"no moment found with CPUs at privilege levels {wanted}", "run it again on an idle machine")

    def memory_ranges(self):
        """Guest RAM in physical address space, merged: [(first, last + 1)]."""
        text = self.qmp.human("info mtree -f")
        view = text[text.index(' AS "memory"') :].split("FlatView")[0]
        found = re.findall(r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|rom)\): pc\.ram", view, re.MULTILINE)
        merged = []
        for first, last in sorted((int(a, 16), int(b, 16) + 1) for a, b in found):
            if merged and merged[-1][1] == first:
                merged[-1] = (merged[-1][0], last)
            else:
                merged.append((first, last))
        return merged

    def save_memory(self, first, size, path):
        self.qmp.command("pmemsave", val=first, size=size, filename=os.fspath(path))

    def dump(self, path, dump_format, paging=False):
        arguments = {"paging": paging, "protocol": f"file:{path}"}
        if dump_format != "elf":
            arguments["format"] = dump_format
        self.qmp.command("dump-guest-memory", **arguments)

    def dump_formats(self):
        return self.qmp.command("query-dump-guest-memory-capability")["formats"]
