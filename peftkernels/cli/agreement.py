"""Which installed libraries ask for another release of each other than the one that is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version

_LIBRARIES = ("peftkernels", "torch", "triton", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")
# The extra of peftkernels that says which releases its integrations work with.
_INTEGRATIONS = "hf"


def disagreements() -> list[str]:
    """Return a sentence for each installed library that does not take the installed release of another."""
    try:
        from packaging.requirements import Requirement
    except ImportError:  # which transformers and peft need: neither is installed
        return []
    found: dict[str, None] = {}
    for asking, asked_of in ((name, map(Requirement, _requirements(name))) for name in _LIBRARIES):
        for one in asked_of:
            installed = _installed(one.name)
            if one.name not in _LIBRARIES or installed is None or one.specifier.contains(installed, prereleases=True):
                continue
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", _INTEGRATIONS)):
                found[f"{asking} {_installed(asking)} asks for {one.name}{one.specifier}, found {installed}"] = None
    return list(found)


def _requirements(name: str) -> Iterator[str]:
    """What a library asks for when it is installed, and transformers later, in the calls that need it."""
    try:
        yield from requires(name) or ()
    except PackageNotFoundError:
        return
    if name == "transformers":
        yield from _asked_later()


def _asked_later() -> Iterable[str]:
    try:
        from transformers.dependency_versions_table import deps
    except ImportError:
        return ()
    return [deps[name] for name in _LIBRARIES if name in deps]


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
