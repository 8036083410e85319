"""The list of tests that are marked slow names tests that exist."""

from pathlib import Path

from conftest import SLOW

TESTS = Path(__file__).parent


def test_every_line_names_a_test():
    for line in SLOW:
        file, *classes, test = line.split("::")
        name = test.partition("[")[0]
        text = (TESTS / file).read_text()
        assert f"def {name}(" in text, f"tests/slow.txt: {line} is gone; take the line out"
        assert all(f"class {each}" in text for each in classes), line
