"""Requests of production, and ones like them: read from published traces or drawn from a seed, for the simulator and for a live cluster.

A prompt is a chain of runs, each named by what its tokens are (content.py): what a trace says is shared is shared, whatever the size of a
block, and nothing else is. Nothing here waits, sends or looks at a clock.
"""

from simulator.traces.formats import FORMATS, load_trace
from simulator.traces.trace import Run, Trace, TraceRequest

__all__ = ["FORMATS", "Run", "Trace", "TraceRequest", "load_trace"]
