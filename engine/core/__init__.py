"""What decides in a worker: sequences, blocks, prefix cache, scheduler, and the core that binds them. Pure: no torch, ray, socket, clock.

A driver feeds `WorkerCore.on(event, now)` and performs the commands it returns (engine/core/events.py).
"""
