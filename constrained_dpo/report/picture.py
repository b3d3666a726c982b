"""A figure as a page holds it: drawn for light and dark, with its words and its sources."""

import base64
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from constrained_dpo.report.drawing import DARK, LIGHT, Style, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure of a page.

    section: front, multipliers, slack, path, certificate or scores; stem: its PNGs are STEM.png and
    STEM-dark.png; sources: the run's files it was drawn from.
    """

    stem: str
    section: str
    title: str
    alt: str
    caption: str
    sources: list[str]
    draw: "Callable[[Style], Figure]" = field(repr=False)

    def drawn(self) -> "DrawnPicture":
        """Draw it for light and for dark pages."""
        light, dark = render(self.draw, LIGHT), render(self.draw, DARK)
        return DrawnPicture(self, {f"{self.stem}.png": light, f"{self.stem}-dark.png": dark})


@dataclass(frozen=True)
class DrawnPicture:
    """A figure with its PNGs by file name, the light one first."""

    picture: Picture
    files: dict[str, bytes]

    @property
    def file(self) -> str:
        return next(iter(self.files))

    @property
    def light(self) -> str:
        """The light PNG in base64, as a page embeds it."""
        return base64.b64encode(self.files[self.file]).decode()

    @property
    def dark(self) -> str:
        """The dark PNG in base64."""
        return base64.b64encode(self.files[f"{self.picture.stem}-dark.png"]).decode()
