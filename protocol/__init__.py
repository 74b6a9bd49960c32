"""The words everybody speaks, and the wire; read this first.

Here belong the records that cross a process, the three state machines, the one prefix hash, the one definition of every
latency, the error tree and the framing of every socket. What does not belong here: any decision, any model, any clock.
Imports the standard library, msgpack and xxhash only.
"""
