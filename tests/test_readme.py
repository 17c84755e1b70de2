"""What the documents say: their commands compose, their links lead somewhere."""

import re
from pathlib import Path

import pytest

from gnbench.check import compose
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of a sweep the first value of each setting; not commands that need files of one's own.
COMMANDS = sorted(
    {
        " ".join(command.split())
        for page in PAGES
        for command in re.findall(
            r"python -m gnbench ([^&#`\n…\\]*=[^&#`\n…\\]*)", page.read_text()
        )
        if "my" not in command
    }
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#:]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_linked_from_the_readme_alone():
    links = [
        (page.parent / link).resolve()
        for page in PAGES
        for link in re.findall(r"\]\(([^)#:]+\.md)\)", page.read_text())
    ]
    assert sorted(links) == sorted(PAGES[1:])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    compose(*(word.partition(",")[0].strip("'\"") for word in command.split() if word != "-m"))


def test_settings_named_in_the_tables_exist():
    tables = "".join(re.findall(r"^\|.*\n", PAGES[0].read_text(), re.MULTILINE))
    for group, options in re.findall(r"^\| `(\w+)=` \| ((?:`\w+` ?)+)", tables, re.MULTILINE):
        names = {path.stem for path in Path(ROOT, "conf", group).glob("*.yaml")}
        assert set(re.findall(r"`(\w+)`", options)) == names, group
