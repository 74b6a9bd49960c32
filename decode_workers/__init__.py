"""The policy of decode: who is admitted to the batch, and who is preempted when blocks run out.

Here belongs what only matters while tokens are decoded, later expert parallelism. What does not: the step itself (engine).
"""
