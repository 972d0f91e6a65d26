"""Writes DICOM series as a scanner would, for tests: one file a slice, every tag open to change."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid


def write_series(
    folder: Path,
    array_XYZ: np.ndarray,
    affine: np.ndarray,
    change: Callable[[int, Dataset], None] = lambda n, slice_: None,
    name: Callable[[int], str] = "{:04d}.dcm".format,
) -> Path:
    """Writes slice n of the last axis as `name(n)`.

    Args:
        folder: made if missing.
        array_XYZ: uint8, int16 or uint16, in any axis order.
        affine: voxel to RAS+ mm; DICOM's left and back are made of it here.
        change: edits the dataset of slice n before it is written.
        name: the file of slice n.
    """
    folder.mkdir(exist_ok=True)
    series, study = generate_uid(entropy_srcs=[str(folder)]), generate_uid()
    steps = (np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)[:3]
    spacing = np.linalg.norm(steps[:, :3], axis=0)
    for n in range(array_XYZ.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        slice_ = FileDataset(folder / name(n), {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID = study, series
        slice_.Modality, slice_.SeriesDescription, slice_.InstanceNumber = "MR", "T1", n + 1
        slice_.SeriesNumber, slice_.AcquisitionNumber, slice_.ImageType = 1, 1, ["ORIGINAL", "PRIMARY"]
        slice_.Columns, slice_.Rows = array_XYZ.shape[:2]
        slice_.PixelSpacing = [text(spacing[1]), text(spacing[0])]
        slice_.SliceThickness = text(spacing[2] / 2)  # never the distance of slices
        directions = steps[:, :2] / spacing[:2]
        slice_.ImageOrientationPatient = [text(value) for value in directions.T.ravel()]
        slice_.ImagePositionPatient = [text(value) for value in steps[:, 3] + n * steps[:, 2]]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = array_XYZ.dtype.itemsize * 8
        slice_.HighBit, slice_.PixelRepresentation = slice_.BitsStored - 1, int(array_XYZ.dtype.kind == "i")
        slice_.PixelData = np.ascontiguousarray(array_XYZ[:, :, n].T).tobytes()
        change(n, slice_)
        slice_.save_as(folder / name(n), enforce_file_format=True)
    return folder


def text(value: float) -> str:
    """A number as DICOM writes it, in at most 16 characters."""
    return f"{value:.10g}"[:16]
