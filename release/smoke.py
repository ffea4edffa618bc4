"""What an installed wheel must do wherever it is: run by the Python of a fresh environment, outside the source folder.

    python smoke.py VERSION weights|none

An op beside plain torch and under opcheck, an image and an answer of the embedded model, dense and exact, and the models of
the package of weights, which is installed or must be asked for by name.
"""

import sys
from pathlib import Path

import torch

import flashu_ext as fx


def main(version: str, weights: bool) -> None:
    """Fail where the package does not do what it promises."""
    home = Path(fx.__file__).resolve().parent
    assert home.is_relative_to(Path(sys.prefix).resolve()), f"expected an installed package, got {home}"
    assert fx.__version__ == version, f"expected {version}, got {fx.__version__}"

    torch.manual_seed(0)
    x, weight = torch.randn(5, 64), torch.randn(64)
    expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
    torch.testing.assert_close(fx.ops.rms_norm(x, weight, 1e-6), expected)
    gate, up, down = torch.randn(48, 64), torch.randn(48, 64), torch.randn(64, 48)
    kept = [*range(4, 20), *range(32, 40)]
    expected = (torch.nn.functional.silu(x @ gate[kept].T) * (x @ up[kept].T)) @ down[:, kept].T
    got = fx.ops.gathered_ffn(x, gate, up, down, runs=[(4, 16), (32, 8)])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
    torch.library.opcheck(torch.ops.flashu.rms_norm.default, (x, weight, 1e-6))
    torch.library.opcheck(torch.ops.flashu.gathered_ffn.default, (x, gate, up, down, [4, 16, 32, 8]))
    try:
        fx.ops.rms_norm(x, weight[:9], 1e-6)
    except ValueError as error:
        assert "weight: expected" in str(error), error
    else:
        raise AssertionError("a weight of the wrong size was taken")

    pipe = fx.showo2.Pipeline.from_pretrained("nano")
    image = pipe.generate("a red circle", seed=0)
    dense = pipe.answer(image, "what color is the circle ?")
    with fx.accelerate(pipe.model, fx.FlashUConfig.exact()):
        exact = pipe.answer(pipe.generate("a red circle", seed=0), "what color is the circle ?")
    assert dense == exact == "red", f"expected red, got {dense!r} dense and {exact!r} exact"

    for family in (fx.janusflow, fx.bagel):
        try:
            family.Pipeline.from_pretrained("nano")
            assert weights, f"{family.__name__}: its weights are not installed, and it was loaded"
        except FileNotFoundError as error:
            assert not weights and "pip install flashu_ext_nano" in str(error), error
    cuda = dict(line.split("\t") for line in torch.ops.flashu.build_facts().splitlines())["cuda"]
    print(f"torch {torch.__version__}, CUDA kernels {cuda}: ops, an image and an answer ({exact})")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "weights")
