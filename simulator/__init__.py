"""The second driver: the same cores on a virtual clock, with seeded faults. A run is a seed, an incident is a file.

Here belongs what performs commands without sockets, processes or weights, and what checks the laws meanwhile. What does not: decisions.
"""
