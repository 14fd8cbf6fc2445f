"""What is looked for in compiled kernels, in lines as Triton and the disassembler write them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from tests.kernels import aot

LAYOUT = "#mma1 = #ttg.nvidia_mma<{versionMajor = %d, versionMinor = 0, warpsPerCTA = [%d, 1]}>"
PRODUCT = "%%s = ttng.warp_group_dot %%q, %%k : tensor<64x32xbf16> -> tensor<%dx32xf32, #mma1>"


@pytest.mark.parametrize(
    ("version", "warps", "rows", "beyond"),
    [(3, 8, 64, True), (3, 4, 64, False), (3, 8, 128, False), (2, 8, 64, False), (3, 8, 1, False)],
)
def test_more_warps_than_rows(version: int, warps: int, rows: int, beyond: bool) -> None:
    assert aot._beyond(f"{LAYOUT % (version, warps)}\n{PRODUCT % rows}") == beyond


@pytest.mark.parametrize(
    ("before", "undefined"),
    [
        ("UMOV UR9, 0x40", True),
        ("UMOV UR34, 0x40", False),
        ("ULDC.64 UR34, c[0x0][0x210]", False),
        ("@!UP0 R2UR UR34, R4", False),
        ("UIADD3 UR33, UR34, 0x1, URZ", True),
    ],
)
def test_a_register_that_nothing_has_written(before: str, undefined: bool) -> None:
    code = (before, "UIADD3 UR34, UP0, UR34, 0x40, URZ")
    lines = (f"        /*{16 * i:04x}*/    {line} ;  /* 0x00 */" for i, line in enumerate(code))
    assert aot._undefined("\n".join(lines)) == undefined
