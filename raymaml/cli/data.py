"""``raymaml data``: make and look at image banks and episode shards."""

from __future__ import annotations

from pathlib import Path

import click

from raymaml.cli.options import UserPath, say_line, takes_config
from raymaml.config.schema import SPLITS, Config, Split


@click.group()
def data() -> None:
    """Make and look at image banks and episode shards."""


@data.command("import")
@takes_config
def import_(config: Config) -> None:
    """Import data.source into the image bank data.bank."""
    from raymaml.data.importers import import_bank

    bank = import_bank(config.data, config.episodes, say_line)
    counts = {split: len(bank.class_ids(split)) for split in SPLITS}
    say_line(
        f"{bank.folder}: {bank.num_images} images of {bank.source}, classes "
        + " / ".join(f"{count} {split}" for split, count in counts.items())
        + f", hash {bank.hash[:12]}"
    )


@data.command()
@takes_config
def sample(config: Config) -> None:
    """Sample the episodes of all splits into shards under data.shards."""
    from raymaml.training.data import open_bank, sample_shards

    sampled = sample_shards(config.data, config.episodes, open_bank(config.data))
    for split, shards in zip(SPLITS, sampled, strict=True):
        queries = shards.spec.num_queries
        fewer = (
            f" with {queries} queries a class: the smallest class of {split} leaves no more"
            if queries < config.episodes.of(split).num_queries
            else ""
        )
        say_line(f"{shards.folder}: {shards.count} episodes{fewer}")


@data.command()
@takes_config
@click.option("--split", type=click.Choice(SPLITS), default="test")
@click.option("--episode", type=click.IntRange(min=0), help="Draw this episode of the split.")
@click.option("--out", type=UserPath(dir_okay=False), default="sheet.png", show_default=True)
def show(config: Config, split: Split, episode: int | None, out: Path) -> None:
    """Draw a contact sheet (PNG) of the bank, or of one episode."""
    from raymaml.data.contact_sheet import bank_sheet, episode_sheet
    from raymaml.data.sampling import check_spec, sample_episode, spec_in
    from raymaml.training.data import open_bank

    bank = open_bank(config.data)
    if episode is None:
        bank_sheet(bank, out)
    else:
        spec = spec_in(bank, config.episodes, split)
        check_spec(bank, spec, split)
        episode_sheet(bank, sample_episode(bank, spec, config.episodes.seed, split, episode), out)
    say_line(out)
