"""Figures and pages of lens results."""

from tl_backward.plotting.edit_figures import edit_figure, edit_page
from tl_backward.plotting.figures import lens_figure
from tl_backward.plotting.page import lens_page
from tl_backward.plotting.report import Chapter, report_page
from tl_backward.plotting.tokens import visible

__all__ = [
    "Chapter",
    "edit_figure",
    "edit_page",
    "lens_figure",
    "lens_page",
    "report_page",
    "visible",
]
