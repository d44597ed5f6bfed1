"""A matplotlib figure as SVG inside a page: colours by CSS variables, text as text, ids of its own.

Light and dark are the page's business, so a picture names no colour but those that stand for a variable.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

Layout: TypeAlias = Literal["constrained"] | None

# Colours no palette has, each in the place of a variable of the page's style sheet.
INK, MUTED, LINE, KEPT, GONE, ACCENT = (f"#0102{i:02x}" for i in range(3, 9))
_VARIABLES = dict(
    zip(
        (INK, MUTED, LINE, KEPT, GONE, ACCENT),
        ("ink", "muted", "line", "kept", "gone", "accent"),
        strict=True,
    )
)
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "hwprune",
    "text.parse_math": False,  # a layer may be called $\frac
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 9.0,
    "axes.unicode_minus": False,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "image.interpolation": "none",
}


@contextmanager
def in_style() -> Iterator[None]:
    """Let figures drawn inside have the page's style, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_STYLE, "backend": "svg"}):
        yield


def drawing(width: float, height: float, layout: Layout = "constrained") -> Any:
    """A figure of that many inches, without pyplot and its global state.

    Args:
        width: in inches.
        height: in inches.
        layout: "constrained" finds room for labels, and takes 0.1 s; None = axes are placed by hand.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=layout)
    FigureCanvasSVG(figure)
    return figure


def inline(figure: Any, name: str, title: str, description: str) -> str:
    """The figure as an <svg> element that can stand in a page beside others.

    Args:
        figure: of matplotlib, drawn within `drawing`.
        name: of this picture in the page: letters, digits and dashes.
        title: what it is, for readers that do not see it.
        description: what it shows, for them.
    """
    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing, transparent=True)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="([-\d. ]+)"', head)
    assert box is not None  # matplotlib writes one
    width = float(box[1].split()[2])
    body = re.sub(r"<!--.*?-->", "", body, flags=re.S)
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    body = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', body)
    body = body.replace("url(#", f"url(#{name}-")
    body = re.sub(r'\s(?:xlink:)?href="#', f' href="#{name}-', body)
    body = body.replace("xlink:href=", "href=")
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"\n\s*", "\n", body)
    opening = (
        f'<svg viewBox="{box[1]}" role="img" style="max-width:{width * 4 / 3:.0f}px" '
        f'aria-labelledby="{name}-title {name}-desc">'
    )
    told = (
        f'<title id="{name}-title">{html.escape(title)}</title>'
        f'<desc id="{name}-desc">{html.escape(description)}</desc>'
    )
    return opening + told + body.strip()
