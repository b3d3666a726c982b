"""What the pages of `cdpo report` and `cdpo compare` share: their templates and the longest text on
them."""

from pathlib import Path

TEMPLATES = Path(__file__).parent / "templates"


# of one text on a page: a report with three constraints stays below 10 MB whatever was sampled
MAX_CHARACTERS = 3000


def render_page(template: str, values: dict[str, object]) -> str:
    """The template of `templates/` filled in; every value is escaped, a missing one is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def shortened(text: str) -> str:
    """A prompt or response as a page shows it; what is cut is counted."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return (
        f"{text[:MAX_CHARACTERS]} […] ({len(text) - MAX_CHARACTERS:,} more characters are in "
        "the table)"
    )
