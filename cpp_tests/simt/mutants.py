"""Plants bugs in the CUDA kernels and in the emulator's primitives, one at a time, and checks that the emulated tests find
each of them. A suite that no longer kills its mutants is broken.

    python cpp_tests/simt/mutants.py            all of them (some minutes)
    python cpp_tests/simt/mutants.py sm90       those whose name has this in it
    python cpp_tests/simt/mutants.py --check    whether all of them apply (no build, a moment)

The sources are copied to a build folder and changed there. Exit code 1: a mutant survived, or no longer applies.
"""

# ruff: noqa: E501  (a mutant is a line of source)
from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutant:
    """`old` is replaced by `new` in `file`, once; the tests matching `tests` must then fail in one of the builds."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    builds: tuple[str, ...] = ("", "address,undefined")  # sanitizers


NORM, ROTARY, ROUTING, STEP, FFN = (
    "DeviceNorm*",
    "DeviceRotary*",
    "DeviceRouting*:DeviceMoves*",
    "DeviceStep*",
    "DeviceFfn*",
)

# Accesses of one warp that only the hardware could reorder: no schedule of whole threads shows them.
RACE = ("thread",)

MUTANTS = [
    # ---- what all kernels share
    Mutant("vector: no barrier before the warps' sums are read", "csrc/cuda/vector.cuh",
           "scratch[threadIdx.x / kWarp] = value;\n    __syncthreads();", "scratch[threadIdx.x / kWarp] = value;", NORM),
    Mutant("vector: one warp too few is summed", "csrc/cuda/vector.cuh",
           "for (int w = 0; w < kThreads / kWarp; ++w) value", "for (int w = 1; w < kThreads / kWarp; ++w) value", NORM),
    Mutant("vector: sums are overwritten while they are read", "csrc/cuda/vector.cuh",
           "value += scratch[w];\n    __syncthreads();", "value += scratch[w];", STEP),
    # ---- norm
    Mutant("norm: reads a piece past the width", "csrc/cuda/norm.cu",
           "if (!inside || at >= a.width) continue;", "if (!inside || at > a.width) continue;", NORM),
    Mutant("norm: rows past the end", "csrc/cuda/norm.cu", "const bool inside = row < a.rows;",
           "const bool inside = row <= a.rows;", NORM),
    Mutant("norm: every batch is shifted as the first one is", "csrc/cuda/norm.cu", "load_vector(a.shift + batch * a.shift_stride + at)",
           "load_vector(a.shift + at)", NORM),
    Mutant("norm: every batch has the gate of the first one", "csrc/cuda/norm.cu", "load_vector(a.gate + batch * a.gate_stride + at)",
           "load_vector(a.gate + at)", NORM),
    Mutant("norm: the norm of the sum before it is rounded", "csrc/cuda/norm.cu",
           "      piece[v] = widen<T>(stored);\n", "", NORM),
    # ---- rotary
    Mutant("rotary: a slot behind the cache", "csrc/cuda/rotary.cu", "start >= a.capacity - token)", "start > a.capacity - token)", ROTARY),
    Mutant("rotary: a slot in front of the cache", "csrc/cuda/rotary.cu", "if (start < -token ||", "if (start < -token - 1 ||", ROTARY),
    Mutant("rotary: heads past the end of a row", "csrc/cuda/rotary.cu", "if (index >= a.row_heads)", "if (index > a.row_heads)", ROTARY),
    Mutant("rotary: idle threads read past the half", "csrc/cuda/rotary.cu", "low_at < a.half;", "low_at <= a.half;", ROTARY),
    Mutant("rotary: the norm is not rounded", "csrc/cuda/rotary.cu",
           "    piece.value[i] = rounded<T>(piece.value[i] * (inverse * weight.value[i]));",
           "    piece.value[i] = piece.value[i] * (inverse * weight.value[i]);", ROTARY),
    Mutant("rotary: angles of the first row", "csrc/cuda/rotary.cu", "task.cos = a.cos.at(row, token);", "task.cos = a.cos.at(0, token);", ROTARY),
    Mutant("rotary: one start for all", "csrc/cuda/rotary.cu", "a.start[row * a.start_stride]", "a.start[0]", ROTARY),
    Mutant("rotary: a value head of the next one", "csrc/cuda/rotary.cu", "task.from = a.value.at(row, token, head - a.kv_heads);",
           "task.from = a.value.at(row, token, head - a.kv_heads + 1);", ROTARY),
    Mutant("rotary: keys are normed as queries are", "csrc/cuda/rotary.cu", "task.norm = a.key_norm;", "task.norm = a.query_norm;", ROTARY),
    Mutant("rotary: sums over half a group", "csrc/cuda/rotary.cu", "sum_group<kGroup>(sum_squares", "sum_group<kGroup / 2>(sum_squares", ROTARY),
    # ---- step
    Mutant("step: sums are added before they are there", "csrc/cuda/step.cu",
           "total[k] = sum;\n  __syncthreads();", "total[k] = sum;", STEP),
    Mutant("step: no barrier between the two halves of a tile", "csrc/cuda/step.cu",
           "  __syncthreads();\n  const float dt", "  const float dt", STEP),
    Mutant("step: a position too far", "csrc/cuda/step.cu",
           "const int64_t position = first_position + i % kTilePositions;",
           "const int64_t position = first_position + i % kTilePositions + 1;", STEP),
    Mutant("step: a difference too many", "csrc/cuda/step.cu", "kept[j] = i <= a.terms", "kept[j] = i <= a.terms + 1", STEP),
    Mutant("step: the last partial sum is left out", "csrc/cuda/step.cu", "b < blocks; b += kWarp)", "b < blocks - 1; b += kWarp)", STEP),
    # ---- routing
    Mutant("routing: scratch is overwritten while it is read", "csrc/cuda/routing.cu",
           "  __syncwarp();  // what the last call left for this warp has been read\n", "", "DeviceRouting/1.*", RACE),
    Mutant("routing: no barrier before the warps' counts are read", "csrc/cuda/routing.cu",
           "  if (lane == 0) scratch[warp] = __popc(votes);\n  __syncthreads();",
           "  if (lane == 0) scratch[warp] = __popc(votes);", ROUTING),
    Mutant("routing: no barrier before the total is read", "csrc/cuda/routing.cu",
           "  __syncthreads();\n  total = scratch", "  total = scratch", ROUTING),
    Mutant("routing: the histogram is cleared while it is counted", "csrc/cuda/routing.cu",
           "histogram[thread] = 0;\n    __syncthreads();", "histogram[thread] = 0;", ROUTING),
    Mutant("routing: no barrier before the digit is read", "csrc/cuda/routing.cu",
           "    __syncthreads();\n    prefix |=", "    prefix |=", ROUTING),
    Mutant("routing: no barrier before the histogram is read", "csrc/cuda/routing.cu",
           "    __syncthreads();\n    if (thread < kWarp) {", "    if (thread < kWarp) {", ROUTING),
    Mutant("routing: a tie too many", "csrc/cuda/routing.cu", "ties_before + tie_rank < wanted", "ties_before + tie_rank <= wanted", ROUTING),
    Mutant("routing: the later entry does not win", "csrc/cuda/routing.cu",
           "if (next_entry(a, batch, entry, row) < a.count) return;", "", ROUTING),
    Mutant("routing: repeated rows are added twice", "csrc/cuda/routing.cu",
           "if (named_before(a, batch, entry, row)) return;", "", ROUTING),
    Mutant("routing: writes past the capacity", "csrc/cuda/routing.cu", "taken + rank < a.capacity", "taken + rank <= a.capacity", ROUTING),
    # ---- FFN, fp32
    Mutant("f32: no barrier after a tile is used", "csrc/cuda/ffn_f32.cu", "    __syncthreads();\n  }\n  const auto* const residual",
           "  }\n  const auto* const residual", FFN),
    Mutant("f32: depth past the end", "csrc/cuda/ffn_f32.cu", "r < g.m && k < g.k ?", "r < g.m && k <= g.k ?", FFN),
    Mutant("f32: no barrier before a tile is used", "csrc/cuda/ffn_f32.cu", "    __syncthreads();\n#pragma unroll", "#pragma unroll", FFN),
    # ---- FFN, sm_80
    Mutant("sm80: waits for a stage too few", "csrc/cuda/ffn_sm80.cu", "cp_async_wait<kStages - 2>();", "cp_async_wait<kStages - 1>();", FFN),
    Mutant("sm80: no barrier in the loop", "csrc/cuda/ffn_sm80.cu",
           "    __syncthreads();  // this stage has come, and the one before it is read\n", "", FFN),
    Mutant("sm80: a group is not committed where there is nothing to fetch", "csrc/cuda/ffn_sm80.cu",
           "fetch(step + kStages - 1);\n    cp_async_commit();", "fetch(step + kStages - 1), cp_async_commit();", FFN),
    Mutant("sm80: a depth past the end", "csrc/cuda/ffn_sm80.cu", "min(int64_t{8}, g.k - k);", "min(int64_t{8}, g.k + 1 - k);", FFN),
    Mutant("sm80: fetches into the stage that is read", "csrc/cuda/ffn_sm80.cu",
           "if (step + kStages - 1 < steps) fetch(step + kStages - 1);", "if (step + kStages < steps) fetch(step + kStages);", FFN),
    Mutant("sm80: gate and up of another neuron", "csrc/cuda/ffn_sm80.cu", "first_n + r / 16 * 8 + r % 8;", "first_n + r / 16 * 8 + r % 7;", FFN),
    Mutant("sm80: a row too many is stored", "csrc/cuda/ffn_sm80.cu", "if (r >= g.m) continue;", "if (r > g.m) continue;", FFN),
    # ---- FFN, sm_90
    Mutant("sm90: phase of a full stage", "csrc/cuda/ffn_sm90.cu",
           "mbarrier_wait(&barriers->full[ring.stage], ring.phase);", "mbarrier_wait(&barriers->full[ring.stage], ring.phase ^ 1);", FFN),
    Mutant("sm90: does not wait for an empty stage", "csrc/cuda/ffn_sm90.cu",
           "        mbarrier_wait(&barriers->empty[ring.stage], ring.phase ^ 1);\n        if (lane == 0) {",
           "        if (lane == 0) {", FFN),
    Mutant("sm90: expects too few bytes", "csrc/cuda/ffn_sm90.cu", "mbarrier_expect(full, C::kStageBytes);", "mbarrier_expect(full, C::kStageBytes - 1024);", FFN),
    Mutant("sm90: one warp empties a stage", "csrc/cuda/ffn_sm90.cu", "mbarrier_init(&barriers->empty[s], kConsumers * 4);", "mbarrier_init(&barriers->empty[s], 1);", FFN),
    Mutant("sm90: a stage is given back while it is read", "csrc/cuda/ffn_sm90.cu",
           "      wgmma_wait<1>();\n", "", FFN),
    Mutant("sm90: a stage is given back a step too early", "csrc/cuda/ffn_sm90.cu", "wgmma_wait<1>();", "wgmma_wait<2>();", FFN),
    Mutant("sm90: a tile's last stage is not given back", "csrc/cuda/ffn_sm90.cu",
           "    wgmma_wait<0>();\n    if (lane == 0) mbarrier_arrive(&barriers->empty[previous]);", "    wgmma_wait<0>();", FFN),
    Mutant("sm90: phase of an empty stage", "csrc/cuda/ffn_sm90.cu",
           "        mbarrier_wait(&barriers->empty[ring.stage], ring.phase ^ 1);\n        if (thread == 0) {",
           "        mbarrier_wait(&barriers->empty[ring.stage], ring.phase);\n        if (thread == 0) {", FFN),
    Mutant("sm90: copies do not wait for an empty stage", "csrc/cuda/ffn_sm90.cu",
           "        mbarrier_wait(&barriers->empty[ring.stage], ring.phase ^ 1);\n        if (thread == 0) {",
           "        if (thread == 0) {", FFN),
    Mutant("sm90: registers of the sums are not fenced", "csrc/cuda/ffn_sm90.cu", "      wgmma_fence();\n", "", FFN),
    Mutant("sm90: initialised barriers are not fenced", "csrc/cuda/ffn_sm90.cu", "    mbarrier_init_fence();\n", "", FFN),
    Mutant("sm90: no barrier after the barriers are initialised", "csrc/cuda/ffn_sm90.cu",
           "  __syncthreads();\n  griddepcontrol_wait();", "  griddepcontrol_wait();", FFN),
    Mutant("sm90: boxes come before their bytes are expected", "csrc/cuda/ffn_sm90.cu",
           "          __syncwarp();  // no box before its bytes are expected\n", "", FFN),
    Mutant("sm90: does not wait for the kernel before", "csrc/cuda/ffn_sm90.cu",
           "  __syncthreads();\n  griddepcontrol_wait();", "  __syncthreads();", FFN),
    Mutant("sm90: sums are read while products are under way", "csrc/cuda/ffn_sm90.cu",
           "    wgmma_wait<0>();\n    if (lane == 0)", "    if (lane == 0)", FFN),
    Mutant("sm90: results are not fenced", "csrc/cuda/ffn_sm90.cu",
           "      fence_proxy_async();  // stmatrix wrote what TMA reads\n", "", FFN),
    Mutant("sm90: copies are not fenced", "csrc/cuda/ffn_sm90.cu",
           "      fence_proxy_async();  // what cp.async wrote is read by wgmma\n", "", FFN),
    Mutant("sm90: copies are fenced before they have come", "csrc/cuda/ffn_sm90.cu",
           "          cp_async_wait<kCopiesAhead>();\n          hand_over();\n",
           "          fence_proxy_async();\n          cp_async_wait<kCopiesAhead>();\n"
           "          mbarrier_arrive(&barriers->full[arrived.stage]);\n          arrived.advance();\n          --pending;\n", FFN),
    Mutant("sm90: a result box is overwritten while TMA reads it", "csrc/cuda/ffn_sm90.cu",
           "if (thread == 0) tma_store_wait_read<1>();", "if (thread == 0) tma_store_wait_read<2>();", FFN),
    Mutant("sm90: only one thread knows that a result box is free", "csrc/cuda/ffn_sm90.cu",
           "      named_barrier(2 + group, 128);\n      write_group", "      write_group", FFN),
    Mutant("sm90: the warpgroups meet at one barrier", "csrc/cuda/ffn_sm90.cu",
           "      named_barrier(2 + group, 128);\n      write_group", "      named_barrier(2, 128);\n      write_group", FFN),
    Mutant("sm90: three warps are waited for before a result is stored", "csrc/cuda/ffn_sm90.cu",
           "      named_barrier(2 + group, 128);\n      if (thread == 0 && first_n",
           "      named_barrier(2 + group, 96);\n      if (thread == 0 && first_n", FFN),
    Mutant("sm90: both result boxes are one", "csrc/cuda/ffn_sm90.cu", "      out_slot ^= 1;\n", "", FFN),
    Mutant("sm90: no barrier before a result is stored", "csrc/cuda/ffn_sm90.cu",
           "      named_barrier(2 + group, 128);\n      if (thread == 0 && first_n", "      if (thread == 0 && first_n", FFN),
    Mutant("sm90: copies are handed over before they have come", "csrc/cuda/ffn_sm90.cu",
           "cp_async_wait<kCopiesAhead>();", "cp_async_wait<kCopiesAhead + 1>();", FFN),
    Mutant("sm90: the last copies are handed over before they have come", "csrc/cuda/ffn_sm90.cu",
           "    cp_async_wait<0>();\n    while (pending > 0) hand_over();", "    while (pending > 0) hand_over();\n    cp_async_wait<0>();", FFN),
    Mutant("sm90: the list of a tile is read before it is there", "csrc/cuda/ffn_sm90.cu",
           "      named_barrier(1, 128);\n      for (int step", "      for (int step", FFN),
    Mutant("sm90: a warp of copies is not waited for", "csrc/cuda/ffn_sm90.cu", "? 1 + 128 : 1);", "? 1 + 96 : 1);", FFN),
    Mutant("sm90: a box reaches into the next tile", "csrc/cuda/ffn_sm90.cu",
           "part + 64 <= C::kBlockN ? part : C::kBlockN - 64;", "part;", FFN),
    Mutant("sm90: the list of the next tile comes too early", "csrc/cuda/ffn_sm90.cu",
           "      named_barrier(1, 128);  // the last tile's list is not read any more\n", "", FFN),
    Mutant("sm90: the depth does not end with the range", "csrc/cuda/ffn_sm90.cu",
           "encode_tensor_map(g.b, g.n, g.first + g.k, g.b_stride, box_b);",
           "encode_tensor_map(g.b, g.n, g.intermediate, g.b_stride, box_b);", FFN),
    Mutant("sm90: boxes of eight of the next lane", "csrc/cuda/ffn_sm90.cu",
           "lane % (C::kBlockN / 8) * 8;", "(lane + 1) % (C::kBlockN / 8) * 8;", FFN),
    Mutant("sm90: a box of up from gate", "csrc/cuda/ffn_sm90.cu", "if (lane >= C::kBlockN / 8) {", "if (lane > C::kBlockN / 8) {", FFN),
    Mutant("sm90: reads behind the end of a row", "csrc/cuda/ffn_sm90.cu",
           "inside ? static_cast<int>(values) * 2 : 0);", "inside ? 16 : 0);", FFN),
    Mutant("tiles: another tile where the one that was asked for is not compiled", "csrc/cuda/ffn_sm90.cu",
           "if (tile != kTile) return false;", "if (tile.up != kTile.up) return false;", "FfnTiles.*:" + FFN),
    Mutant("tiles: a tile of the other half", "csrc/cuda/ffn_sm90.cu",
           "tile.up == g.gated() && ", "",
           "FfnTiles.*"),
    Mutant("tiles: a tile that does not read the list", "csrc/cuda/ffn_sm90.cu", "return fetch == Fetch::kRange;", "return true;", "FfnTiles.*"),
    Mutant("choice: no tensor map of no columns", "csrc/core/ffn_choice.cpp", "q.hidden > 0 && q.neurons > 0", "q.neurons > 0", FFN),
    Mutant("ffn: decodes a width of nothing", "csrc/cuda/ffn.cu", "p.width > 0 && ffn_decodes(q)", "ffn_decodes(q)", FFN),
    # ---- FFN, few rows
    Mutant("decode: x is read before it is there", "csrc/cuda/ffn_decode.cu",
           "h[i] = T{};\n  __syncthreads();", "h[i] = T{};", FFN),
    Mutant("decode: shares are added before they are there", "csrc/cuda/ffn_decode.cu",
           "= sum;\n  __syncthreads();", "= sum;", FFN),
    Mutant("decode: the sum does not wait for the blocks", "csrc/cuda/ffn_decode.cu", "  griddepcontrol_wait();\n", "", FFN),
    Mutant("decode: a row too many", "csrc/cuda/ffn_decode.cu", "const bool inside = row < f.rows &&", "const bool inside = row <= f.rows &&", FFN),
    Mutant("decode: h is read before all of it is there", "csrc/cuda/ffn_decode.cu",
           "      if (j < neurons) h[row * a.h_stride + j] = from_float<T>(silu(gate) * up);\n    }\n    __syncthreads();",
           "      if (j < neurons) h[row * a.h_stride + j] = from_float<T>(silu(gate) * up);\n    }", FFN),
    Mutant("decode: parts are added before they are there", "csrc/cuda/ffn_decode.cu",
           "    __syncthreads();\n    for (int i = thread; i < kGroups", "    for (int i = thread; i < kGroups", FFN),
    Mutant("decode: a part of the depth twice", "csrc/cuda/ffn_decode.cu",
           "const int64_t begin = steps * split / kSplits * kStep;", "const int64_t begin = steps * split / kSplits * kStep - (split > 1 ? kStep : 0);", FFN),
    Mutant("decode: a block's last neurons", "csrc/cuda/ffn_decode.cu",
           "min(int64_t{8}, neurons - j)", "min(int64_t{8}, neurons - j + 1)", FFN),
    Mutant("decode: the last block is left out", "csrc/cuda/ffn_decode.cu",
           "blocks * (share + 1) / kSumShares;", "(blocks - 1) * (share + 1) / kSumShares;", FFN),
    # ---- selection and statistics
    Mutant("ffn: runs are listed one off", "csrc/cuda/ffn.cu", "list[run.position + i] = run.start + i;", "list[run.position + i] = run.start + i + 1;", FFN),
    Mutant("ffn: an index past the end is used", "csrc/cuda/ffn.cu", "value >= limit) {", "value > limit) {", FFN),
    Mutant("ffn: shares of the norms are added before they are there", "csrc/cuda/ffn.cu",
           "= sum;\n  __syncthreads();", "= sum;", "DeviceFfn*Norms*"),
    Mutant("ffn: a share of the rows is left out", "csrc/cuda/ffn.cu", "for (int s = 0; s < kNormShares; ++s) total", "for (int s = 1; s < kNormShares; ++s) total", FFN),
]  # fmt: skip


def misfits(mutants: list[Mutant]) -> list[str]:
    """One line for each mutant whose text is not found exactly once in its file."""
    counts = [(mutant, (ROOT / mutant.file).read_text().count(mutant.old)) for mutant in mutants]
    return [
        f"{mutant.name}: its text occurs {count} times in {mutant.file}, expected once"
        for mutant, count in counts
        if count != 1
    ]


def copy_sources(target: Path) -> None:
    """Bring `target` up to date. What is the same is not touched, and what changes is new to the build by its time, which
    a time that came along would not be after a run that planted something later."""
    wanted = {target / "CMakeLists.txt": ROOT / "CMakeLists.txt"}
    for name in ("csrc", "cpp_tests"):
        wanted |= {target / path.relative_to(ROOT): path for path in (ROOT / name).rglob("*") if path.is_file()}
    for path in [path for path in target.rglob("*") if path.is_file() and path not in wanted]:
        path.unlink()
    for path, source in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_file() or path.read_bytes() != source.read_bytes():
            shutil.copyfile(source, path)


def build(folder: Path, source: Path, sanitize: str) -> bool:
    """Configure once, then build the emulated tests; False where they do not compile."""
    binary = folder / (sanitize.replace(",", "-") or "plain")
    if not (binary / "build.ninja").is_file():
        binary.mkdir(parents=True, exist_ok=True)
        options = ["-G", "Ninja", "-S", str(source), "-B", str(binary), "-DFLASHU_TESTS=ON", "-DFLASHU_CUDA=OFF"]
        subprocess.run(["cmake", *options, f"-DFLASHU_SANITIZE={sanitize}"], check=True, stdout=subprocess.DEVNULL)
    command = ["cmake", "--build", str(binary), "--target", "flashu_emulated_tests"]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def fails(folder: Path, sanitize: str, tests: str, seeds: int) -> bool:
    """Whether the tests find something (a hang counts)."""
    binary = folder / (sanitize.replace(",", "-") or "plain") / "cpp_tests" / "flashu_emulated_tests"
    environment = {
        **os.environ,
        "FLASHU_SIMT_SEEDS": str(seeds),
        "ASAN_OPTIONS": "detect_leaks=0",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [str(binary), f"--gtest_filter={tests}", "--gtest_fail_fast"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=600)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="only mutants with this in their name")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "build" / "mutants", help="where sources and builds are kept"
    )
    parser.add_argument("--check", action="store_true", help="only find the mutants' texts in the sources")
    parser.add_argument("--seeds", type=int, default=6, help="schedules to try")
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if arguments.name in mutant.name]
    if arguments.check:
        lines = misfits(chosen)
        print("\n".join([*lines, f"{len(chosen) - len(lines)} of {len(chosen)} mutants apply"]))
        return 1 if lines else 0
    source = arguments.folder / "source"
    copy_sources(source)
    if not build(arguments.folder, source, ""):
        print("the unchanged sources do not build", file=sys.stderr)
        return 1
    survivors = 0
    for number, mutant in enumerate(chosen, 1):
        path = source / mutant.file
        original = path.read_text()
        if original.count(mutant.old) != 1:
            outcome = f"does not apply: its text occurs {original.count(mutant.old)} times"
            survivors += 1
        else:
            path.write_text(original.replace(mutant.old, mutant.new))
            try:
                outcome = "survived"
                for sanitize in mutant.builds:
                    if not build(arguments.folder, source, sanitize):
                        outcome = "does not compile"
                        break
                    if fails(arguments.folder, sanitize, mutant.tests, arguments.seeds):
                        outcome = f"killed ({sanitize or 'plain'})"
                        break
                survivors += not outcome.startswith("killed")
            finally:
                path.write_text(original)
        print(f"[{number}/{len(chosen)}] {mutant.name}: {outcome}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
