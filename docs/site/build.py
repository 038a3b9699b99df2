"""Builds the documentation site: ``python docs/site/build.py site/``; ``make docs`` does it in its environment.

Its pages are docs/ and some of the repository's root; they stay where a repository has them, and are gathered here with
links between them that lead somewhere. Links to other files go to the repository (``REPOSITORY_URL``), or are shown as
names. Warnings are errors.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

from sphinx.cmd.build import main as sphinx

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# A file of the repository → its page. All else is docs/NAME.md → NAME.md.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/results/README.md": "benchmarks.md",
    "docs/site/reference.md": "reference.md",
    **{f"docs/{page.name}": page.name for page in sorted((ROOT / "docs").glob("*.md"))},
}
LINK = re.compile(r"(?<![\w`])\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def gather(into: Path) -> None:
    """The pages, the pictures and what Sphinx needs, in one folder."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if page == "index.md":
            text += "\n" + (HERE / "contents.md").read_text(encoding="utf-8")
        (into / page).write_text(LINK.sub(partial(link, source=source), text), encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", into / "images")
    shutil.copy(HERE / "conf.py", into)


def link(found: re.Match[str], source: str) -> str:
    """A link of the file ``source`` as it is written in the site."""
    text, path, anchor = found[1], found[2], found[3] or ""
    if "://" in path:
        return found[0]
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if target in PAGES:
        return f"[{text}]({PAGES[target]}{anchor})"
    if target.startswith("docs/images/"):
        return f"[{text}]({target.removeprefix('docs/')})"
    if repository := os.environ.get("REPOSITORY_URL"):
        return f"[{text}]({repository.rstrip('/')}/blob/main/{target}{anchor})"
    return text if text.strip("`") in (target, posixpath.basename(target)) else f"{text} (`{target}`)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    with tempfile.TemporaryDirectory() as folder:
        gather(Path(folder))
        raise SystemExit(sphinx(["--fail-on-warning", "--keep-going", "-q", "-E", "-b", "html", folder, str(out)]))


if __name__ == "__main__":
    main()
