"""How faithfully a cell of an experiment is run. Light to import: a command line offers the choice before anything else is needed."""

from __future__ import annotations

from enum import Enum


class Fidelity(Enum):
    TOKEN_ACCURATE = "token-accurate"  # noqa: S105 (every core, every step, every token)
    POLICY_ONLY = "policy-only"  # the router's placements over modelled queues


__all__ = ["Fidelity"]
