import re

import pytest

from gnbench.check import compose
from tests.conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m gnbench ((?:-m )?[^&#`\n]*=[^&#`\n]*)", TEXT)))


def test_what_the_readme_links_to_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_compose(command):
    """A sweep by the first value of each setting."""
    compose(*(word.partition(",")[0] for word in command.split() if word != "-m"))


def test_the_readme_has_the_commands_of_the_tool():
    assert len(COMMANDS) >= 5
    assert "norm=gn batch_size=2" in [command.strip() for command in COMMANDS]
