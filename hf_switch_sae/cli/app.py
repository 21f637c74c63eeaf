"""All commands under one name."""

from __future__ import annotations

from importlib.metadata import version as installed_version

import typer

from hf_switch_sae.cli import (
    cache,
    calibrate,
    card,
    compare,
    convert,
    demo,
    describe,
    evaluate,
    geometry,
    inspect,
    pull,
    push,
    query,
    record,
    train,
)

# \b keeps click from joining the lines of the paragraph that follows
FACE = """
Attach Switch Sparse Autoencoders to running Hugging Face models: show, steer, clamp and ablate
features while the model runs.

In Python:

\b
    from hf_switch_sae import Ablate, Steer, SwitchSAE
\b
    sae = SwitchSAE.from_pretrained("org/repo", subfolder="layers.15.resid_post")
    with sae.attach(lm) as session:
        lm(**inputs)
        session.features                                # which features are active
        session.edit(Steer(1234, 0.5), Ablate([77]))    # live, from the next token on
        lm.generate(**inputs)
"""

app = typer.Typer(
    name="hf-switch-sae",
    help=FACE,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# the help lists commands in this order
app.command("demo")(demo.demo)
app.command("cache")(cache.cache)
app.command("calibrate")(calibrate.calibrate_sae)
app.command("card")(card.card)
# compare and train take the fields of whole classes: `options` finds them in the extra words
app.command("compare", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    compare.compare_saes
)
app.command("convert")(convert.convert)
app.command("describe")(describe.describe_features)
app.command("eval")(evaluate.evaluate_sae)
app.command("geometry")(geometry.geometry)
app.command("inspect")(inspect.inspect)
app.command("pull")(pull.pull)
app.command("push")(push.push)
app.command("record")(record.record_corpus)
app.command("query")(query.query)
app.command("train", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    train.train
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(installed_version("hf-switch-sae"))
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Print the version."
    ),
) -> None:
    """Options that come before a command."""
