"""Reading GLUE's tables, in the form that each task has them."""

import logging

import numpy as np
import pytest

from eqvision.data.text import read_glue
from eqvision.data.text.glue import GLUE_FILES
from eqvision.metrics import GLUE_TASKS
from eqvision.names import UnknownNameError


@pytest.fixture
def write(tmp_path):
    def write(name, *rows):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
        return tmp_path

    return write


def test_every_task_that_is_measured_can_be_read():
    assert list(GLUE_FILES) == list(GLUE_TASKS)


def test_single_texts_with_and_without_a_header(write):
    folder = write("CoLA/train.tsv", ("gj04", "1", "", 'He said "no.'), ("gj04", "0", "*", "Slept he."))
    found = read_glue(folder, "cola", "train")
    assert (found.first, found.second, found.labels.tolist()) == (['He said "no.', "Slept he."], None, [1, 0])
    write("CoLA/test.tsv", ("index", "sentence"), ("0", "Bill whistled."))
    test = read_glue(folder, "cola", "test")
    assert (test.first, test.labels, len(test)) == (["Bill whistled."], None, 1)
    write("SST-2/dev.tsv", ("sentence", "label"), ("it 's a charming journey", "1"))
    assert read_glue(folder / "SST-2", "sst2", "dev").labels.tolist() == [1]


def test_pairs_have_their_columns_anywhere_and_labels_by_name_or_number(write):
    header = ("index", "promptID", "genre", "sentence1", "sentence2", "label1", "gold_label")
    row = ("0", "9", "fiction", "A\u2028dog.", "An animal.", "neutral", "contradiction")
    folder = write("MNLI/dev_mismatched.tsv", header, row)
    found = read_glue(folder, "mnli_mismatched", "dev")
    assert (found.first, found.second, found.labels.tolist()) == (["A\u2028dog."], ["An animal."], [2])
    write(
        "MRPC/train.tsv", ("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("1", "5", "6", "a b", "b a")
    )
    assert read_glue(folder, "mrpc", "train").second == ["b a"]
    write("STS-B/train.tsv", ("index", "sentence1", "sentence2", "score"), ("0", "a", "b", "3.800"))
    score = read_glue(folder, "stsb", "train").labels
    assert score.dtype == np.float64
    assert score.tolist() == [3.8]
    write("AX/diagnostic.tsv", ("index", "sentence1", "sentence2"), ("0", "a", "b"))
    assert read_glue(folder, "ax", "test").first == ["a"]


def test_rows_that_lack_a_column_are_left_out_and_told(write, caplog):
    header = ("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
    folder = write(
        "QQP/train.tsv", header, ("0", "1", "2", "a", "b", "0"), ("1", "3", "4", "c"), ("2", "5", "6", "d", "e", "1")
    )
    with caplog.at_level(logging.WARNING, "eqvision.data"):
        found = read_glue(folder, "qqp", "train")
    assert (found.first, found.labels.tolist()) == (["a", "d"], [0, 1])
    assert "1 rows without all columns are left out, the first in line 3" in caplog.text


def test_what_cannot_be_read_is_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dev table of GLUE's rte: expected .*RTE/dev\.tsv or dev\.tsv in"):
        read_glue(tmp_path, "rte", "dev")
    with pytest.raises(UnknownNameError, match="rte"):
        read_glue(tmp_path, "rtee", "dev")
    with pytest.raises(ValueError, match="ax has no split 'train'"):
        read_glue(tmp_path, "ax", "train")
    folder = write("RTE/dev.tsv", ("index", "sentence1", "sentence2"), ("0", "a", "b"))
    with pytest.raises(ValueError, match="has no column label; its columns are index, sentence1, sentence2"):
        read_glue(folder, "rte", "dev")
    write("RTE/dev.tsv", ("index", "sentence1", "sentence2", "label"), ("0", "a", "b", "neutral"))
    with pytest.raises(ValueError, match=r"dev\.tsv, line 2: label 'neutral' is no class .*entailment, not_entailment"):
        read_glue(folder, "rte", "dev")
    write("STS-B/dev.tsv", ("index", "sentence1", "sentence2", "score"), ("0", "a", "b", "high"))
    with pytest.raises(ValueError, match="line 2: label 'high' is no number"):
        read_glue(folder, "stsb", "dev")
