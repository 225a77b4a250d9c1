"""Hostile image banks and episode shards, their checksums forged."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from helpers_data import make_bank, rewritten, spec_of, with_entry
from helpers_fuzz import Fuzz, changed_bytes, changed_tree, hostile_values
from hypothesis import strategies as st

from raymaml.data.bank import ImageBank
from raymaml.data.contact_sheet import bank_sheet
from raymaml.data.shard_format import read_pixels
from raymaml.data.shards import EpisodeShards, Sampling

COUNTS = {"train": [4, 3, 5], "val": [3, 3], "test": [3, 4]}
SPEC = spec_of(2, 1, 2, 7)


def with_column(name: str, type_: pa.DataType, value: Any) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(
        max(table.schema.get_field_index(name), 0), name, pa.array([value] * len(table), type_)
    )


def arrow_variants(data: bytes, name: str) -> list[bytes]:
    """Well-formed Arrow files that differ from the header."""
    variants = [
        rewritten(data, lambda table: table, compression="zstd"),
        rewritten(data, lambda table: table, compression="lz4"),
        rewritten(data, lambda table: table.slice(0, 1)),
        rewritten(data, lambda table: table.slice(0, 0)),
        rewritten(data, lambda table: pa.concat_tables([table] * 50).combine_chunks()),
        rewritten(data, with_column(name, pa.int64(), 1)),
        rewritten(data, with_column(name, pa.binary(), b"x" * 300)),
        rewritten(data, with_column(name, pa.list_(pa.uint8(), 3), [1, 2, 3])),
        rewritten(data, lambda table: table.append_column("more", pa.nulls(len(table)))),
        rewritten(data, lambda table: table.select([])),
    ]
    words = pa.array(["a"]).dictionary_encode().type
    variants.append(rewritten(data, with_column("word", words, "a")))
    return variants


def write_bank_files(folder: Path, header: Any, images: bytes) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "images.arrow").write_bytes(images)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "bank.json").write_bytes(text)


def signed(header: Any, images: bytes) -> Any:
    """The header with the length that the pixels have."""
    return header | {"images_bytes": len(images)} if isinstance(header, dict) else header


def read_bank(folder: Path, out: Path) -> None:
    bank = ImageBank.open(folder)
    assert bank.images(np.arange(bank.num_images)).shape[0] == bank.num_images
    for class_id, entry in enumerate(bank.classes):
        assert len(bank.class_images(class_id)) == entry.count
    bank_sheet(bank, out)
    bank.verify()


def test_a_bank(fuzz: Fuzz) -> None:
    made = make_bank(fuzz.root / "honest", COUNTS)
    header = json.loads((made.folder / "bank.json").read_text())
    text, images = (
        (made.folder / "bank.json").read_bytes(),
        (made.folder / "images.arrow").read_bytes(),
    )
    variants = arrow_variants(images, "image")
    values = hostile_values(fuzz.root)
    all_images = st.just(images) | changed_bytes(images) | st.sampled_from(variants)
    trees = changed_tree(header, values)
    cases = st.one_of(
        st.tuples(trees, st.just(images)),
        st.tuples(trees, all_images).map(lambda pair: (signed(*pair), pair[1])),
        all_images.map(lambda data: (signed(header, data), data)),
        all_images.map(lambda data: (signed(header, data), data)),
        st.tuples(changed_bytes(text), st.just(images)),
    )
    folder, out = fuzz.place / "bank", fuzz.place / "sheet.png"
    read_bank(made.folder, out)

    fuzz(cases, lambda case: write_bank_files(folder, *case), lambda _: read_bank(folder, out))


def test_shards(fuzz: Fuzz) -> None:
    bank = make_bank(fuzz.root / "bank", COUNTS)
    wanted = Sampling(bank, SPEC, seed=0, split="train", folder=fuzz.place / "shards")
    made = {
        pixels: replace(wanted, folder=fuzz.root / f"honest-{pixels}", materialize=pixels)
        .write(episodes_per_shard=4)
        .folder
        for pixels in (False, True)
    }
    cases = st.one_of(*(shard_cases(folder, fuzz.root) for folder in made.values()))
    folder = fuzz.place / "shards"

    def write(case: tuple[Any, list[bytes], bool]) -> None:
        manifest, files, _ = case
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for number, data in enumerate(files):
            (folder / f"shard-{number:05d}.arrow").write_bytes(data)
        text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
        (folder / "manifest.json").write_bytes(text)

    def read(case: tuple[Any, list[bytes], bool]) -> None:
        shards = EpisodeShards.open(folder, verify=case[2])
        wanted.require(shards)
        for episode in shards.rows(range(shards.count)):
            bank.images(episode.support), bank.images(episode.query)
        if shards.materialized:
            read_pixels(shards.table(range(shards.count)))

    for honest in made.values():
        shutil.copytree(honest, folder, dirs_exist_ok=True)
        wanted.require(EpisodeShards.open(folder))
        shutil.rmtree(folder)
    fuzz(cases, write, read)


def shard_cases(folder: Path, root: Path) -> st.SearchStrategy[tuple[Any, list[bytes], bool]]:
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [(folder / shard["file"]).read_bytes() for shard in manifest["shards"]]
    first = files[0]
    pixels = "support_pixels" if manifest["materialized"] else "query"
    changed = st.one_of(
        changed_bytes(first),
        st.sampled_from(arrow_variants(first, pixels)),
        changed_rows(first),
        changed_rows(first),
    )
    honest = st.just(files)
    with_other = changed.map(lambda data: [data, *files[1:]])
    trees = changed_tree(manifest, hostile_values(root))
    text = (folder / "manifest.json").read_bytes()
    return st.one_of(
        st.tuples(trees, honest, st.booleans()),
        st.tuples(trees, with_other, st.booleans()).map(resigned),
        st.tuples(st.just(manifest), with_other, st.booleans()).map(resigned),
        st.tuples(st.just(manifest), with_other, st.booleans()).map(resigned),
        st.tuples(changed_bytes(text), honest, st.booleans()),
    )


def resigned(case: tuple[Any, list[bytes], bool]) -> tuple[Any, list[bytes], bool]:
    """The manifest with the lengths and checksums of the files as they are now."""
    manifest, files, verify = case
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        return case
    shards = [
        entry | {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if isinstance(entry, dict)
        else entry
        for entry, data in zip(manifest["shards"], files, strict=False)
    ]
    return manifest | {"shards": shards}, files, verify


@st.composite
def changed_rows(draw: st.DrawFn, data: bytes) -> bytes:
    """A shard with some numbers of some episodes replaced; all else as it should be."""
    name = draw(st.sampled_from(["index", "seed", "classes", "support", "query"]))
    small = st.sampled_from([-(2**31), -1, 0, 1, 2, 3, 5, 11, 12, 21, 22, 25, 26, 2**31 - 1])
    large = small | st.sampled_from([-(2**63), 2**63 - 1, 2**40])
    number = draw(large if name in {"index", "seed"} else small)
    at, place = draw(st.integers(0, 3)), draw(st.integers(0, 5))

    return rewritten(data, lambda table: with_entry(table, name, number, at, place))
