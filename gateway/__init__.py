"""The front door: owns each accepted request from its first byte to its one terminal state, and speaks OpenAI's dialect.

    events.py, session.py, placement.py   pure: the journal of one request, its attempts, and where to go without a router
    text.py, logprobs.py                  tokens to text: stop strings, OpenAI's logprob shapes
    dialect/                              what a body may say, and what an answer looks like
    service.py, live.py, model.py         the live driver: one tick, one object a request, the model as clients see it
    workers.py, routers.py                who it is connected to, and whether they make progress
    app.py, generate.py, http.py, page.py ASGI: routes, answers, bodies with limits, server-sent events
    metrics.py, status.py                 what it tells about itself

What does not belong here: any decision about a batch or a block (engine), any import of ray (cluster).
"""
