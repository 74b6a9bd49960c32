"""What a comparison of policies looks like to a reader: one HTML file that needs no network, no script and no second file.

Here belongs the drawing. What is drawn was decided before (simulator/verdict.py, simulator/summary.py): nothing is measured, tested or
ranked here.
"""

from simulator.report.page import render

__all__ = ["render"]
