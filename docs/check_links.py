"""Fails where a built page links to a page, file or anchor that is not there.

python docs/check_links.py docs/_build
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        self.anchors.update(value for key in ("id", "name") if (value := values.get(key)))
        self.links.update(value for key in ("href", "src") if (value := values.get(key)))


def broken_links(root: Path) -> list[str]:
    """Page and link of each that leads nowhere inside of the site."""
    pages = {path.resolve(): Page(path) for path in root.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target.is_dir():
                target /= "index.html"
            has_anchor = target not in pages or unquote(parts.fragment) in pages[target].anchors
            if not (target.exists() and has_anchor):
                broken.append(f"{path.relative_to(root.resolve())}: {link}")
    return broken


if __name__ == "__main__":
    found = broken_links(Path(sys.argv[1]))
    print("\n".join(found) if found else "Every internal link leads somewhere.")
    sys.exit(bool(found))
