"""Names and numbers as people see them: terminal tables, CSV cells, paths without secrets.

A name comes from data (a category, a column, a path), so it may hold anything. Each kind of output
has one function that makes a name harmless there. HTML uses html.escape; figures use
``c2al.report.figures``.
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A text table: the first row holds the titles, the first `left` columns are aligned left, the rest right."""
    shown = [[terminal(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in shown) for i in range(len(shown[0]))]
    lines = []
    for row in shown:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def terminal(name: str) -> str:
    """`name` in one line, without control characters, which could move the cursor or colour the screen."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """CSV with a quote in front of text that a spreadsheet would run as a formula."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow([_no_formula(cell) if isinstance(cell, str) else cell for cell in row])
    return out.getvalue()


def _no_formula(text: str) -> str:
    return "'" + text if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


# The second form is for a secret with a slash in it, which its owner forgot to write as %2F. After a colon,
# digits and a slash are a port, not a secret.
_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?:[^/\s'\"]*|[^/@:\s'\"]+:(?!\d+/)[^@\s'\",]*)@")
_QUERY = re.compile(
    r"(?P<key>[?&](?:[A-Za-z0-9_.-]*(?:key|secret|token|password|passwd|credential|signature|sig)[A-Za-z0-9_.-]*)=)"
    r"[^&#\s'\"]*",
    re.IGNORECASE,
)


def redacted(text: str) -> str:
    """`text` with the user part and the secret query values of every URI in it replaced by ***.

    What is shown or stored passes through here. Credentials belong in the environment or a profile.
    """
    return _QUERY.sub(r"\g<key>***", _USER.sub(r"\g<scheme>***@", text))


def percent(share: float) -> str:
    """A confidence in words: "95%", "99.5%", never rounded up to "100%"."""
    return f"{100 * share:.12g}%"
