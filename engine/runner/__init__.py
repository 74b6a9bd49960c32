"""The torch executor: BatchPlan in, StepResult out, on its own compute thread.

`config.py` is torch-free; the rest is not, so this file imports nothing.
"""
