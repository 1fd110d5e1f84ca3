"""The course: exercises with their checker, what the lessons share, figures. Nothing outside imports it but the command
line, for what it draws and executes.

    from minillama.course import check
    check("gated_prefix_attention", your_function)
"""

from .exercises import check

__all__ = ["check"]
