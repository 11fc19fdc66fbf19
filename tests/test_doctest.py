"""The examples in the docstrings of the public names."""

import doctest
import importlib

import pytest

import hloss

MODULES = sorted({getattr(hloss, name).__module__ for name in hloss.__all__})


@pytest.mark.parametrize("name", hloss.__all__)
def test_every_public_name_has_an_example(name):
    assert doctest.DocTestFinder(recurse=False).find(getattr(hloss, name))[0].examples


@pytest.mark.parametrize("module", MODULES)
def test_examples_print_what_they_show(module):
    failed, attempted = doctest.testmod(importlib.import_module(module))
    assert attempted > 0
    assert failed == 0
