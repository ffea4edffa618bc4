"""Faults in the Python layer: planning, models, the runtime, folders of images."""

from __future__ import annotations

from collections.abc import Callable

from ..mutant import Mutant, Pytest

FILES = Pytest("python_tests/planning/test_files.py")
SCHEDULE = Pytest("python_tests/planning/test_schedule.py", "python_tests/planning/test_mixed_schedule.py")
COST = Pytest("python_tests/planning/test_cost.py")


def within(file: str) -> Callable[[str], Pytest]:
    """Selects tests of one file by pytest's -k."""
    return lambda which: Pytest(f"python_tests/{file}", "-k", which)


RELEASE = within("packaging/test_release.py")
SMALL = within("runtime/test_small_models.py")
CALLERS = within("runtime/test_callers_tensors.py")
IMAGES = within("runtime/test_image_company.py")
KNOBS = within("runtime/test_skipping_and_caching.py")
LORA = within("runtime/test_lora.py")
RUNNER = within("runtime/test_step_runner.py")
ANSWERS = within("runtime/test_understanding.py")
COMPANY = within("runtime/test_answer_company.py")
SEVERAL = within("runtime/test_several_images.py")
HANDLE = within("runtime/test_accelerate.py")
LIVING = within("runtime/test_living.py")
COPIES = within("runtime/test_living_copies.py")
PAGE = within("runtime/test_living_page.py")
MODULES = within("runtime/test_living_modules.py")
FUNCTIONS = within("runtime/test_living_functions.py")
CAPTURED = within("runtime/test_captured_answers.py")
RESUMED = within("planning/test_calibrate_resumed.py")
SCHEDULES = within("runtime/test_images_by_turns.py")
CONTEXTS = within("runtime/test_contexts.py")
SHARED = within("runtime/test_threads.py")
CALIBRATE = within("planning/test_calibrate.py")
PLAN = within("planning/test_plan.py")
SETTINGS = within("planning/test_config.py")
TUNE = within("report/test_tune.py")
ANALYSIS = within("report/test_analysis.py")
FOLDER = within("parallel/test_folder.py")
LISTS = within("parallel/test_lists.py")
RANKS = within("parallel/test_ranks.py")
LOCK = within("parallel/test_folder_lock.py")
HOSTILE = within("planning/test_hostile_files.py")
FOLDERS = within("families/test_checkpoint_folders.py")
CONFIGS = within("families/test_bagel_checkpoint.py")
WRITES = within("planning/test_failed_writes.py")
EDGES = within("showo2/test_edges.py")
SIZES = within("showo2/test_sizes.py")
PIPELINE = within("showo2/test_pipeline.py")
CONFORMANCE = within("showo2/test_conformance.py")
COMMANDS = within("cli/test_cli.py")
BENCHMARKS = within("evaluation/test_benchmark_folders.py")
SCORES = within("evaluation/test_scores.py")
LMMS = within("evaluation/test_lmms.py")
KERNELS = within("runtime/test_kernel_sets.py")
MANY = within("runtime/test_many_changes.py")
PARTS = within("runtime/test_living_parts.py")
JANUSFLOW = within("families/test_janusflow.py")
BAGEL = within("families/test_bagel.py")
FAMILIES = within("families/test_conformance_command.py")
PRUNED = within("runtime/test_prune_ffn.py")
EXPERTS = within("families/test_bagel_runtime.py")
NEW_FAMILY = within("examples/test_new_family.py")
EMBEDDED = within("nano/test_embedded_pipelines.py")
SUBJECTS = within("nano/test_subjects.py")
PARTS_OF = within("families/test_wrapped_parts.py")
OF_FAMILIES = within("nano/test_many_of_families.py")
JANUSFLOW_PIPELINE = within("families/test_janusflow_pipeline.py")
BAGEL_PIPELINE = within("families/test_bagel_pipeline.py")
DIFFUSERS = within("hosts/test_diffusers_pipeline.py")
KL_CODEC = Pytest("python_tests/families/test_kl_codec.py")
PLANS = within("families/test_family_plans.py")
ENDS = within("runtime/test_many_ends.py")

MUTANTS = [
    Mutant("files: mode 0600", "flashu_ext/planning/safe_files.py", "            temporary.chmod(0o666 & ~umask)\n", "", FILES, quick=True),
    Mutant("files: no fsync", "flashu_ext/planning/safe_files.py", "os.fsync(file.fileno())", "file.fileno()", FILES),
    Mutant("files: Ctrl-C leaves the draft", "flashu_ext/planning/safe_files.py", "            shutil.rmtree(folder, ignore_errors=True)\n            os.close(lock)\n", "            os.close(lock)\n", FILES),
    Mutant("files: drafts of dead writers stay", "flashu_ext/planning/safe_files.py", "            _delete_dead(parent / folder)\n", "            pass\n", WRITES("killed_process")),
    Mutant("files: drafts of living writers are deleted", "flashu_ext/planning/safe_files.py", "            if try_lock(handle, fcntl.LOCK_EX):\n", "            if True:\n", WRITES("killed_process")),
    Mutant("files: a full disk has no name", "flashu_ext/planning/safe_files.py", "raise os_refusal(path, error) from error", "raise", WRITES("full_disk_leaves")),
    Mutant("files: a FIFO is waited for", "flashu_ext/planning/reading.py", "    if not stat.S_ISREG(status.st_mode):\n", "    if stat.S_ISDIR(status.st_mode):\n", HOSTILE("only_regular and plan and FIFO")),
    Mutant("files: any number of dimensions", "flashu_ext/planning/safe_files.py", "    if len(shape) > MAX_DIMENSIONS:\n", "    if len(shape) > MAX_JSON_BYTES:\n", HOSTILE("hostile_headers and tensors")),
    Mutant("json: a float may be infinite", "flashu_ext/planning/reading.py", "    if not math.isfinite(value):\n", "    if value != value:\n", HOSTILE("hostile_json")),
    Mutant("json: lists may be nested at will", "flashu_ext/planning/reading.py", "        _check_depth(data)\n", "", HOSTILE("hostile_json")),
    Mutant("errors: control codes are passed on", "flashu_ext/planning/reading.py", "c if c.isprintable() else _escaped(c)", "c", HOSTILE("any_text")),
    Mutant("checkpoint: layers may have gaps", "flashu_ext/models/weights.py", "for number in found.keys() - layers:", "for number in list(found.keys() - layers)[:0]:", HOSTILE("far_off")),
    Mutant("checkpoint: float8 is a floating dtype", "flashu_ext/models/weights.py", "        if tensor.dtype not in DTYPES:\n", "        if not tensor.is_floating_point():\n", HOSTILE("float8")),
    Mutant("lock: a second run shares it", "flashu_ext/batch/lock.py", "        self._take(fcntl.LOCK_EX)\n", "        self._take(fcntl.LOCK_SH)\n", LOCK("one_run")),
    Mutant("lock: ranks of another run join", "flashu_ext/batch/lock.py", 'if self._record().get("run") != run:', 'if not run:', LOCK("another_run_does_not")),
    Mutant("lock: its file stays", "flashu_ext/batch/lock.py", "                os.unlink(self.out / LOCK)\n", "                pass\n", LOCK("one_run")),
    Mutant("ranks: a signal does not end the waiting", "flashu_ext/batch/ranks.py", "        if stop():\n            raise InterruptedError", "        if stop() and seconds < 1:\n            raise InterruptedError", LOCK("as_long_as")),
    Mutant("files: the umask stays 0", "flashu_ext/planning/safe_files.py", "            os.umask(umask)\n", "", FILES),
    Mutant("schedule: skipped layers are rounded to nearest", "flashu_ext/planning/groups.py", "return int(layers * self.ratio)", "return round(layers * self.ratio)", SMALL("least_important"), quick=True),
    Mutant("schedule: the most important are skipped", "flashu_ext/planning/schedule.py", "key=scores.__getitem__)", "key=scores.__getitem__, reverse=True)", SMALL("least_important")),
    Mutant("schedule: the first layers are skipped", "flashu_ext/planning/schedule.py", "sorted(range(len(scores)), key=scores.__getitem__)", "list(range(len(scores)))", SMALL("least_important")),
    Mutant("schedule: layers are measured a step late", "flashu_ext/planning/schedule.py", "_due(rules.measure_layers, index - 1)", "_due(rules.measure_layers, index)", SCHEDULE),
    Mutant("schedule: tokens are measured a step late", "flashu_ext/planning/schedule.py", "_due(rules.measure_tokens, index - 1)", "_due(rules.measure_tokens, index)", SCHEDULE),
    Mutant("schedule: one full step more", "flashu_ext/planning/schedule.py", "index > rules.whole_after", "index >= rules.whole_after", SCHEDULE),
    Mutant("schedule: a forecast takes the oldest", "flashu_ext/planning/schedule.py", "(index, *measured_tokens)", "(*measured_tokens, index)", SCHEDULE),
    Mutant("cost: the unguided is priced as guided", "flashu_ext/planning/cost.py", "(2 if guided else 1), geometry.length", "2, geometry.length", COST),
    Mutant("checkpoint: a tied table is saved twice", "flashu_ext/models/checkpoint.py", "        state.pop(self._tied_head(model), None)\n", "", SMALL("files")),
    Mutant("checkpoint: shards count beside a whole file", "flashu_ext/models/weights.py", '            if exists(directory / f"{stem}.{suffix}"):\n', '            if exists(directory / f"{stem}.{suffix}") and not exists(directory / f"{stem}.{suffix}.index.json"):\n', FOLDERS("saved_over")),
    Mutant("checkpoint: ours is upstream's where both are there", "flashu_ext/models/checkpoint.py", 'OWN in self.configs or "format" in own', 'OWN in self.configs', FOLDERS("bagel")),
    Mutant("checkpoint: fixed tables are trained", "flashu_ext/models/checkpoint.py", "parameter.requires_grad_(name in trained)", "parameter.requires_grad_(True)", FOLDERS("bagel and round_trip")),
    Mutant("checkpoint: a field may contradict the weights", "flashu_ext/models/checkpoint.py", "fields.get(name) not in (None, value)", "fields.get(name, value) is None", CONFIGS("bad_configs")),
    Mutant("checkpoint: an activation is not looked at", "flashu_ext/models/checkpoint.py", "if fields.get(name, value) != value:", "if False:", CONFIGS("bad_configs")),
    Mutant("bagel: the image encoder has all layers of its file", "flashu_ext/models/bagel/checkpoint.py", "sizes.count(_VIT_LAYERS) + 1", "sizes.count(_VIT_LAYERS)", CONFIGS("released")),
    Mutant("prompts: the end is kept", "flashu_ext/models/showo2/prompts.py", "[: self.max_text_len]", "[-self.max_text_len :]", EDGES("prompt")),
    Mutant("pixels: cut off", "flashu_ext/models/pictures.py", "* 127.5).round()", "* 127.5)", EDGES("pixels"), quick=True),
    Mutant("pixels: cropped at the top", "flashu_ext/models/pictures.py", "round((height - side) / 2)", "0", EDGES("cropped")),
    Mutant("pixels: cropped at the left", "flashu_ext/models/pictures.py", "left, top = round((width - side) / 2)", "left, top = 0", EDGES("cropped")),
    Mutant("validate: an id equal to the vocabulary", "flashu_ext/models/checks.py", "high >= vocabulary", "high > vocabulary", SMALL("vocabulary")),
    Mutant("folder: weights do not matter", "flashu_ext/batch/folder.py", '        "weights": weights_digest(pipe.model),\n', "", FOLDER("weights")),
    Mutant("folder: the plan does not matter", "flashu_ext/batch/folder.py", '"plan": plan_digest(config, plan)', '"plan": None', FOLDER("plan")),
    Mutant("folder: the manifest goes first", "flashu_ext/batch/folder.py", "    for name in names:\n        (out /", "    path.unlink(missing_ok=True)\n    for name in names:\n        (out /", FOLDER("manifest")),
    Mutant("backbone: layers are judged over the span alone", "flashu_ext/runtime/backbone.py", "memory.importance[index] = importance.float().mean()", "memory.importance[index] = importance.gather(1, places).float().mean()", SMALL("layer_importance_equals"), quick=True),
    Mutant("backbone: the last layer is judged before the final norm", "flashu_ext/runtime/backbone.py", "importance = kernels.cosine_importance(before, after)", "importance = kernels.cosine_importance(before, x)", SMALL("layer_importance_equals")),
    Mutant("backbone: the last layer's tokens are judged behind it", "flashu_ext/runtime/backbone.py", "                importance = importance if index < last else kernels.cosine_importance(before, x)\n", "", KNOBS("judged_before_the_final_norm")),
    Mutant("state: the prefix of other layers serves", "flashu_ext/runtime/state.py", "self.prefix[0] == variant and", "self.prefix[0].task == variant.task and", KNOBS("a_knob and layers and sample")),
    Mutant("state: the prefix of one branch serves both", "flashu_ext/runtime/state.py", " and self.prefix[1] >= rows:", ":", KNOBS("a_knob and unit and sample")),
    Mutant("state: a stored prefix is overwritten", "flashu_ext/runtime/state.py", "(llm.clone(), head.clone())", "(llm, head)", KNOBS("a_knob and layers and sample")),
    Mutant("state: waits for the flag are not counted", "flashu_ext/runtime/state.py", "return self.importance.waits + self.flag.waits", "return self.importance.waits", KNOBS("flag"), quick=True),
    Mutant("generation: a cached step's turn to encode is lost", "flashu_ext/runtime/generation.py", "                    state.encode_due |= step.encode\n", "", KNOBS("defers_its_encoding")),
    Mutant("generation: features of fewer rows are used again", "flashu_ext/runtime/generation.py", " or state.semantic_rows < each.images", "", KNOBS("latents_of_their_own")),
    Mutant("generation: a cached state may be a step older", "flashu_ext/runtime/generation.py", "step.index - steps[-1] >= caching.interval", "step.index - steps[-1] > caching.interval", KNOBS("defers_its_encoding")),
    Mutant("generation: the signal's sum is not reset", "flashu_ext/runtime/generation.py", "        gate.computed()\n", "", KNOBS("a_knob and adaptive and sample")),
    Mutant("generation: the steps that the caller asks for are ignored", "flashu_ext/runtime/generation.py", "steps = steps or config.steps or parts.grid_points", "steps = config.steps or parts.grid_points", HANDLE("exact_equals_upstream")),
    Mutant("head: the residual is measured up to the output", "flashu_ext/runtime/head.py", "before = x.clone() if any(work.residual for work in works) else x", "before = x", KNOBS("a_knob and residual and sample")),
    Mutant("history: differences are a step apart", "flashu_ext/runtime/history.py", "interval = float(step - self.steps[-1]) if self.order and self.steps else 1.0", "interval = 1.0", KNOBS("a_knob and forecast and sample")),
    Mutant("history: a prediction of one order less", "flashu_ext/runtime/history.py", "min(len(self.steps), self.order + 1)", "min(len(self.steps), max(self.order, 1))", KNOBS("a_knob and forecast and sample")),
    Mutant("history: differences begin anew where rows leave", "flashu_ext/runtime/history.py", "rows > self.rows", "rows != self.rows", KNOBS("grows_and_shrinks")),
    Mutant("history: tokens are extrapolated from the older measurement", "flashu_ext/runtime/history.py", "(step - newest) / (newest - earlier[0])", "(step - earlier[0]) / (newest - earlier[0])", KNOBS("constant_or_linear")),
    Mutant("head cache: differences are lost where rows come or go", "flashu_ext/runtime/head_cache.py", "            table[:, :common] = self._tables[work.copied_from][:, :common]\n", "", KNOBS("grows_and_shrinks")),
    Mutant("gate: the rows of the image before it are compared", "flashu_ext/runtime/head_cache.py", "            self.drift.zero_()\n        self.signal", "            pass\n        self.signal", KNOBS("gate_sums")),
    Mutant("router: the time token of the first row alone is kept", "flashu_ext/runtime/token_router.py", "importance[:, :, : self.lead]", "importance[:, :1, : self.lead]", KNOBS("a_knob and tokens and sample")),
    Mutant("decoding: an answer sees what its prompt's last token does not", "flashu_ext/runtime/decoding.py", "if all(bool(each.all()) for each in seen):", "if seen:", ANSWERS("hidden_tokens")),
    Mutant("decoding: captured answers do not see their first token", "flashu_ext/runtime/decoding.py", "(0, cache.written[row]), value=True)", "(0, cache.written[row]), value=False)", COMPANY("begin_and_end and True")),
    Mutant("decoding: rows store their tokens where the first one does", "flashu_ext/runtime/decoding.py", "*cache, self.slots[region])", "*cache, self.slots[region, :1])", COMPANY("any_company and exact-False")),
    Mutant("decoding: positions count the kept tokens", "flashu_ext/runtime/decoding.py", "first - cache.prompt(row).ahead for row, (first, _) in", "first - cache.prompt(row).ahead for row, (_, first) in", ANSWERS("masking_the_dropped")),
    Mutant("answers: a token is sampled ahead of the end", "flashu_ext/runtime/answering.py", "not any(each.request.draws for each in self._live)", "self._live", CAPTURED("samples_advance")),
    Mutant("answers: rows that go on have the first rows' tokens", "flashu_ext/runtime/answering.py", "self._token[torch.tensor(order, dtype=torch.int64, device=self._token.device)]", "self._token[: len(order)]", COMPANY("rows_that_end")),
    Mutant("answers: a row that ends takes the last one's prompt with it", "flashu_ext/runtime/prompt_cache.py", "            two.copy_(kept)\n", "", COMPANY("rows_that_end")),
    Mutant("answers: a prompt is put over one that goes on", "flashu_ext/runtime/answering.py", "live = len(self._live)\n        try:", "live = max(len(self._live) - 1, 0)\n        try:", COMPANY("begin_and_end and exact-False")),
    Mutant("answers: memory is a slot too small", "flashu_ext/runtime/answering.py", "max(each) < capacity for", "max(each) <= capacity for", ANSWERS("outgrow_their_memory"), quick=True),
    Mutant("answers: memory of one slot less fits", "flashu_ext/runtime/answer_memory.py", "asked <= mine <=", "asked <= mine + 1 <=", SMALL("capacity_of_captured")),
    Mutant("answers: full memory is a step larger", "flashu_ext/runtime/image_memory.py", "return -(-count // step) * step", "return (count // step + 1) * step", SMALL("capacity_of_captured")),
    Mutant("answers: the caller's picture is kept", "flashu_ext/runtime/understanding.py", "distinct.append(latents.clone())", "distinct.append(latents)", CALLERS("answer_tokens"), quick=True),
    Mutant("answers: the caller's embeddings are kept", "flashu_ext/runtime/understanding.py", "Prompt(embeds.clone(),", "Prompt(embeds,", CALLERS("mmu_generate")),
    Mutant("answers: a pruned image is shared by its unpruned length", "flashu_ext/runtime/understanding.py", "prompt.kept[: prompt.slots(start)]", "prompt.kept[:start]", ANSWERS("share_a_pruned_image")),
    Mutant("prompts shared: an image is cut in the middle", "flashu_ext/runtime/prompt_cache.py", "farthest < torch.arange(1, limit + 1", "farthest <= torch.arange(1, limit + 1", ANSWERS("whole_or_not_at_all")),
    Mutant("prompts shared: the attention mask does not matter", "flashu_ext/runtime/prompt_cache.py", "    same &= (source.allowed[:limit, :limit] == prompt.allowed[:limit, :limit]).all(dim=-1)\n", "", ANSWERS("hidden_tokens")),
    Mutant("company: images of a batch share their decisions", "flashu_ext/runtime/generation.py", "        if not self.invariant:\n", "        if True:\n", IMAGES("any_batch and fast")),
    Mutant("company: rows attend in another image's memory", "flashu_ext/runtime/modules/attention.py", "for own, each in zip(self.passes, rows, strict=True)", "for own, each in zip(self.passes[::-1], rows, strict=True)", IMAGES("any_batch and exact"), quick=True),
    Mutant("company: the first image's time serves all", "flashu_ext/runtime/head.py", "m.modulation.index_select(0, m.time_rows[: work.rows]) for m, work in pairs", "memories[0].modulation.index_select(0, m.time_rows[: work.rows]) for m, work in pairs", IMAGES("different_times and exact")),
    Mutant("many: what was cancelled goes on", "flashu_ext/models/many.py", "        self._live = [each for each in self._live if each.index not in cancelled]\n", "", IMAGES("different_times and exact")),
    Mutant("many: an image of another config is planned as the model's", "flashu_ext/runtime/generation.py", "config = self.config if config is None else config", "config = self.config", MANY("preset_of_its_own")),
    Mutant("embedders: a patch's pixels by columns", "flashu_ext/runtime/modules/embedders.py", ".permute(0, 2, 4, 1, 3, 5)", ".permute(0, 2, 4, 1, 5, 3)", HANDLE("exact_equals_upstream")),
    Mutant("vision: an FFN without its residual", "flashu_ext/runtime/modules/vision.py", "x = layer.down(raised, residual=x)", "x = layer.down(raised)", HANDLE("exact_equals_upstream")),
    Mutant("known: any GELU is by tanh", "flashu_ext/models/known.py", 'return "gelu_tanh" if activation.approximate == "tanh" else "gelu"', 'return "gelu_tanh"', HANDLE("exact_equals_upstream")),
    Mutant("upstream: conditioning written to is not noticed", "flashu_ext/upstream/showo2.py", "            and self.versions == other.versions\n", "", CALLERS("t2i_generate")),
    Mutant("upstream: the same time again is the same image", "flashu_ext/upstream/showo2.py", "if image.time < time and", "if image.time <= time and", RUNNER("written_to_in_place")),
    Mutant("upstream: another scale is the same image", "flashu_ext/upstream/showo2.py", "guidance_scale if self.runner.config.execution.skip_unit_guidance else None", "None", KNOBS("another_scale")),
    Mutant("upstream: halves with latents of their own share one", "flashu_ext/upstream/showo2.py", "same = (first == second).all() & (t == t[0]).all() if", "same = (t == t[0]).all() if", KNOBS("latents_of_their_own")),
    Mutant("upstream: guidance is a step late", "flashu_ext/upstream/showo2.py", "index = states[0].step + 1", "index = max(states[0].step, 1)", HANDLE("paper_equals_flashu")),
    Mutant("upstream: the newest image is evicted", "flashu_ext/upstream/showo2.py", "self._end(running[0],", "self._end(running[-1],", RUNNER("oldest_image")),
    Mutant("memory: memory in use is leased again", "flashu_ext/runtime/memory.py", "            self._idle.remove(lease)\n", "", RUNNER("memory_of_their_own")),
    Mutant("memory: the oldest is kept", "flashu_ext/runtime/memory.py", "[*self._idle, lease][-self._most_idle :]", "[*self._idle, lease][: self._most_idle]", CAPTURED("memory_of_answers or memory_for_answers")),
    Mutant("readback: numbers overwritten before they are read", "flashu_ext/runtime/readback.py", "self._values, self._event = values.clone(), None", "self._values, self._event = values, None", CAPTURED("numbers_on_their_way")),
    Mutant("graphs: work is captured one run too late", "flashu_ext/runtime/graphs.py", "self._uses[work] >= _uses_before(work)", "self._uses[work] > _uses_before(work)", RUNNER("work_runs_then")),
    Mutant("runner: replaced modules run on", "flashu_ext/runtime/runner.py", "if rebuild or self._stamp.moved():", "if self._stamp.moved():", MODULES("hooked_module")),
    Mutant("order: neurons are put back by the permutation", "flashu_ext/runtime/order.py", "if planned else self._layout.inverse", "if planned else self._layout.permutation", HANDLE("remove_gives")),
    Mutant("order: what is loaded is not permuted", "flashu_ext/runtime/order.py", 'state[f"{prefix}weight"] = self.reordered(given, planned=True)', "pass", LIVING("loaded_weights")),
    Mutant("order: load hooks of others come after ours", "flashu_ext/runtime/order.py", "            hooks[id(self)] = to_plan_order  # the last one: hooks of others get the model's own order\n", "            hooks[id(self)] = to_plan_order\n            hooks.move_to_end(id(self), last=False)\n", LIVING("hooks_of_one")),
    Mutant("order: what is saved stays in plan order", "flashu_ext/runtime/order.py", 'destination[f"{prefix}{name}"] = copied = self.reordered(self.parameter, planned=False)', "copied = self.parameter", COPIES("in_its_own_order"), quick=True),
    Mutant("order: what is copied stays in plan order", "flashu_ext/runtime/order.py", "        values = self.reordered(weight, planned=False)\n", "        values = weight.detach().clone()\n", COPIES("a_copy_is_dense")),
    Mutant("order: weights are never edited", "flashu_ext/runtime/order.py", "return self.planned and self._pending is None and any(", "return not self.planned and any(", LIVING("edit_in_plan_order")),
    Mutant("order: a load counts as an edit", "flashu_ext/runtime/order.py", "                self.parameter = self.linear.weight\n                self.accept(self._planned)\n", "                pass\n", LIVING("loaded_weights")),
    Mutant("order: another parameter is no edit", "flashu_ext/runtime/order.py", "if weight is not self.parameter or _version(weight) != self._version or", "if weight is self.parameter and _version(weight) != self._version or", LIVING("replaced_parameter")),
    Mutant("stamp: versions do not matter", "flashu_ext/models/stamp.py", "return self._written or self._read_weights() != (self._versions, self._addresses)", "return self._written or self.moved()", LIVING("follow_weights")),
    Mutant("stamp: hooks do not matter", "flashu_ext/models/stamp.py", "hooks: list[Any] = [each for *pair, _ in self._hooks for each in pair]", "hooks: list[Any] = []", MODULES("hooked_module")),
    Mutant("stamp: other functions of torch do not matter", "flashu_ext/models/stamp.py", "            [functions(vars(owner)) for owner, functions in _LIBRARY],\n", "", FUNCTIONS("only_modules_call")),
    Mutant("stamp: another class does not matter", "flashu_ext/models/stamp.py", "            list(map(type, self._modules)),\n", "", PAGE("what_happens")),
    Mutant("known: forward hooks are passed over", "flashu_ext/models/known.py", '    if module._forward_hooks:\n        return "has a forward hook"\n', "", MODULES("hooked_module")),
    Mutant("known: a bias is left out", "flashu_ext/models/known.py", 'why_not_linear(linear, like) or ("has a bias" if linear.bias is not None else None)', "why_not_linear(linear, like)", MODULES("kernel_does_not_compute")),
    Mutant("lora: a scaling set later is not noticed", "flashu_ext/models/lora.py", "        dict(module.scaling),\n", "", LORA("noticed")),
    Mutant("lora: merged adapters are added again", "flashu_ext/models/lora.py", "if module.disable_adapters or module.merged_adapters:", "if module.disable_adapters:", LORA("states")),
    Mutant("lora: DoRA is taken for a plain adapter", "flashu_ext/models/known.py", "    if variant is not None:\n", "    if False:\n", LORA("themselves")),
    Mutant("lora: down reads A of the first neurons", "flashu_ext/runtime/modules/ffn.py", "low = ops.gathered_down(h.to(update.down.weight.dtype), update.down.weight, selection=selection)", "low = self._kernels.linear(h.to(update.down.weight.dtype), update.down.weight[:, : h.shape[-1]].contiguous())", LORA("pruned")),
    Mutant("int8: zero points are passed over", "flashu_ext/models/int8.py", "if zero is not None and bool(zero.any()):", "if False:", within("runtime/test_int8_models.py")("zero")),
    Mutant("known: a subclass is taken for its base", "flashu_ext/models/known.py", "    homes = known.get(kind.__name__)\n", "    kind = next((base for base in kind.__mro__ if base.__name__ in known), kind)\n    homes = known.get(kind.__name__)\n", MODULES("refused_by_name")),
    Mutant("runner: prompts outlast another weight", "flashu_ext/runtime/runner.py", "        self.reset()\n        self._stamp", "        self.generation.pool.clear()\n        self._stamp", LIVING("follow_weights"), quick=True),
    Mutant("runner: an image goes on with other weights", "flashu_ext/runtime/runner.py", "        self.reset()\n        self._stamp", "        self.understanding.reset()\n        self._stamp", SCHEDULES("image_in_progress")),
    Mutant("runner: an edit is told once for all", "flashu_ext/runtime/runner.py", "        self._told = False\n\n    def _forget", "\n    def _forget", LIVING("told_each_time")),
    Mutant("stamp: steps of optimizers do not matter", "flashu_ext/models/stamp.py", "stamp._written = stamp._written or not written.isdisjoint(stamp._ids)", "pass", LIVING("a_fused_step_on_one_weight")),
    Mutant("order: an edit is saved on other neurons", "flashu_ext/runtime/order.py", "        if self.edited():\n            raise", "        if False:\n            raise", LIVING("pruned_in_plan_order")),
    Mutant("stamp: values do not matter", "flashu_ext/models/stamp.py", "return self._read_values() != self._values or self._turns.changed()", "return self._turns.changed()", LIVING("through_data_uses or written_to_through_data")),
    Mutant("stamp: functions that attention calls do not matter", "flashu_ext/models/stamp.py", "            [namespace.get(name) for namespace, name in self._called],\n", "", MODULES("function_that_attention")),
    Mutant("stamp: matrices on a GPU have no turns", "flashu_ext/models/stamp.py", "        self._turn += 1\n        now", "        now", FUNCTIONS("take_turns")),
    Mutant("order: writes to a copy are lost", "flashu_ext/runtime/order.py", "return any(watched._version for _, watched in self._copies)", "return False", LIVING("not_lost_silently")),
    Mutant("order: memory in another plan's order is taken", "flashu_ext/runtime/order.py", "            if any(low < end and start < high for low, high in taken):\n", "            if not taken and taken:\n", LIVING("another_plans_order")),
    Mutant("upstream: ended images keep their memory", "flashu_ext/upstream/showo2.py", "        image.states, image.conditioning, image.ended = [], None, why\n", "        image.ended = why\n", SCHEDULES("free_their_memory")),
    Mutant("runner: autocast reaches the kernels", "flashu_ext/runtime/runner.py", "with self.lock.held, without_autocast(self.parts.device), torch.no_grad():", "with self.lock.held, torch.no_grad():", CONTEXTS("changes_no_bit and autocast")),
    Mutant("runner: threads step at the same time", "flashu_ext/runtime/runner.py", "with self.lock.held, without_autocast(self.parts.device), torch.no_grad():", "with without_autocast(self.parts.device), torch.no_grad():", SHARED("bits_of_a_serial_run")),
    Mutant("runner: an image goes on in a forked process", "flashu_ext/runtime/runner.py", "            if self.lock.abandoned:\n                self.reset()\n", "", SHARED("another_thread_held")),
    Mutant("upstream: threads with one prompt share an image", "flashu_ext/upstream/showo2.py", "[image for image in images if image.thread == threading.get_ident()] or images", "images", SHARED("share_their_prompt")),
    Mutant("answers: importance in the default dtype", "flashu_ext/runtime/understanding.py", "layers, dtype=torch.float32, device", "layers, device", CONTEXTS("changes_no_bit and bf16-paper")),
    Mutant("handle: an edit is not told of at the end", "flashu_ext/runtime/handle.py", "            try:\n                self.runner.tell_once()\n", "            try:\n                pass\n", LIVING("removing_tells")),
    Mutant("handle: the plan's order is shown for editing", "flashu_ext/runtime/handle.py", "                runner.reset()\n                runner.restore()\n", "                runner.reset()\n", LIVING("editing_shows")),
    Mutant("handle: a plan of another multiple is taken", "flashu_ext/runtime/handle.py", '        ("prune_multiple", ffn.multiple, plan.multiple),\n', "", HANDLE("refused_model")),
    Mutant("calibration: importance of the answer's first token", "flashu_ext/calibration/calibrate.py", "values[-1 - each.answer]", "values[-each.answer]", CALIBRATE("layer_importance")),
    Mutant("calibration: two tasks have one noise", "flashu_ext/calibration/calibrate.py", "{self.seed}/{task}/{index}/", "{self.seed}/{index}/", CALIBRATE("noise_depends")),
    Mutant("calibration: a token behind the image counts", "flashu_ext/models/showo2/calibration.py", "device=tokens.device) < end[:, None]", "device=tokens.device) <= end[:, None]", CALIBRATE("scores_equal")),
    Mutant("calibration: the caller's latents are changed", "flashu_ext/models/calibration.py", "return t * latents + ", "return latents.mul_(t) + ", CALLERS("calibrate"), quick=True),
    Mutant("calibration: what a drawing computes before its pass counts", "flashu_ext/calibration/calibrate.py", "            if self._pass is None:\n                return\n            assert self._state is not None\n", "            assert self._state is not None\n            self._pass = self._pass or DensePass(lambda: None)\n", PLANS("sums_and_scores")),
    Mutant("calibration: a drawing scores the text expert", "flashu_ext/calibration/calibrate.py", "drawn = bool(self._experts) and state.kind == \"generation\"", "drawn = bool(self._experts) and state.kind == \"drawing\"", PLANS("sums_and_scores")),
    Mutant("calibration: an answer scores the drawing expert", "flashu_ext/calibration/calibrate.py", "drawn = bool(self._experts) and state.kind == \"generation\"", "drawn = bool(self._experts)", PLANS("sums_and_scores")),
    Mutant("calibration: the drawing expert has the text's norm", "flashu_ext/models/bagel/adapter.py", "expert_norm=llm.norm_moe_gen", "expert_norm=llm.norm", PLANS("layer_importance")),
    Mutant("calibration: hooks stay after an error", "flashu_ext/calibration/calibrate.py", "        finally:\n            self._state = None\n            for hook", "        finally:\n            self._state = None\n        if self._values:\n            for hook", PLANS("error_in_the_model")),
    Mutant("estimators: scores by the other expert's weights", "flashu_ext/planning/estimators.py", "if self.drawing_down is None or task in self.mean_layer_importance:", "if self.drawing_down is None or task not in self.mean_layer_importance:", PLANS("sums_and_scores")),
    Mutant("plans: the drawing expert's norms are not kept", "flashu_ext/planning/plan.py", "        drawing[0] if drawing else None,\n", "", PLANS("kept_in_a_file")),
    Mutant("calibration: a tensor in a sequence is not compared", "flashu_ext/calibration/state.py", "            _feed(digest, f\"{name}.{field.name}\", getattr(value, field.name))", "            pass", PLANS("tells_checkpoints_apart")),
    Mutant("janusflow: padding counts", "flashu_ext/models/janusflow/calibration.py", "(position < seen[:, None]) | (position >= inputs.length)", "position[None].repeat(len(seen), 1) >= 0", PLANS("sums_and_scores")),
    Mutant("janusflow: the time is not the network's", "flashu_ext/models/janusflow/calibration.py", "t * TIMES, dtype", "t, dtype", PLANS("sums_and_scores")),
    Mutant("bagel: the time runs the wrong way", "flashu_ext/models/bagel/calibration.py", "torch.full((1,), 1 - t, ", "torch.full((1,), t, ", PLANS("sums_and_scores")),
    Mutant("bagel: one branch of guidance", "flashu_ext/models/bagel/calibration.py", "else [model.append(before, full[-1], ids), before]", "else [model.append(before, full[-1], ids)]", PLANS("sums_and_scores")),
    Mutant("bagel: markers are patches", "flashu_ext/models/bagel/calibration.py", "        counted[:, [0, -1]] = False\n", "", PLANS("layer_importance")),
    Mutant("bagel: the answer's marker is not read", "flashu_ext/models/bagel/calibration.py", "torch.tensor([ids.bos_token_id, *answer]", "torch.tensor([*answer]", PLANS("sums_and_scores")),
    Mutant("bagel: the prompt's markers are not read", "flashu_ext/models/bagel/calibration.py", "[run(_contexts(model, sample.drawing)) for run in runs]", "[_contexts(model, sample.drawing) for run in runs]", PLANS("rest_of_a_drawing")),
    Mutant("analysis: neurons stay away", "flashu_ext/studies/analysis.py", "            weight[:, neurons] = values", "            weight[:, neurons] += 0 * values", ANALYSIS("come_back")),
    Mutant("analysis: a drawing's neurons are the text expert's", "flashu_ext/studies/analysis.py", "layers = parts.experts if len(parts.experts) and of.partition(\":\")[0] == TASKS[0] else parts.layers", "layers = parts.layers", ANALYSIS("come_back")),
    Mutant("analysis: the least important are removed", "flashu_ext/studies/analysis.py", "largest=end == \"most\"", "largest=end != \"most\"", ANALYSIS("sets_that_are_removed")),
    Mutant("specialisation: rankings of different experts are compared", "flashu_ext/studies/specialisation.py", "pair = (PROMPTS, TASKS[1])", "pair = TASKS", ANALYSIS("any_family")),
    Mutant("specialisation: both halves are one", "flashu_ext/studies/specialisation.py", "[plan_of(0), plan_of(1)]", "[plan_of(0), plan_of(0)]", ANALYSIS("halves_are")),
    Mutant("calibration: a sample is left out behind a checkpoint", "flashu_ext/calibration/calibrate.py", "            if index < seen:\n", "            if index <= seen and seen:\n", RESUMED("interrupted_run")),
    Mutant("calibration: samples of a checkpoint are not compared", "flashu_ext/calibration/calibrate.py", "if index == seen - 1 and before", "if index == seen and before", RESUMED("checkpoint_of_another_run")),
    Mutant("tuning: it reports on the split of the walk", "flashu_ext/studies/tuning.py", 'seed + 1, "held-out")', 'seed + 1, "training")', TUNE("training_scenes"), quick=True),
    Mutant("tuning: it walks on the split of the report", "flashu_ext/studies/tuning.py", 'questions, seed, "training")', 'questions, seed, "held-out")', TUNE("training_scenes")),
    Mutant("tuning: the first answers are timed", "flashu_ext/studies/tuning.py", "statistics.median(times[2:] or times)", "statistics.median(times)", TUNE("first_two_answers")),
    Mutant("tuning: answers about pictures seen before are timed", "flashu_ext/studies/tuning.py", "list(first.values())[: count + 2]", "range(len(probe.asked))[: count + 2]", TUNE("not_seen_before")),
    Mutant("tuning: images or answers must hold", "flashu_ext/studies/tuning.py", "kept = all(own.value", "kept = any(own.value", TUNE("walk_keeps")),
    Mutant("tuning: files are written in place", "flashu_ext/studies/tuning.py", '            write_text(folder / name, text)\n', '            (folder / name).write_text(text, encoding="utf-8")\n', TUNE("saved_whole")),
    Mutant("cost: the image that warms up counts", "flashu_ext/planning/cost.py", "if turn == 0:", "if turn < 0:", COST),
    Mutant("cost: a step that may be cached is priced as one that runs", "flashu_ext/planning/cost.py", "config.head.budget if config.head is not None and step.adaptive else None", "None", COST),
    Mutant("cost: the time token may be left out", "flashu_ext/planning/cost.py", "tokens.count(span - shape.time_token)", "tokens.count(span)", COST),
    Mutant("plan: the kept share is rounded, not the pruned one", "flashu_ext/planning/plan.py", "ideal = intermediate - int(intermediate * ratio)", "ideal = int(intermediate * (1 - ratio))", PLAN("kept_counts")),
    Mutant("plan: every layer keeps as many as the first", "flashu_ext/planning/plan.py", "aligned_sets(scores, self.kept_counts[layer]", "aligned_sets(scores, self.kept_counts[0]", PLAN("ratio_of_its_own")),
    Mutant("plan: scores of one layer are kept", "flashu_ext/planning/plan.py", "    return torch.stack([score.detach()", "    return scores[0][None] if len(scores) == 1 else torch.stack([score.detach()", CALLERS("from_scores")),
    Mutant("plan: ratios of the layers outlast another ratio", "flashu_ext/planning/plan.py", "multiple=self.multiple if multiple is None else multiple, ratios=None)", "multiple=self.multiple if multiple is None else multiple)", PLAN("adaptive_ratios or ratios")),
    Mutant("plan: a file's model is not checked", "flashu_ext/planning/plan.py", "            if model is not None:\n                plan.check_model(model)\n        except", "        except", HANDLE("another_model")),
    Mutant("estimators: variance over all tokens", "flashu_ext/planning/estimators.py", "max(self.tokens - 1, 1)", "self.tokens", CALIBRATE("variance")),
    Mutant("estimators: a variance below zero", "flashu_ext/planning/estimators.py", ".clamp_min(0)\n        return", "\n        return", CALIBRATE("variance")),
    Mutant("neurons: a further task exchanges too many", "flashu_ext/planning/neurons.py", "key=lambda b: wanted[b] - counts[b])", "key=lambda b: counts[b] - wanted[b])", Pytest("python_tests/planning/test_neurons.py")),
    Mutant("neurons: runs start anywhere", "flashu_ext/planning/neurons.py", "counts = [n // unit * unit for n in wanted]", "counts = list(wanted)", Pytest("python_tests/planning/test_neurons.py")),
    Mutant("neurons: a task meets no blocks", "flashu_ext/planning/neurons.py", "block = 2 * block + member", "block = block", Pytest("python_tests/planning/test_neurons.py")),
    Mutant("neurons: a neuron may come twice", "flashu_ext/planning/neurons.py", "if int(mask.sum()) != index.numel():", "if int(mask.sum()) > index.numel():", Pytest("python_tests/planning/test_neurons.py")),
    Mutant("groups: an answer's layers are rounded to nearest", "flashu_ext/planning/groups.py", "return int(layers * self.layer_skip_ratio)", "return round(layers * self.layer_skip_ratio)", ANSWERS("skip_the_layers")),
    Mutant("groups: tokens are rounded to nearest", "flashu_ext/planning/groups.py", "return int(image_tokens * self.ratio)", "return round(image_tokens * self.ratio)", KNOBS("idle_knob")),
    Mutant("groups: a phase of guidance is a step short", "flashu_ext/planning/groups.py", "            if step <= last:", "            if step < last:", KNOBS("half_the_rows")),
    Mutant("config: half a step is rounded to even", "flashu_ext/planning/config.py", "math.floor(self.full_network_steps * steps + 0.5)", "round(self.full_network_steps * steps)", SETTINGS("paper_follows"), quick=True),
    Mutant("config: other phases are no longer relative", "flashu_ext/planning/config.py", '            overrides.setdefault("guidance_relative", self.guidance_relative)\n', "            pass\n", SETTINGS("other_phases")),
    Mutant("config: fast takes the best fidelity", "flashu_ext/planning/config.py", "best = min(found,", "best = max(found,", TUNE("fast_takes")),
    Mutant("schedule: cached steps count for the encoder", "flashu_ext/planning/schedule.py", "uses + step.backbone", "uses + 1", SCHEDULE),
    Mutant("schedule: layers are chosen by one branch", "flashu_ext/planning/schedule.py", "        if step.measure:\n            # Layers", "        if step.measure_tokens:\n            # Layers", SCHEDULE),
    Mutant("ranks: the rank behind the lost ones does not report", "flashu_ext/batch/ranks.py", "return all(rank in self.lost for rank in range(self.ranks.rank))", "return self.ranks.rank == 0", RANKS("silent_rank")),
    Mutant("ranks: a rank too many", "flashu_ext/batch/ranks.py", "if self.rank >= self.world:", "if self.rank > self.world:", RANKS("wrong_environments")),
    Mutant("prompts: a seed of 0 is none", "flashu_ext/batch/prompts.py", 'record.get("seed", seed + index)', 'record.get("seed") or seed + index', LISTS("text_and_jsonl"), quick=True),
    Mutant("prompts: a mark of the byte order is part of the first", "flashu_ext/batch/prompts.py", 'encoding="utf-8-sig"', 'encoding="utf-8"', LISTS("text_and_jsonl")),
    Mutant("prompts: seeds run out of their range", "flashu_ext/batch/prompts.py", '        check_seed(f"{where}: seed", own)\n', "", LISTS("seeds_end")),
    Mutant("folder: the order of neurons matters", "flashu_ext/planning/fingerprint.py", "return mixed.sum(0, keepdim=True)", "return mixed", FOLDER("digest_of_the_dense"), quick=True),
    Mutant("folder: neurons of each matrix in an order of its own", "flashu_ext/planning/fingerprint.py", "        mixed = mixed ^ (mixed >> 29)\n", "", FOLDER("another_order")),
    Mutant("folder: norms do not matter", "flashu_ext/planning/fingerprint.py", "if id(value) not in own and _readable(value)]", "if id(value) not in own and value.dim() > 1]", FOLDER("halving")),
    Mutant("folder: an earlier version's weights are taken for the same", "flashu_ext/batch/folder.py", 'if old["version"] != VERSION:', 'if old["version"] > VERSION:', FOLDER("earlier_version")),
    Mutant("folder: a whole image is written again", "flashu_ext/batch/folder.py", "if write and not complete_png(path):", "if write:", LISTS("list_is_resumed")),
    Mutant("folder: an image is written in place", "flashu_ext/batch/folder.py", '                    with atomic_path(path) as temporary:\n                        image.save(temporary, format="PNG")\n', '                    image.save(path, format="PNG")\n', FOLDER("ctrl_c")),
    Mutant("folder: an image without its end is whole", "flashu_ext/batch/folder.py", "if file.read() != _PNG_END:", "if not file.read():", LISTS("complete_png")),
    Mutant("folder: the config's steps are recorded, not the caller's", "flashu_ext/batch/folder.py", "steps or planned or parts.grid_points", "planned or steps or parts.grid_points", FOLDER("what_the_caller_asks")),
    Mutant("folder: no guidance is recorded as the pipeline's", "flashu_ext/batch/folder.py", "float(pipe.guidance_scale if guidance_scale is None else guidance_scale)", "float(guidance_scale or pipe.guidance_scale)", FOLDER("what_the_caller_asks")),
    Mutant("validate: a span that ends with the row", "flashu_ext/models/showo2/validate.py", "offset + got > length", "offset + got >= length", SMALL("ends_with_its_row")),
    Mutant("validate: an odd number of guided rows", "flashu_ext/models/showo2/validate.py", "if guided and rows % 2:", "if guided and rows < 2:", CONFORMANCE("odd_number")),
    Mutant("sampling: the caller's noise is overwritten", "flashu_ext/models/showo2/sampling.py", "self._latents = self._latents + (", "self._latents += (", CALLERS("dense")),
    Mutant("sampling: a shift of 0 shifts", "flashu_ext/models/showo2/sampling.py", "if shift else u", "if shift is not None else u", CONFORMANCE("time_grid")),
    Mutant("answers: later images begin a token early", "flashu_ext/models/showo2/adapter.py", "length += 1 + late + image.shape[1] + 1", "length += late + image.shape[1] + 1", SEVERAL("made_by_hand"), quick=True),
    Mutant("answers: all images of a question are the first", "flashu_ext/runtime/runner.py", "[[next(embeds) for _ in own] for own in images]", "[[next(embeds)] * len(own) for own in images]", SEVERAL("mixed_batches")),
    Mutant("answers: only the last image's tokens are dropped", "flashu_ext/runtime/understanding.py", "if first >= start and drop:\n                assert", "if (first, count) == prompt.spans[-1] and drop:\n                assert", SEVERAL("dropped_in_each")),
    Mutant("answers: the span starts late without a time token", "flashu_ext/models/showo2/adapter.py", "        late = self.lead\n", "        late = 1\n", SMALL("without_a_time_token")),
    Mutant("pipeline: no guidance is the pipeline's own", "flashu_ext/models/pipeline.py", "guidance_scale_of(self.guidance_scale if guidance_scale is None else guidance_scale, count)", "guidance_scale_of(guidance_scale or self.guidance_scale, count)", EDGES("guidance")),
    Mutant("pipeline: layers' ratios of a plan are levelled", "flashu_ext/models/pipeline.py", "if plan.ratios is not None:", "if plan.ratios is not None and not plan.layers:", CALIBRATE("ratios_of_its_own")),
    Mutant("known: diffusers' decorator hides the model's own code", "flashu_ext/models/known.py", '("torch", "transformers", "diffusers", "einops", "timm", "flash_attn", "flashu_ext")', '("torch", "transformers", "einops", "timm", "flash_attn", "flashu_ext")', FUNCTIONS("decorated_by_diffusers")),
    Mutant("parts: a table is resampled from a grid that it has not", "flashu_ext/models/showo2/positions.py", "return side if stored and side * side == rows else None", "return side if side * side == rows else None", SIZES("of_one_size")),
    Mutant("parts: the nearest stored position is taken", "flashu_ext/models/showo2/adapter.py", 'mode="bicubic", align_corners=False', 'mode="nearest"', SIZES("as_upstream_does")),
    Mutant("prompts: rows of another size are padded as the model's own", "flashu_ext/models/showo2/prompts.py", "text = self.max_text_len if length is None else length - image_tokens - _MARKS", "text = self.max_text_len", SIZES("long_as_upstreams")),
    Mutant("folder: the size is not recorded", "flashu_ext/batch/folder.py", '{} if grid == pipe.grid() else {"grid": list(grid)}', "{}", SIZES("folder_records")),
    Mutant("prompts: half a character is returned", "flashu_ext/models/prompts.py", 'if text.endswith("\\ufffd") or not', "if not", PIPELINE("incomplete_characters")),
    Mutant("pixels: a picture is a pixel too narrow", "flashu_ext/models/pictures.py", "max(side, int(width * scale))", "int(width * scale)", EDGES("cropped")),
    Mutant("generate: ranks that are started anew discard", "flashu_ext/cli/generate.py", "discard = overwrite and ranks.attempt == 0", "discard = overwrite", LISTS("started_anew")),
    Mutant("cli: samples have no seed", "flashu_ext/cli/main.py", '"top_p": top_p, "seed": seed}', '"top_p": top_p, "seed": None}', COMMANDS("answers_are_sampled")),
    Mutant("cli: a plan beside tuned settings is ignored", "flashu_ext/cli/support.py", "if tuned is not None and plan_file is not None:", "if tuned is not None and plan_file is None and False:", COMMANDS("tuned")),
    Mutant("cli: --adaptive is ignored", "flashu_ext/cli/main.py", "    if adaptive:\n", "    if adaptive and data is None:\n", COMMANDS("calibrate_a_folder")),
    Mutant("kernels: a row for one phase is taken in all", "flashu_ext/ops/kernel_sets.py", "case.task in each.tasks and case.phase in each.phases", "case.task in each.tasks", KERNELS("another_row"), quick=True),
    Mutant("kernels: batch invariance is not asked of a row", "flashu_ext/ops/kernel_sets.py", "if execution.batch_invariant and not self.invariant:", "if execution.batch_invariant and not self.implementation:", KERNELS("invariance_needs")),
    Mutant("kernels: an op that is never called must be met", "flashu_ext/ops/kernel_sets.py", "if why is not None and op in called:", "if why is not None:", KERNELS("not_called")),
    Mutant("kernels: measuring runs on the backbone's", "flashu_ext/runtime/backbone.py", "enumerate(self.measuring.layers)", "enumerate(self.network.layers)", KERNELS("the_table_has and paper")),
    Mutant("kernels: a phase of its own has all neurons", "flashu_ext/runtime/network.py", "network if self.layouts is None else network.over(self.layouts)", "network", KERNELS("plans_neurons")),
    Mutant("kernels: every row attends as many keys as the first", "flashu_ext/ops/reference.py", "for r, n in enumerate(counts)\n    ]\n", "for r, n in enumerate(counts[:1] * len(counts))\n    ]\n", KERNELS("one_at_a_time")),
    Mutant("kernels: sixteen rows are many", "flashu_ext/ops/kernel_sets.py", "MANY = 17\n", "MANY = 16\n", KERNELS("padded_to_many")),
    Mutant("many: structure is not looked at between steps", "flashu_ext/runtime/runner.py", "                self.check_unchanged()\n                self.generation.step", "                self.generation.step", MANY("between_two_steps"), quick=True),
    Mutant("many: BAGEL's latents stay a grid of tokens", "flashu_ext/models/many.py", "latents = self.pipe.unpacked(each.work.latents())", "latents = each.work.latents()", OF_FAMILIES("drawn_alone and bagel")),
    Mutant("many: a config of one image is left out", "flashu_ext/models/sampling.py", "handle.stepper(inputs, config)", "handle.stepper(inputs)", OF_FAMILIES("preset_of_one")),
    Mutant("many: any index is cancelled", "flashu_ext/models/many.py", "if not 0 <= index < self._count:", "if index is None:", MANY("cannot_be_cancelled")),
    Mutant("many: what waits survives close", "flashu_ext/models/many.py", "        self._results.clear()\n", "", MANY("closed_list")),
    Mutant("known: a convolution's own method is passed over", "flashu_ext/models/known.py", '("_call_impl", "_conv_forward")', '("_call_impl",)', PARTS("private_method")),
    Mutant("linear: strided rows go to the kernel", "flashu_ext/runtime/modules/linear.py", "x if x.shape[-1] < 2 or x.stride(-1) == 1 else x.contiguous()", "x", PARTS("may_give_columns")),
    Mutant("stamp: settings of activations are not watched", "flashu_ext/models/stamp.py", "[(own.get, _settings(own)) for module, own in pairs if tracked(module)]", "[]", PARTS("settings_that_change")),
    Mutant("known: an encoder's norms are anything", "flashu_ext/models/known.py", 'for name in ("layer_norm1", "layer_norm2"):', "for name in ():", PARTS("norm_that_is_not_known")),
    Mutant("linear: an unknown member is not named", "flashu_ext/runtime/modules/linear.py", "self.members.append(Unknown(module, why_not_activation(module)))", "self.members.append(Unknown(module, why_not_activation(module) and None))", PARTS("unknown_member")),
    Mutant("janusflow: image tokens see all of the image", "flashu_ext/models/janusflow/adapter.py", "causal: ClassVar[bool] = True", "causal: ClassVar[bool] = False", FAMILIES("holds and janusflow"), quick=True),
    Mutant("janusflow: padding is seen", "flashu_ext/models/janusflow/sampling.py", "+ (1,) * (len(self.tokens) - images)", "+ (self.length,) * (len(self.tokens) - images)", FAMILIES("holds and janusflow")),
    Mutant("janusflow: a cached step decodes old latents", "flashu_ext/runtime/generation.py", "        self._run_together(self.backbone.early, early)\n", "        self._run_together(self.backbone.early, [each for each in early if each[0].step.backbone])\n", JANUSFLOW("cached_step")),
    Mutant("janusflow: the time modulates the branch", "flashu_ext/models/janusflow/adapter.py", "        x = self.down(responded, residual=x)\n        scale, shift = modulation[:, None, None].chunk(2, dim=-1)\n        return x * (1 + scale) + shift\n", "        scale, shift = modulation[:, None, None].chunk(2, dim=-1)\n        return x + self.down(responded) * (1 + scale) + shift\n", FAMILIES("holds and janusflow")),
    Mutant("janusflow: the encoder's hooks are passed over", "flashu_ext/models/janusflow/adapter.py", "known.why_replaced(module, kinds, self.own(path))", "known.why_unknown(module, kinds)", JANUSFLOW("would_be_passed_over")),
    Mutant("janusflow: two places of an image are one", "flashu_ext/models/janusflow/images.py", "if count == 1 or len(found) != 1 or found[0] == 0:", "if count == 1 or found[0] == 0:", JANUSFLOW("arguments_of_a_question")),
    Mutant("bagel: markers go through the drawing expert", "flashu_ext/models/bagel/model.py", "self.language_model.model(block, Experts(1, len(block) - 1), context", "self.language_model.model(block, Experts(0, len(block)), context", BAGEL("whole_sequence")),
    Mutant("bagel: an image's tokens have positions of their own", "flashu_ext/models/bagel/model.py", "context = run(block, Experts(1, len(block) - 1), context, causal=False, step=0)[1]", "context = run(block, Experts(1, len(block) - 1), context, causal=False, step=1)[1]", BAGEL("whole_sequence")),
    Mutant("bagel: renormalisation enlarges", "flashu_ext/models/bagel/sampling.py", ".clamp(least, 1.0)", ".clamp(least)", BAGEL("never_enlarges")),
    Mutant("bagel: the forecast begins with the first evaluations", "flashu_ext/models/bagel/sampling.py", "if old and index > self._seer.first_enhance - 2:", "if old:", FAMILIES("holds and bagel")),
    Mutant("bagel: text guidance of 1 guides by the image", "flashu_ext/models/bagel/sampling.py", "return text, text and self.image > 1", "return text, self.image > 1", BAGEL("branches_run")),
    Mutant("pruned: what changes later does not count", "flashu_ext/runtime/pruned.py", "if self._ffn is None or self._stamp.structure_changed() or self._stamp.moved():", "if self._ffn is None:", PRUNED("changes_later")),
    Mutant("prompts: a causal image is reused in part", "flashu_ext/runtime/prompt_cache.py", "    return min(inside, default=end)\n", "    return end\n", JANUSFLOW("reused_whole")),
    Mutant("experts: patches go through the text expert", "flashu_ext/runtime/backbone.py", "drawn = memories[0].sizes.patches if self.network.experts else 0", "drawn = 0", EXPERTS("any_sequence")),
    Mutant("experts: the text expert is pruned in a drawing", "flashu_ext/runtime/backbone.py", "attention, shape, (variant.task, None))", "attention, shape, (variant.task, variant.task))", EXPERTS("each_expert")),
    Mutant("experts: the drawing expert is never pruned", "flashu_ext/runtime/backbone.py", "attention, shape, (variant.task, None))", "attention, shape, (None, None))", EXPERTS("each_expert")),
    Mutant("experts: heads are not normed", "flashu_ext/runtime/modules/decoder_layer.py", "projected.append([*layer.normed_heads(query, key), value])", "projected.append([query, key, value])", EXPERTS("any_sequence")),
    Mutant("layers: heads of a decoder are not normed", "flashu_ext/runtime/modules/decoder_layer.py", "attention(index, query, key, value, rope, layer.head_norms), task)", "attention(index, query, key, value, rope), task)", EXPERTS("any_question")),
    Mutant("contexts: rows share a segment too many", "flashu_ext/runtime/backbone.py", "        if a is not b:\n            return count\n", "        if a is not b:\n            return count + 1\n", EXPERTS("any_sequence")),
    Mutant("placement: experts that share weights do not count", "flashu_ext/runtime/placement.py", "for ffn in read if ffn is not None", "for ffn in ffns if ffn is not None", EXPERTS("share_weights")),
    Mutant("bagel: TaylorSeer where guidance begins later", "flashu_ext/models/bagel/sampling.py", "    guidance.check_forecast(taylorseer)\n", "", EXPERTS("any_sequence")),
    Mutant("known: a layer in two places", "flashu_ext/models/known.py", "if cache is not None and cache in caches[:index]:", "if False:", PARTS_OF("two_places")),
    Mutant("shapes: a width is the norm's", "flashu_ext/models/shapes.py", "width=out_features(layer.mlp.down_proj)", "width=int(layer.input_layernorm.weight.shape[0])", PARTS_OF("runs_as_itself")),
    Mutant("adapter: results of another shape", "flashu_ext/models/checks.py", "if len(got) != len(shape) or any(", "if False and any(", NEW_FAMILY("another_shape")),
    Mutant("config: a skip without measurements is not idle", "flashu_ext/planning/groups.py", 'return {"ratio": "interval"} if self.ratio > 0 and self.interval == 0 else {}', "return {}", SETTINGS("keeps_off")),
    Mutant("embedded pipeline: BAGEL's own guidance is left out", "flashu_ext/models/bagel/pipeline.py", "guidance_of(self.guidance if guidance is None else guidance,", "guidance_of(DRAWING if guidance is None else guidance,", EMBEDDED("subjects")),
    Mutant("embedded pipeline: JanusFlow draws any size", "flashu_ext/models/janusflow/pipeline.py", "if size is not None and sides(size) != own:", "if False:", EMBEDDED("sizes")),
    Mutant("describe: the family's own number of steps", "flashu_ext/runtime/kernel_sets.py", "steps or config.steps or parts.grid_points", "steps or config.steps or 50", SUBJECTS("kernels_and_costs")),
    Mutant("calibrate: a projection without weights", "flashu_ext/calibration/calibrate.py", '    check_parts(decoder.stack, "decoder", weights)\n', "", CALIBRATE("without_weights")),
    Mutant("example: rows of another number", "flashu_ext/models/sampling.py", "or len(tokens) != rows:", "or False:", NEW_FAMILY("do_not_fit")),
    Mutant("contexts: an image is causal", "flashu_ext/runtime/modules/attention.py", "        if mask is None and ordered and tokens > 1:\n", "        if mask is None and tokens > 1:\n", EXPERTS("any_sequence")),
    Mutant("contexts: a text is not causal", "flashu_ext/runtime/modules/attention.py", "        if mask is None and ordered and tokens > 1:\n", "        if mask is None and ordered and tokens > 9999:\n", EXPERTS("any_sequence")),
    Mutant("spans: tokens of an image have positions of their own", "flashu_ext/runtime/image_memory.py", "along = torch.zeros if parts.flat else torch.arange", "along = torch.arange", EXPERTS("any_sequence")),
    Mutant("guidance: outside the interval too", "flashu_ext/runtime/state.py", "self.guides is None or self.guides[step.index - 1] else", "self.guides is not None else", EXPERTS("any_sequence")),
    Mutant("taylorseer: the first evaluations count", "flashu_ext/runtime/history.py", " or step <= self.upto:", ":", EXPERTS("any_sequence")),
    Mutant("taylorseer: the last of the first is not kept", "flashu_ext/planning/schedule.py", "    kept |= {draft.index for draft in drafts if draft.kept}  # extrapolation reads earlier states too\n", "", EXPERTS("any_sequence")),
    Mutant("bagel: an image at the end is left out without text", "flashu_ext/models/bagel/sampling.py", "without_text = full[:-1] if full and isinstance(full[-1], Text) else full", "without_text = full[:-1]", EXPERTS("see_the_same")),
    Mutant("answers: positions are places", "flashu_ext/runtime/decoding.py", "first - cache.prompt(row).ahead for", "first for", EXPERTS("any_question")),
    Mutant("prompts: equal tokens at other positions are shared", "flashu_ext/runtime/prompt_cache.py", "    same &= source.positions[:limit] == prompt.positions[:limit]\n", "", JANUSFLOW("reused_whole")),
    Mutant("prompts: what is not finite is shared", "flashu_ext/runtime/prompt_cache.py", "    if source.finite is not None and not bool(source.finite):\n        return 0\n", "", ENDS("spoils_no_other")),
    Mutant("prompts: what is not finite is shared in a batch", "flashu_ext/runtime/understanding.py", "            if bool(cache.prompt(other).finite):\n", "            if True:\n", ENDS("spoils_no_other")),
    Mutant("many: a list is numbered as it is read", "flashu_ext/models/many.py", "        self._requests = iter(() if isinstance(requests, Sequence) else requests)\n", "        self._requests, requests = iter(requests), iter(requests)\n", ENDS("numbered_before")),
    Mutant("many: answers are not put to rest", "flashu_ext/models/many.py", "        if not self._live:\n            self._rest()\n", "", ENDS("leave_no_memory")),
    Mutant("many: errors hold memory", "flashu_ext/runtime/generation.py", "        self.states = []\n", "", ENDS("hold_no_memory")),
    Mutant("many: an image goes on accelerated", "flashu_ext/models/many.py", "                    if handle is not None:\n", "                    if handle is self:\n", ENDS("began_dense")),
    Mutant("pool: what is forgotten stays", "flashu_ext/runtime/memory.py", "        self._leased.add(lease)\n", "        self._leased.add(lease)\n        self.all = [*getattr(self, \"all\", ()), lease]\n", ENDS("loops_that_are_left")),
    Mutant("decoding: lengths are written in place", "flashu_ext/runtime/decoding.py", "[lengths + 1 for lengths in memory.lengths]", "[lengths.add_(1) for lengths in memory.lengths]", ENDS("any_mode")),
    Mutant("describe: what is refused is described", "flashu_ext/runtime/kernel_sets.py", "        check_model(parts)\n", "        pass\n", ENDS("cannot_be_accelerated")),
    Mutant("contexts: they are in a graph", "flashu_ext/runtime/generation.py", "each.done.append(self.capture.run_together(self.backbone.context, (each.state.memory,), works))", "each.run(lambda memory, work: self.backbone.context((memory,), (work,)), works[0])", EXPERTS("share_evaluations")),
    Mutant("evaluations: a neighbour's markers", "flashu_ext/runtime/backbone.py", "behind = [memory.trailing.expand(count, -1, -1) for memory, count in zip(memories, images, strict=True)]", "behind = [memories[0].trailing.expand(count, -1, -1) * (1 + i) for i, count in enumerate(images)]", EXPERTS("share_evaluations")),
    Mutant("janusflow: a group has the noise of the first images", "flashu_ext/models/pipeline.py", "noise[group], steps, scales", "noise[: len(group)], steps, scales", JANUSFLOW_PIPELINE("other_lengths")),
    Mutant("janusflow: a prompt has no tag", "flashu_ext/models/janusflow/prompts.py", "[self.bos, *self.encode(text), self.tag]", "[self.bos, *self.encode(text)]", JANUSFLOW_PIPELINE("conversations or samplers")),
    Mutant("janusflow: the preprocessor's colours are not read", "flashu_ext/models/janusflow/pipeline.py", "pixel_values(each, self.model.config, self.mean, self.std)", "pixel_values(each, self.model.config)", JANUSFLOW_PIPELINE("answers_are")),
    Mutant("janusflow: every question has the first one's draws", "flashu_ext/models/janusflow/understanding.py", "[:, -1]), [row])", "[:, -1]), [0])", JANUSFLOW_PIPELINE("draws_of")),
    Mutant("codec: nothing is shifted", "flashu_ext/models/codec.py", "self.scale * (latents - self.shift)", "self.scale * latents", KL_CODEC),
    Mutant("bagel: an edit is normed as a drawing", "flashu_ext/models/bagel/sequences.py", '(0.0, 1.0), "text_channel")', "(0.0, 1.0))", BAGEL_PIPELINE("edit")),
    Mutant("bagel: an image is encoded as it came", "flashu_ext/models/bagel/sequences.py", "vae_image(rgb(item, name, on_white=True), config, *sides)", "rgb(item, name, on_white=True)", BAGEL_PIPELINE("answers_are")),
    Mutant("bagel: transparent colours show", "flashu_ext/models/bagel/sequences.py", "on_white=True", "on_white=False", BAGEL_PIPELINE("transparent")),
    Mutant("bagel: images have the most likely latents", "flashu_ext/models/bagel/pipeline.py", "pixels(item).to(device), generator)", "pixels(item).to(device))", BAGEL_PIPELINE("edit")),
    Mutant("bagel: the size is the first image's", "flashu_ext/models/bagel/pipeline.py", "(images[-1].height, images[-1].width)", "(images[0].height, images[0].width)", BAGEL_PIPELINE("of_the_last")),
    Mutant("diffusers: steps are grid points", "flashu_ext/hosts/diffusers.py", "steps + pipe.counts_grid_points", "steps", DIFFUSERS("each_with_a_callback")),
    Mutant("diffusers: images of one generator are alike", "flashu_ext/hosts/diffusers.py", "self.pipeline.noise_by(each, size).to(device) for each in given", "self.pipeline.noise_by(None if each is None else each.clone_state(), size).to(device) for each in given", DIFFUSERS("generators")),
    Mutant("bagel: noise is drawn as latents", "flashu_ext/models/bagel/pipeline.py", "        shape = (rows * columns, self.model.config.patch_width)\n", "        return super().noise_by(generator, size)\n        shape = (rows * columns, self.model.config.patch_width)\n", BAGEL_PIPELINE("image_is_the_samplers")),
    Mutant("diffusers: an image is not interrupted", "flashu_ext/hosts/diffusers.py", "            raise _InterruptedError\n", "            pass\n", DIFFUSERS("interrupted")),
    Mutant("diffusers: what is interrupted is lost", "flashu_ext/hosts/diffusers.py", "drawn[group] = told.latents", "pass", DIFFUSERS("interrupted")),
    Mutant("diffusers: the next image is interrupted", "flashu_ext/hosts/diffusers.py", "self._interrupt, self._num_timesteps = False, steps", "self._num_timesteps = steps", DIFFUSERS("interrupted")),
    Mutant("diffusers: a callback gets the sampler's latents", "flashu_ext/hosts/diffusers.py", "given = latents.clone()", "given = latents", DIFFUSERS("replaced")),
    Mutant("diffusers: a callback's latents are not looked at", "flashu_ext/hosts/diffusers.py", "if replaced or given._version != version:", "if replaced:", DIFFUSERS("replaced")),
    Mutant("diffusers: the VAE takes the model's dtype", "flashu_ext/hosts/diffusers.py", "self.vae.to(device=device, non_blocking", "self.vae.to(device=device, dtype=dtype, non_blocking", DIFFUSERS("loads_and_is_saved")),
    Mutant("diffusers: a saved folder has no index", "flashu_ext/hosts/diffusers.py", "        write_diffusers_index(directory)\n", "", DIFFUSERS("loads_and_is_saved")),
    Mutant("diffusers: another's index is overwritten", "flashu_ext/hosts/__init__.py", "if name != _CLASS:", "if False:", DIFFUSERS("another_pipeline_stays")),
    Mutant("diffusers: copies are drawn in turns", "flashu_ext/hosts/diffusers.py", '[each for each in prompts for _ in range(_count("num_images_per_prompt", copies))]', '[each for _ in range(_count("num_images_per_prompt", copies)) for each in prompts]', DIFFUSERS("company")),
    Mutant("geneval: samples share their seed", "flashu_ext/evaluation/lists.py", "seed + index * samples + sample", "seed + index * samples", BENCHMARKS("genevals_folder")),
    Mutant("dpg: images lie column by column", "flashu_ext/evaluation/drawing.py", "(index % 2 * side, index // 2 * side)", "(index // 2 * side, index % 2 * side)", BENCHMARKS("dpgs_folder"), quick=True),
    Mutant("dpg: a name may have a dot", "flashu_ext/evaluation/lists.py", 're.search(r"[.]|^\\s*$", name)', 're.search(r"^\\s*$", name)', BENCHMARKS("of_dpg_that_are_none")),
    Mutant("evaluation: a damaged picture stays", "flashu_ext/evaluation/drawing.py", "    if not complete_png(target):\n        return False\n", "    if not target.exists():\n        return False\n", BENCHMARKS("resumed")),
    Mutant("evaluation: a grid is written in place", "flashu_ext/evaluation/drawing.py", "            with atomic_path(target) as temporary:\n                _make(picture, sources, temporary)\n", "            _make(picture, sources, target)\n", BENCHMARKS("no_part_of_a_file")),
    Mutant("evaluation: pictures of another list stay", "flashu_ext/evaluation/drawing.py", "        left.unlink()\n", "        pass\n", BENCHMARKS("shorter_list")),
    Mutant("geneval: the overall score is the mean over images", "flashu_ext/evaluation/scores.py", "math.fsum(shares) / len(shares)", "sum(r for t in strata for r, _ in t) / (len(seen) + 1)", SCORES("genevals_scores")),
    Mutant("geneval: images are independent", "flashu_ext/evaluation/scores.py", "wilson(share, len(task))", "wilson(share, int(sum(n for _, n in task)))", SCORES("genevals_scores")),
    Mutant("geneval: results of another list are taken", "flashu_ext/evaluation/scores.py", 'if line["prompt"] != prompts[match[1]]:', "if False:", SCORES("geneval_that_are_none")),
    Mutant("mme: a picture needs one right answer", "flashu_ext/evaluation/scores.py", "100.0 * (share == 1.0)", "100.0 * (share > 0.0)", SCORES("mme")),
    Mutant("intervals: clusters are drawn once", "flashu_ext/planning/intervals.py", "rng.integers(len(clusters), size=", "rng.integers(1 + len(clusters) // 2, size=", SCORES("intervals")),
    Mutant("page: a part of a list is a whole one", "flashu_ext/report/evaluation.py", 'if result.state == "scored" and result.scored != result.expected:', "if False:", SCORES("the_page")),
    Mutant("page: other weights are not told", "flashu_ext/report/evaluation.py", '_OWN = {"preset", "config", "plan", "steps"}', '_OWN = {"preset", "config", "plan", "steps", "weights"}', SCORES("the_page")),
    Mutant("likelihoods: of the token before", "flashu_ext/evaluation/likelihood.py", "token = self.tokens[len(self.logprobs)]", "token = self.tokens[max(0, len(self.logprobs) - 1)]", LMMS("likelihoods")),
    # ---- releases
    Mutant("release: weak symbols of a newer glibc are fine", "release/symbols.py", "for kind, number, name in undefined(table):\n", "for kind, number, name in undefined(table, weak=False):\n", RELEASE("newer_symbols")),
    Mutant("release: versions are compared as text", "release/symbols.py", 'tuple(map(int, number.split("."))) >', '(number,) and number >= "2.3" and (9,) >', RELEASE("newer_symbols")),
    Mutant("release: any symbol of torch is stable", "release/symbols.py", r'OF_TORCH = re.compile(r"(aoti_torch|torch)_\w+")', r'OF_TORCH = re.compile(r"(aoti_torch|torch|_Z)\w+")', RELEASE("needs_too_much"), quick=True),
    Mutant("release: a wheel may be twice as large", "release/wheel.py", "if (size := wheel.path.stat().st_size) > LARGEST:", "if (size := wheel.path.stat().st_size) > 2 * LARGEST:", RELEASE("planted_fault")),
    Mutant("release: paths in libraries are not looked for", "release/wheel.py", 'if name.endswith(".so") or b"\\0" not in data[:4096]:', 'if b"\\0" not in data[:4096]:', RELEASE("planted_fault")),
    Mutant("release: a section may be empty", "release/changelog.py", 'return found[1].strip() if found else ""', 'return found[0].strip() if found else ""', RELEASE("refused")),
    Mutant("release: a tagged version is made again", "release/changelog.py", 'if _git(root, "tag", "--list", f"v{own}"):', 'if _git(root, "tag", "--list", own):', RELEASE("refused")),
    Mutant("release: new files may lie around", "release/changelog.py", '"status", "--porcelain"', '"status", "--porcelain", "-uno"', RELEASE("refused")),
    Mutant("pages: versions are sorted as text", "release/site.py", "found.append((Version(folder.name), folder.name))", "found.append((Version('0'), folder.name))", RELEASE("pages_of_this_version")),
]  # fmt: skip
