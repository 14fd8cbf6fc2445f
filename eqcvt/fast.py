"""The fast models: the same constructors, state dicts and results as :mod:`eqcvt`'s.

``from eqcvt.fast import EqCvT`` is the swap. Each op takes the fastest backend this version has for
its device (``eqcvt doctor`` prints which, and why not another), or the one that
:func:`eqcvt.use_backend` asks for.
"""

from __future__ import annotations

from typing import ClassVar

from eqcvt import models

__all__ = ["CvT", "EqCvT"]


class EqCvT(models.EqCvT):
    """:class:`eqcvt.EqCvT` whose ops take the backend in force."""

    default_backend: ClassVar[str | None] = None


class CvT(models.CvT):
    """:class:`eqcvt.CvT` whose ops take the backend in force."""

    default_backend: ClassVar[str | None] = None
