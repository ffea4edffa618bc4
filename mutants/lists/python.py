"""Faults in the Python layer: planning, models, the runtime, folders of images."""

from __future__ import annotations

from ..mutant import Mutant, Pytest

SMALL = "python_tests/runtime/test_small_models.py"
FILES = Pytest("python_tests/planning/test_files.py")
EDGES = "python_tests/showo2/test_edges.py"
FOLDER = "python_tests/parallel/test_folder.py"
SCHEDULE = Pytest("python_tests/planning/test_schedule.py", "python_tests/planning/test_mixed_schedule.py")
COST = Pytest("python_tests/planning/test_cost.py")

MUTANTS = [
    Mutant("files: mode 0600", "flashu_ext/planning/safe_files.py", "        temporary.chmod(0o666 & ~umask)\n", "", FILES, quick=True),
    Mutant("files: no fsync", "flashu_ext/planning/safe_files.py", "os.fsync(file.fileno())", "file.fileno()", FILES),
    Mutant("files: Ctrl-C leaves the draft", "flashu_ext/planning/safe_files.py", "except BaseException:", "except Exception:", FILES),
    Mutant("files: the umask stays 0", "flashu_ext/planning/safe_files.py", "        os.umask(umask)\n", "", FILES),
    Mutant("schedule: skipped layers are rounded to nearest", "flashu_ext/planning/groups.py", "return int(layers * self.ratio)", "return round(layers * self.ratio)", Pytest(SMALL, "-k", "least_important"), quick=True),
    Mutant("schedule: the most important are skipped", "flashu_ext/planning/schedule.py", "key=scores.__getitem__)", "key=scores.__getitem__, reverse=True)", Pytest(SMALL, "-k", "least_important")),
    Mutant("schedule: the first layers are skipped", "flashu_ext/planning/schedule.py", "sorted(range(len(scores)), key=scores.__getitem__)", "list(range(len(scores)))", Pytest(SMALL, "-k", "least_important")),
    Mutant("schedule: layers are measured a step late", "flashu_ext/planning/schedule.py", "_due(rules.measure_layers, index - 1)", "_due(rules.measure_layers, index)", SCHEDULE),
    Mutant("schedule: tokens are measured a step late", "flashu_ext/planning/schedule.py", "_due(rules.measure_tokens, index - 1)", "_due(rules.measure_tokens, index)", SCHEDULE),
    Mutant("schedule: one full step more", "flashu_ext/planning/schedule.py", "index > rules.whole_after", "index >= rules.whole_after", SCHEDULE),
    Mutant("schedule: a forecast takes the oldest", "flashu_ext/planning/schedule.py", "(index, *measured_tokens)", "(*measured_tokens, index)", SCHEDULE),
    Mutant("cost: the unguided is priced as guided", "flashu_ext/planning/cost.py", "(2 if guided else 1), geometry.length", "2, geometry.length", COST),
    Mutant("checkpoint: a tied table is saved twice", "flashu_ext/models/showo2/checkpoint.py", '        state.pop("showo.lm_head.weight", None)\n', "        pass\n", Pytest(SMALL, "-k", "files")),
    Mutant("prompts: the end is kept", "flashu_ext/models/showo2/prompts.py", "[: self.max_text_len]", "[-self.max_text_len :]", Pytest(EDGES, "-k", "prompt")),
    Mutant("pixels: cut off", "flashu_ext/models/showo2/pipeline.py", "* 127.5).round()", "* 127.5)", Pytest(EDGES, "-k", "pixels"), quick=True),
    Mutant("pixels: cropped at the top", "flashu_ext/models/showo2/pipeline.py", "round((height - side) / 2)", "0", Pytest(EDGES, "-k", "cropped")),
    Mutant("pixels: cropped at the left", "flashu_ext/models/showo2/pipeline.py", "left, top = round((width - side) / 2)", "left, top = 0", Pytest(EDGES, "-k", "cropped")),
    Mutant("validate: an id equal to the vocabulary", "flashu_ext/models/showo2/validate.py", "high >= vocabulary", "high > vocabulary", Pytest(SMALL, "-k", "vocabulary")),
    Mutant("folder: weights do not matter", "flashu_ext/batch/folder.py", '        "weights": weights_digest(pipe.model),\n', "", Pytest(FOLDER, "-k", "weights")),
    Mutant("folder: the plan does not matter", "flashu_ext/batch/folder.py", '"plan": _plan_digest(config, plan)', '"plan": None', Pytest(FOLDER, "-k", "plan")),
    Mutant("folder: the manifest goes first", "flashu_ext/batch/folder.py", "    for name in names:\n        (out /", "    path.unlink(missing_ok=True)\n    for name in names:\n        (out /", Pytest(FOLDER, "-k", "manifest")),
]  # fmt: skip
