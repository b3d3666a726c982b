"""What a page is read with, and texts that try to break it."""

from html.parser import HTMLParser

HOSTILE = '</script><script>alert("x")</script> & <img src=x onerror=\'alert(1)\'> "quoted"'


class Page(HTMLParser):
    """Tags with their attributes; texts of figcaptions, scripts, answers and rows of the table of
    rounds; figures as (img, caption)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.answers: list[str] = []
        self.captions: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in ("meta", "img", "source", "br"):
            self.open.append((tag, attrs))
        if tag == "tr" and self._within("table", "table-of-rounds"):
            self.rows.append([])
        if tag in ("td", "th") and self._within("table", "table-of-rounds"):
            self.rows[-1].append("")
        for name, texts in (("figcaption", self.captions), ("script", self.scripts)):
            if tag == name:
                texts.append("")
        if attrs.get("class") == "answer":
            self.answers.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def _within(self, tag, identifier=None):
        return any(
            t == tag and (identifier is None or a.get("id") == identifier) for t, a in self.open
        )

    def handle_data(self, data):
        if self._within("figcaption"):
            self.captions[-1] += data
        if self._within("script"):
            self.scripts[-1] += data
        if self.open and self.open[-1][1].get("class") == "answer":
            self.answers[-1] += data
        if (
            self.open
            and self.open[-1][0] in ("td", "th")
            and self._within("table", "table-of-rounds")
        ):
            self.rows[-1][-1] += data

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]
