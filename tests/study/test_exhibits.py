"""Figures and tables of a report with captions, and their files."""

import base64
import io

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from PIL import Image

from hloss.study import exhibits
from hloss.study.exhibits import Exhibits


@pytest.fixture
def shown(monkeypatch):
    """The displayed objects with their metadata."""
    outputs = []
    monkeypatch.setattr(exhibits, "display", lambda what, raw=False, metadata=None: outputs.append((what, metadata)))
    return outputs


@pytest.fixture
def figure():
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, 1])
    plt.close(figure)
    return figure


def test_a_figure_has_alternative_text_a_numbered_caption_and_files(shown, figure, tmp_path):
    show = Exhibits(str(tmp_path), {})
    show.figure(figure, "a b", "Recall@1 (%) & more.", "rising line")
    show.figure(figure, "similarities", "Second.", "same")
    (image, metadata), (caption, _), *_ = shown
    assert metadata == {"image/png": {"alt": "rising line"}}
    assert Image.open(io.BytesIO(base64.b64decode(image["image/png"]))).mode == "P"
    assert caption.data == '<figcaption id="figure-1"><b>Figure 1.</b> Recall@1 (%) &amp; more.</figcaption>'
    assert "Figure 2" in shown[3][0].data
    with Image.open(tmp_path / "a_b.png") as written:
        assert written.size == (300, 150)
    assert "<svg" in (tmp_path / "a_b.svg").read_text()
    assert 'src = "similarities.png"' in show.link_script()


def test_a_table_is_written_as_csv_latex_and_markdown(shown, tmp_path):
    table = pd.DataFrame({"method": ["a_b"], "recall": [41.25], "run_ids": ["r1, r2"], "run_id": ["r1"]})
    Exhibits(str(tmp_path), {"r1": "<i>r1</i>"}).table(table, "the losses", "Recall@1 (%).")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tables" / "the_losses.csv"), table, check_dtype=False)
    assert r"a\_b & 41.25 & r1" in (tmp_path / "tables" / "the_losses.tex").read_text()
    assert r"\caption{Recall@1 (\%).}" in (tmp_path / "tables" / "the_losses.tex").read_text()
    assert "| a\\_b | 41.25 | r1 |" in (tmp_path / "tables" / "the_losses.md").read_text()
    page = BeautifulSoup(shown[0][0].data, "html.parser")
    assert page.figcaption.text == "Table 1. Recall@1 (%)."
    assert [link["data-beside"] for link in page.select("p.files a")] == [
        f"tables/the_losses.{kind}" for kind in ("csv", "tex", "md")]  # fmt: skip
    assert [cell.text for cell in page.select("tbody td")] == ["a_b", "41.25", "r1", "runsr1, r2"]
    assert page.select("tbody i")


def test_nothing_is_written_without_a_folder(shown, figure, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    show = Exhibits("", {})
    show.figure(figure, "a", "b", "c")
    show.table(pd.DataFrame({"x": [1]}), "a", "b")
    assert not list(tmp_path.iterdir())
    assert show.link_script() == ""
    assert "data-beside" not in shown[-1][0].data


def test_tables_too_long_for_a_paper_are_written_as_csv_only(shown, tmp_path):
    show = Exhibits(str(tmp_path), {})
    for rows, name in ((exhibits.PRINTED, "fits"), (exhibits.PRINTED + 1, "long")):
        show.table(pd.DataFrame({"x": range(rows)}), name, "b")
    written = {file.name for file in (tmp_path / "tables").iterdir()}
    assert written == {"fits.csv", "fits.tex", "fits.md", "long.csv"}
    page = BeautifulSoup(shown[1][0].data, "html.parser")
    assert [link.text for link in page.select("p.files a")] == ["CSV"]


def test_long_tables_are_folded(shown):
    Exhibits("", {}).table(pd.DataFrame({"x": range(exhibits.LONG + 1)}), "a", "b")
    page = BeautifulSoup(shown[0][0].data, "html.parser")
    assert page.details.summary.text == "31 rows"
    assert page.select_one("figure > figcaption")
    assert len(page.details.select("tbody tr")) == 31
