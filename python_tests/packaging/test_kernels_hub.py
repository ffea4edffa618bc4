"""The ops as a Hugging Face kernel: built, loaded without a network, beside this package, and put into models."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.inputs import randn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flashu_ext import ops, reference

kernels = pytest.importorskip("kernels")
ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / ".ci" / "kernels-hub"
if not PROGRAM.is_file():
    pytest.skip("these tests need the source folder", allow_module_level=True)
loader = importlib.machinery.SourceFileLoader("kernels_hub", str(PROGRAM))
hub = importlib.util.module_from_spec(importlib.util.spec_from_loader("kernels_hub", loader))  # type: ignore[arg-type]
loader.exec_module(hub)
if not (hub.BUILD / "CMakeCache.txt").is_file():
    pytest.skip(f"{hub.BUILD} was not built", allow_module_level=True)

LAYERS = ("Linear", "RMSNorm", "SwiGLUMLP")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kernels") / "flashu-ext"
    done = subprocess.run([sys.executable, PROGRAM, path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture(scope="module")
def kernel(folder: Path) -> ModuleType:
    return kernels.get_local_kernel(folder)


@pytest.fixture
def mapped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The names of our layers stand for them."""
    from transformers.models.llama import modeling_llama as llama
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    for module, name in (
        *((each, "RMSNorm") for each in (llama.LlamaRMSNorm, qwen2.Qwen2RMSNorm, nn.RMSNorm)),
        *((each, "SwiGLUMLP") for each in (llama.LlamaMLP, qwen2.Qwen2MLP)),
        (nn.Linear, "Linear"),
    ):
        monkeypatch.setattr(module, "kernel_layer_name", name, raising=False)
    repositories = {name: kernels.LocalLayerRepository(folder, layer_name=name) for name in LAYERS}
    with kernels.use_kernel_mapping(
        {name: {"cpu": each} for name, each in repositories.items()}, inherit_mapping=False
    ):
        yield


class Called(TorchDispatchMode):
    """Counts calls of ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] = self.counts.get(func.name(), 0) + 1
        return func(*args, **(kwargs or {}))


def namespace(kernel: ModuleType) -> str:
    return importlib.import_module("._ops", kernel.__name__).NAMESPACE


def model(family: str, **config: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings = getattr(transformers, f"{family}Config")(**sizes, num_key_value_heads=2, vocab_size=96, **config)
    return getattr(transformers, f"{family}ForCausalLM")(settings).eval()


ALONE = """
import sys
sys.modules["flashu_ext"] = None  # as if it was not installed
import kernels, torch
kernel = kernels.get_local_kernel(__import__("pathlib").Path(sys.argv[1]))
x, weight = torch.randn(3, 64), torch.randn(64)
torch.testing.assert_close(kernel.rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (64,), weight, 1e-6))
gate, up, down = torch.randn(32, 64), torch.randn(32, 64), torch.randn(64, 32)
kept = kernel.Selection.from_runs([(4, 8)], limit=32)
expected = (torch.nn.functional.silu(x @ gate[4:12].T) * (x @ up[4:12].T)) @ down[:, 4:12].T
torch.testing.assert_close(kernel.gathered_ffn(x, gate, up, down, selection=kept), expected, rtol=1e-4, atol=1e-3)
names = {name.partition("::")[0] for name in torch._C._dispatch_get_all_op_names()}
print(sorted(name for name in names if "flashu" in name))
"""


def test_it_is_loaded_offline_and_alone(folder: Path, tmp_path: Path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, folder],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"['_flashu_ext_{hub.digest()}']"


TWICE = """
import importlib.util, sys, kernels, torch
kernel = kernels.get_local_kernel(__import__("pathlib").Path(sys.argv[1]))
spec = importlib.util.spec_from_file_location("copied", sys.argv[2] + "/__init__.py", submodule_search_locations=[sys.argv[2]])
copied = sys.modules["copied"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(copied)
x, weight = torch.randn(3, 64), torch.randn(64)
expected = kernel.rms_norm(x, weight, 1e-6)
try:
    copied.rms_norm(x, weight, 1e-6)
except ImportError as error:
    print(error)
assert torch.equal(kernel.rms_norm(x, weight, 1e-6), expected)
"""


def test_a_second_copy_is_refused_and_the_first_one_works_on(folder: Path, tmp_path: Path):
    """Two variants are such copies."""
    (variant,) = folder.glob("build/*cpu*")
    copied = shutil.copytree(variant, tmp_path / "copied")
    program = [sys.executable, "-c", TWICE, folder, copied]
    done = subprocess.run(program, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert f"torch.ops._flashu_ext_{hub.digest()} is there from another file ({variant}" in done.stdout


def test_the_layout(folder: Path):
    general = tomllib.loads((folder / "build.toml").read_text())["general"]
    assert (general["name"], general["version"]) == (hub.NAME, hub.VERSION)
    variants = {path.name.split("-")[3]: path for path in (folder / "build").iterdir()}
    assert {re.sub(r"^cu\d+$", "cuda", backend) for backend in variants} == {*general["backends"]} >= {"cpu"}
    for path in variants.values():
        metadata = kernels.Metadata.read_from_file(path / "metadata.json")
        assert (metadata.name.python_name, metadata.version, metadata.python_depends) == ("flashu_ext", hub.VERSION, [])
        copied = {file.name for file in path.glob("*.py")} - {"_ops.py"}
        assert copied == {file.name for file in hub.OPS.glob("*.py")} - set(hub.LEFT_OUT)
        assert all((path / name).read_bytes() == (hub.OPS / name).read_bytes() for name in copied)


def test_it_imports_itself_torch_and_the_standard_library_only(folder: Path):
    """Relative imports within the folder, as the hub asks; the syntax is that of the oldest Python that `kernels` takes."""
    files = sorted(folder.glob("build/*/*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(), feature_version=(3, 10))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or (node.level == 0 and known(node.module or "")), f"{file.name}:{node.lineno}"
            elif isinstance(node, ast.Import):
                assert all(known(name.name) for name in node.names), f"{file.name}:{node.lineno}"


def known(module: str) -> bool:
    first = module.partition(".")[0]
    return first == "torch" or first in sys.stdlib_module_names


def test_the_library_keeps_to_manylinux(folder: Path):
    """And exports nothing, so that neither the process's C++ runtime nor another kernel meets its symbols."""
    (library,) = {path.resolve() for path in folder.glob("build/*cpu*/*.so")}
    hub.check(library)
    assert " g " not in hub.symbols.symbols(library).replace("*UND*", "")


def test_beside_the_package(kernel: ModuleType):
    """Two copies in one process: their own namespaces, the same bits, errors of their own."""
    assert namespace(kernel).startswith("_flashu_ext_") and kernel.rms_norm is not ops.rms_norm
    x, weight = randn(0, 3, 64), randn(1, 64)
    w = [randn(seed, *shape) for seed, shape in enumerate(((32, 64), (32, 64), (64, 32)), 2)]
    with Called() as called:
        assert torch.equal(kernel.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6))
        assert torch.equal(kernel.gathered_ffn(x, *w, runs=[(8, 16)]), ops.gathered_ffn(x, *w, runs=[(8, 16)]))
    names = [f"{space}::{op}" for space in ("flashu", namespace(kernel)) for op in ("rms_norm", "gathered_ffn")]
    assert [called.counts.get(name) for name in names] == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="rms_norm: weight: expected"):
        kernel.rms_norm(x, weight[:9], 1e-6)
    with pytest.raises(IndexError, match="runs"):
        kernel.gathered_ffn(x, *w, runs=[(30, 9)])
    with pytest.raises(NotImplementedError, match=rf"{namespace(kernel)}::rms_norm has no backward"):
        kernel.rms_norm(x, weight.requires_grad_(), 1e-6).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
@torch.no_grad()
def test_kernelized_models(kernel: ModuleType, mapped: None, family: str, dtype: torch.dtype):
    plain = model(family).to(dtype)
    ours = model(family).to(dtype)
    ids = torch.arange(24).reshape(2, 12)
    expected = plain(ids).logits
    assert kernels.kernelize(ours, mode=kernels.Mode.INFERENCE, device="cpu") is ours
    with Called() as called:
        got = ours(ids).logits
    space = namespace(kernel)
    # Two norms a layer and one at the end; queries, keys, values and outputs, and the vocabulary's.
    counts = {op: called.counts.get(f"{space}::{op}") for op in ("rms_norm", "gathered_ffn", "linear")}
    assert counts == {"rms_norm": 5, "gathered_ffn": 2, "linear": 9}
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(got, expected, **tolerance)
    mlp = ours.model.layers[0].mlp
    assert mlp.forward.__func__ is kernel.layers.SwiGLUMLP.forward


@torch.no_grad()
def test_some_neurons(kernel: ModuleType, mapped: None):
    ours = kernels.kernelize(model("Qwen2"), mode=kernels.Mode.INFERENCE, device="cpu")
    mlp, x = ours.model.layers[0].mlp, randn(7, 5, 64)
    mlp.selection = kernel.Selection.from_runs([(0, 24), (96, 40)], limit=160)
    kept = [*range(24), *range(96, 136)]
    weights = mlp.gate_proj.weight[kept], mlp.up_proj.weight[kept], mlp.down_proj.weight[:, kept]
    torch.testing.assert_close(mlp(x), reference.gathered_ffn(x, *weights), rtol=1e-4, atol=1e-5)


def doubled(forward: Any) -> Any:
    return lambda self, x: 2 * forward(self, x)


@pytest.mark.parametrize("place", ["mlp", "mlp.up_proj", "input_layernorm", "self_attn.q_proj"])
@torch.no_grad()
def test_a_subclass_with_a_forward_of_its_own_runs_as_itself(mapped: None, place: str):
    """`kernelize` binds layers to subclasses too."""
    plain, ours, ids = model("Qwen2"), model("Qwen2"), torch.arange(8)[None]
    before = plain(ids).logits
    for each in (plain, ours):
        module = each.model.layers[0].get_submodule(place)
        module.__class__ = type("Own", (type(module),), {"forward": doubled(type(module).forward)})
    kernels.kernelize(ours, mode=kernels.Mode.INFERENCE, device="cpu")
    expected = plain(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, before, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("settings", [{}, {"eps": 1e-5, "elementwise_affine": False}], ids=["no eps", "no weight"])
@torch.no_grad()
def test_torch_s_norms(mapped: None, settings: dict[str, Any]):
    norm, x = nn.RMSNorm(64, **settings), randn(3, 5, 64, scale=1e-3)
    expected = norm(x)
    kernels.kernelize(nn.Sequential(norm), mode=kernels.Mode.INFERENCE, device="cpu")
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("mode", ["TRAINING", "INFERENCE"])
def test_modes(kernel: ModuleType, mapped: None, mode: str):
    """Training keeps the model's own forward: no layer has a backward."""
    ours = kernels.kernelize(model("Qwen2"), mode=kernels.Mode[mode], device="cpu")
    forwards = [module.forward.__func__ for module in ours.modules() if type(module).__name__ == "Qwen2RMSNorm"]
    assert {each is kernel.layers.RMSNorm.forward for each in forwards} == {mode == "INFERENCE"}
    loss = ours(torch.arange(8)[None]).logits.sum()
    if mode == "TRAINING":
        loss.backward()
        assert all(parameter.grad is not None for parameter in ours.parameters())
    else:
        with pytest.raises(NotImplementedError, match="has no backward"):
            loss.backward()


@torch.no_grad()
def test_layers_are_compiled_whole(kernel: ModuleType, mapped: None):
    mode = kernels.Mode.INFERENCE | kernels.Mode.TORCH_COMPILE
    ours = kernels.kernelize(model("Qwen2"), mode=mode, device="cpu")
    layer, x = ours.model.layers[0], randn(7, 1, 5, 64)

    def part(x: Tensor) -> Tensor:
        return layer.mlp(layer.input_layernorm(x)) + layer.self_attn.o_proj(x)

    compiled = torch.compile(part, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), part(x))
    del layer.mlp.up_proj.forward  # as where nn.Linear has no name
    layer.mlp.selection = kernel.Selection.from_runs([(0, 24)], limit=160)
    assert torch.equal(compiled(x), part(x))
