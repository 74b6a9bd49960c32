"""The policy of prefill: in which order prompts are computed, in which chunks, and how much offered KV may wait for its targets.

Here belongs what only matters while prompts are computed, later sequence parallelism. What does not: the step itself (engine).
"""
