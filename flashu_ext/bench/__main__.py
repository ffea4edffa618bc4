"""`python -m flashu_ext.bench COMMAND`, in a source folder or installed; `--help` lists the commands."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ..cli.main import bench
from ..planning.safe_files import write_text
from .calls import main as calls
from .conformance import main as conformance
from .counters import main as counters
from .predict import main as predict
from .profile import main as profile
from .readme import main as readme
from .roofline import main as roofline
from .sass import main as sass
from .steps import main as steps


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measurements."""


@main.command(epilog="Example: python -m flashu_ext.bench gpu --out out --part ffn --part rows")
@click.option(
    "--out", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for logs and results."
)
@click.option("--part", "parts", multiple=True, help="Only this part (may be repeated): conformance, ffn, rows, ...")
@click.option(
    "--device",
    default="cuda",
    show_default=True,
    type=click.Choice(("cuda", "cpu")),
    help="cpu: small shapes, to try the command.",
)
@click.option("--seconds", default=0.4, show_default=True, type=click.FloatRange(0), help="Time spent on each shape.")
@click.option("--build", type=click.Path(file_okay=False, path_type=Path), help="Build folder with the C++ programs.")
def gpu(out: Path, parts: tuple[str, ...], device: str, seconds: float, build: Path | None) -> None:
    """Conformance, tests, sanitizers and tables on a GPU; exit 1 where something failed."""
    from . import gpu as module

    unknown = [part for part in parts if part not in module.PARTS]
    if unknown:
        raise click.UsageError(f"--part: expected one of {', '.join(module.PARTS)}, got {unknown[0]!r}")
    result = module.run(module.Settings(out, device, parts, seconds, build))
    click.echo(f"\n{module.markdown(result)}\nwrote {out / 'results.json'} and {out / 'results.md'}")
    sys.exit(1 if any(text.startswith("failed") for text in result.parts.values()) else 0)


@main.command(epilog="Example: python -m flashu_ext.bench fidelity --prompts 8 --json fidelity.json")
@click.option("--prompts", default=8, show_default=True, type=click.IntRange(1), help="Held-out prompts to generate.")
@click.option("--seed", default=0, show_default=True, type=int, help="Seed of the prompts and the noise.")
@click.option("--steps", default=50, show_default=True, type=click.IntRange(2), help="Grid points.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the numbers here."
)
def fidelity(prompts: int, seed: int, steps: int, json_path: Path | None) -> None:
    """Distance from the embedded model's exact images under skipped layers, routed tokens and caches."""
    from . import fidelity as module

    rows = module.measure(prompts, seed, steps)
    click.echo(module.table(rows))
    if json_path is not None:
        write_text(json_path, module.to_json(rows))


main.add_command(calls, "calls")
main.add_command(conformance, "conformance")
main.add_command(counters, "counters")
main.add_command(predict, "predict")
main.add_command(profile, "profile")
main.add_command(sass, "sass")
main.add_command(readme, "readme")
main.add_command(roofline, "roofline")
main.add_command(steps, "steps")
for name, command in bench.commands.items():
    main.add_command(command, name)

if __name__ == "__main__":
    main(prog_name="python -m flashu_ext.bench")
