"""Writing a figure of matplotlib as SVG."""

import io
import warnings
from typing import Any

TEXT = {"svg.fonttype": "none", "svg.hashsalt": "c2al"}
"""Style: letters stay letters, so that whoever shows the figure has the fonts for them; equal bytes each time."""


def svg_text(figure: Any, **options: Any) -> str:
    """The figure as SVG, without its date. To be called within the figure's own style.

    matplotlib measures letters in its own font and warns of those that the font lacks. They are not drawn with it.
    """
    out = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None}, **options)
    return out.getvalue()
