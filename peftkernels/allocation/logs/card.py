"""A card for a saved adapter: what it is, how its ranks were decided, and from what it can be made again."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftkernels._files import write_atomically
from peftkernels.allocation.logs.run_log import RunLog

CARD_NAME = "README.md"
# An identifier on the Hugging Face hub; a card that names a path as its base model is refused there.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_MARK = re.compile(r"<!-- written by peftkernels; sha256 of the rest: ([0-9a-f]{64}) -->\n")


def adapter_card(
    run: RunLog | Mapping[str, Any] | None,
    *,
    config: Mapping[str, Any],
    seeds: Mapping[str, int],
    data_fingerprint: str,
    pattern: Mapping[str, Sequence[bool]],
    versions: Mapping[str, str | None],
    results: Mapping[str, str | float] | None = None,
) -> str:
    """Write Markdown with the YAML front matter of HF model cards (library_name, base_model, tags).

    Args:
        run: The decision log, or the facts an observer is told at the start; None where ranks were fixed.
        config: The content of adapter_config.json.
        seeds: The seeds by what they seed.
        data_fingerprint: Changes with the training texts.
        pattern: For every module, which ranks were kept.
        versions: The versions of the packages it was made with; None for one that is not installed.
        results: Figures to show, by name.
    """
    kind = {"ADALORA": "AdaLoRA", "LORA": "LoRA"}.get(str(config.get("peft_type")), str(config.get("peft_type")))
    base = str(config.get("base_model_name_or_path") or "")
    kept, total = sum(sum(mask) for mask in pattern.values()), sum(len(mask) for mask in pattern.values())
    of_base = f" of {base}" if base else ""
    lines = [
        f"# {kind} adapter{of_base}",
        "",
        f"{len(pattern)} {'matrix' if len(pattern) == 1 else 'matrices'} with {kept} of {total} ranks"
        + _decided(run)
        + ".",
        "",
        "```python",
        "import peft",
        "",
        "model = peft.PeftModel.from_pretrained(base_model, directory)  # the folder of this file",
        "```",
        "",
    ]
    facts = run.facts if isinstance(run, RunLog) else run
    if facts is not None:
        lines += ["## Schedule", "", *_table(("setting", "value"), _plain(facts.get("settings", {})))]
    if results:
        lines += ["## Results", "", *_table(("figure", "value"), _plain(results))]
    training = {f"seed of {what}": str(seed) for what, seed in seeds.items()} | {"data": data_fingerprint}
    lines += ["## Training", "", *_table(("", ""), training.items())]
    lines += ["## Final rank pattern", "", "One digit a rank: 1 was kept, 0 was cut out of the file.", ""]
    rows = [(f"`{name}`", f"{sum(mask)}/{len(mask)}", f"`{_digits(mask)}`") for name, mask in pattern.items()]
    lines += _table(("module", "kept", "ranks"), rows)
    # The schedule above is the training's; a file for use holds a schedule that is over.
    told = {"rank_pattern", *(facts or {}).get("settings", {})}
    shown = {name: value for name, value in config.items() if name not in told}
    lines += ["## Configuration", "", "```json", json.dumps(shown, indent=1, sort_keys=True, default=str), "```", ""]
    present = {package: version for package, version in versions.items() if version is not None}
    lines += ["## Versions", "", *_table(("package", "version"), present.items())]
    text = "\n".join(lines)
    front = _front_matter(base, str(config.get("peft_type", "")).lower(), facts)
    return f"{front}<!-- written by peftkernels; sha256 of the rest: {_digest(text)} -->\n{text}"


def write_card(directory: Path, card: str) -> bool:
    """Write README.md into `directory`, unless one is there that is not this package's or was changed since.

    Returns:
        True if it was written.
    """
    path = directory / CARD_NAME
    if path.exists() and not _is_own(path):
        return False
    write_atomically(path, lambda file: file.write(card.encode()))
    return True


def _is_own(path: Path) -> bool:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    mark = _MARK.search(text)
    return mark is not None and _digest(text[mark.end() :]) == mark.group(1)


def _front_matter(base: str, kind: str, facts: Mapping[str, Any] | None) -> str:
    tags = dict.fromkeys(tag for tag in ("peftkernels", kind, str((facts or {}).get("strategy", ""))) if tag)
    lines = ["---"]
    if _HUB_NAME.fullmatch(base):
        lines.append(f"base_model: {json.dumps(base)}")
    # JSON's strings are YAML's.
    lines += ["library_name: peft", "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---", ""]
    return "\n".join(lines)


def _decided(run: RunLog | Mapping[str, Any] | None) -> str:
    if run is None:
        return ", fixed from the start"
    facts = run.facts if isinstance(run, RunLog) else run
    text = f", decided by the strategy {facts.get('strategy', 'unnamed')}"
    if isinstance(run, RunLog) and run.standing:
        first, last = run.standing[0].step, run.standing[-1].step
        text += f" in {len(run.standing)} decisions between step {first} and {last}"
    return text


def _plain(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (name, value if isinstance(value, str) else json.dumps(value, default=str))
        for name, value in values.items()
        if value is not None
    ]


def _table(head: Sequence[str], rows: Any) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"

    return [line(head), line(["---"] * len(head)), *(line(row) for row in rows), ""]


def _digits(mask: Sequence[bool]) -> str:
    return "".join("1" if keep else "0" for keep in mask)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
