"""Live composition: Ray, processes, sockets and threads around the pure cores. The only packaged folder that imports ray.

Here belong hosts and drivers, which perform what a core decided; a decision does not belong here.
"""
