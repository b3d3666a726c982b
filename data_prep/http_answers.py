"""What an HTTP answer holds: its JSON object, a server's own words about a failure, how long to
wait."""

import email.utils
import json
import time

import httpx


class GarbledAnswer(Exception):
    """An answer that is not what was asked for; raised by the caller's own check too, and tried
    again."""


def server_words(response: httpx.Response) -> str:
    """Give the server's own words, from the places where OpenAI-compatible servers put them."""
    try:
        content = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = response.text
    for key in ("error", "detail", "message"):
        if isinstance(content, dict) and content.get(key):
            content = content[key]
    return _shortened(content if isinstance(content, str) else json.dumps(content))


def read_object(response: httpx.Response) -> dict:
    try:
        answer = response.json()
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise GarbledAnswer(f"the answer is not JSON: {_shortened(response.text)!r}") from error
    if not isinstance(answer, dict):
        raise GarbledAnswer(f"the answer is no JSON object: {_shortened(response.text)!r}")
    return answer


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait (a number or a date), at most ten minutes; None where it
    does not say."""
    value = response.headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), 600.0)


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + "…"
