"""Hook of mkdocs: the site mirrors the repository, so that the links between its files hold in
both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

REPO = Path(__file__).resolve().parents[1]
SHOWN = ("*.md", "docs/**/*.md", "docs/**/*.png", "recipes/**/*.*")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give each file of the site its path in the repository, also those outside docs/."""
    for file in [f for f in files if f.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(path for pattern in SHOWN for path in REPO.glob(pattern)):
        name = path.relative_to(REPO).as_posix()
        files.append(File(name, str(REPO), config.site_dir, config.use_directory_urls))
    return files
