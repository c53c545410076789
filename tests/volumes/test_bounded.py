"""Files that unpack to more than they say, or to less: read no further than their header says."""

from __future__ import annotations

import gzip
import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel")

from folders import make_msd, save  # noqa: E402

from calseg.volumes import nifti  # noqa: E402
from calseg.volumes.datasets import find_cases, load_case  # noqa: E402
from calseg.volumes.nifti import DataError, open_volume, read_header, read_volume  # noqa: E402
from calseg.volumes.probabilities import MapCase, check_headers, read_slabs  # noqa: E402

MORE = 1 << 28
"""Zeros that follow the voxels: 256 MiB, of which gzip makes 256 KiB."""


def bomb(path: Path, voxels: np.ndarray) -> Path:
    image = nibabel.Nifti1Image(voxels, np.eye(4))
    with gzip.open(path, "wb", 1) as file:
        file.write(image.to_bytes())
        for _ in range(MORE >> 24):
            file.write(bytes(1 << 24))
    return path


def bomb_npz(path: Path, array: np.ndarray) -> Path:
    start = io.BytesIO()
    np.save(start, array)
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("probabilities.npy", "w", force_zip64=True) as member,
    ):
        member.write(start.getvalue())
        for _ in range(MORE >> 24):
            member.write(bytes(1 << 24))
    return path


def peak(call: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    save(folder / "label.nii.gz", np.zeros((8, 8, 8), np.uint8))
    save(folder / "good.nii.gz", np.full((8, 8, 8, 2), 0.5, np.float32))
    bomb(folder / "volume.nii.gz", np.zeros((8, 8, 8), np.float32))
    bomb(folder / "map.nii.gz", np.full((8, 8, 8, 2), 0.5, np.float32))
    bomb_npz(folder / "map.npz", np.full((2, 8, 8, 8), 0.5, np.float32))
    return folder


MESSAGE = (
    r"cannot be read; the file is corrupt or truncated \(it unpacks to more than the \d+ bytes that its header says"
)


def test_no_reader_unpacks_more_than_the_header_says(bombs: Path) -> None:
    def refused(call: Callable[[], Any], name: str) -> None:
        def run() -> None:
            with pytest.raises(DataError, match=rf"{name}: {MESSAGE}"):
                call()

        assert peak(run) < MORE / 32

    refused(lambda: read_volume(bombs / "volume.nii.gz"), "volume.nii.gz")
    for name in ("map.nii.gz", "map.npz"):
        case = MapCase("map", (bombs / name,), bombs / "label.nii.gz")
        assert peak(lambda case=case: check_headers(case)) < MORE / 32
        for memory in (1, 1 << 29):  # in a temporary file, and in memory
            refused(lambda case=case, memory=memory: list(read_slabs(case, 2, None, memory)), name)
    case = MapCase("good", (bombs / "good.nii.gz",), bombs / "volume.nii.gz")
    refused(lambda: list(read_slabs(case, 2, None)), "volume.nii.gz")


def test_training_names_the_file(tmp_path: Path) -> None:
    make_msd(tmp_path, 1)
    bomb(tmp_path / "labelsTr" / "case_0.nii.gz", np.zeros((10, 9, 8), np.uint8))
    dataset = find_cases(tmp_path)
    with pytest.raises(DataError, match=rf"labelsTr.case_0.nii.gz: {MESSAGE}"):
        load_case(dataset.cases[0], dataset)


def test_one_byte_more_or_less(tmp_path: Path) -> None:
    content = nibabel.Nifti1Image(np.arange(64, dtype=np.uint8).reshape(4, 4, 4), np.eye(4)).to_bytes()
    path = tmp_path / "a.nii.gz"
    for data, message in ((content + b"x", "unpacks to more than the 416 bytes"), (content[:-1], "415 of 416 bytes")):
        path.write_bytes(gzip.compress(data))
        with pytest.raises(DataError, match=rf"a.nii.gz: cannot be read; .*{message}"):
            read_volume(path)
    half = len(content) // 2
    for data in (
        gzip.compress(content),
        gzip.compress(content[:half]) + gzip.compress(content[half:]),  # as bgzip writes
        gzip.compress(content) + bytes(512),  # as a tape leaves
    ):
        path.write_bytes(data)
        np.testing.assert_array_equal(read_volume(path).ravel(), np.arange(64))


def test_a_header_that_promises_too_much_costs_nothing(tmp_path: Path) -> None:
    """The size that is claimed is never allocated: only what there is is read."""
    image = nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float64), np.eye(4))
    content = bytearray(image.to_bytes())
    struct.pack_into("<4h", content, 40, 3, 30000, 30000, 30000)
    for name, data in (("a.nii.gz", gzip.compress(content)), ("a.nii", bytes(content))):
        (tmp_path / name).write_bytes(data)

        def read(name: str = name) -> None:
            with pytest.raises(DataError, match="of 216000000000352 bytes"):
                read_volume(tmp_path / name)

        assert peak(read) < 1 << 22


def test_packed_arrays_of_other_kinds_are_refused(tmp_path: Path) -> None:
    """A header of any length, and compression that unpacks without bounds."""
    save(tmp_path / "label.nii.gz", np.zeros((4, 4, 4), np.uint8))
    start = io.BytesIO()
    np.save(start, np.zeros((2, 4, 4, 4), np.float32))
    long_header = b"\x93NUMPY\x02\x00" + (1 << 31).to_bytes(4, "little")
    for content, method, message in (
        (start.getvalue(), zipfile.ZIP_LZMA, "compressed in a way that NumPy does not write"),
        (start.getvalue(), zipfile.ZIP_BZIP2, "compressed in a way that NumPy does not write"),
        (long_header + bytes(1000), zipfile.ZIP_DEFLATED, "in version 2.0 of NumPy's format; 1.0 is wanted"),
    ):
        with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
            archive.writestr("probabilities.npy", content)
        with pytest.raises(DataError, match=rf"a.npz: .*{message}"):
            check_headers(MapCase("a", (tmp_path / "a.npz",), tmp_path / "label.nii.gz"))


def test_temporary_files_are_gone_after_an_error(bombs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = []
    make = nifti.tempfile.TemporaryFile
    monkeypatch.setattr(nifti.tempfile, "TemporaryFile", lambda: files.append(make()) or files[-1])
    with pytest.raises(DataError), open_volume(bombs / "volume.nii.gz", 1):
        pytest.fail("opened")
    assert [file.closed for file in files] == [True]
    assert read_header(bombs / "volume.nii.gz").get_data_shape() == (8, 8, 8)
