"""`baton bench`: what Baton measures of itself, and of others beside it.

    report.py            what every benchmark prints: machine, commit, seed, rows; the one definition of a paired ratio
    screen.py            the line of progress and the table at the end
    serve.py             `baton bench serve`: an endpoint under open-loop load
    load.py              the load: arrivals, and the client that times every delivery
    disagg.py            `baton bench disagg`: prefill and decode apart, beside colocated engines
    start.py             `baton bench start`: from the command to the first answer, and to the end
    servers.py           whole servers, held still between turns   pareto.py           the drawing of that trade
    transfer.py          `baton bench transfer`: KV blocks between two processes, and the hand-off in a cluster
    transfer_run.py      subjects that take turns                 transfer_rows.py    from turns to rows, targets, verdicts
    transfer_subject.py  our target, answering                    transfer_source.py  our source
    transfer_spoken.py   what all subjects do alike               transfer_handoff.py the hand-off as the engine sees it
    policies.py          `baton bench policies`: placement policies in turns, in one live cluster
    policy_traffic.py    its four workloads and its cluster       policy_run.py       switch, reset, one cell
    policy_rows.py       from cells to rows and verdicts          policy_figure.py    their drawing
    switched.py          a running cluster between two policies   trace_traffic.py    a trace as load
    live_runs.py         the turns of `baton replay`
    validation.py        `baton bench validation`: simulated beside live
    validation_model.py  what a simulation says beforehand        validation_run.py    the live half
    router.py            `baton bench router`: what a placement costs, from the index to the socket
    router_run.py        subjects that take turns                 router_rows.py      from turns to rows, targets
    router_subject.py    our router, answering                    router_load.py      the fleet, its caches, the prompts
    router_socket.py     gateway, router and workers as processes
    engine_command.py    `baton bench engine` and the table it prints
    engine_run.py        loading, checking, taking turns          engine_rows.py      from samples to rows, targets, verdicts
    workloads.py         which requests, which figures            models.py           random checkpoints, bytes and FLOPs of a token
    conversation.py      an engine in a process of its own        spoken.py           the words it answers in (standard library only)
    subject.py           our engine, answering                    peers.py            where others are
    processor_time.py    what other processes used meanwhile

What does not belong here: figures themselves (benchmarks/results), and the scripts that drive peers (benchmarks/peers).
"""
