"""What tiny models learn is what the golden files say; `python -m tests.golden` compares byte for byte."""

from __future__ import annotations

import pytest
import torch

from tests.golden.learned import CASES, FAMILIES, compare, learn_all, read

# Other processors round differently, which a few steps of Adam carry on (see tests/engine/test_shards.py).
TOLERANCE = 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_masks_are_those_of_the_golden_files(family: str) -> None:
    golden = read()
    assert golden.keys() == CASES.keys()
    found = learn_all([case for case, (of, *_) in CASES.items() if of == family])
    for case, (_, difference) in compare(found, golden).items():
        assert difference <= TOLERANCE, case
    for objective in ("inversion", "paper"):
        alone, together = (found[f"{family}-{objective}-{count}"].masks for count in (1, 2))
        for name, values in together.items():  # a byte may round the other way
            limit = 1.0 if values.dtype == torch.uint8 else 1e-4
            assert (alone[name].float() - values.float()).abs().max() <= limit, (objective, name)
