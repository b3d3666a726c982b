"""The URLs that a recipe names, or the environment variables that hold them."""

import os
from urllib.parse import urlsplit

from data_prep.errors import UserError


def check_url(url: str) -> str:
    """The URL as it is, or `$NAME`; raises ValueError where it is neither or holds credentials."""
    if url.startswith("$"):
        if not url[1:].isidentifier():
            raise ValueError(f"{url}: write $NAME, the name of an environment variable")
        return url
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url}: not a URL; write e.g. http://localhost:8000/v1")
    if parts.username or parts.password:
        raise ValueError("holds a user name or password, which a run would keep; use api_key_env")
    return url


def check_urls(urls: str | list[str]) -> str | list[str]:
    """The URL or URLs as they are; raises ValueError as `check_url`, and for an empty list or one
    that names a URL twice."""
    if isinstance(urls, str):
        return check_url(urls)
    if not urls or len(set(urls)) < len(urls):
        raise ValueError("give one URL, or a list of different ones")
    return [check_url(url) for url in urls]


def resolve_urls(urls: str | list[str]) -> list[str]:
    """The URLs that a key names, as `resolve_url` each; an environment variable may hold several,
    with commas between."""
    resolved: list[str] = []
    for url in [urls] if isinstance(urls, str) else urls:
        value = os.environ.get(url[1:], "") if url.startswith("$") else ""
        if "," in value:
            resolved += [resolve_url(part.strip()) for part in value.split(",") if part.strip()]
        else:
            resolved.append(resolve_url(url))
    return list(dict.fromkeys(resolved))


def resolve_url(url: str) -> str:
    """The URL that `url` names, without a slash at its end. Raises UserError where the environment
    variable is not set or no URL."""
    if not url.startswith("$"):
        return url.rstrip("/")
    value = os.environ.get(url[1:], "")
    try:
        if value.startswith("$"):
            raise ValueError(f"{value}: not a URL")
        return check_url(value).rstrip("/")
    except ValueError as error:
        raise UserError(
            f"environment variable {url[1:]}: {error if value else 'is not set'}; export it as "
            "the server's URL"
        ) from error
