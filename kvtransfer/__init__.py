"""Moving KV blocks between pools: the verbs, the pure hand-off machine and planner, and one file a backend.

Here belongs everything between "these blocks are offered" and "these bytes are verified in my pool". What does not:
which worker offers to whom (router), and what is computed from the blocks (engine).
"""
