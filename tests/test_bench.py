import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "bench"))


@pytest.mark.slow
def test_realistic_scans_have_the_grid_the_noise_and_the_bytes_of_a_clinical_t1(tmp_path):
    from realistic import write_realistic_scans

    first, second = write_realistic_scans(tmp_path, 2)
    for path in (first, second):
        image = nib.load(path)
        assert image.shape[:2] == (256, 256) and 166 <= image.shape[2] < 176
        assert np.allclose(image.header.get_zooms(), (1, 1, 1.2)) and image.get_data_dtype() == np.int16
        assert nib.aff2axcodes(image.affine) == ("P", "I", "R")
        assert 10e6 < path.stat().st_size < 15e6
        air = np.asarray(image.dataobj)[-8:, :8]
        # Rician noise without signal is Rayleigh's: its mean is 1.91 times its standard deviation.
        assert air.std() > 5 and 1.7 < air.mean() / air.std() < 2.1
    assert first.read_bytes() != second.read_bytes()
