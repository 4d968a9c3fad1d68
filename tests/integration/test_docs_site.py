"""The documentation: its generated pages are current, its links resolve, and its site builds and opens without a network."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opd.config import Config, SftConfig
from opd.reference import PAGES, keys, sections

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "mkdocs.yml").is_file())
PAGE = re.compile(r"docs/[\w./-]+?\.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")
ROOT_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md")
LOADED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=["']?(?:https?:)?//""")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def build(target: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(target)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    built = build(folder)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_has_a_page_for_every_page_of_docs(site: Path):
    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert {page.relative_to(site) for page in site.rglob("*.html")} == pages | {Path("404.html")}


def test_the_strict_build_refuses_broken_links_and_pages_outside_the_nav(tmp_path: Path):
    docs, config = tmp_path / "docs", tmp_path / "mkdocs.yml"
    docs.mkdir()
    shutil.copy(ROOT / "docs/site_hooks.py", docs)
    (tmp_path / "recipe.toml").touch()
    sound = "# Home\n\n[a](other.md#part), [a recipe](../recipe.toml)\n\n"
    (docs / "index.md").write_text(sound)
    (docs / "other.md").write_text("# Other\n\n## Part\n")
    config.write_text(f"INHERIT: {ROOT}/mkdocs.yml\nplugins: []\nextra_css: []\nnav: [index.md, 'oth*.md']\n")
    assert build(tmp_path / "sound", config).returncode == 0
    assert (tmp_path / "sound/repository/recipe.toml").is_file()
    broken = "[a](no-page.md) [a](other.md#no-anchor) [a](../no-file.toml) ![a](no-picture.png)"
    (docs / "index.md").write_text(sound + broken)
    (docs / "outside.md").touch()
    built = build(tmp_path / "broken", config)
    assert built.returncode != 0
    warnings = [line for line in built.stderr.splitlines() if line.startswith("WARNING")]
    for fault in ("no-page.md", "#no-anchor", "no-file.toml", "no-picture.png", "outside.md"):
        assert any(fault in line for line in warnings) or f"- {fault}" in built.stderr, (fault, built.stderr)


def test_the_links_of_the_pages_at_the_root_resolve(site: Path):
    links = [(name, link) for name in ROOT_PAGES for link in LINK.findall((ROOT / name).read_text(encoding="utf-8"))]
    inside = [(name, *link.partition("#")) for name, link in links if not link.startswith(("http://", "https://"))]
    assert [(name, path) for name, path, _, _ in inside if not (ROOT / path).exists()] == []
    for name, path, _, anchor in inside:
        if anchor and path.startswith("docs/"):
            page = site / Path(path).relative_to("docs").with_suffix(".html")
            assert f'id="{anchor}"' in page.read_text(encoding="utf-8"), (name, path, anchor)


def test_every_page_that_the_code_names_exists():
    named = [
        (file.relative_to(ROOT), page)
        for kind in (
            "src/**/*.py",
            "tests/**/*.py",
            "examples/**/*.py",
            "benchmarks/**/*.py",
            "recipes/*.toml",
            "Makefile",
        )
        for file in ROOT.glob(kind)
        for page in PAGE.findall(file.read_text(encoding="utf-8"))
    ]
    assert named
    assert [(str(file), page) for file, page in named if not (ROOT / page).is_file()] == []


def test_every_module_that_the_page_on_the_architecture_names_exists():
    page = (ROOT / "docs/concepts/architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", page)
    assert "local/learner.py" in named
    assert [name for name in named if not any((ROOT / place / name).is_file() for place in ("src/opd", "."))] == []


def test_the_site_loads_nothing_from_a_network(site: Path):
    pages = list(site.rglob("*.html"))
    assert [page.name for page in pages if LOADED.search(page.read_text(encoding="utf-8"))] == []
    styles = [style.read_text(encoding="utf-8") for style in site.rglob("*.css")]
    assert styles
    assert not any(re.search(r"url\(\s*[\"']?(https?:)?//|@import", style) for style in styles)
    # the theme fetches a library from a server for such a diagram
    assert not any('class="mermaid"' in page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_current(name: str):
    assert (ROOT / "docs/reference" / name).read_text(encoding="utf-8") == PAGES[name](), "run `make reference`"


def test_every_page_of_the_reference_is_generated_or_known():
    elsewhere = {"api.md", "cluster-plan.md", "models.md"}  # by hand, and by `make models-page`
    assert {page.name for page in (ROOT / "docs/reference").glob("*.md")} == elsewhere | set(PAGES)


def schema_keys(schema: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, its schema) of a table of the JSON schema that pydantic makes of a recipe."""
    for key, value in schema.get("properties", {}).items():
        yield f"{name}.{key}", value


@pytest.mark.parametrize("recipe", [Config, SftConfig])
def test_every_key_of_a_recipe_has_a_description(recipe: type[Config] | type[SftConfig]):
    schema = recipe.model_json_schema()
    tables = {"recipe": schema, **{name: table for name, table in schema["$defs"].items()}}
    found = dict(pair for name, table in tables.items() for pair in schema_keys(table, name))
    is_table = {key for key, value in found.items() if "$ref" in str(value)} | {
        k for k in found if k.endswith("Task.type")
    }
    assert "recipe.steps" in found
    assert "recipe.lora" in is_table
    assert [key for key in found if key not in is_table and not found[key].get("description", "").strip()] == []


def test_every_key_is_in_the_reference_with_one_short_sentence_first():
    page = (ROOT / "docs/reference/configuration.md").read_text(encoding="utf-8")
    tables = [Config, SftConfig, *(table for _, found in sections(Config) for table in found)]
    for key in (key for table in tables for key in keys(table)):
        first = re.split(r"(?<=\.)\s+(?=[A-Z0-9\"`(]|opd )", key.description)[0]
        assert first.endswith("."), key
        assert len(first.split()) <= 25, key
        assert f"| `{key.name}` | {key.kind} | {key.default} | {first} |" in page


@pytest.mark.parametrize(
    "row",
    [
        "`student` | text | required",
        "`lr` | number > 0 | `0.0001`",
        "`eps` | number > 0 | `1e-8`",
        "`betas` | 2 numbers | `[0.9, 0.95]`",
        "`group_size` | integer ≥ 1 | `1`",
        "`discount` | number in [0, 1] | none",
        "`jsd_beta` | number in (0, 1) | `0.5`",
        "`low` | number in (0, 1] | `0.5`",
        '`loss` | `"reinforce"`, `"ppo"` | `"reinforce"`',
        "`url` | text or list of texts | none",
        "`weights` | table of numbers > 0 | none",
        "`tail_residual` | `true`, `false` | `false`",
        "`template_time` | date and time | none",
        "`rules` | list of names | `[]`",
    ],
)
def test_a_row_of_the_configuration_shows_type_range_and_default(row: str):
    assert f"| {row} | " in PAGES["configuration.md"]()


@pytest.mark.parametrize(
    "option", ["--resume RUN", "--allow-changes", "--prompt-tokens TOKENS", "[RECIPE] [KEY=VALUE]..."]
)
def test_the_page_of_the_commands_has_arguments_and_options(option: str):
    assert f"| `{option}` | " in PAGES["cli.md"]()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the site was not opened in a browser")
def test_a_browser_without_a_network_shows_the_landing_page_and_runs_the_scripts(site: Path, tmp_path: Path):
    shown = open_page(site / "index.html", tmp_path, f"--screenshot={tmp_path}/page.png", "--window-size=1200,900")
    title = re.search(r"<h1[^>]*>([^<]+)", shown)
    assert title is not None
    assert title[1].strip() == "opd"
    assert "reference/configuration.html" in shown
    assert (tmp_path / "page.png").stat().st_size > 20_000  # an empty page has 5 kB
    ran = "data-js-focus-visible"  # the theme's script sets it
    assert ran in shown
    assert ran not in (site / "index.html").read_text(encoding="utf-8")


def open_page(page: Path, profile: Path, *options: str) -> str:
    """The page as a headless Chromium without a network has it after its scripts have run."""
    offline = ("--host-resolver-rules=MAP * ~NOTFOUND", "--disable-background-networking", "--no-first-run")
    command = [
        CHROMIUM or "",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}/profile",
        *offline,
    ]
    command += ["--virtual-time-budget=3000", *options, "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
