"""What an export is held against: outputs that differ, or that one side lacks."""

import numpy as np
import pytest

from siglip.exporting.verification import compare
from siglip.formats.export_format import ExportMismatch


def test_not_a_number_does_not_pass():
    with pytest.raises(ExportMismatch, match="differs"):
        compare({"z": np.ones(2)}, {"z": np.array([1, np.nan])})


def test_what_the_source_lacks_or_has_in_another_shape_does_not_pass():
    with pytest.raises(ExportMismatch, match="the export lacks image_embedding; it has nothing"):
        compare({"image_embedding": np.ones(2), "probabilities": np.ones(1)}, {})
    with pytest.raises(ExportMismatch, match="allowed is 1.0e-05"):
        compare({"image_embedding": np.full(2, 50.0)}, {"image_embedding": np.full(2, 50.0001)})
    compare({"image_tokens": np.full(2, 50.0)}, {"image_tokens": np.full(2, 50.0001)})
    with pytest.raises(ExportMismatch, match=r"z has shape \(2,\), its source's is absent"):
        compare({}, {"z": np.ones(2)})
    with pytest.raises(ExportMismatch, match=r"z has shape \(2,\), its source's is \(1,\)"):
        compare({"z": np.ones(1)}, {"z": np.ones(2)})
    with pytest.raises(ExportMismatch, match="tokens differs"):
        compare({"tokens": np.full(2, 900_000)}, {"tokens": np.array([900_000, 900_001])})
