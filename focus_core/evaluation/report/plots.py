"""Draw what metrics files hold: results against length (arXiv 2408.11745, Fig. 1 and 6) and chunk size (Fig. 5).

Files accumulate over runs, so a plot shows every length that was measured into the folder. Nothing is measured here;
matplotlib is an extra, and without it nothing is drawn.
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focus_core.evaluation.metrics import wilson
from focus_core.evaluation.report.records import read_metrics


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        series: the line it belongs to, length and chunk size left out.
        tokens: memory tokens.
        chunk_size: most tokens of a chunk.
        value: share of right answers in percent, or perplexity.
        low: lower end of its 95% interval; the value where there is none.
        high: upper end.
    """

    series: str
    tokens: int
    chunk_size: int
    value: float
    low: float
    high: float


def draw_folder(folder: Path, task: str) -> list[Path]:
    """Draw ``{task}-length.png`` and ``{task}-chunk-size.png`` where there are two values or more of either.

    Args:
        folder: with metrics files.
        task: its name; files of it are ``{task}-....json``.

    Returns:
        The images written; none without matplotlib.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return []
    points = read_points(folder, task)
    unit = "perplexity of the last tokens" if task == "perplexity" else "right answers, %"
    images = []
    for name, label, axis, other in (
        ("length", "memory tokens", _tokens, _chunk_size),
        ("chunk-size", "chunk size, tokens", _chunk_size, _tokens),
    ):
        if len({axis(point) for point in points}) > 1:
            path = folder / f"{task}-{name}.png"
            _draw(_lines(points, axis, other), label, unit, task != "perplexity", path)
            images.append(path)
    return images


def read_points(folder: Path, task: str) -> list[Point]:
    """Read the points of a task from its metrics files; rows without a length are left out."""
    points: list[Point] = []
    for facts in read_metrics(folder, task):
        points += _perplexities(facts) if "ratio" in facts else _rates(facts, task)
    return points


def _rates(facts: dict[str, Any], task: str) -> list[Point]:
    tokens, trials = facts.get("tokens"), facts.get("trials")
    if not tokens or not trials:
        return []
    size = facts["run"]["focus"]["chunk_size"]
    low, high = wilson(facts["right"], trials)
    series = f"{facts['method']}{_variant(facts['name'].removeprefix(task), tokens, size)}"
    return [Point(series, tokens, size, 100 * facts["right"] / trials, 100 * low, 100 * high)]


def _perplexities(facts: dict[str, Any]) -> list[Point]:
    tokens, size = facts["settings"]["tokens"], facts["run"]["focus"]["chunk_size"]
    names = {"memory": "with memory", "local": "local context only", "window": "base on its window"}
    variant = _variant(facts["name"].removeprefix("perplexity"), tokens, size)
    return [Point(f"{name}{variant}", tokens, size, facts[key], facts[key], facts[key]) for key, name in names.items()]


def _variant(name: str, tokens: int, chunk_size: int) -> str:
    """Return what a row's name says beside length and chunk size, a space before each part."""
    return "".join(f" {part}" for part in name.split("-") if part not in ("", str(tokens), f"c{chunk_size}"))


def _tokens(point: Point) -> int:
    return point.tokens


def _chunk_size(point: Point) -> int:
    return point.chunk_size


def _lines(
    points: Iterable[Point], axis: Callable[[Point], int], other: Callable[[Point], int]
) -> dict[str, list[tuple[int, Point]]]:
    """Group points into lines along ``axis``; the other size joins the name where it differs."""
    several = len({other(point) for point in points}) > 1
    lines: dict[str, list[tuple[int, Point]]] = defaultdict(list)
    for point in points:
        lines[f"{point.series}, {other(point)}" if several else point.series].append((axis(point), point))
    return {name: sorted(line, key=lambda pair: pair[0]) for name, line in sorted(lines.items())}


def _draw(lines: dict[str, list[tuple[int, Point]]], label: str, unit: str, percent: bool, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2))
    axes = figure.subplots()
    for name, line in lines.items():
        places, values = [place for place, _ in line], [point.value for _, point in line]
        below = [point.value - point.low for _, point in line]
        above = [point.high - point.value for _, point in line]
        axes.errorbar(places, values, yerr=[below, above] if percent else None, marker="o", capsize=3, label=name)
    axes.set_xscale("log", base=2)
    ticks = sorted({place for line in lines.values() for place, _ in line})
    axes.set_xticks(ticks, [f"{tick // 1000}K" if tick >= 1000 else str(tick) for tick in ticks])
    axes.minorticks_off()
    if percent:
        axes.set_ylim(-3, 103)
    axes.set_xlabel(label)
    axes.set_ylabel(unit)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(str(path), dpi=150)
