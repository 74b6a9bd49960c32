"""Measuring Baton beside others.

    results/      what was measured, one document a run, as the benchmark wrote it
    figures.py    from these documents to the tables of README and docs
    peers/        scripts that drive other engines, run by the Python those are installed in

What does not belong here: how anything is measured (baton/bench).
"""
