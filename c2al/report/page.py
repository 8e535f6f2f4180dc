"""Pieces of the page: every word from data is escaped here, every number is formatted here."""

import html
import re
from collections.abc import Iterable, Sequence
from typing import Any

from c2al.evaluation.result import Estimate
from c2al.report.style import CSS
from c2al.text import terminal

MINUS = "−"
_JOINT = re.compile(r"(?<=[A-Za-z][._])(?=[A-Za-z])")
"""Where a name such as optimizer.sparse_lr may go on in the next line of a narrow column."""


def page(title: str, body: str) -> str:
    """A whole document without scripts, which loads nothing."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # else a browser asks the server for one
        f"<title>{escaped(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def escaped(value: Any) -> str:
    """Text as HTML, control characters spelled out."""
    return html.escape(terminal(str(value)))


def lines(value: str) -> str:
    """Text of several lines as HTML."""
    return "\n".join(map(escaped, value.splitlines()))


def number(value: float | None, form: str) -> str:
    """With a minus sign; a dash for an undefined number."""
    return "–" if value is None else form.format(value).replace("-", MINUS)


def value(estimate: Estimate, form: str) -> str:
    return "undefined" if estimate.value is None else number(estimate.value, form)


def between(interval: tuple[float, float] | None, form: str) -> str:
    return "no interval" if interval is None else " to ".join(number(bound, form) for bound in interval)


def counted(count: int, noun: str) -> str:
    """ "1 comparison", "2 comparisons"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def figure(svg: str, caption: str = "") -> str:
    """The figure is as wide as the page, on a narrow screen too: a phone enlarges it, and nothing of it is hidden."""
    text = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="draw">{svg}</div>{text}</figure>\n'


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    text: Iterable[int] = (),
    marked: Iterable[int] = (),
    wrapped: Iterable[int] = (),
) -> str:
    """Escapes every cell. `text`: left-aligned columns. `marked`: rows that stand out.

    `wrapped`: columns of numbers whose cells may take several lines.
    """
    text, marked, wrapped = set(text), set(marked), set(wrapped)

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag} class=text>{_JOINT.sub('<wbr>', escaped(cell))}</{tag}>"
            if i in text
            else f"<{tag}{' class=wrap' if i in wrapped else ''}>{escaped(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(
        f"<tr{' class=chosen' if i in marked else ''}>{line('td', row)}</tr>\n" for i, row in enumerate(rows)
    )
    top = f"<thead><tr>{line('th', head)}</tr></thead>"
    return f'<div class="scroll"><table>\n{top}\n<tbody>\n{body}</tbody></table></div>\n'
