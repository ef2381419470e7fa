"""A guest that keeps running, for the demo and for tests of live debugging."""

import contextlib
import os
import shutil
import signal
import time

import initramfs
import kernels
from common import LAB, LabError, read_json, say, step, write_json
from machine import Machine, Qmp, boots_again

LIVE = LAB / "live"
BOOT_TIMEOUT = 300
STOP_TIMEOUT = 20


def _directory(name):
    return LIVE / name


def _alive(description):
    """Whether the QEMU of a description still runs: the process, not a later one with its number."""
    try:
        with open(f"/proc/{description['pid']}/cmdline", "rb") as file:
            return description["qmp"].encode() in file.read()
    except OSError:
        return False


def _description(name):
    path = _directory(name) / "guest.json"
    return read_json(path) if path.exists() else None


@boots_again
def start(kernel_spec, name, levels, memory, smp, vmcoreinfo):
    """Boots a guest in the background, waits until it is ready, and says how to reach it."""
    running = _description(name)
    if running and _alive(running):
        raise LabError(
            f"a guest called {name} runs already (pid {running['pid']})",
            f"stop it: scripts/lab guest --stop --name {name}",
        )
    kernel = kernels.fetch(kernel_spec)
    images = initramfs.build(kernel)
    directory = _directory(name)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    cmdline = "console=ttyS0 panic=0"
    ram = directory / "ram"
    machine = Machine(
        directory,
        kernel / "vmlinuz",
        images / "base.cpio",
        cmdline,
        memory=memory,
        smp=smp,
        cpu="max" if levels == 5 else "max,la57=off",
        vmcoreinfo=vmcoreinfo,
        serial=False,
        machine_properties=",memory-backend=ram",
    )
    sockets = machine.sockets
    machine.argv += [
        # RAM in a shared file: what kstub maps to read a live guest.
        "-object",
        f"memory-backend-file,id=ram,size={memory},mem-path={ram},share=on",
        "-qmp",
        f"unix:{sockets}/qmp-kstub,server=on,wait=off",
        "-gdb",
        f"unix:{sockets}/gdb,server=on,wait=off",
        "-chardev",
        f"socket,id=console,path={sockets}/console,server=on,wait=off,logfile={machine.console}",
        "-serial",
        "chardev:console",
    ]
    release = kernels.info(kernel)["release"]
    description = {
        "name": name,
        "kernel": kernel_spec,
        "release": release,
        "vmlinux": str(kernel / "vmlinux"),
        "modules": str(kernel / "lib/modules" / release),
        "cmdline": cmdline,
        "page_table_levels": levels,
        "smp": smp,
        "memory": memory,
        "vmcoreinfo_device": vmcoreinfo,
        "directory": str(directory),
        "ram": str(ram),
        "qmp": f"{sockets}/qmp-kstub",
        "gdb": f"{sockets}/gdb",
        "console": f"{sockets}/console",
        "console_log": str(machine.console),
        "facts": str(directory / "facts"),
    }
    try:
        with step(f"guest {name} ({release})"):
            machine.start(keep=True)
            description["pid"] = machine.process.pid
            write_json(directory / "guest.json", description)
            machine.wait_for("KSTUB-GUEST-READY", BOOT_TIMEOUT)
            machine.unpack_facts()
    except BaseException:
        machine.kill()
        raise
    machine.qmp.close()
    _explain(description)


def _explain(description):
    name = description["name"]
    say(f"""guest {name} is ready: Linux {description["release"]}, pid {description["pid"]}
  QMP      {description["qmp"]}
  gdbstub  {description["gdb"]}
  console  {description["console"]}   (a shell; log: {description["console_log"]})
  RAM      {description["ram"]}
  vmlinux  {description["vmlinux"]}
  facts    {description["facts"]}   (what the guest says of itself)
  all of it as JSON: {description["directory"]}/guest.json
stop it: scripts/lab guest --stop --name {name}""")


def dump(name, path, dump_format):
    """Dumps a running guest through QEMU, which stops it for that long; its vmlinux is linked beside the dump."""
    description = _description(name)
    if not description or not _alive(description):
        raise LabError(f"no guest called {name} runs", "start it: scripts/lab guest")
    path = os.path.abspath(path)
    with step(f"dump of guest {name} ({dump_format})"):
        qmp = Qmp(description["qmp"])
        qmp.command("dump-guest-memory", paging=False, protocol=f"file:{path}", format=dump_format)
        qmp.close()
    vmlinux = os.path.join(os.path.dirname(path), f"vmlinux-{description['release']}")
    if not os.path.lexists(vmlinux):
        os.symlink(description["vmlinux"], vmlinux)
    say(f"  {path}")


def stop(name):
    """Ends a guest of this lab; none running is fine."""
    description = _description(name)
    if not description:
        say(f"no guest called {name} was started")
        return
    if _alive(description):
        with contextlib.suppress(OSError, LabError, ValueError):
            Qmp(description["qmp"], timeout=2).command("quit", timeout=5)
        deadline = time.monotonic() + STOP_TIMEOUT
        while _alive(description) and time.monotonic() < deadline:
            time.sleep(0.1)
        if _alive(description):
            os.kill(description["pid"], signal.SIGKILL)
    shutil.rmtree(os.path.dirname(description["qmp"]), ignore_errors=True)
    shutil.rmtree(description["directory"], ignore_errors=True)
    say(f"guest {name} stopped")


def running():
    """Descriptions of the guests that run now."""
    found = [read_json(path) for path in sorted(LIVE.glob("*/guest.json"))]
    return [description for description in found if _alive(description)]
