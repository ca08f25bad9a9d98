"""Lay out what one command runs, and its tables: rows of settings, columns of results, Markdown.

Nothing is run here. The screen shows the rows of a command, the Markdown file all that a folder has gathered.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from focus_core.engine import FocusEngine
from focus_core.evaluation.report.records import read_metrics
from focus_core.evaluation.runner import Row
from focus_core.evaluation.tasks.perplexity import GIVEN, PerplexityRow
from focus_core.evaluation.tasks.registry import TaskOptions, Varies

Cells = list[str]
HEADER = ["task", "method", "right", "95% interval", "suite's score", "exact", "F1", "recall"]
HEADER += ["cut at", "right", "exact", "F1", "declined", "AUROC", "k", "gold @1 @3 @5", "s/trial"]
PERPLEXITY_HEADER = ["task", "memory / local", "95% over texts", "texts below 1", "memory / base's window"]
PERPLEXITY_HEADER += ["memory", "local only", "base's window", "k", "s/text"]


@dataclass(frozen=True)
class Plan:
    """One setting of a task.

    Args:
        title: names files and rows.
        engine: with the chunk size and prompt length of the setting.
        options: of the task.
        given: perplexity's local tokens before the scored ones.
    """

    title: str
    engine: FocusEngine
    options: TaskOptions
    given: int = GIVEN


@dataclass(frozen=True)
class Grid:
    """The settings that a command asks for, a row for each combination. Titles leave out what is ``None``.

    Args:
        lengths: memory tokens, for tasks that vary by them.
        documents: in memory, for tasks that vary by them.
        chunk_sizes: instead of the adapter's.
        prompt_lengths: instead of the adapter's.
        given: perplexity's local tokens before the scored ones.
    """

    lengths: Sequence[int]
    documents: Sequence[int]
    chunk_sizes: Sequence[int] | None = None
    prompt_lengths: Sequence[int] | None = None
    given: Sequence[int] | None = None

    def models(self, engine: FocusEngine) -> Iterator[tuple[Cells, FocusEngine]]:
        """Yield an engine for every chunk size and prompt length, and what titles call it."""
        for size, prompt in product(_asked(self.chunk_sizes), _asked(self.prompt_lengths)):
            asked = {"chunk_size": size, "prompt_length": prompt}
            changes = {
                name: value for name, value in asked.items() if value not in (None, getattr(engine.config, name))
            }
            names = [*([f"c{size}"] if size else []), *([f"p{prompt}"] if prompt else [])]
            yield names, engine.with_config(**changes) if changes else engine


def make_plans(engine: FocusEngine, task: str, varies: Varies, options: TaskOptions, grid: Grid) -> Iterator[Plan]:
    """Yield every setting that a command asks for.

    Args:
        engine: under test.
        task: its name.
        varies: which of the grid's ``lengths`` and ``documents`` makes rows.
        options: shared by all settings.
        grid: the settings.
    """
    changes: list[dict[str, Any]] = [{}]
    if varies == "lengths":
        changes = [{"tokens": tokens} for tokens in grid.lengths]
    elif varies == "documents":
        changes = [{"documents": count} for count in grid.documents]
    for (names, model), given, change in product(grid.models(engine), _asked(grid.given), changes):
        made = replace(options, chunk_size=model.config.chunk_size, **change)
        parts = [task, *_variant(made), *map(str, change.values()), *names, *([] if given is None else [f"g{given}"])]
        yield Plan("-".join(parts), model, made, GIVEN if given is None else given)


def row_cells(row: Row) -> Cells:
    """Return a row under :data:`HEADER`."""
    low, high = row.interval
    return [
        row.name,
        row.method,
        f"{row.right}/{row.trials}" + (f" ({row.skipped} do not fit)" if row.skipped else ""),
        f"{low:.0%}-{high:.0%}",
        "" if row.suite_score is None else f"{100 * row.suite_score:.1f}",
        f"{row.exact:.2f}",
        f"{row.f1:.2f}",
        f"{row.recall:.2f}",
        *_cut_cells(row),
        ", ".join(f"{share:.0%} {label}" for label, share in row.declined.items()),
        "" if row.auroc is None else f"{row.auroc:.2f}",
        f"{row.chunks:.0f}" if row.chunks else "",
        " ".join(f"{share:.0%}" for share in row.gold_within.values()),
        f"{row.seconds:.1f}",
    ]


def _cut_cells(row: Row) -> Cells:
    """Return the scores of answers cut at the first limit, under "cut at", "right", "exact" and "F1"."""
    if not row.cut:
        return [""] * 4
    limit, scores = min(row.cut.items(), key=lambda pair: int(pair[0]))
    return [
        f"{limit} tokens",
        f"{scores['right']:.0f}/{row.trials}",
        f"{scores['exact']:.2f}",
        f"{scores['f1']:.2f}",
    ]


def filled_columns(header: Cells, rows: Sequence[Cells]) -> tuple[Cells, list[Cells]]:
    """Return a table without the columns that no row fills."""
    kept = [index for index in range(len(header)) if any(row[index] for row in rows)]
    return [header[index] for index in kept], [[row[index] for index in kept] for row in rows]


def perplexity_cells(row: PerplexityRow) -> Cells:
    """Return a row under :data:`PERPLEXITY_HEADER`."""
    low, high = row.interval
    better = sum(ratio < 1 for ratio in row.by_text.values())
    return [
        row.name,
        f"{row.ratio:.3f}",
        "" if low == 0 else f"{low:.3f}-{high:.3f}",
        f"{better}/{row.texts}",
        f"{row.window_ratio:.3f}",
        f"{row.memory:.2f}",
        f"{row.local:.2f}",
        f"{row.window:.2f}",
        f"{row.chunks:.0f}",
        f"{row.seconds:.0f}",
    ]


def gathered_cells(folder: Path, task: str) -> list[Cells]:
    """Return the cells of every row of a task that a folder's metrics files hold: by setting, own methods first."""
    cells = []
    for facts in read_metrics(folder, task):
        name, method = str(facts["name"]), str(facts.get("method", ""))
        place = [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
        kind: type[Row | PerplexityRow] = PerplexityRow if "ratio" in facts else Row
        row = kind(**{item.name: facts[item.name] for item in fields(kind) if item.name in facts})
        made = perplexity_cells(row) if isinstance(row, PerplexityRow) else row_cells(row)
        cells.append(((place, not method.startswith("focusllm"), method), made))
    return [made for _, made in sorted(cells, key=lambda pair: pair[0])]


def write_markdown(path: Path, header: Cells, rows: Sequence[Cells], trained: dict[str, Any]) -> None:
    """Write a table as Markdown, with the k that training has seen below it."""
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n\n{trained_note(trained)}\n", encoding="utf-8")


def trained_note(trained: dict[str, Any]) -> str:
    """Return what to read the tested k beside."""
    most = trained.get("max_chunks")
    return f"k seen in training: up to {most}" if most else "k seen in training: not recorded"


def _asked(values: Sequence[int] | None) -> Sequence[int | None]:
    return values or [None]


def _variant(options: TaskOptions) -> Cells:
    natural = ["natural"] if options.filler is not None else []
    natural += [options.distractors_from] if options.distractors_from != "others" else []
    natural += [options.needle] if options.needle != "key" else []
    natural += ["test"] if options.split == "test" else []
    return natural + ([f"keys{options.distractors + 1}"] if options.distractors else [])
