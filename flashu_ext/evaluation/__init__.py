"""Evaluates drawing and understanding with the benchmarks' own tools: GenEval, DPG-Bench, lmms-eval."""
