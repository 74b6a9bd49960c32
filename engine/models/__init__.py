"""Which checkpoints can be served, and the network that serves them.

`table.py` and `config.py` decide and never reach torch; `decoder.py` and `rope.py` compute.
"""
