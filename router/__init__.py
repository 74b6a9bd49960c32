"""The global router: where each attempt runs, and why.

Here belong what the router believes of the fleet, the prefix index, the cost model, the fair queue, admission and the placement
policies; all pure, so that the simulator runs the very same objects. Only service.py opens a socket. What does not belong here:
token ids, KV bytes, HTTP. Read core.py first.
"""
