"""The `retro-kernels` command, one file per subcommand.

Nothing here imports torch or retro_kernels' kernels before a command needs them: `retro-kernels doctor` must be able to
say what is wrong with an installation that cannot import them.
"""

from __future__ import annotations

import typer

from . import bench, convert, db, doctor, evaluate, generate, retrofit, swap_check, tokenizer, train, verify

app = typer.Typer(
    name="retro-kernels",
    help="Fused kernels for retrieval-enhanced transformers (RETRO).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_show_locals=False,
)
app.command("doctor")(doctor.doctor)
app.command("verify")(verify.verify)
app.command("bench")(bench.bench)
app.command("train")(train.train)
app.command("retrofit")(retrofit.retrofit)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("convert")(convert.convert)
app.command("swap-check")(swap_check.swap_check)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(db.app, name="db")


def main() -> None:
    """The entry point of the `retro-kernels` script."""
    app()
