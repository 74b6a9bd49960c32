"""HTML and SVG as values: text is escaped where it enters an element, so that a policy's name can not become markup."""

from __future__ import annotations

from html import escape

VOID = frozenset({"col", "meta", "wbr"})


class Markup(str):
    """Text that is markup already; any other `str` is text and gets escaped."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: object) -> Markup:
    """`<tag attributes>children</tag>`.

    Args:
        attributes: `class_` is class and `stroke_width` is stroke-width; None leaves one out; a float is written with two decimals.
    """
    said = "".join(f' {_name(key)}="{escape(_value(value))}"' for key, value in attributes.items() if value is not None)
    if tag in VOID:
        return Markup(f"<{tag}{said}>")
    return Markup(f"<{tag}{said}>{together(*children)}</{tag}>")


def together(*children: str, between: str = "") -> Markup:
    """One behind the other."""
    return Markup(_escaped(between).join(_escaped(child) for child in children))


def _escaped(text: str) -> str:
    return text if isinstance(text, Markup) else escape(text)


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _value(value: object) -> str:
    return f"{value:.2f}".removesuffix(".00") if isinstance(value, float) else str(value)


__all__ = ["Markup", "element", "together"]
