"""Makes escnn, to which weights are converted, work beside today's NumPy and scikit-learn."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
import warnings
from typing import Any, NoReturn

# Its other requirements serve SO(3) alone: one wants a Fortran compiler, another NumPy 1.
INSTALL = "pip install --no-deps escnn==1.0.11 cloudpickle joblib scipy"
_NAME = "lie_learn.representations.SO3.wigner_d"


def wigner_D_matrix(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for the one function escnn takes from lie_learn; planar groups never call it."""
    raise NotImplementedError("Wigner matrices of SO(3) need lie_learn, which is not installed")


def _stand_in_for_lie_learn() -> None:
    parts = _NAME.split(".")
    parent: types.ModuleType | None = None
    for end in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:end]))
        module.__path__ = []
        sys.modules[module.__name__] = module
        if parent is not None:
            setattr(parent, parts[end - 1], module)
        parent = module
    sys.modules[_NAME].wigner_D_matrix = wigner_D_matrix  # type: ignore[attr-defined]


def install() -> str | None:
    """Make escnn importable; return why it is not, or None if it is.

    lie_learn, whose wheel breaks under NumPy 2, gets a stand-in where it cannot be imported. escnn
    hands scikit-learn's ``randomized_svd`` an ``np.matrix``, which scikit-learn refuses by now;
    without that function escnn takes SciPy's exact decomposition.
    """
    if importlib.util.find_spec("escnn") is None:
        return f"escnn is not installed: {INSTALL}"
    try:
        importlib.import_module(_NAME)
    except Exception:
        _stand_in_for_lie_learn()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("escnn.nn")
            numerical: Any = importlib.import_module("escnn.group._numerical")
            numerical.randomized_svd = None
    except Exception as error:
        return f"escnn cannot be imported ({type(error).__name__}: {error}): {INSTALL}"
    return None
