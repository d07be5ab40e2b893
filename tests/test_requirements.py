from __future__ import annotations

import pytest

from tl_backward import _requirements as requirements


@pytest.mark.parametrize(
    ("numpy", "pyarrow", "works"),
    [
        ("1.26.4", "22.0.0", False),
        ("1.26.4", "26.0.1", False),
        ("1.26.4", "21.0.0", True),
        ("2.0.0", "26.0.1", True),
        ("2.4.6", "14.0.0", True),
        ("10.0", "100.0", True),
    ],
)
def test_a_pyarrow_for_another_numpy_is_refused_with_the_command(
    monkeypatch, numpy, pyarrow, works
):
    monkeypatch.setattr(requirements, "version", {"numpy": numpy, "pyarrow": pyarrow}.get)
    if works:
        requirements.require_matching_packages()
        return
    with pytest.raises(ImportError, match=r"pip install 'pyarrow<22'") as raised:
        requirements.require_matching_packages()
    assert f"pyarrow {pyarrow}" in str(raised.value) and numpy in str(raised.value)
