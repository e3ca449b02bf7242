"""The environment that made a bundle as CycloneDX 1.6: what is installed, and what needs what.

Read from the metadata of the installed distributions, none of which is imported for it. The same
environment and moment give the same bytes: no serial number, everything in order.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclonedx.model.component import Component
    from packaging.requirements import Requirement

PROJECT = "repvgg-exporter"
_CLASSIFIER = "License :: "
_OSI = "OSI Approved"
_SERIAL_NUMBER = re.compile(r'^  "serialNumber": "[^"]*",\n', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What a distribution says of itself.

    ``licenses`` is one SPDX expression where it states one, else names in its own words.
    """

    name: str
    version: str | None
    licenses: tuple[str, ...] = ()
    requires: tuple[Requirement, ...] = ()
    extras: tuple[str, ...] = ()

    @classmethod
    def of(cls, found: metadata.Distribution) -> Installed | None:
        """Reads the metadata once; None where a broken installation left none."""
        given: Any = found.metadata
        if not given or not given["Name"]:
            return None
        return cls(
            name=given["Name"],
            version=given["Version"],
            licenses=_licenses(given),
            requires=tuple(_requirements(given.get_all("Requires-Dist") or ())),
            extras=tuple(given.get_all("Provides-Extra") or ()),
        )


def sbom(created: str) -> str:
    """The document as JSON; ``created`` is its timestamp, as ISO 8601."""
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.output.json import JsonV1Dot6

    found = installed()
    components = {name: _component(name, each) for name, each in found.items()}
    bom = Bom(
        metadata=BomMetaData(
            component=components[PROJECT], timestamp=datetime.fromisoformat(created)
        ),
        components=[
            _python(),
            *(component for name, component in components.items() if name != PROJECT),
        ],
    )
    for name, others in needs(found).items():
        bom.register_dependency(components[name], [components[other] for other in sorted(others)])
    # The library makes one up, new each time; the format does not ask for it.
    return _SERIAL_NUMBER.sub("", JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def installed() -> dict[str, Installed]:
    """Every distribution by its name in the index, in order of names.

    Of two with one name it is the one that Python imports. This project is there even where it
    runs without being installed, then without a version.
    """
    found: dict[str, Installed] = {}
    for distribution in metadata.distributions():
        each = Installed.of(distribution)
        if each is not None:
            found.setdefault(canonical(each.name), each)
    found.setdefault(PROJECT, Installed(name=PROJECT, version=None))
    return dict(sorted(found.items()))


def canonical(name: str) -> str:
    """The name by which an index knows the distribution: ``Jinja2`` -> ``jinja2``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needs(found: Mapping[str, Installed]) -> dict[str, set[str]]:
    """Which of the installed distributions each one needs, by the extras that somebody asks for.

    All extras of this project count: what is installed of them was asked for.
    """
    extras = {name: {""} for name in found}
    extras[PROJECT] |= set(found[PROJECT].extras)
    needed: dict[str, set[str]] = {name: set() for name in found}
    waiting = [(name, extra) for name, wanted in extras.items() for extra in wanted]
    while waiting:
        name, extra = waiting.pop()
        for requirement in found[name].requires:
            other, marker = canonical(requirement.name), requirement.marker
            if other not in found or not (marker is None or marker.evaluate({"extra": extra})):
                continue
            needed[name].add(other)
            waiting += [(other, each) for each in requirement.extras - extras[other]]
            extras[other] |= requirement.extras
    return {name: others - {name} for name, others in needed.items()}


def _requirements(texts: Iterable[str]) -> Iterator[Requirement]:
    from packaging.requirements import InvalidRequirement, Requirement

    for text in texts:
        try:
            yield Requirement(text)
        except InvalidRequirement:
            # Of very old packages, which pip does not obey either: it binds nothing.
            continue


def _licenses(given: Any) -> tuple[str, ...]:
    """An SPDX expression; else the classifiers; else the old field, if it is but a name."""
    from cyclonedx.spdx import fixup_id

    expression = (given.get("License-Expression") or "").strip()
    field = (given.get("License") or "").strip()
    if expression or fixup_id(field):
        return (expression or str(fixup_id(field)),)
    classified = [
        text.removeprefix(_CLASSIFIER).removeprefix(f"{_OSI} :: ")
        for text in given.get_all("Classifier") or ()
        if text.startswith(_CLASSIFIER) and text != _CLASSIFIER + _OSI
    ]
    named = "\n" not in field and field not in ("", "UNKNOWN")
    return tuple(classified) or ((field,) if named else ())


def _component(name: str, each: Installed) -> Component:
    from cyclonedx.contrib.license.factories import LicenseFactory
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    make = LicenseFactory()
    # An expression stands alone in the format; of several, each is a name.
    read = make.make_from_string if len(each.licenses) == 1 else make.make_with_name
    return Component(
        name=each.name,
        version=each.version,
        type=ComponentType.APPLICATION if name == PROJECT else ComponentType.LIBRARY,
        purl=PackageURL("pypi", name=name, version=each.version),
        bom_ref=f"{name}=={each.version}" if each.version else name,
        licenses=[read(text) for text in each.licenses],
    )


def _python() -> Component:
    from cyclonedx.model.component import Component, ComponentType

    name, version = platform.python_implementation(), platform.python_version()
    return Component(
        name=name, version=version, type=ComponentType.PLATFORM, bom_ref=f"{name}=={version}"
    )
