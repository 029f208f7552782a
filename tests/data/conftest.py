"""Fixtures shared by the tests of data."""

import pytest


@pytest.fixture(scope="session")
def contents():
    """A function that gives all of a table but its name, in a form that is equal only to the same bits."""

    def contents_of(table):
        arrays = {
            name: (array.dtype.str, array.shape, array.tobytes())
            for name, array in table.to_arrays().items()
            if not name.startswith("file_names")
        }
        return arrays, table.file_names.tolist(), table.categories, table.notes

    return contents_of
