"""What the scripts about drgn share: values as JSON has them, and what to do where a kernel lacks something."""

from drgn.helpers.linux import pid

WALKED_TASKS = 12  # whose page tables are followed


def number(thing):
    return int(thing.value_())


def address(thing):
    return f"{number(thing):#x}"


def text(thing):
    return thing.string_().decode(errors="backslashreplace")


def first(*attempts):
    """The first attempt that this kernel has: names move between versions."""
    for attempt in attempts[:-1]:
        try:
            return attempt()
        except (AttributeError, LookupError):
            pass
    return attempts[-1]()


def attempt(thing):
    """A value, or what stopped it: one broken object must not cost the rest."""
    try:
        return thing()
    except Exception as error:  # noqa: BLE001 - whatever drgn raises is its answer
        return {"error": f"{type(error).__name__}: {error}"}


def symbol_name(prog, pointer):
    try:
        return prog.symbol(pointer).name
    except LookupError:
        return None


def with_memory(prog):
    """One task of each of the first user address spaces, the lab's planting programs before others."""
    leaders = [task for task in pid.for_each_task(prog) if task.mm and task.pid == task.tgid]
    leaders.sort(key=lambda task: not text(task.comm).startswith("kstub"))
    return leaders[:WALKED_TASKS]
