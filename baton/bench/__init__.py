"""`baton bench`: what Baton measures of itself, and of others beside it.

    report.py       what every benchmark prints: machine, commit, seed, rows; the one definition of a paired ratio

What does not belong here: figures themselves (benchmarks/results), and the peers, whose packages are not ours (benchmarks/peers).
"""
