"""`baton bench`: what Baton measures of itself, and of others beside it.

    serve.py        `baton bench serve`: an endpoint under open-loop load
    load.py         the load: arrivals, and the client that times every delivery
    report.py       what every benchmark prints: machine, commit, seed, rows; the one definition of a paired ratio

What does not belong here: figures themselves (benchmarks/results), and the peers, whose packages are not ours (benchmarks/peers).
"""
