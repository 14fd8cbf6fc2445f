"""All calls of ``eqcvt tune``'s check, to be compiled for GPUs that are not here.

    python -m tests.kernels.aot tests.kernels.checked:calls 80 86 90 120

EQCVT_AOT leaves all but some ops and precisions out: ``"lift mlp_block bfloat16"``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from unittest import mock

import torch

from eqcvt.kernels import common, launches
from eqcvt.ops import CannotServe, _backend, _conv_attention_fused, _proof, use_backend
from eqcvt.tune import cases
from eqcvt.tune.check import _PRECISIONS, tf32


def calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield each call with its gradient, whose kernels must be noted and not run."""
    asked = os.environ.get("EQCVT_AOT", "").split()
    for op in [o for o in _backend.OPS if o in asked] or _backend.OPS:
        for precision in [p for p in _proof.PRECISIONS if p in asked] or _proof.PRECISIONS:
            for name, options in cases.CHECKED[op].items():
                for training in (True, False):

                    def run(
                        op: str = op,
                        precision: str = precision,
                        options: dict[str, object] = options,
                        training: bool = training,
                    ) -> None:
                        dtype, switch, _ = _PRECISIONS[precision]
                        major, minor = torch.cuda.get_device_capability()  # the one compiled for
                        torch.manual_seed(1)
                        call, inputs = cases.CALLS[op](training, **options)
                        with (
                            use_backend("triton"),
                            tf32(switch),
                            mock.patch.dict(_backend._REASONS, triton=lambda device: None),
                            mock.patch.object(_conv_attention_fused, "UNFOLDED_PAYS", {"cpu"}),
                            mock.patch.object(common, "interpreted", return_value=True),
                            mock.patch.object(launches, "INTERPRETER", 10 * major + minor),
                            suppress(CannotServe),
                        ):
                            cases.results(call, cases.activations(op, inputs, dtype))

                    yield f"{op} {precision} {name} {'training' if training else 'eval'}", run
