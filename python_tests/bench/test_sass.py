"""Tests of the report on SASS: what is wrong with a kernel, the compiler's advisories, and the layout of shared memory."""

import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from flashu_ext.bench.ptxas import ADVISORIES, advisories
from flashu_ext.bench.sass import INSTRUCTIONS, Kernel, inspect, problems, shared_sections, table


def hopper(**changes):
    """A Hopper product as it should be."""
    counts = dict.fromkeys(INSTRUCTIONS, 0) | {"HGMMA": 12, "UTMALDG": 3, "UTMASTG": 4, "USETMAXREG": 2}
    counts |= changes.pop("counts", {})
    fields = {"registers": 168, "waits": 3, "dynamic": (1024, 1024)} | changes
    return Kernel("gemm_sm90<Config<bfloat16, true, 128>>", "sm_90a", counts=counts, **fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"waits": 4}, "4 of 12 HGMMA are waited for one by one"),
        ({"registers": 160}, "160 registers, setmaxnreg counts on 168"),
        ({"counts": {"USETMAXREG": 0}}, "setmaxnreg was ignored"),
        ({"counts": {"UTMASTG": 0}}, "no UTMASTG"),
        ({"counts": {"STL": 1}}, "uses local memory"),
        ({"counts": {"MEMBAR.GPU": 4, "UCGABAR_ARV": 3}}, "4 fences of the whole device for 3 arrivals"),
        ({"dynamic": (1056, 1024)}, "dynamic shared memory at 1056 of a base aligned to 1024 bytes"),
        ({"dynamic": (1024, 128)}, "dynamic shared memory at 1024 of a base aligned to 128 bytes"),
    ],
)
def test_each_fault_of_a_hopper_kernel_is_named(changes, message):
    assert problems([hopper()]) == []
    (line,) = problems([hopper(**changes)])
    assert message in line and line.startswith("sm_90a gemm_sm90")


def test_advisories_of_serialised_products_and_ignored_setmaxnreg_are_found():
    log = "\n".join(
        [
            "ptxas info    : Used 168 registers",
            "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized",
            "ptxas info    : (C7508) setmaxnreg ignored to maintain minimum register requirements",
            "ptxas info    : (C7521) something else",
        ]
    )
    assert [line.split("(")[1][:5] for line in advisories(log)] == ["C7515", "C7508"]
    assert min(ADVISORIES) == 7505 and max(ADVISORIES) == 7520


def cubin(sections):
    """An ELF file with empty sections: name -> (size, alignment)."""
    header = struct.Struct("<IIQQQQIIQQ")
    names, headers = b"\0", [header.pack(*[0] * 10)]
    for name, (size, alignment) in sections.items():
        headers.append(header.pack(len(names), 8, 3, 0, 0, size, 0, 0, alignment, 0))
        names += name.encode() + b"\0"
    headers.append(header.pack(0, 3, 0, 0, 64, len(names), 0, 0, 1, 0))
    head = bytearray(64)
    struct.pack_into("<Q", head, 40, 64 + len(names))
    struct.pack_into("<HHH", head, 58, header.size, len(headers), len(headers) - 1)
    return bytes(head) + names + b"".join(headers)


def test_sections_of_shared_memory_are_read_from_a_cubin():
    assert shared_sections(cubin({".nv.shared.a": (2048, 1024), ".text.a": (640, 128)})) == {"a": (2048, 1024)}


RESOURCES = """
Resource usage:
 Common:
  GLOBAL:0
 Function gemm_sm90_a:
  REG:168 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:900 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function norm_vectors_b:
  REG:32 STACK:{stack} SHARED:32 LOCAL:0 CONSTANT[0]:900 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
    code for sm_90a
        Function : gemm_sm90_a
        /*0000*/                   LDC R1, c[0x0][0x28] ;                              /* 0x00000a00ff017b82 */
        /*0010*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;            /* 0x00000000000079c5 */
        /*0020*/              @P0  {product}.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ; /* 0x01e00000101879f0 */
        /*0030*/                   {product}.64x256x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ; /* 0x01e00000101879f0 */
        /*0040*/                   WARPGROUP.DEPBAR.LE gsb0, {wait} ;                  /* 0x00008000000079c5 */
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                     /* 0x00008000000079c5 */
        /*0060*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;                   /* 0x00000000000079c5 */
        /*0070*/                   UTMALDG.2D [UR8], [UR4] ;                           /* 0x00000000000079c5 */
        /*0080*/                   UTMASTG.2D [UR8], [UR4] ;                           /* 0x00000000000079c5 */
        Function : norm_vectors_b
        /*0000*/                   LDG.E.128.CONSTANT R4, [R2] ;                       /* 0x00000000000079c5 */
        /*0010*/                   STG.E.128 [R2], R4 ;                                /* 0x00000000000079c5 */
"""


def fake_cuobjdump(folder: Path, stack: int = 0, product: str = "HGMMA", wait: str = "0x1") -> str:
    (folder / "resources").write_text(RESOURCES.format(stack=stack))
    (folder / "sass").write_text(SASS.format(product=product, wait=wait))
    (folder / "elf").write_bytes(cubin({".nv.shared.gemm_sm90_a": (1024, 1024)}))
    tool = folder / "cuobjdump"
    tool.write_text(
        f"""#!/bin/sh
case $1 in
  --extract-elf) cp {folder}/elf library.1.sm_90a.cubin;;
  --dump-sass) cat {folder}/sass;;
  *) cat {folder}/resources;;
esac
"""
    )
    tool.chmod(tool.stat().st_mode | stat.S_IEXEC)
    return str(tool)


def test_a_library_is_read(tmp_path: Path):
    kernels = inspect(Path("library.so"), fake_cuobjdump(tmp_path))
    assert [k.name for k in kernels] == ["gemm_sm90_a", "norm_vectors_b"]
    product, norm = kernels
    assert product.arch == "sm_90a" and product.registers == 168 and product.dynamic == (1024, 1024)
    assert product.counts["HGMMA"] == 2 and product.counts["UTMALDG"] == 1 and product.waits == 0
    assert norm.counts["LDG.128"] == 1 and norm.counts["STG.128"] == 1 and norm.instructions == 2
    assert problems(kernels) == [] and "gemm_sm90_a" in table(kernels)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"stack": 8}, "local memory"),
        ({"product": "HMMA"}, "gemm_sm90_a: no HGMMA"),
        ({"wait": "0x0"}, "1 of 2 HGMMA are waited for one by one"),
    ],
)
def test_faults_of_a_library_are_named(tmp_path: Path, changes: dict[str, Any], text: str):
    (line,) = problems(inspect(Path("library.so"), fake_cuobjdump(tmp_path, **changes)))
    assert text in line
