"""The pages of the site; `make docs` builds it."""

import re
from pathlib import Path

PROJECT = Path(__file__).parents[1]
DOCS = PROJECT / "docs"
# Modules that no reader calls: the inner parts of the losses and what a command line consists of.
INNER = {
    "hloss.losses.compiled",
    "hloss.losses.densities",
    "hloss.losses.fused",
    "hloss.losses.triton_kernels",
    "hloss.losses.pairs",
    "hloss.losses.pairwise",
    "hloss.losses.passes",
    "hloss.losses.settings",
    "hloss.losses.streaming",
    "hloss.losses.batch",
    "hloss.losses.cuda_forms",
    "hloss.names",
    "hloss.retrieval.cuda_ranks",
    "hloss.retrieval.similarity",
}


def modules(folder: Path) -> set[str]:
    files = {file.relative_to(PROJECT) for file in folder.rglob("*.py") if not file.name.startswith("__")}
    return {".".join(file.with_suffix("").parts) for file in files}


def test_every_public_module_is_on_one_page_of_the_reference():
    named = [name for page in DOCS.glob("api/*.md") for name in re.findall(r"automodule:: (\S+)", page.read_text())]
    assert len(named) == len(set(named))
    public = (modules(PROJECT / "hloss") | modules(PROJECT / "data_prep")) - INNER
    assert set(named) == public, "each module has a section on one page of docs/api"


def test_every_guide_is_in_the_table_of_contents():
    listed = [line.strip() for line in (DOCS / "index.md").read_text().splitlines()]
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} - {"index"}
    assert pages <= set(listed)
    assert all(listed.count(page) == 1 for page in pages)
