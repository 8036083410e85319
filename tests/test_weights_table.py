"""benchmarks/weights.py: every layout has a reference, and the page holds what the program printed."""

import json
import sys
from pathlib import Path

import pytest

from eqvision.classifiers import Classifier
from eqvision.pretrained import LAYOUTS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import weights  # noqa: E402
from benchmarks.weight_references import NAMES_ONLY  # noqa: E402


def rows() -> list[weights.Row]:
    return [weights.Row(*entry[:-1]) for entry in json.loads(weights.RESULTS.read_text()).values()]


def test_the_page_holds_the_recorded_rows():
    text = weights.PAGE.read_text()
    printed = text.partition(weights.BEGIN)[2].partition(weights.END)[0]
    assert printed.strip() == weights.report(sorted(weights.stored())).strip()


def test_every_layout_was_measured_and_nothing_is_left_over():
    assert {row.layout for row in rows()} == set(LAYOUTS) - {"eqvision", *NAMES_ONLY}
    for row in rows():
        # Whole detectors are compared at 1e-4: their layers add up rounding, and boxes are inverse sigmoids of boxes.
        assert row.difference <= (1e-5 if LAYOUTS[row.layout].kind is Classifier else 1e-4), row
        assert (row.unused, row.missing) == (0, 0), row
        assert row.read > 0, row


def test_the_table_is_markdown():
    row = weights.Row("timm_vit", "timm ViT", "timm 1.0", "logits", 1.25e-7, 10, 0, 0, 0)
    heading, rule, line = weights.table([row]).splitlines()
    assert heading.startswith("| layout | files of | reference |")
    assert heading.count("|") == rule.count("|") == line.count("|")
    assert "| `timm_vit` | timm ViT | timm 1.0 | logits | 1.2e-07 | 10 | 0 | 0 | 0 |" in line


def test_the_page_is_written_between_its_markers(tmp_path, monkeypatch):
    page = tmp_path / "weights.md"
    page.write_text(f"before\n{weights.BEGIN}\nold\n{weights.END}\nafter\n")
    monkeypatch.setattr(weights, "PAGE", page)
    weights.write("new")
    assert page.read_text() == f"before\n{weights.BEGIN}\nnew\n{weights.END}\nafter\n"


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["timm_vit", "google_vit"])
def test_a_layout_is_measured(layout):
    from benchmarks.weight_references import cases

    case = next(case for case in cases() if case.layout == layout)
    row = weights.measure(case)
    assert row.layout == layout
    assert row.difference <= 1e-5
    assert (row.unused, row.missing) == (0, 0)
