"""The comparison table, once as rows, and set as Markdown and as plain text."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from results.report.results import ERRORS, Arm, Study
from results.report.statistics import Interval

DASH = "–"


def number(interval: Interval | None, digits: int = 3) -> str:
    """`0.123 ± 0.004`, `0.123` without an interval, a dash without a value."""
    if interval is None:
        return DASH
    text = f"{interval.mean:.{digits}f}"
    return text if interval.half is None else f"{text} ± {interval.half:.{digits}f}"


def difference(interval: Interval | None, digits: int = 3) -> str:
    """Like `number`, with the sign always shown."""
    if interval is None:
        return DASH
    text = f"{interval.mean:+.{digits}f}"
    return text if interval.half is None else f"{text} ± {interval.half:.{digits}f}"


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text; the first column is words, the others are numbers."""

    head: list[str]
    rows: list[list[str]]


def comparison(study: Study, *, brief: bool = False) -> Table:
    """One row per teacher and per variant: mAP, NDS, differences to the baseline, the five errors.

    The column `row` names rows of a paper's table, where a variant reproduces one.

    `brief` leaves out the intervals of the errors, for a terminal.
    """
    present = ["mAP present"] if study.absent else []
    rows = ["row"] if study.has_rows else []
    head = ["model", *rows, "seeds", "mAP", "Δ mAP", *present, "NDS", "Δ NDS", *ERRORS, "params"]
    return Table(head, [_row(study, arm, brief) for arm in study.arms])


def _row(study: Study, arm: Arm, brief: bool) -> list[str]:
    name = f"{arm.name} ({arm.tag})" if arm.tag else arm.name
    rows = [arm.row] if study.has_rows else []
    present = [number(arm.mean("mAP_present"))] if study.absent else []
    errors = [number(arm.mean(error)) for error in ERRORS]
    if brief:
        errors = [text.partition(" ")[0] for text in errors]
    return [
        name,
        *rows,
        str(len(arm.runs)),
        number(arm.mean("mAP")),
        difference(study.gain(arm, "mAP")),
        *present,
        number(arm.mean("NDS")),
        difference(study.gain(arm, "NDS")),
        *errors,
        f"{arm.first['parameters'] / 1e6:.2f} M",
    ]


def notes(study: Study, profile: str) -> list[str]:
    """What a reader must know beside the table."""
    run = study.baseline.first
    lines = [
        f"Profile {profile}, seed{'s' * (len(study.seeds) > 1)} {', '.join(map(str, study.seeds))}.",
        f"nuScenes metrics, detection_cvpr_2019, {computed_by(study)}, split {run['split']}: "
        f"keyframes {run['samples']}, boxes of truth {run['boxes']['truth']}.",
    ]
    if len(study.seeds) == 1:
        lines.append("One seed, no interval: a difference between two rows is not evidence of a gain.")
    else:
        lines.append(
            f"Mean ± half-width of the 95 % t-interval over {len(study.seeds)} seeds; "
            f"Δ: difference to {_baselines(study)}, paired by seed."
        )
    if study.absent:
        lines.append(
            f"Not in the truth: {', '.join(study.absent)}. Their AP counts as 0 and their errors as 1; "
            "`mAP present` is the mean over the other classes."
        )
    return lines


def computed_by(study: Study) -> str:
    """Whose code computed the official numbers."""
    words = {"vectorised": "computed by this project", "devkit": "computed by the devkit"}
    return " and ".join(sorted({words[run["official"]] for arm in study.arms for run in arm.runs.values()}))


def _baselines(study: Study) -> str:
    names = [arm.name for arm in study.baselines]
    return names[0] if len(names) == 1 else f"the last of {', '.join(names)} above"


def learning_notes(split: str, learned_from: Mapping[str, str], seen: Collection[str]) -> list[str]:
    """What a reader must know of the data that the models learned from.

    Args:
        split: that they are scored on.
        learned_from: name of a teacher, or "students" -> split.
        seen: those of them that learned from scenes of `split`.
    """
    lines = [f"Learned: {', '.join(f'{name} from {source}' for name, source in learned_from.items())}."]
    if "students" in seen:
        lines.append(
            f"The students have learned from scenes of {split}, on which they are scored: this is a fit, "
            "and says nothing about other scenes."
        )
    elif seen:
        names = " and ".join(name for name in learned_from if name in seen)
        lines.append(f"{names} learned from scenes of {split} too: only the students' scores are of unseen scenes.")
    return lines


def markdown(table: Table, lines: Iterable[str]) -> str:
    """A GitHub table followed by the notes."""
    rule = ["---", *["---:"] * (len(table.head) - 1)]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in (table.head, rule, *table.rows))
    return body + "\n\n" + "\n".join(f"- {line}" for line in lines) + "\n"


def plain(table: Table, lines: Iterable[str]) -> str:
    """The table with aligned columns for a terminal, followed by the notes."""
    cells = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.head))]
    text = [_line(row, widths) for row in cells]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([text[0], rule, *text[1:], "", *lines]) + "\n"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first = row[0].ljust(widths[0])
    rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([first, *rest])
