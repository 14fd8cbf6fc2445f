"""How the extension in use was built."""

from __future__ import annotations

from eqcvt import native


def same_settings() -> dict[str, str]:
    """Return the variables that build the package again in the same way."""
    built = native.build_info()
    if not built["built"]:
        return {"EQCVT_NATIVE": "0"}
    if built["cuda"] is None:
        return {"EQCVT_NATIVE": "1", "EQCVT_CUDA": "0"}
    return {"EQCVT_NATIVE": "1", "EQCVT_CUDA": "1", "EQCVT_CUDA_ARCHS": built["cuda_archs"]}
