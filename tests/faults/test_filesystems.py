"""A small disk is full when it should be, and gone afterwards."""

import errno

import pytest

from tests.support.filesystems import small_disk


def test_a_small_disk_takes_what_fits_refuses_more_and_disappears():
    with small_disk(megabytes=1) as folder:
        (folder / "fits").write_bytes(b"x" * 500_000)
        with pytest.raises(OSError) as full:
            (folder / "too much").write_bytes(b"x" * 1_000_000)
        assert full.value.errno == errno.ENOSPC
    assert not folder.exists()
