"""Names from data as figures show them."""

from c2al.text import terminal


def figure_text(name: str, most: int = 40) -> str:
    """`name` as matplotlib draws it letter by letter, in one line of at most `most` characters.

    matplotlib sets text between two dollar signs as mathematics and fails where that is none, and leaves
    a label that is empty or begins with "_" out of a legend. So dollars get a backslash, which is not
    drawn, a leading "_" gets a space in front, and an empty name is shown as "". Control characters are
    spelled out.
    """
    text = terminal(name) or '""'
    if len(text) > most:
        text = f"{text[: most - 1]}…"
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
