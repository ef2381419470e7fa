"""Debian packages of any suite, without touching this machine's own apt.

The lab has its own source list, package lists and cache below $LAB/apt. Only the
address of the mirror is taken from the machine's apt.
"""

import functools
import re
import shutil
import subprocess
import time

from common import LAB, LabError, run, step

APT = LAB / "apt"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
RELEASES = ["bullseye", "bookworm", "trixie", "forky", "sid", "experimental"]
SUITES = RELEASES + ["bookworm-backports", "trixie-backports"]
SECURITY_SUITES = ["bullseye-security", "bookworm-security", "trixie-security"]
MAX_AGE = 6 * 3600
NO_MIRROR_CURE = "the lab needs a machine whose apt knows a Debian mirror (/etc/apt/sources.list*)"


class NotThere(LabError):
    """The lists name a package that the mirror does not have (any more)."""


def _options():
    """apt's options that point it at the lab's directories."""
    settings = {
        "Dir::Etc::SourceList": APT / "sources.list",
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": APT / "lists",
        "Dir::State::status": APT / "status",
        "Dir::Cache": APT / "cache",
        "APT::Sandbox::User": "root",
        "APT::Architecture": "amd64",
        "Acquire::Languages": "none",
        "Debug::NoLocking": "1",
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _machine_mirrors():
    """The URIs of the Debian archive and of its security archive in the machine's apt."""
    lines = run(["apt-get", "indextargets", "--format", "$(RELEASE) $(REPO_URI)", "Created-By: Packages"])
    archive = security = None
    for line in lines.splitlines():
        release, _, uri = line.partition(" ")
        if release.endswith("-security"):
            security = security or uri
        elif release.partition("-")[0] in RELEASES + ["stable", "testing", "unstable"]:
            archive = archive or uri
    if not archive:
        raise LabError("no Debian mirror in this machine's apt configuration", NO_MIRROR_CURE)
    return archive, security


def _write_sources():
    archive, security = _machine_mirrors()
    pairs = [(archive, suite) for suite in SUITES]
    if security:
        pairs += [(security, suite) for suite in SECURITY_SUITES]
    # target=Packages: no translations, no desktop metadata.
    text = "".join(f"deb [arch=amd64 target=Packages signed-by={KEYRING}] {uri} {suite} main\n" for uri, suite in pairs)
    for directory in ("lists/partial", "cache/archives/partial"):
        (APT / directory).mkdir(parents=True, exist_ok=True)
    (APT / "status").touch()
    (APT / "sources.list").write_text(text, encoding="utf-8")


def update(force=False):
    """Fetches the package lists unless they are new. A suite that is gone stops nothing."""
    stamp = APT / "updated"
    if not force and stamp.exists() and time.time() - stamp.stat().st_mtime < MAX_AGE:
        return
    with step("package lists of all Debian suites"):
        _write_sources()
        subprocess.run(["apt-get", *_options(), "-q", "update"], check=False, stdout=subprocess.DEVNULL)
        stamp.touch()


def names(prefix):
    return run(["apt-cache", *_options(), "pkgnames", prefix]).split()


def show(package_names):
    """The stanzas of packages, as dictionaries; one for each version."""
    text = run(["apt-cache", *_options(), "show", *package_names], stderr=subprocess.DEVNULL)
    stanzas = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if re.match(r"[A-Za-z0-9-]+: ", line))
        if "Package" in fields and "Version" in fields:
            stanzas.append(fields)
    return stanzas


def suite_of(package, version):
    """The suite a version comes from, by apt's `madison` table."""
    for line in run(["apt-cache", *_options(), "madison", package]).splitlines():
        columns = [column.strip() for column in line.split("|")]
        if columns[1] == version:
            return columns[2].split()[1].partition("/")[0]
    return "unknown"


def _compare(left, right):
    if left == right:
        return 0
    less = subprocess.run(["dpkg", "--compare-versions", left, "lt", right], check=False).returncode == 0
    return -1 if less else 1


version_key = functools.cmp_to_key(_compare)


def download(package, version, directory):
    """Downloads one .deb into `directory` and returns its path."""
    return download_all([(package, version)], directory)[0]


def download_all(packages, directory):
    """Downloads the .debs of (name, version) pairs into `directory` and returns their paths."""
    wanted = [f"{package}={version}" for package, version in packages]
    try:
        run(["apt-get", *_options(), "-q", "download", *wanted], cwd=directory)
    except LabError as error:
        raise NotThere(
            f"{' '.join(wanted)} cannot be downloaded", "run with --refresh for new package lists"
        ) from error
    return [next(directory.glob(f"{package}_*.deb")) for package, _ in packages]


def download_with_dependencies(package, suite, *more):
    """Downloads packages of a suite and all they depend on; returns (the first's version, list of .deb files)."""
    archives = APT / "cache/archives"
    shutil.rmtree(archives, ignore_errors=True)
    (archives / "partial").mkdir(parents=True)
    run(
        [
            "apt-get",
            *_options(),
            "-q",
            "-y",
            "--no-install-recommends",
            "--download-only",
            "-t",
            suite,
            "install",
            package,
            *more,
        ],
        cure=f"see whether {package} is in {suite}; run with --refresh for new package lists",
    )
    files = sorted(archives.glob("*.deb"))
    own = next(file for file in files if file.name.startswith(f"{package}_"))
    return own.name.split("_")[1].replace("%3a", ":"), files
