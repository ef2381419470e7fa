"""Debian's cloud kernels with their debug info, unpacked below $LAB/kernels/<release>."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

import debian
from common import LAB, LabError, fresh_directory, is_current, read_json, run, say, step, warn, write_json

KERNELS = LAB / "kernels"
# What the guest loads, and what tests of modules want; their dependencies come along.
MODULES = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_net",
    "qemu_fw_cfg",
    "xfs",
    "overlay",
    "loop",
    "fuse",
    "tun",
    "dummy",
    "dm-mod",
    "nf_tables",
    "null_blk",
    "brd",
    "vfat",
]
MOST_TRIES = 6
PACKAGE = re.compile(r"linux-image-(\d+\.\d+.*-cloud-amd64)-dbg$")
SMALLEST_DEBUG_PACKAGE = 50 << 20  # the others are only names for the current one


@dataclass(frozen=True)
class Candidate:
    """One version of a kernel for which both the image and the debug info can be had."""

    release: str
    version: str
    image_packages: tuple

    @property
    def debug_package(self):
        return f"linux-image-{self.release}-dbg"


def _pinned_dependencies(stanza):
    """Newer kernels are split: the image package depends on others of the very same version."""
    return re.findall(r"(linux-(?:base|binary|modules)-\S+) \(= [^)]*\)", stanza.get("Depends", ""))


def _candidates():
    debug_names = [name for name in debian.names("linux-image-") if PACKAGE.match(name)]
    image_names = [name.removesuffix("-dbg") for name in debug_names]
    stanzas = debian.show(debug_names + image_names)
    images = {(s["Package"], s["Version"]): s for s in stanzas if not s["Package"].endswith("-dbg")}
    found = []
    for stanza in stanzas:
        name, version = stanza["Package"], stanza["Version"]
        image = images.get((name.removesuffix("-dbg"), version))
        if name.endswith("-dbg") and image and int(stanza["Size"]) > SMALLEST_DEBUG_PACKAGE:
            packages = _pinned_dependencies(image) or [image["Package"]]
            found.append(Candidate(PACKAGE.match(name)[1], version, tuple(packages)))
    return found


def _choices(spec):
    """The candidates of a series, newest first; a release's own kernels before backports to another."""
    found = _candidates()
    if spec != "newest":
        found = [c for c in found if re.match(re.escape(spec) + r"[.~-]", c.version)]
    if not found:
        raise LabError(
            f"no kernel {spec} has both its image and its debug info on the mirror",
            "try another series, or --refresh for new package lists",
        )
    found.sort(key=lambda candidate: debian.version_key(candidate.version), reverse=True)
    if spec != "newest":
        found.sort(key=lambda candidate: "~" in candidate.version)
    return found


def _unpack(package, work, place, patterns):
    """Unpacks the members of a .deb that match `patterns`; `place` says where each belongs (None: drop it).

    tar and not Python's tarfile: several times as fast over these 2 GB.
    """
    scratch = work / "unpacked"
    scratch.mkdir()
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as stream:
        # tar also fails for a pattern without a match; a file that was needed is missed later.
        subprocess.run(
            ["tar", "-x", "-C", scratch, "--wildcards", *patterns],
            stdin=stream.stdout,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    if stream.returncode != 0:
        raise LabError(f"{package.name} cannot be unpacked", "run the step again; is the disk full?")
    for path in list(scratch.rglob("*")):
        target = place(str(path.relative_to(scratch))) if path.is_file() and not path.is_symlink() else None
        if target:
            (work / target).parent.mkdir(parents=True, exist_ok=True)
            path.rename(work / target)
    shutil.rmtree(scratch)
    package.unlink()


def _image_path(name, release):
    """Where a file of an image package belongs, None for one the lab does not keep."""
    base = os.path.basename(name)
    if base in (f"vmlinuz-{release}", "vmlinuz"):
        return "vmlinuz"
    if base in (f"config-{release}", "config") and "/kernel/" not in name:
        return "config"
    _, found, below = name.partition(f"lib/modules/{release}/")
    if found and (below.startswith("kernel/") or below.startswith("modules.")):
        return f"lib/modules/{release}/{below}"
    return None


def _debug_path(name, release, modules):
    base = os.path.basename(name)
    if base in (f"vmlinux-{release}", f"System.map-{release}"):
        return base.removesuffix(f"-{release}")
    _, found, below = name.partition(f"lib/modules/{release}/")
    if found and base in ("vmlinux", "System.map") and "/" not in below:
        return base
    if found and re.sub(r"\.debug$", "", below) in modules:
        return f"lib/modules/{release}/{re.sub('.debug$', '', below)}.debug"
    return None


def _debug_patterns(release, modules):
    files = [f"vmlinux-{release}", f"System.map-{release}", f"{release}/vmlinux", f"{release}/System.map"]
    return [f"*/{name}" for name in files] + [f"*/{module}*" for module in modules]


def _decompress_modules(tree):
    for suffix, tool in ((".xz", ["xz", "-d"]), (".zst", ["zstd", "-q", "-d", "--rm"])):
        files = [str(path) for path in tree.rglob(f"*.ko{suffix}")]
        if files:
            run([*tool, *files])


def _module_name(path):
    return os.path.basename(path).removesuffix(".ko").replace("-", "_")


def _prune_modules(work, release):
    """Keeps MODULES and what they need, drops the rest; returns the kept paths."""
    tree = work / "lib/modules" / release
    _decompress_modules(tree)
    run(["depmod", "-b", work, release])
    needs = {}
    for line in (tree / "modules.dep").read_text(encoding="utf-8").splitlines():
        path, _, dependencies = line.partition(":")
        needs[path] = dependencies.split()
    wanted = {name.replace("-", "_") for name in MODULES}
    keep = {path for path in needs if _module_name(path) in wanted}
    keep |= {dependency for path in keep for dependency in needs[path]}
    # crc32c is found by the crypto layer at run time, so no dependency names it.
    keep |= {path for path in needs if _module_name(path) in ("crc32c_generic", "crc32c_intel")}
    for path in needs.keys() - keep:
        (tree / path).unlink()
    for directory, _, _ in os.walk(tree, topdown=False):
        if directory != str(tree) and not os.listdir(directory):
            os.rmdir(directory)
    run(["depmod", "-b", work, release])
    return keep


def _fetch(candidate, spec):
    release = candidate.release
    final = KERNELS / release
    stamp = f"{candidate.version} {' '.join(MODULES)}"
    if is_current(final, stamp):
        return
    with step(f"kernel {release} ({candidate.version})"), fresh_directory(final, stamp) as work:
        files = [
            debian.download(name, candidate.version, work)
            for name in (candidate.debug_package, *candidate.image_packages)
        ]
        for file in files[1:]:
            _unpack(file, work, lambda name: _image_path(name, release), ["*"])
        modules = _prune_modules(work, release)
        _unpack(files[0], work, lambda name: _debug_path(name, release, modules), _debug_patterns(release, modules))
        for needed in ("vmlinuz", "vmlinux"):
            if not (work / needed).is_file():
                raise LabError(f"the packages of {release} hold no {needed}", "report this: their layout changed")
        write_json(
            work / "kernel.json",
            {
                "release": release,
                "spec": spec,
                "package_version": candidate.version,
                "packages": [*candidate.image_packages, candidate.debug_package],
                "suite": debian.suite_of(candidate.debug_package, candidate.version),
                "modules": sorted(modules),
            },
        )


def _fetch_first(candidates, spec):
    """Fetches the first candidate that the mirror really has: lists and pool may disagree."""
    for candidate in candidates:
        try:
            _fetch(candidate, spec)
            return candidate
        except debian.NotThere as error:
            warn(f"{error}; trying an older version")
    raise LabError(f"no version of kernel {spec} can be downloaded", "see the messages above; try --refresh")


def fetch(spec, refresh=False):
    """Fetches the kernel of a series and returns its directory.

    What a series means is settled once (a link $LAB/kernels/<spec>), so that sets stay
    what they are while Debian publishes new kernels; `refresh` settles it anew.
    """
    link = KERNELS / spec
    if not refresh and (link / "kernel.json").is_file():
        return link.resolve()
    debian.update(force=refresh)
    candidate = _fetch_first(_choices(spec)[:MOST_TRIES], spec)
    if link.name != candidate.release:
        link.unlink(missing_ok=True)
        link.symlink_to(candidate.release)
    say(f"    kernel {spec} is {candidate.release}")
    return KERNELS / candidate.release


def info(directory):
    return read_json(directory / "kernel.json")
