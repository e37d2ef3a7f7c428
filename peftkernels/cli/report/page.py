"""The page: one HTML file with its pictures inside, for light and dark screens and for paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

import peftkernels
from peftkernels.cli.report import words
from peftkernels.cli.report.collect import Collected
from peftkernels.cli.report.curves import draw_budget, draw_churn, draw_together
from peftkernels.cli.report.heatmap import RankHistory, draw_heatmap
from peftkernels.cli.report.history import History, common_share
from peftkernels.cli.report.look import DARK, LIGHT, png

PAGE = "index.html"
_TEMPLATE = "page.html.j2"
_MOST_OPEN = 3
_MOST_COMPARED = 12


@dataclass(frozen=True)
class Picture:
    """A picture in both looks, its file name, and what it shows to those who do not see it."""

    file: str
    description: str
    caption: str
    light: bytes
    dark: bytes

    @property
    def light_uri(self) -> str:
        return _data_uri(self.light)

    @property
    def dark_uri(self) -> str:
        return _data_uri(self.dark)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG's header."""
        return int.from_bytes(self.light[16:20], "big"), int.from_bytes(self.light[20:24], "big")


def render(collected: Collected) -> dict[str, bytes]:
    """The page and the pictures beside it, by file name."""
    histories = {name: History(log) for name, log in collected.logs.items()}
    anchors = _anchors(histories)
    runs = [_run(name, anchors[name], history, collected) for name, history in histories.items()]
    together = _together(histories, anchors, collected) if len(histories) > 1 else None
    environment = Environment(
        loader=PackageLoader("peftkernels.cli.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    page = environment.get_template(_TEMPLATE).render(
        title=collected.directory.resolve().name,
        runs=runs,
        together=together,
        all_open=len(runs) <= _MOST_OPEN,
        training=_training(collected),
        version=peftkernels.__version__,
    )
    pictures = [picture for run in runs for picture in run["pictures"]]
    if together is not None:
        pictures.append(together["picture"])
    return {PAGE: page.encode(), **{picture.file: picture.light for picture in pictures}}


def _run(name: str, anchor: str, history: History, collected: Collected) -> dict[str, Any]:
    log = history.log
    outcome = collected.outcome(name)
    losses: Any = history.losses()
    if not losses[0]:
        losses = collected.losses(name)
    rows = [{"row": row, "margin": words.margin(row), "why": words.why(row)} for row in history.rows]
    groups = history.groups()
    return {
        "name": name,
        "anchor": anchor,
        "strategy": words.strategy_name(log.strategy),
        "summary": words.summary(history),
        "warning": _warning(history),
        "figures": _figures(history, outcome),
        "pictures": _pictures(anchor, history, losses),
        "rows": rows,
        "groups": groups if len(groups) > 1 else {},
        "timeline": words.timeline(history),
        "settings": _settings(log.facts.get("settings", {})),
    }


def _warning(history: History) -> str | None:
    log = history.log
    notes = []
    if log.torn:
        notes.append(
            "The log ends in the middle of a line or a decision, which is left out: the run was stopped there."
        )
    if log.first_step > 0:
        notes.append(f"The log begins at step {log.first_step}; what was decided before is not known.")
    if history.scored is not None and not log.standing[-1].scored:
        notes.append(
            f"Scores, margins and reasons are those of step {log.standing[history.scored].step}, the last logged."
        )
    return " ".join(notes) or None


def _figures(history: History, outcome: Mapping[str, Any]) -> list[tuple[str, str]]:
    log = history.log
    figures = [("ACTIVE ranks", f"{history.active_now:,} of {log.total_ranks:,}")]
    if log.standing:
        last = log.standing[-1]
        figures.append(("budget", f"{last.budget:,.6g} {log.unit}"))
        thresholds = {f"{row.threshold:.3g}" for row in history.rows if row.threshold is not None}
        figures.append(("threshold", " / ".join(sorted(thresholds)) if 0 < len(thresholds) < 3 else "–"))
    figures += [
        ("decisions", f"{len(log.standing):,}"),
        ("changes", f"{int(history.churn.sum()):,}"),
        ("revived", f"{int(history.revived.sum()):,}"),
        ("skipped steps", f"{len(history.events('skipped'))}"),
        ("rollbacks", f"{len(history.events('rollback'))}"),
    ]
    if outcome.get("accuracy") is not None:
        figures.append(("test accuracy", f"{outcome['accuracy']:.3f}"))
    if outcome.get("milliseconds") is not None:
        figures.append(("ms per step", f"{outcome['milliseconds']:.0f}"))
    return figures


def _pictures(stem: str, history: History, losses: Any) -> list[Picture]:
    log = history.log
    active, span = history.over_time()
    ranks = RankHistory([module.name for module in log.modules], active)
    most = max(module.rank for module in log.modules)
    return [
        Picture(
            f"{stem}-live-ranks.png",
            f"Heatmap of the ACTIVE ranks of {len(log.modules)} matrices over {log.last_step} steps, by "
            f"{ranks.rows}{'' if ranks.rows == 'module' else ' and projection'}",
            "ACTIVE ranks over time. Bright keeps all of its ranks, dark has lost them.",
            *_both(lambda look: draw_heatmap(ranks, most, span)),
        ),
        Picture(
            f"{stem}-budget.png",
            "Curves of ACTIVE ranks, budget and threshold over the steps",
            "Budget and ACTIVE ranks, and the threshold that made them meet.",
            *_both(lambda look: draw_budget(history, losses, look)),
        ),
        Picture(
            f"{stem}-churn.png",
            "Bars of ranks masked and brought back at each decision",
            "Ranks masked (downwards) and brought back (upwards).",
            *_both(lambda look: draw_churn(history, look)),
        ),
    ]


def _together(histories: Mapping[str, History], anchors: Mapping[str, str], collected: Collected) -> dict[str, Any]:
    rows = []
    for name, history in histories.items():
        outcome = collected.outcome(name)
        accuracy = outcome.get("accuracy")
        rows.append(
            {
                "name": name,
                "anchor": anchors[name],
                "strategy": words.strategy_name(history.log.strategy),
                "live": history.active_now,
                "total": history.log.total_ranks,
                "decisions": len(history.log.standing),
                "churn": int(history.churn.sum()),
                "revived": int(history.revived.sum()),
                "skipped": len(history.events("skipped")),
                "rollbacks": len(history.events("rollback")),
                "accuracy": "–" if accuracy is None else f"{accuracy:.3f}",
            }
        )
    names = list(histories)
    shares = common_share([history.log.rank_pattern() for history in histories.values()])
    picture = Picture(
        "together-live-ranks.png",
        f"Curves of the ACTIVE ranks of {len(names)} runs over their steps",
        "ACTIVE ranks of all runs.",
        *_both(lambda look: draw_together(dict(histories), look)),
    )
    accuracies = {name: collected.outcome(name).get("accuracy") for name in names}
    known = {name: float(accuracy) for name, accuracy in accuracies.items() if accuracy is not None}
    return {
        "rows": rows,
        "picture": picture,
        "names": names,
        "shares": shares if len(names) <= _MOST_COMPARED else [],
        "summary": words.comparison(histories, shares, known),
    }


def _training(collected: Collected) -> list[tuple[str, str]]:
    """What the demo said about the training, for the reader who wants to repeat it."""
    facts = [(name.removeprefix("--"), _plain(value)) for name, value in collected.arguments.items()]
    found = collected.results
    for name in ("date", "versions", "machine"):
        if name in found:
            facts.append((name, _plain(found[name])))
    return facts


def _settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(name), _plain(value)) for name, value in settings.items() if value is not None]


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items() if item is not None)
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _both(draw: Any) -> tuple[bytes, bytes]:
    return png(draw, LIGHT), png(draw, DARK)


def _data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _anchors(names: Iterable[str]) -> dict[str, str]:
    """For each name one of its own that can be a file's and an anchor's."""
    taken = {"together", "training"}
    numbers: dict[str, Iterator[int]] = {}
    anchors = {}
    for name in names:
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"
        # Each search goes on where the last one for the same name ended.
        further = (f"{plain}-{number}" for number in numbers.setdefault(plain, count(2)))
        anchor = next(a for a in chain([plain], further) if a not in taken)
        taken.add(anchor)
        anchors[name] = anchor
    return anchors


def _breakable(name: str) -> Markup:
    """A dotted name that may be broken after its dots and underscores."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))
