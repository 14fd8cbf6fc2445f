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


LOOP = """
    %tile = ttg.local_alloc : () -> !ttg.memdesc<{places}x64x64xbf16, #shared, #smem, mutable>
    %first = ttg.memdesc_index %tile[%c0] : {view}
    %copy = ttg.async_copy_global_to_local %p, %first mask %m : {view}
    %sum:3 = scf.for %i = %a to %b step %c iter_args(%total = %zero) -> (tensor<64x64xf32, #mma>)
      %now = ttg.memdesc_index %tile[%i] : {view}
      %turned = ttg.memdesc_trans %now {{order = array<i32: 1, 0>}} : {view}
      %product = ttng.warp_group_dot %turned, %other, %total {{isAsync = true}} : {view}
      %done = ttng.warp_group_dot_wait %product {{pendings = {pendings} : i32}} : {view}
      %next = ttg.memdesc_index %tile[%j] : {view}
      %more = ttg.async_copy_global_to_local %p, %next mask %m : {view}
      scf.yield %done
    }}
"""


@pytest.mark.parametrize(
    ("places", "pendings", "overwritten"),
    [(1, 1, True), (1, 0, False), (2, 1, False), (2, 2, True)],
)
def test_a_tile_fetched_to_where_another_is_read(
    places: int, pendings: int, overwritten: bool
) -> None:
    text = LOOP.format(places=places, pendings=pendings, view="!ttg.memdesc<64x64xbf16>")
    assert aot._overwritten(text) == overwritten
