"""Set-up of matplotlib: no display, one style, and the same bytes for the same figure.

matplotlib is imported when the first figure is drawn. It ignores the user's style and needs no
writable home folder.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from job.errors import GammaslimError, reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from matplotlib.axes import Axes

# Okabe & Ito 2008: colours that the colour-blind tell apart; shapes and dashes differ too
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#999999"
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
STYLE = {
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": "#dddddd", "grid.linewidth": 0.6, "font.size": 10,
    "legend.fontsize": 9, "legend.framealpha": 0.8, "lines.linewidth": 1.6, "lines.markersize": 5,
    "axes.formatter.useoffset": False,
}  # fmt: skip
SIZE, DPI = (6.4, 4.0), 100  # inches, dots per inch

S = TypeVar("S")


@dataclass(frozen=True)
class FigureSpec(Generic[S]):
    """A figure of a report: the file's name without ``.png``, a caption, and how to draw it.

    ``applies`` returns whether the subject, one run or several, has the data that the figure shows.
    ``bottom`` is the margin below the axes, a fraction of the height.
    """

    name: str
    caption: str
    draw: Callable[[Axes, S], None]
    applies: Callable[[S], bool]
    bottom: float = 0.14


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as PNG, its name, and its caption."""

    name: str
    caption: str
    png: bytes


def draw_figures(specs: Sequence[FigureSpec[S]], subject: S) -> list[DrawnFigure]:
    """Draw the figures of ``specs`` that apply to ``subject``.

    Raises GammaslimError when matplotlib cannot be imported.
    """
    chosen = [spec for spec in specs if spec.applies(subject)]
    if not chosen:
        return []
    with _matplotlib() as figure_class:
        return [_draw(figure_class, spec, subject) for spec in chosen]


def _draw(figure_class: Any, spec: FigureSpec[S], subject: S) -> DrawnFigure:
    canvas = figure_class(figsize=SIZE, dpi=DPI)
    axes = canvas.subplots()
    axes.locator_params(nbins=6)  # a tick costs a millisecond
    # fixed margins: measuring them takes as long as drawing
    canvas.subplots_adjust(left=0.12, right=0.97, top=0.93, bottom=spec.bottom)
    spec.draw(axes, subject)
    content = io.BytesIO()
    canvas.savefig(content, format="png", metadata={"Software": None})
    return DrawnFigure(spec.name, spec.caption, content.getvalue())


@contextmanager
def _matplotlib() -> Iterator[Any]:
    """Yield matplotlib's Figure class, in the style of the report."""
    try:
        with _quiet_import():
            import matplotlib
            from matplotlib.backends import backend_agg  # noqa: F401  (savefig would import it)
            from matplotlib.figure import Figure
    except ImportError as error:
        raise GammaslimError(
            f"the figures need matplotlib, which cannot be imported: {reason(error)}"
        ) from error
    with warnings.catch_warnings(), matplotlib.rc_context():
        warnings.simplefilter("ignore")  # about letters that its font does not have
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield Figure


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Ignore MPLBACKEND and silence messages about fonts and caches while matplotlib is imported.

    matplotlib uses a temporary folder if neither MPLCONFIGDIR nor the home folder is writable.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
