"""Colours by a policy's place in the document: the same in every drawing, in light and dark told apart by readers who see fewer colours."""

from __future__ import annotations

# The nearest two are 29 and 26 apart in CIELAB with any of the three dichromacies (Machado et al., 2009); 3 : 1 and more on the page.
LIGHT = ("#14306e", "#d4605c", "#4b97b5", "#9a3ccc", "#8f9600", "#3b2a14")
DARK = ("#3d8ff5", "#e0533f", "#5fe6a0", "#bd62ad", "#dcc93a", "#d6ecf8")
DASHES = (None, "6 3", "2 3")  # a seventh policy has the colour of the first, and a line of another kind


def colour_class(place: int) -> str:
    """Classes of what is drawn for the policy; `var(--policy)` is its colour, and an outline marks the second and third of a colour."""
    return f"policy{place % len(LIGHT)}" + (f" outlined{place // len(LIGHT)}" if place >= len(LIGHT) else "")


def dash(place: int) -> str | None:
    return DASHES[place // len(LIGHT) % len(DASHES)]


def rules() -> str:
    """For the style sheet: a class sets `--policy`, which the drawing reads."""
    return "\n".join(f".policy{i}{{--policy:var(--policy{i})}}" for i in range(len(LIGHT)))


def variables(colours: tuple[str, ...]) -> str:
    return "".join(f"--policy{i}:{colour};" for i, colour in enumerate(colours))


__all__ = ["DARK", "LIGHT", "colour_class", "dash", "rules", "variables"]
