"""The kernel's commands inside gdb, for a gdb that is connected to kstub.

`kstub gdb` loads this file; by hand: `source kstub.py` behind `target remote`. Needs gdb 13 or newer with Python.

Every command of kstub becomes a command of gdb: `ps`, `log`, `page $rdi`, `struct task_struct p`. Unlike
`monitor page $rdi`, which gdb sends as typed, arguments are evaluated in the selected frame first, and the
CPU is that of the selected thread, `thread apply all` included. A name that gdb itself has stays gdb's; kstub's is
then behind the prefix: `kstub list`, `kstub p`.

Functions:  $percpu(&VAR, CPU)   $page(ADDR)   $task(PID)
Python:     import kstub; kstub.run("ps"), kstub.read_many([(addr, len)]), kstub.tasks(), kstub.modules(),
            kstub.pages([addr, ...]), kstub.objects("struct page", [addr, ...])

The kernel's own scripts (vmlinux-gdb.py), loaded before or after, get from kstub where per-CPU variables are
($lx_per_cpu, $lx_current, lx-timerlist), and lx-symbols leaves alone what kstub has told gdb.
"""

import importlib.machinery
import json
import os
import re
import sys
import types

import gdb
import gdb.FrameDecorator
import gdb.unwinder

# What gdb's own users type every day stays gdb's, abbreviations included.
GDBS_OWN = {"dis", "dump", "info", "help", "list", "p", "set", "whatis", "x"}
# The whole line is one expression for these, once options are off.
ONE_EXPRESSION = {"page", "why"}
# For these gdb must wait longer than for a packet.
LONG = {"dump"}
OPTIONS_WITH_VALUE = {"-c", "-n"}
# Bytes that one packet may ask for and bring.
REQUEST_MAX, READ_MAX = 32 * 1024, 2 << 20
U64 = (1 << 64) - 1
# Threads from here on are tasks, those below CPUs.
FIRST_TASK = 1000000000


def send(packet):
    """kstub's answer to one packet of its own."""
    connection = gdb.selected_inferior().connection
    if not isinstance(connection, gdb.RemoteTargetConnection):
        raise gdb.GdbError("not connected to kstub; use 'target remote' first")
    answer = connection.send_packet(packet) or b""
    # Nothing is also what a command with nothing to say answers.
    if not answer and not connection.send_packet("qkstub.supported"):
        raise gdb.GdbError("the remote side is not kstub")
    if re.fullmatch(rb"E[0-9a-f]{2}", answer):
        raise gdb.GdbError("kstub refused the request: errno %d" % int(answer[1:], 16))
    return answer


def thread_id(cpu):
    """The thread that a command is for: a CPU's, else the selected one."""
    if cpu is not None:
        return "%x" % (int(cpu) + 1)
    thread = gdb.selected_thread()
    return "" if thread is None else "%x" % thread.ptid[1]


def ask(kind, line, cpu):
    """Runs a command for a CPU, or the selected thread; its text or its JSON."""
    request = "qkstub.%s:%s:%s" % (kind, thread_id(cpu), line.encode().hex())
    return bytes.fromhex(send(request).decode()).decode("utf-8", "replace")


def run(line, cpu=None):
    """What a command answers, as Python values: `run("ps")["tasks"][0]["pid"]`."""
    answer = json.loads(ask("run", line, cpu))
    if "error" in answer:
        raise gdb.GdbError(answer["error"])
    return answer["result"]


def read_many(pieces):
    """The bytes of many pieces of memory `(address, length)`, in a few packets; shorter where it cannot be read."""
    found, batch, asked, wanted = [], [], 0, 0

    def flush():
        if batch:
            answer = send(b"qkstub.read:" + b";".join(batch))
            found.extend(bytes.fromhex(field.decode()) for field in answer.split(b";"))
        batch.clear()

    for address, length in pieces:
        if length > READ_MAX:
            raise ValueError("a piece of more than %d bytes; ask for smaller ones" % READ_MAX)
        text = b"%x,%x" % (address & U64, length)
        if asked + len(text) > REQUEST_MAX or wanted + length > READ_MAX:
            flush()
            asked = wanted = 0
        batch.append(text)
        asked += len(text) + 1
        wanted += length
    flush()
    return found


def objects(type_name, addresses):
    """`(address, value)` for each address whose memory can be read; values are complete, nothing is read later."""
    kind = gdb.lookup_type(type_name)
    addresses = [int(address) & U64 for address in addresses]
    for address, data in zip(addresses, read_many((address, kind.sizeof) for address in addresses)):
        if len(data) == kind.sizeof:
            yield address, gdb.Value(data, kind)


def tasks():
    """Every task: `(address, struct task_struct)`."""
    return objects("struct task_struct", (int(task["task"], 16) for task in run("ps")["tasks"]))


def modules():
    """Every loaded module: `(address, struct module)`."""
    return objects("struct module", (int(module["module"], 16) for module in run("mod")["modules"]))


def pages(addresses):
    """`(address of the struct page, struct page)` of each address: virtual, or of a struct page."""
    found = (run("page %#x" % (int(address) & U64)) for address in addresses)
    return objects("struct page", (int(page["page"], 16) for page in found))


def address_of(value):
    """The number that an expression stands for, as kstub should hear it."""
    value = value.referenced_value() if value.type.code == gdb.TYPE_CODE_REF else value
    code = value.type.strip_typedefs().code
    if code in (gdb.TYPE_CODE_STRUCT, gdb.TYPE_CODE_UNION, gdb.TYPE_CODE_ARRAY, gdb.TYPE_CODE_FUNC):
        value = value.address
    return int(value) & U64


def evaluated(text):
    """An expression's value in the selected frame, in hex; the text itself where it means nothing to gdb."""
    try:
        number = address_of(gdb.parse_and_eval(text))
    except (gdb.error, TypeError, ValueError):
        return text
    # Of a per-CPU variable gdb knows the template only; kstub knows the copies.
    return text if is_template(number) else "%#x" % number


def is_template(number):
    """Whether an address is in what the CPUs' copies of per-CPU variables are made of."""
    try:
        start, end = (int(gdb.parse_and_eval("&__per_cpu_" + name)) & U64 for name in ("start", "end"))
    except gdb.error:
        return False
    return start < end and start <= number < end


def per_cpu_argument(words):
    """What 'percpu' is asked: kstub knows per-CPU variables, the selected frame the rest, whose type is needed, too."""
    options = []
    while words and words[0].startswith("-"):
        options.append(words.pop(0))
    cpus = [words.pop()] if len(words) > 1 and re.fullmatch(r"a|all|[0-9][-,0-9]*", words[-1]) else []
    text = " ".join(words)
    try:
        # Of a per-CPU variable gdb knows the template only.
        known = re.search(r"\$\w", text) or gdb.lookup_symbol(re.match(r"\w*", text)[0])[0].needs_frame
        value = gdb.parse_and_eval(text) if known else None
    except (gdb.error, AttributeError):
        value = None
    if value is not None and value.type.strip_typedefs().code == gdb.TYPE_CODE_PTR:
        text = "(%s)%#x" % (value.type.unqualified(), address_of(value))
    return " ".join(options + [text] + cpus)


def prepare(command, argument):
    """The command line to send: what the selected frame knows is put in."""
    words = gdb.string_to_argv(argument)
    if command in ONE_EXPRESSION:
        options = []
        while words and words[0].startswith("-"):
            options.append(words.pop(0))
            if options[-1] in OPTIONS_WITH_VALUE and words:
                options.append(words.pop(0))
        rest = " ".join(words)
        # kstub's own spellings (pfn:12, phys:1000) and plain numbers, which are hexadecimal, go as they are.
        plain = not rest or re.fullmatch(r"[a-z]+:\S+|(0x)?[0-9a-fA-F]+", rest)
        return " ".join([command, *options, rest if plain else evaluated(rest)])
    if command == "percpu":
        return " ".join([command, per_cpu_argument(words)])
    # Elsewhere only what cannot be a name or an option: registers, dereferences, addresses of locals.
    is_expression = re.compile(r"\$\w|->|^&|^\(|^\*\(")
    return " ".join([command] + [evaluated(word) if is_expression.search(word) else word for word in words])


def say(command, argument):
    """Prints what a command answers."""
    if command in LONG:
        gdb.execute("with remotetimeout 86400 -- monitor %s %s" % (command, argument))
    else:
        gdb.write(ask("text", prepare(command, argument), None))


class KernelCommand(gdb.Command):
    """A command of kstub's, in gdb."""

    def __init__(self, name, shown, summary):
        self.__doc__ = summary
        self.name = name
        super().__init__(shown, gdb.COMMAND_DATA)

    def invoke(self, argument, from_tty):
        say(self.name, argument)


class Prefix(gdb.Command):
    """Commands of kstub's, by their own names: kstub COMMAND [ARGUMENTS]. 'kstub help' lists them."""

    def __init__(self):
        super().__init__("kstub", gdb.COMMAND_DATA, prefix=True)

    def invoke(self, argument, from_tty):
        name, _, rest = (argument or "help").partition(" ")
        say(name, rest)


def copy_of(pointer, cpu):
    """The address of a CPU's own copy of a per-CPU variable of the kernel image, as a pointer."""
    start = int(gdb.parse_and_eval("&__per_cpu_start")) & U64
    for one in run("info")["cpus"]:
        if one["cpu"] == int(cpu):
            if one["per_cpu_base"] is None:
                raise gdb.GdbError("where CPU %d has its per-CPU data is not known" % int(cpu))
            address = ((int(pointer) & U64) - start + int(one["per_cpu_base"], 16)) & U64
            return gdb.Value(address).cast(pointer.type)
    raise gdb.GdbError("there is no CPU %d" % int(cpu))


class PerCpu(gdb.Function):
    """$percpu(&VAR, CPU): address of the CPU's own copy of a per-CPU variable of the kernel image."""

    def __init__(self):
        super().__init__("percpu")

    def invoke(self, pointer, cpu):
        return copy_of(pointer, cpu)


class Page(gdb.Function):
    """$page(ADDR): the struct page of an address."""

    def __init__(self):
        super().__init__("page")

    def invoke(self, address):
        found = int(run("page %#x" % address_of(address))["page"], 16)
        return gdb.Value(found).cast(gdb.lookup_type("struct page").pointer())


class Task(gdb.Function):
    """$task(PID): the struct task_struct of a pid."""

    def __init__(self):
        super().__init__("task")

    def invoke(self, pid):
        found = run("ps %d" % int(pid))["tasks"]
        if not found:
            raise gdb.GdbError("there is no task with pid %d" % int(pid))
        return gdb.Value(int(found[0]["task"], 16)).cast(gdb.lookup_type("struct task_struct").pointer())


class Frames(gdb.unwinder.Unwinder):
    """The frames that gdb gets wrong, as kstub found them: entry code and stack switches, which no call frame
    information describes or describes rightly, and code of which gdb has none at all."""

    def __init__(self):
        super().__init__("kstub")
        self.known = {}
        gdb.events.cont.connect(self.forget)
        gdb.events.exited.connect(self.forget)

    def forget(self, event=None):
        """What runs has other frames later."""
        self.known.clear()

    def of(self, frame):
        """What kstub knows of a frame."""
        return self.frames().get(tuple(int(frame.read_register(name)) & U64 for name in ("rip", "rsp")))

    def frames(self):
        """The selected thread's, by pc and stack pointer; none if it is not kstub's."""
        thread = gdb.selected_thread()
        key = (gdb.selected_inferior().connection, thread and thread.ptid)
        if key not in self.known:
            self.known[key] = {}
            # send() would select no thread for a moment, and gdb forget the frame that it is asking about.
            try:
                rows = json.loads(bytes.fromhex(answer_of("qkstub.unwind:" + thread_id(None)) or ""))
                self.known[key] = {(row["pc"], row["sp"]): row for row in rows}
            except ValueError:
                pass
        return self.known[key]

    def __call__(self, pending):
        try:
            row = self.of(pending)
        except gdb.error:
            return None
        # Behind a call that does not return, its last one, a pc may be in the next function already.
        if row is None or not row["wrong"] and gdb_knows(row["function"] or row["pc"]):
            return None
        integer = gdb.selected_inferior().architecture().integer_type
        frame = types.SimpleNamespace(sp=gdb.Value(row["cfa"]), pc=gdb.Value(row["function"] or row["pc"]))
        caller = pending.create_unwind_info(frame)
        # A caller at 0 is none.
        registers = row["caller"] or {"rip": 0, "rsp": row["cfa"]}
        if row["through"] and gdb.solib_name(row["through"]):
            # gdb's own frame of a signal in between: behind one a pc is no return address, and stacks may change.
            registers = registers | {"rip": row["through"], "rsp": row["saved"]}
        for name, value in registers.items():
            bits = 32 if name in ("eflags", "cs", "ss") else 64
            caller.add_saved_register(name, gdb.Value(value).cast(integer(bits, False)))
        for name in row["kept"]:
            value = pending.read_register(name)
            # Of one that an inner frame has lost there is nothing to keep.
            if not value.is_optimized_out:
                caller.add_saved_register(name, value)
        return caller


def gdb_knows(pc):
    """Whether gdb has debug information of the function at an address, and so call frame information."""
    block = gdb.block_for_pc(pc)
    while block is not None and block.function is None:
        block = block.superblock
    return block is not None


class Named(gdb.FrameDecorator.FrameDecorator):
    """A frame of which gdb has no name: kstub's name of it; or one between two contexts, which is nowhere."""

    def is_between(self):
        return self.inferior_frame().type() == gdb.SIGTRAMP_FRAME

    def function(self):
        frame = self.inferior_frame()
        if self.is_between() or frame.function() is not None:
            return super().function()
        last = end_of(frame)
        if last:
            return "<the backtrace ends here: %s>" % last["broken"]
        row = FRAMES.of(frame) or {"name": None, "caller": None}
        # A kernel's frame has a caller, also one in the user's half: a call through a bad pointer.
        user = frame.pc() < 1 << 63 and row["caller"] is None
        return row["name"] or ("<user mode>" if user else super().function())

    def address(self):
        return None if self.is_between() else super().address()

    def filename(self):
        return None if self.is_between() else super().filename()


def end_of(frame):
    """What kstub knows of the last frame, if this is the one at 0 behind it, by which gdb is told that a backtrace ends.
    None for a frame that is there: a call through a null pointer."""
    called = frame.newer() if frame.pc() == 0 else None
    row = called and FRAMES.of(called)
    return row if row and row["caller"] is None else None


class EndOfStack:
    """Leaves out the frame at 0 by which gdb is told that a backtrace ends, unless it ends short."""

    def __init__(self):
        self.name, self.priority, self.enabled = "kstub-end-of-stack", 100, True
        gdb.frame_filters[self.name] = self

    def filter(self, frames):
        return (Named(frame) for frame in frames if not self.is_end(frame.inferior_frame()))

    def is_end(self, frame):
        last = end_of(frame)
        return last is not None and last["broken"] is None


def answer_of(packet):
    """The answer to a packet, by a way that leaves gdb's selected thread and frame alone; None if there is none."""
    try:
        answer = gdb.execute("maintenance packet " + packet, to_string=True)
    except gdb.error:
        return None
    return answer.split('received: "', 1)[-1].rsplit('"', 1)[0] if 'received: "' in answer else None


class Moved:
    """Moves gdb's symbols, and with them its breakpoints, when a guest has its kernel elsewhere than gdb was told, or has
    one only now: gdb itself asks for that (qOffsets) only as it connects. Those of another kernel are loaded, or go; those
    of modules go with every boot."""

    def __init__(self):
        self.forget()
        gdb.events.stop.connect(self.look)
        if hasattr(gdb.events, "connection_removed"):
            gdb.events.connection_removed.connect(self.forget)
        self.look()

    def forget(self, event=None):
        self.is_connected, self.number, self.known = False, None, None

    def look(self, event=None):
        if not isinstance(gdb.selected_inferior().connection, gdb.RemoteTargetConnection):
            return
        number = answer_of("qkstub.kernel")
        if not number or number == self.number:
            return
        offsets = answer_of("qOffsets") or ""
        was_connected, self.is_connected = self.is_connected, True
        # Without an answer there is no kernel yet, or kstub does not know it.
        if not offsets.startswith("TextSeg="):
            return
        # Another kernel may be in the same place.
        before, self.number, self.known = self.known, number, (offsets, named_file())
        if not was_connected:
            return
        if before != self.known:
            self.move()
        else:
            self.boot()

    def boot(self):
        """The kernel is where it was, and has yet to load its modules, or has others."""
        gdb.execute("nosharedlibrary")
        gdb.execute("sharedlibrary", to_string=True)
        gdb.write("kstub: gdb's symbols of modules are those of the modules that are there now\n")
        # What gdb has just shown may have been by the symbols of before.
        gdb.execute("frame")

    def move(self):
        kernel = run("info")["kernel"]
        image = self.image_of(kernel)
        if image is None and gdb.current_progspace().filename is None:
            return
        # Modules of before; those of now have the same names.
        gdb.execute("nosharedlibrary")
        if image is None:
            gdb.execute("with confirm off -- symbol-file", to_string=True)
            why = "the kernel is %s now, of which there is no vmlinux here" % kernel["release"]
            gdb.write("kstub: gdb has no symbols any more: %s; connect anew when there is one\n" % why)
            return
        name = image.replace("\\", "\\\\").replace("'", "\\'")
        gdb.execute("with confirm off -- symbol-file -o %s '%s'" % (kernel["kaslr_offset"], name), to_string=True)
        gdb.execute("sharedlibrary", to_string=True)
        gdb.write("kstub: gdb's symbols and breakpoints were moved to where the kernel is now\n")
        # What gdb has just shown was by the symbols of before.
        gdb.execute("frame")

    def image_of(self, kernel):
        """The file that has the kernel's symbols: gdb's own if it is of that kernel, else what kstub names; or None."""
        image = gdb.current_progspace().filename
        own = next((one for one in gdb.objfiles() if image is not None and one.filename == image), None)
        build_id = own.build_id if own is not None else None
        if build_id is not None and build_id == kernel["build_id"]:
            return image
        named = named_file() or kernel["vmlinux"]
        if named is not None and os.path.isabs(named) and os.path.exists(named):
            return named
        # Nothing tells that it is of another.
        return image if build_id is None or kernel["build_id"] is None else None


def named_file():
    """The name of the kernel's file, as kstub tells it to who asks."""
    answer = answer_of("qXfer:exec-file:read::0,1000") or ""
    return answer[1:] if answer.startswith("l") else None


def has_command(name):
    """Whether gdb has a command of exactly this name."""
    return name in gdb.execute("complete " + name, to_string=True).split("\n")


def register():
    """Makes the commands; False where there is no kstub to ask for them yet."""
    try:
        known = run("help")
    except (gdb.error, gdb.GdbError):
        return False
    for command in known:
        name = command["name"]
        summary = "%s.\n\n%s %s\n\n%s" % (command["summary"], name, command["arguments"], command["help"])
        KernelCommand(name, "kstub " + name, summary)
        # gdb's `task` is about Ada programs.
        if name == "task" or name not in GDBS_OWN and not has_command(name):
            KernelCommand(name, name, summary)
    return True


def is_kstub():
    """Whether gdb is connected to kstub."""
    try:
        ask("text", "help", None)
    except (gdb.error, gdb.GdbError):
        return False
    return True


def selected_cpu():
    """The CPU of the selected thread; of a task's, the one it last ran on."""
    number = gdb.selected_thread().ptid[1]
    return number - 1 if number < FIRST_TASK else run("task")["tasks"][0]["cpu"]


def mend_cpus(cpus):
    """linux.cpus: gdb has per-CPU symbols where KASLR would have put them, and these scripts do not know."""
    per_cpu, get_current_cpu = cpus.per_cpu, cpus.get_current_cpu

    def mended(pointer, cpu):
        if not is_kstub():
            return per_cpu(pointer, cpu)
        return copy_of(pointer, selected_cpu() if int(cpu) == -1 else cpu).dereference()

    cpus.per_cpu = mended
    cpus.get_current_cpu = lambda: selected_cpu() if is_kstub() else get_current_cpu()


def mend_symbols(symbols):
    """linux.symbols: lx-symbols would load the vmlinux anew, where KASLR has not put it."""

    class Mended(symbols.LxSymbols):
        __doc__ = symbols.LxSymbols.__doc__

        def invoke(self, arg, from_tty):
            if not is_kstub():
                return super().invoke(arg, from_tty)
            gdb.write("kstub has told gdb where the kernel and its modules are: nothing to load\n")

    Mended()


def mend_timerlist(timerlist):
    """linux.timerlist: until about v6.4 it looks for members of a timerqueue's head that went in v5.4, and counts
    bytes of a CPU mask in fractions."""

    def active_timers(base):
        queue = base["active"]
        if "rb_root" not in [field.name for field in queue.type.fields()]:
            yield from print_active_timers(base)
            return
        node, index = queue["rb_root"]["rb_leftmost"], 0
        while node:
            yield timerlist.print_timer(node, index)
            node, index = timerlist.rbtree.rb_next(node), index + 1

    def cpumask(mask):
        bits, count = mask["bits"], int(gdb.parse_and_eval("nr_cpu_ids"))
        number = sum(int(bits[i]) << 64 * i for i in range((count + 63) // 64))
        digits = "%0*x" % ((count + 3) // 4, number)
        groups = range(len(digits), 0, -8)
        return ",".join(reversed([digits[max(end - 8, 0) : end] for end in groups]))

    print_active_timers = timerlist.print_active_timers
    timerlist.print_active_timers, timerlist.pr_cpumask = active_timers, cpumask


class KernelScripts:
    """Mends modules of the kernel's own scripts once they are imported."""

    MENDED = {"linux.cpus": mend_cpus, "linux.symbols": mend_symbols, "linux.timerlist": mend_timerlist}

    @classmethod
    def find_spec(cls, name, path, target=None):
        mend = cls.MENDED.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if mend else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                mend(module)

            spec.loader.exec_module = exec_module
        return spec

    @classmethod
    def install(cls):
        for name, mend in cls.MENDED.items():
            if name in sys.modules:
                mend(sys.modules[name])
        sys.meta_path.insert(0, cls)


# `target remote` ends with a stop; in a session without prompts (-batch) nothing else tells of it.
CONNECTED = (gdb.events.stop, gdb.events.before_prompt)


def register_later(event=None):
    """When something happens that a connection may be behind: the first time that there is one."""
    if register():
        for happens in CONNECTED:
            happens.disconnect(register_later)


def expose():
    """Lets users write `import kstub`."""
    module = types.ModuleType("kstub", __doc__)
    for function in (run, read_many, objects, tasks, modules, pages):
        setattr(module, function.__name__, function)
    sys.modules["kstub"] = module


expose()
KernelScripts.install()
Prefix(), PerCpu(), Page(), Task(), EndOfStack()
FRAMES = Frames()
MOVED = Moved()
gdb.unwinder.register_unwinder(None, FRAMES, replace=True)
if not register():
    for happens in CONNECTED:
        happens.connect(register_later)
