"""Holes that were found, each with the smallest file that went through it.

Before, each ended in a traceback, a warning, a hang, a full memory or a file read or written where
none should be; ``tests/fuzz`` found them, or led to them.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from helpers_data import make_bank, raw_png, rewritten, spec_of, with_entry
from helpers_evaluation import record
from helpers_imports import classes, import_source, plan_source, zipped
from helpers_trained import as_before
from PIL import Image
from test_fuzz_imports import HEADERS, npy, tar_tricks
from test_fuzz_runs import IDENTITY, parquet, trained

from raymaml.common.errors import UserError
from raymaml.config.load import load_config
from raymaml.config.schema import Config
from raymaml.convert.command import convert_files
from raymaml.convert.learner import load_reference
from raymaml.data.bank import ImageBank
from raymaml.data.formats import spool
from raymaml.data.formats.archives import read_tar
from raymaml.data.importers.images import decode_files, squashed
from raymaml.data.sampling import EpisodeRows
from raymaml.data.shards import EpisodeShards, Sampling
from raymaml.evaluation.record_files import read_circumstances, read_records, write_chunk
from raymaml.evaluation.records import record_arrays
from raymaml.storage.place import to_place
from raymaml.training.checkpoint import checkpoint_path, weights_of, write_checkpoint
from raymaml.training.identity import identity_of
from raymaml.training.metrics import read_metrics
from raymaml.training.origin import require_same_model, require_trained_by
from raymaml.training.session import LocalSession
from raymaml.training.state import TrainState, build_state
from raymaml.training.store import CheckpointStore, check_last

CPU = torch.device("cpu")
SHAPE = (1, 16, 16)
MakeConfig = Callable[..., Config]


# Configs

YAML = {
    "an anchor in itself": ("a: &a {b: *a}", "it is more than 50 deep"),
    "anchors that double": (
        "x0: &x0 {k: 1}\n"
        + "".join(f"x{i}: &x{i} {{l: *x{i - 1}, r: *x{i - 1}}}\n" for i in range(1, 40)),
        "over 100000 values",
    ),
    "merge keys that double": (
        "x0: &x0 {k: 1}\n"
        + "".join(f"x{i}: &x{i} {{<<: [*x{i - 1}, *x{i - 1}]}}\n" for i in range(1, 60)),
        "over 100000 values",
    ),
    "depth": ("[" * 5000, "it is more than 50 deep"),
    "a tag that does not fit": ("name: !!int x", "a value is not of its kind"),
    "a day that is none": ("name: !!timestamp 2021-13-45", "a value is not of its kind"),
    "a number too long to be written": (
        "name: 0x" + "f" * 6000,
        "which YAML reads as a number of more than",
    ),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(tmp_path: Path, name: str) -> None:
    text, says = YAML[name]
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_an_override_of_a_day_that_is_none(make_config: MakeConfig, tmp_path: Path) -> None:
    make_config(tmp_path)
    with pytest.raises(UserError, match="2021-13-45: the value is not YAML"):
        load_config(tmp_path / "config.yaml", ["name=!!timestamp 2021-13-45"])


# Banks


@pytest.fixture
def bank(tmp_path: Path) -> ImageBank:
    return make_bank(tmp_path / "bank", {"train": [4, 3, 5], "val": [3, 3], "test": [3, 4]})


# Shards


def sampling(bank: ImageBank, folder: Path) -> Sampling:
    return Sampling(bank, spec_of(2, 1, 2, 6), seed=0, split="train", folder=folder)


@pytest.fixture
def shards(bank: ImageBank, tmp_path: Path) -> Path:
    return sampling(bank, tmp_path / "shards").write().folder


def manifest_with(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rows_with(folder: Path, name: str, value: Any) -> None:
    """Replace the first entry of a column, and sign the shard."""
    path = folder / "shard-00000.arrow"
    path.write_bytes(rewritten(path.read_bytes(), lambda it: with_entry(it, name, value)))
    (shard,) = json.loads((folder / "manifest.json").read_text())["shards"]
    sums = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest_with(folder, shards=[shard | sums])


def test_a_manifest_that_no_config_gives_or_that_names_a_file_elsewhere(shards: Path) -> None:
    tree = json.loads((shards / "manifest.json").read_text())
    (shard,), spec = tree["shards"], tree["spec"]
    for name in ("../bank/images.arrow", "/etc/passwd", "shard-00000.arrow/../../x", "a\0b"):
        manifest_with(shards, shards=[shard | {"file": name}])
        with pytest.raises(UserError, match=r"manifest\.json: is damaged \(shards\.0\.file"):
            EpisodeShards.open(shards)
    for change in ({"num_ways": -1}, {"num_shots": 2**40}, {"num_episodes": 7}, {"more": 1}):
        manifest_with(shards, shards=[shard], spec=spec | change)
        with pytest.raises(UserError, match=r"manifest\.json: is damaged"):
            EpisodeShards.open(shards)


def test_a_manifest_at_a_uri_cannot_have_a_file_written_elsewhere(
    shards: Path, tmp_path: Path
) -> None:
    (shard,) = json.loads((shards / "manifest.json").read_text())["shards"]
    place = to_place("memory://hole/shards")
    (place / "../../../evil").write_bytes(b"x")
    manifest_with(shards, shards=[shard | {"file": "../../../evil"}])
    (place / "manifest.json").write_bytes((shards / "manifest.json").read_bytes())
    with pytest.raises(UserError, match="is damaged"):
        EpisodeShards.open(place, tmp_path / "a" / "b" / "cache")
    assert not list(tmp_path.rglob("evil"))


ROWS: dict[str, tuple[str, Callable[[EpisodeRows], int]]] = {
    "support rows that are not of their class": ("support", lambda _: 99),
    "query rows that are not of their class": ("query", lambda _: -1),
    "support labels that are not 0 to 1, 1 of each": ("support_labels", lambda _: 2),
    "query labels that are not 0 to 1, 2 of each": ("query_labels", lambda _: 255),
    "classes that are not of split train": ("classes", lambda _: 4),
    "episode 0 has a class twice": ("classes", lambda first: int(first.classes[1])),
    "its episodes are not 0 to 5": ("index", lambda _: 3),
}


@pytest.mark.parametrize("says", ROWS)
def test_row_numbers_that_are_signed_and_wrong(bank: ImageBank, shards: Path, says: str) -> None:
    name, value = ROWS[says]
    rows_with(shards, name, value(EpisodeShards.open(shards).rows([0])[0]))
    with pytest.raises(UserError, match=rf"shard-00000\.arrow: .*{says}"):
        sampling(bank, shards).require(EpisodeShards.open(shards))


# Runs


@pytest.fixture
def run(make_config: MakeConfig, tmp_path: Path) -> Config:
    """A config whose run has one checkpoint."""
    config = make_config(tmp_path / "tiny")
    path = checkpoint_path(config.run_folder, 2)
    write_checkpoint(path, trained(config), identity_of(config, SHAPE, "x"))
    return config


def sign(run: Config, **changes: Any) -> Path:
    """Change the card, and write the checksums of the files as they are into it."""
    path = checkpoint_path(run.run_folder, 2)
    card = json.loads((path / "checkpoint.json").read_text())
    files = (file for file in path.iterdir() if file.name != "checkpoint.json")
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path / "checkpoint.json").write_text(json.dumps(card | {"files": sums} | changes))
    return path


def resave(run: Config, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a file of the checkpoint, and sign it."""
    path = checkpoint_path(run.run_folder, 2) / file
    if path.suffix == ".pt":
        torch.save(change(torch.load(path, weights_only=True)), path)
    else:
        safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)
    sign(run)


def restore(run: Config) -> TrainState:
    state = build_state(run, SHAPE, CPU)
    session: Any = LocalSession
    store = CheckpointStore(run.run_folder, identity_of(run, SHAPE, "x"))
    store.restore(state, session(None, CPU))
    return state


def test_a_card_that_names_a_file_elsewhere(run: Config, tmp_path: Path) -> None:
    torch.save({}, tmp_path / "secret.pt")
    digest = hashlib.sha256((tmp_path / "secret.pt").read_bytes()).hexdigest()
    sign(run, files={"params.safetensors": digest, "../../../../secret.pt": digest})
    with pytest.raises(UserError, match=r"checkpoint\.json: is damaged \(files"):
        check_last(run.run_folder, identity_of(run, SHAPE, "x"))


def test_a_card_whose_config_names_code_and_places_elsewhere(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a checkpoint says of its own config is compared; nothing of it is imported or opened."""
    (tmp_path / "evil_nets.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((checkpoint_path(run.run_folder, 2) / "checkpoint.json").read_text())[
        "config"
    ]
    model = config["model"] | {"encoder": "evil_nets:Net", "width": None}
    path = sign(run, config=config | {"model": model, "run_dir": "ftp://nobody.invalid/x"})
    seen: list[str] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *_args, **_kwargs: seen.append("network"))
    with pytest.raises(
        UserError, match=r"model\.encoder = 'evil_nets:Net', config and bank now say"
    ):
        require_same_model(path, run.model, run.episodes.test.num_ways, SHAPE)
    with pytest.raises(UserError, match=r"was started with model\.encoder = 'evil_nets:Net'"):
        require_trained_by(run.run_folder, run.learning)
    assert "evil_nets" not in sys.modules
    assert not seen


def test_a_card_whose_config_is_none(run: Config) -> None:
    for config in ({}, {"model": 3}, {"data": []}):
        sign(run, config=config)
        with pytest.raises(UserError, match=r"checkpoint\.json"):
            require_trained_by(run.run_folder, run.learning)


def test_weights_that_spread_over_what_they_do_not_fit(run: Config) -> None:
    resave(run, "params.safetensors", lambda params: {name: torch.zeros(1) for name in params})
    with pytest.raises(UserError, match=r"has the shape \[1\], the model needs"):
        restore(run)


OPTIMIZERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nothing": lambda saved: {},
    "another number of parameters": lambda saved: {"state": {0: saved["state"][0]}},
    "another shape": lambda saved: {"state": dict.fromkeys(saved["state"], saved["state"][0])},
    "one number shown many times": lambda saved: {
        "state": {
            number: own | {"exp_avg": torch.zeros(1).expand(own["exp_avg"].shape[::-1])}
            for number, own in saved["state"].items()
        }
    },
    "no tensors": lambda saved: {"state": {number: {"step": 1} for number in saved["state"]}},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_of_something_else(run: Config, name: str) -> None:
    resave(run, "optimizer.pt", OPTIMIZERS[name])
    with pytest.raises(UserError, match=r"optimizer\.pt: is damaged"):
        restore(run)


def test_rates_that_only_the_file_says_are_not_taken(run: Config) -> None:
    strange = {"betas": "x", "lr": float("nan"), "eps": None}
    groups = "param_groups"
    resave(run, "optimizer.pt", lambda it: it | {groups: [it[groups][0] | strange]})
    assert restore(run).optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_torch_file_that_unpacks_to_more_than_it_is(run: Config) -> None:
    path = checkpoint_path(run.run_folder, 2)
    as_before(path)
    source = zipfile.ZipFile(path / "params.pt")
    members = {name: source.read(name) for name in source.namelist()} | {"bomb": bytes(1 << 20)}
    (path / "params.pt").write_bytes(zipped(members, zipfile.ZIP_DEFLATED))
    sign(run)
    with pytest.raises(UserError, match="its parts are packed"):
        weights_of(path, CPU)


def test_a_line_of_metrics_that_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for line in ("3", '{"step": "x"}', '{"a": 1}', "[" * 5000, '{"step": -1}', "{"):
        path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
        with pytest.raises(UserError, match=r"metrics\.jsonl:2: is no row of metrics"):
            read_metrics(path)


# Records


def chunk(folder: Path, **changes: Any) -> pa.Table:
    """Write five records with some values of the first replaced."""
    path = folder / "episodes-00000000-00000004.parquet"
    write_chunk(path, [record(number) for number in range(5)], IDENTITY)
    table = pq.read_table(path)
    for name, value in changes.items():
        table = with_entry(table, name, value)
    path.write_bytes(parquet(table))
    return table


def test_values_that_no_judgement_gives(tmp_path: Path) -> None:
    impossible = {"accuracy": 1e308, "loss": -5.0, "bin_count": -1, "class_ids": -7}
    for name, value in (impossible | {"seconds": float("nan")}).items():
        chunk(tmp_path, **{name: value})
        with pytest.raises(UserError, match=rf"\.parquet: has impossible values of {name};"):
            read_records(tmp_path)
    chunk(tmp_path, accuracy=None)
    with pytest.raises(UserError, match=r"\.parquet: has gaps in accuracy"):
        read_records(tmp_path)


def test_images_that_the_bank_does_not_hold(tmp_path: Path) -> None:
    chunk(tmp_path, query_rows=10**6)
    assert not record_arrays(read_records(tmp_path)).are_of_bank(22, 176)


def test_metadata_that_are_no_text_and_no_json(tmp_path: Path) -> None:
    table = chunk(tmp_path)
    path = tmp_path / "episodes-00000000-00000004.parquet"
    path.write_bytes(parquet(table.replace_schema_metadata({b"\xff": b"\xff"})))
    with pytest.raises(UserError, match="belongs to another campaign"):
        read_records(tmp_path, identity=IDENTITY)
    for text in (b"[", b"3", b"\xff", b"[" * 5000):
        path.write_bytes(parquet(table.replace_schema_metadata({b"circumstances": text})))
        assert read_circumstances(tmp_path) == []


def test_a_few_bytes_that_unpack_to_millions_of_records(tmp_path: Path) -> None:
    table = chunk(tmp_path)
    path = tmp_path / "episodes-00000000-00000004.parquet"
    many = pa.table(
        [pa.repeat(column.combine_chunks()[0], 200_000) for column in table.columns],
        schema=table.schema,
    )
    path.write_bytes(parquet(many, compression="zstd"))
    with pytest.raises(UserError, match="is torn or no file of records"):
        read_records(tmp_path)


# Pictures


def test_postscript_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would have started Ghostscript for it, whatever its name."""
    path = tmp_path / "a.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    monkeypatch.setattr(subprocess, "check_call", lambda *_args, **_kwargs: pytest.fail("started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_args, **_kwargs: pytest.fail("started"))
    with pytest.raises(UserError, match=r"a\.png: is not a readable image \(unknown format\)"):
        decode_files([path], squashed(8))


def test_a_torn_tiff_says_nothing_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.tif"
    Image.new("RGB", (9, 9)).save(path, compression="tiff_deflate")
    data = bytearray(path.read_bytes())
    data[8:12] = b"\0\0\0\0"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tif: is not a readable image"):
        decode_files([path], squashed(8))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "train" / "class"
    folder.mkdir(parents=True)
    path = folder / "a.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match="no regular file"):
        decode_files([path], squashed(8))
    (folder / "b.png").write_bytes(raw_png(1, 1, 8, 2, bytes(4)))
    assert classes(plan_source("image-folder", tmp_path)) == [("train", "class", 1)]


# Lists


@pytest.mark.parametrize("name", ["../secret.png", "{tmp}/secret.png", "a/../../secret.png"])
def test_paths_of_csvs_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    name = name.format(tmp=tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    (own / "list.csv").write_text(f"path,class,split\n{name},a,train\n")
    (problem,) = plan_source("image-folder", own, csv=own / "list.csv").problems
    assert str(problem).startswith(f"{own}/list.csv:2: {name!r} ")
    assert ("is not relative" if name.startswith("/") else "leaves the folder") in str(problem)
    (own / "train.csv").write_text(f"filename,label\n{name},a\n")
    with pytest.raises(UserError, match=r"train\.csv:2: must give filename and label"):
        plan_source("mini-imagenet", own)


def test_a_path_longer_than_any(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path,class,split\n{'x' * 5000},a,train\n")
    (problem,) = plan_source("image-folder", tmp_path, csv=tmp_path / "list.csv").problems
    assert "does not exist" in str(problem)
    assert len(str(problem)) < 500


def test_digits_that_are_no_number(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(f"a.png,{'9' * 6000}\n")
    (tmp_path / "test.csv").write_text("b.png,1\n")
    with pytest.raises(UserError, match=r"train\.csv:1: .* is not a path and a whole number"):
        plan_source("inaturalist-2017", tmp_path)
    (tmp_path / "images.txt").write_text("1 ²³¹.Bird/x.jpg\n")
    with pytest.raises(UserError, match=r"images\.txt: .* is of no class 001 to 200"):
        plan_source("cub", tmp_path, split="cub_100_50_50")


# Pickles, npz files and archives


def test_contents_of_pickles_that_no_images_have(tmp_path: Path) -> None:
    labels: Any = [0] * 10  # more than fits into memory
    for _ in range(40):
        labels = [labels] * 10
    for height, own, says in (
        (4, labels, "its labels are no whole numbers"),
        (0, [0, 1], r"its images are uint8 \(2, 0, 4, 3\), must be"),
    ):
        content = {"data": np.zeros((2, height, 4, 3), np.uint8), "labels": own}
        (tmp_path / "train.pickle").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match=says):
            plan_source("mini-imagenet", tmp_path)


def test_two_classes_of_one_name(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        names = {b"a": 0, "a": 1}  # bytes and text are one name
        images = np.zeros((8, 16, 16, 3), np.uint8)
        content = {"data": images, "labels": [0, 1] * 4, "catname2label": names}
        (tmp_path / f"{split}.pickle").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="class a of split train: is there 2 times"):
        import_source("mini-imagenet", tmp_path, tmp_path, 16, verify_counts=False)


@pytest.mark.parametrize("header", [HEADERS[2], HEADERS[6], "(" * 300, HEADERS[4]], ids=range(4))
def test_headers_of_npz_files(tmp_path: Path, header: str) -> None:
    for split in ("train", "val", "test"):
        images = zipped({"images.npy": npy(header, bytes(96))})
        (tmp_path / f"{split}_images.npz").write_bytes(images)
        (tmp_path / f"{split}_labels.pkl").write_bytes(pickle.dumps({"labels": [0, 1]}))
    if header == HEADERS[4]:  # Python 2 wrote it; it is read without a warning
        assert len(plan_source("tiered-imagenet", tmp_path, verify_counts=False).classes) == 6
    else:
        with pytest.raises(UserError, match=r"_images\.npz"):
            plan_source("tiered-imagenet", tmp_path, verify_counts=False)


def test_archives_that_unpack_to_far_more_than_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "UNPACKED", 1 << 16)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(bytes(4 << 20)))
    with pytest.raises(UserError, match=r"a\.tar\.gz: .*unpack to .* or more, as no data do"):
        read_tar(tmp_path / "a.tar.gz", tmp_path / "bank")
    name = "images_background/A/character01/0001_01.png"
    (tmp_path / "images_background.zip").write_bytes(zipped({name: bytes(4 << 20)}, 8))
    with pytest.raises(UserError, match=r"images_background\.zip: .*as no data do"):
        plan_source("omniglot", tmp_path)


def test_headers_of_tars_that_lead_back_or_on_for_ever(tmp_path: Path) -> None:
    for data in tar_tricks()[:6]:
        (tmp_path / "a.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"a\.tar: is not a whole tar archive|unsafe path"):
            read_tar(tmp_path / "a.tar", tmp_path / "bank")


# The reference's files


def test_values_of_the_reference_that_are_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    for text in ("dataset: [a]", "train: 3", "inner_args: {frozen: 3}", "optimizer_args: {lr: {}}"):
        path.write_text(f"encoder: convnet4\n{text}\n")
        with pytest.raises(UserError, match=rf"train\.yaml:2: {text.split(':')[0]}"):
            convert_files([path], None, tmp_path / "o.yaml", None, lambda _: None)


def test_a_state_of_the_reference_that_is_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    keys = ("encoder", "encoder_args", "classifier", "classifier_args")
    parts = ("encoder_state_dict", "classifier_state_dict")
    torch.save({**dict.fromkeys(keys), **{part: [1] for part in parts}}, path)
    with pytest.raises(UserError, match=r"a\.pth: its encoder_state_dict are not tensors by name"):
        load_reference(path)


# Ray


@pytest.mark.slow
def test_columns_that_ray_would_unpickle_are_refused_unread(
    bank: ImageBank, tmp_path: Path
) -> None:
    """Ray Data registers an Arrow type whose values it unpickles; our readers refuse the column."""
    code = f"""
import json, sys
import numpy as np, pyarrow as pa
import ray.data
from ray.data._internal.object_extensions.arrow import ArrowPythonObjectArray
from raymaml.data.bank import ImageBank
from raymaml.common.errors import UserError

class Bomb:
    def __reduce__(self):
        return open, ({str(tmp_path / "pwned")!r}, "w")

column = ArrowPythonObjectArray.from_objects([Bomb()])
path = {str(bank.folder / "images.arrow")!r}
schema = pa.schema([("image", column.type)])
with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, schema) as out:
    out.write_batch(pa.record_batch([column], names=["image"]))
header = json.load(open({str(bank.folder / "bank.json")!r}))
header["images_bytes"] = __import__("os").path.getsize(path)
header["classes"] = header["classes"][:1] and [dict(header["classes"][0], count=1)]
json.dump(header, open({str(bank.folder / "bank.json")!r}, "w"))
try:
    ImageBank.open(__import__("pathlib").Path({str(bank.folder)!r})).class_images(0)
except UserError as error:
    assert "it has other columns" in str(error), error
    sys.exit(0)
sys.exit("was read")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "pwned").exists()
