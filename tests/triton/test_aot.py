"""Every kernel compiles for every chip and dtype, within the budgets of aot.py."""

from dataclasses import replace
from itertools import product

import pytest
from tests.triton import aot

KERNELS = ["state", "gradient", "softmax", "merge", "pick"]
DTYPES = ["bfloat16", "float16", "float32", "float64"]
CASES = list(aot.cases())


def test_every_kernel_chip_and_dtype_has_a_configuration() -> None:
    compiled = {(case.kernel, case.architecture, case.dtype) for case in CASES}
    assert compiled >= set(product(KERNELS, aot.CHIPS, DTYPES))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_compiles_within_its_budgets(kernel: str) -> None:
    wanted = [case for case in CASES if case.kernel == kernel]
    broken = []
    for case, report in zip(wanted, aot.reports(wanted), strict=True):
        if isinstance(report, aot.Report):
            broken += aot.violations(case, report, aot.pinned())
        else:
            broken.append(f"{case}: {type(report).__name__}: {report}")
    assert not broken, "\n".join(broken)


@pytest.mark.slow
def test_a_tile_too_large_breaks_the_budgets() -> None:
    case = next(c for c in CASES if str(c) == "state sm_80 bfloat16 plain")
    case = replace(case, options=case.options | {"BLOCK_D": 128, "num_stages": 5, "num_warps": 4})
    (report,) = aot.reports([case])
    assert isinstance(report, aot.Report)
    found = " ".join(aot.violations(case, report, aot.pinned()))
    assert "bytes of shared memory, the chip has 166912" in found


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"loop_spills": 8}, "8 bytes spilled in the main loop, none may"),
        ({"loop_spills": None}, "no loop multiplies by wgmma bf16"),
        ({"other_spills": 9999}, "9999 bytes spilled elsewhere, at most"),
        ({"product": "mma bf16"}, "multiplies by mma bf16, not wgmma bf16"),
    ],
)
def test_each_budget_can_be_broken(change: dict[str, object], text: str) -> None:
    case = next(c for c in CASES if str(c) == "gradient sm_90 bfloat16 plain")
    sound = aot.Report(128, 0, 0, 100_000, "wgmma bf16")
    assert aot.violations(case, sound) == []
    (found,) = aot.violations(case, replace(sound, **change))
    assert found.startswith(f"{case}: {text}")


# A loop over tiles and in it one over D, as cuobjdump and LLVM write them.
SASS = """
    /*0000*/              LDL R1, [R2] ;          /* 0x000 */
    /*0010*/              STL.64 [R2], R4 ;       /* 0x000 */
    /*0020*/              HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24 ;
    /*0030*/              STL.128 [R2+0x10], R4 ;
    /*0040*/         @!P0 BRA 0x20 ;              /* 0x000 */
    /*0050*/              LDL.LU.64 R4, [R2] ;
    /*0060*/          @P1 BRA 0x10 ;              /* 0x000 */
    /*0070*/              BRA 0x70 ;
"""
AMDGCN = """
    s_mov_b32 s0, 0
.LBB0_1:
    scratch_store_dwordx2 off, v[2:3], off ; 8-byte Folded Spill
.LBB0_2:                                ;   Parent Loop BB0_1 Depth=1
    v_mfma_f32_32x32x8_bf16 v[0:15], v[16:17], v[18:19], v[0:15]
    scratch_load_dwordx4 v[4:7], off, off offset:16 ; 16-byte Folded Reload
    s_cbranch_scc1 .LBB0_2
    scratch_load_dword v1, off, off ; 4-byte Folded Reload
    s_cbranch_vccnz .LBB0_1
    .vgpr_count:     256
    .private_segment_fixed_size: 44
"""


def test_spills_are_told_apart_by_the_innermost_loop_that_multiplies() -> None:
    code = aot.of_sass(SASS)
    loop = aot.main_loop(code, aot.INSTRUCTIONS["wgmma"])
    assert loop == slice(2, 5)
    assert (aot.spilled(code.lines[loop]), aot.spilled(code.lines)) == (16, 4 + 8 + 16 + 8)
    assert aot.main_loop(code, aot.INSTRUCTIONS["mma"]) is None


def test_spills_are_told_apart_on_amd() -> None:
    registers, has_scratch, read = aot.of_amdgcn(AMDGCN)
    assert (registers, has_scratch) == (256, True)
    code = read()
    loop = aot.main_loop(code, aot.INSTRUCTIONS["mfma"])
    assert (aot.spilled(code.lines[loop]), aot.spilled(code.lines)) == (16, 8 + 16 + 4)


@pytest.mark.parametrize(
    ("text", "product"),
    [
        ("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {%r1}", "wgmma bf16"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}", "mma tf32"),
        ("@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ]", "tcgen05 f16"),
        ("v_mfma_f64_16x16x4_f64 v[0:7]", "mfma f64"),
        ("v_mfma_f32_32x32x4_xf32 v[0:7]", "mfma xf32"),
        ("fma.rn.f32 %r1, %r2, %r3, %r4;", "fma f32"),
        ("fma.rn.f64 %r1, %r2, %r3, %r4;", "fma f64"),
    ],
)
def test_tf32_is_not_taken_for_exact_float32(text: str, product: str) -> None:
    assert aot.multiplies(text) == product
