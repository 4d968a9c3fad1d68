"""Hooks of the documentation site (mkdocs.yml): globs in the nav, and links to files of the repository outside docs/."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_FOLDER = "repository"  # of the site, for copies of files that pages link to
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)(\)|#)")


def on_config(config: MkDocsConfig) -> None:
    """Put the pages that match in place of each entry of the nav with a star."""
    config.nav = _expanded(config.nav, Path(config.docs_dir))


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Copy every file outside docs/ to which a page links into the site."""
    docs = Path(config.docs_dir)
    for page in files.documentation_pages():
        for link in _LINK.finditer(page.content_string):
            target = _outside(page.src_uri, link[2], docs)
            if target is not None and files.get_file_from_path(_copy_of(target, docs)) is None:
                files.append(File.generated(config, _copy_of(target, docs), abs_src_path=str(target)))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to such files lead to their copies."""
    docs = Path(config.docs_dir)

    def moved(link: re.Match[str]) -> str:
        target = _outside(page.file.src_uri, link[2], docs)
        if target is None:
            return link[0]
        return f"{link[1]}{'../' * page.file.src_uri.count('/')}{_copy_of(target, docs)}{link[3]}"

    return _LINK.sub(moved, markdown)


def _expanded(nav: Any, docs: Path) -> Any:
    match nav:
        case list():
            found = [_expanded(each, docs) for each in nav]
            flat = [item for each in found for item in (each if isinstance(each, list) else [each])]
            return list(dict.fromkeys(flat)) if all(isinstance(each, str) for each in flat) else flat
        case dict():
            return {title: _expanded(each, docs) for title, each in nav.items()}
        case str() if "*" in nav:
            return sorted(path.relative_to(docs).as_posix() for path in docs.glob(nav))
    return nav


def _outside(page: str, link: str, docs: Path) -> Path | None:
    """The file of the repository, outside docs/, to which a link of a page leads."""
    target = (docs / page).parent.joinpath(link).resolve()
    root = docs.parent.resolve()
    is_outside = target.is_file() and target.is_relative_to(root) and not target.is_relative_to(docs.resolve())
    return target if is_outside else None


def _copy_of(target: Path, docs: Path) -> str:
    """The place of the copy in the site. A page of Markdown is copied as a text."""
    name = f"{_FOLDER}/{target.relative_to(docs.parent.resolve()).as_posix()}"
    return f"{name}.txt" if target.suffix == ".md" else name
