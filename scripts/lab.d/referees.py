"""What other debuggers say of a dump: JSON facts by drgn and crash, made once for each dump.

They are referees and not the truth: each has dumps that it refuses, and answers that are known to be wrong.
"""

import fcntl
import subprocess
import sys

import sets
import tools
from common import CHECKOUT, LAB, LabError, read_json, recipe_hash, say, step

SCRIPTS = CHECKOUT / "scripts/referees.d"
CACHE = LAB / "referee-cache"
# What each is by the name of its script; "pages" is drgn once more, apart because it takes as long as all the rest.
NAMES = ["drgn", "pages", "crash"]
# The same of stacks, only when asked for.
STACKS = ["stacks", "crash_stacks"]
TOOL = {"drgn": "drgn", "pages": "drgn", "crash": "crash", "stacks": "drgn", "crash_stacks": "crash"}


def _dump_of(manifest, wanted):
    """The entry asked for; else the set's first, which is whole and in a format that both can read."""
    for entry in manifest["dumps"]:
        if wanted in (None, entry["file"]):
            return entry["file"]
    raise LabError(
        f"set {manifest['name']} has no dump {wanted}",
        "its dumps: " + " ".join(entry["file"] for entry in manifest["dumps"]),
    )


def _key(who, dump, *more):
    state = dump.stat()
    scripts = [SCRIPTS / f"{who}_facts.py", *([SCRIPTS / "drgn_common.py"] if TOOL[who] == "drgn" else [])]
    return recipe_hash(tools.install(TOOL[who])[1], *scripts, state.st_mtime_ns, state.st_size, *more)


def _run(argv, output):
    """Has a referee write its JSON; a partial file never gets the final name."""
    unfinished = output.with_suffix(".new")
    log = output.with_suffix(".log")
    with open(unfinished, "wb") as out, open(log, "wb") as errors:
        result = subprocess.run([str(word) for word in argv], stdout=out, stderr=errors, check=False)
    if result.returncode != 0:
        raise LabError(f"{' '.join(map(str, argv[:3]))} failed ({result.returncode})", f"see {log}")
    unfinished.rename(output)


def _drgn(who, dump, manifest):
    modules = LAB / manifest["modules"]
    debug_files = sorted(modules.rglob("*.ko.debug"))
    # The interpreter that drgn was installed for, with drgn on its path.
    python = ["env", f"PYTHONPATH={tools.drgn_directory()}", "PYTHONDONTWRITEBYTECODE=1", sys.executable]
    return [*python, SCRIPTS / f"{who}_facts.py", dump, LAB / manifest["vmlinux"], *debug_files]


def _crash(_who, dump, manifest):
    argv = [sys.executable, SCRIPTS / "crash_facts.py", tools.install("crash")[0], dump, LAB / manifest["vmlinux"]]
    # crash is asked about the pages and addresses that drgn chose.
    chosen = [ask(manifest["name"], dump.name, who) for who in ("drgn", "pages")]
    return [*argv, LAB / manifest["modules"], *chosen]


def _crash_stacks(who, dump, manifest):
    argv = [sys.executable, SCRIPTS / f"{who}_facts.py", tools.install("crash")[0], dump, LAB / manifest["vmlinux"]]
    return [*argv, LAB / manifest["modules"]]


ARGUMENTS = {"drgn": _drgn, "pages": _drgn, "crash": _crash, "stacks": _drgn, "crash_stacks": _crash_stacks}


def ask(set_name, dump_name, who):
    """The path of a referee's facts about one dump of a set; made unless they are there and current."""
    manifest_path = sets.SETS / set_name / "set.json"
    if not manifest_path.exists():
        raise LabError(f"there is no set {set_name}", f"make it: scripts/lab set {set_name}")
    manifest = read_json(manifest_path)
    dump = manifest_path.parent / _dump_of(manifest, dump_name)
    directory = CACHE / set_name
    directory.mkdir(parents=True, exist_ok=True)
    output = directory / f"{dump.name}.{who}.json"
    # Tests run at the same time, and may want the same.
    with open(directory / f".{output.name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = ARGUMENTS[who](who, dump, manifest)
        key = _key(who, dump, *(argv[-2:] if who == "crash" else []))
        stamp = directory / f".{output.name}.stamp"
        if not (output.exists() and stamp.exists() and stamp.read_text(encoding="utf-8") == key):
            with step(f"{who} on {set_name}/{dump.name}"):
                _run(argv, output)
            stamp.write_text(key, encoding="utf-8")
    return output


def show(set_name, dump_name, who):
    for name in [who] if who else NAMES:
        path = ask(set_name, dump_name, name)
        refused = read_json(path).get("refused")
        say(f"    {path}" + (f"\n    {name} refused it: {refused}" if refused else ""))
