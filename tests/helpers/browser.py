"""A real Chromium, and pages opened in it as files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

PATIENCE = 180_000
"""Milliseconds: a machine that is busy with other tests starts a browser late."""


@contextmanager
def chromium() -> Iterator:
    """The installed Chromium, without a window; skips where there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # root may not use the sandbox
    with driver.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=PATIENCE)
        yield browser
        browser.close()


@dataclass
class Opened:
    """A page in the browser; requests: addresses that it asked for; complaints: errors, and what
    its Content-Security-Policy refused."""

    page: object
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def unfold(self) -> None:
        self.page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")


@contextmanager
def opened(
    browser, file: Path, width: int = 1280, height: int = 800, scheme: str = "light", scripts=True
) -> Iterator[Opened]:
    """The file in a window of this size (CSS pixels) that prefers this colour scheme."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        java_script_enabled=scripts,
    )
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    shown = Opened(page)
    page.on("request", lambda request: shown.requests.append(request.url))
    page.on("pageerror", lambda error: shown.complaints.append(str(error)))
    page.on("console", lambda message: shown.complaints.append(message.text))
    page.goto(file.as_uri())
    yield shown
    context.close()


# Every visible text with its contrast to the background that it stands on (WCAG 2.2, 1.4.3).
CONTRASTS = """
() => {
  const channels = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = rgb => {
    const [r, g, b] = rgb.slice(0, 3).map(value => {
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const colour = channels(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
      if (colour[3] !== 0) throw new Error("half transparent: " + at.className);
    }
    throw new Error("no background");
  };
  const contrasts = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility()) continue;
    const colours = [channels(getComputedStyle(element).color), ground(element)];
    const [one, other] = colours.map(luminance);
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    contrasts.push([ratio, text.slice(0, 40)]);
  }
  return contrasts;
}
"""

# What can be operated or scrolled, numbered in `data-stop`.
STOPS = """
() => {
  const scrolls = element => {
    const {overflowX, overflowY} = getComputedStyle(element);
    return (overflowY === "auto" && element.scrollHeight > element.clientHeight)
      || (overflowX === "auto" && element.scrollWidth > element.clientWidth);
  };
  const operated = "a[href], button, input, select, textarea, summary, [tabindex]";
  const stops = [...document.body.querySelectorAll("*")].filter(
    e => e.checkVisibility() && (e.matches(operated) || scrolls(e)));
  stops.forEach((element, number) => { element.dataset.stop = number; });
  return stops.length;
}
"""

# What is wider than the window and stands in nothing that scrolls.
OVERFLOWS = """
() => [...document.body.querySelectorAll("*")].filter(element => {
  if (!element.checkVisibility() || element.closest(".scroll, pre")) return false;
  const box = element.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(element => element.outerHTML.slice(0, 80))
"""
