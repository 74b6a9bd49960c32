"""The built-in demo model: where its checkpoint lies, and what it is. How it was made: examples/demo_model/."""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL_DIR = Path(__file__).resolve().with_name("demo_model")  # package data, in the wheel too
DEMO_MODEL_ABOUT = "a Python and docstring completer of 4M parameters"
