"""Hostile run folders: checkpoints, what a run was started with, metrics, records, audits."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers_evaluation import record
from helpers_fuzz import NUMBERS, Fuzz, changed_bytes, changed_tree, hostile_values
from helpers_trained import NEW
from hypothesis import strategies as st

from raymaml.common.untrusted import json_ready
from raymaml.config.model import ModelConfig
from raymaml.config.schema import Config, EpisodesConfig
from raymaml.evaluation.campaign import Campaign
from raymaml.evaluation.record_files import (
    leading_accuracies,
    missing_chunks,
    read_circumstances,
    read_records,
    write_chunk,
)
from raymaml.evaluation.records import record_arrays
from raymaml.evaluation.results import ArmResult, Protocol
from raymaml.evaluation.run_audit import read_audits
from raymaml.reports.content import audits
from raymaml.reports.summary import summarize_arm
from raymaml.reports.write import worst_episodes
from raymaml.training.checkpoint import checkpoint_path, find_checkpoint, write_checkpoint
from raymaml.training.identity import identity_of
from raymaml.training.metrics import read_metrics
from raymaml.training.origin import require_same_model, require_trained_by
from raymaml.training.run import claim, open_run, write_identity
from raymaml.training.session import LocalSession
from raymaml.training.state import WEIGHTS, TrainState, Validation, build_state
from raymaml.training.store import CheckpointStore, check_last
from raymaml.training.tensor_file import weights_bytes
from raymaml.types import Params

CPU = torch.device("cpu")
MakeConfig = Callable[..., Config]
SHAPE = (1, 16, 16)
ELSEWHERE = [
    "s3://bucket/x",
    "ftp://nobody.invalid/x",
    "github://a:b@/x",
    "file:///etc",
    "python://x",
]


class Bomb:
    """Pickles to a call."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import os

        return os.system, ("touch ../outside/pwned",)


def trained(config: Config) -> TrainState:
    """A state after one outer step, so that the optimizer has something to keep."""
    state = build_state(config, SHAPE, CPU)
    for value in state.params.values():
        value.grad = torch.ones_like(value)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step = 2
    state.record(Validation(step=2, accuracy=0.5, ci95=0.1, loss=1.0))
    return state


def torch_file(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def with_pickle(data: bytes, change: Callable[[bytes], bytes], packed: bool = False) -> bytes:
    """A torch file whose pickle is another; all else as it was."""
    source, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(out, "w", method) as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


def hostile_torch(honest: dict[str, Any], data: bytes) -> list[bytes]:
    """Files that torch could read, and whose content is not what it should be."""
    tensors = {name: value for name, value in honest.items() if isinstance(value, torch.Tensor)}
    name, value = next(iter(tensors.items()), ("w", torch.zeros(3)))
    others: list[Any] = [
        *(torch.zeros(1), value.double(), value.to(torch.int8), value[None], value.to_sparse()),
        *(torch.zeros(1).expand(value.shape), torch.empty(2**40, device="meta"), None, "x", [], {}),
        *(torch.zeros(1).expand(10**12), torch.full_like(value, torch.nan), 10**400, [[]] * 3),
    ]
    files = [torch_file({**honest, name: other}) for other in others]
    files += [torch_file(other) for other in ([], 3, "x", {}, {1: 2}, [value], value)]
    files += [
        torch_file({**honest, "bomb": Bomb()}),
        torch_file(honest, _use_new_zipfile_serialization=False),
        pickle.dumps(Bomb()),
        pickle.dumps(honest),
        with_pickle(data, lambda _: pickle.dumps(Bomb(), 2)),
        with_pickle(data, lambda content: content, packed=True),
        with_pickle(data, lambda _: b"\x80\x02" + b"(" * 10_000 + b"."),
        with_pickle(data, lambda _: b"\x80\x02" + b"]" * 10_000 + b"a" * 9_999 + b"."),
        with_pickle(data, lambda _: b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x7f\x85R."),
        with_pickle(data, lambda _: b"\x80\x02\x95" + b"\xff" * 8 + b"."),
        with_pickle(data, lambda _: b"\x80\x02\x82\x01."),
    ]
    return files


def torch_cases(honest: dict[str, Any]) -> st.SearchStrategy[bytes]:
    data = torch_file(honest)
    pickled = zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")
    numbers = [b"\x8a\x09" + n.to_bytes(9, "little", signed=True) for n in NUMBERS]
    others = [None, 0, -1, 2**70, "x", torch.zeros(2), torch.tensor(1), {}, [1], 1.5]
    return st.one_of(
        changed_bytes(data),
        changed_bytes(pickled).map(lambda content: with_pickle(data, lambda _: content)),
        st.sampled_from(hostile_torch(honest, data)),
        st.tuples(st.integers(0, 60), st.sampled_from(numbers)).map(
            lambda pair: with_pickle(data, lambda content: _nth_number(content, *pair))
        ),
        changed_tree(honest, st.sampled_from(others)).map(torch_file),
    )


def weights_cases(honest: Params) -> st.SearchStrategy[bytes]:
    """Safetensors files: bytes changed, the header changed, and honest files of something else."""
    data = weights_bytes(honest)
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    values = st.sampled_from([*NUMBERS, -1, 2**70, None, "x", [], {}, "F64", "BF16", [2**62, 4]])

    def with_header(tree: Any) -> bytes:
        text = json.dumps(tree).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    name, value = next(iter(honest.items()))
    others = [torch.zeros(1), value.double(), value.to(torch.int8), value[None], value[:0]]
    files = [weights_bytes(honest | {name: other}) for other in others]
    files += [weights_bytes({}), b"", b"\xff" * 8, b"\0" * 8, (2**40).to_bytes(8, "little") + data]
    files += [torch_file(dict(honest)), pickle.dumps(Bomb())]
    trees = changed_tree(header, values)
    return changed_bytes(data) | trees.map(with_header) | st.sampled_from(files)


def _nth_number(content: bytes, number: int, new: bytes) -> bytes:
    """Replace a small number of a pickle (``K`` and a byte): a size, a stride, an offset, ..."""
    places = [at for at in range(len(content) - 1) if content[at : at + 1] == b"K"]
    at = places[number % len(places)]
    return content[:at] + new + content[at + 2 :]


def test_a_checkpoint(fuzz: Fuzz, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "honest")
    state = trained(config)
    folder = fuzz.place / "run"
    path = checkpoint_path(folder, 2)
    session = LocalSession(cast("Any", None), CPU)
    store = CheckpointStore(folder, identity_of(config, SHAPE, "x"))
    config = config.model_copy(update={"run_dir": fuzz.place, "name": "run"})

    identity = identity_of(config, SHAPE, "x")
    write_checkpoint(path, state, identity)
    card = json.loads((path / "checkpoint.json").read_text())
    honest: dict[str, Any] = {
        "params.pt": dict(state.weights),
        "optimizer.pt": state.optimizer.state_dict(),
    }
    files = {name: (path / name).read_bytes() for name in card["files"]}
    files_before = {name: torch_file(value) for name, value in honest.items()}
    before = {key: value for key, value in card.items() if key not in NEW}
    before |= {"schema_version": 2, "files": dict.fromkeys(files_before, "")}
    text = (path / "checkpoint.json").read_bytes()

    def signed(case: tuple[Any, str, bytes]) -> tuple[Any, dict[str, bytes]]:
        tree, name, data = case
        content = {**(files_before if name == "params.pt" else files), name: data}
        sums = {key: hashlib.sha256(value).hexdigest() for key, value in content.items()}
        if isinstance(tree, dict) and isinstance(tree.get("files"), dict):
            tree = {**tree, "files": {**tree["files"], **sums}}
        return tree, content

    def of_config(**changes: Any) -> dict[str, Any]:
        return card | {"config": card["config"] | changes}

    encoder = {"encoder": "os:system", "encoder_args": {"command": "touch ../outside/pwned"}}
    redirected = [of_config(model=encoder), *(of_config(run_dir=place) for place in ELSEWHERE)]
    redirected += [of_config(data=card["config"]["data"] | {"bank": place}) for place in ELSEWHERE]
    trees = changed_tree(card, hostile_values(fuzz.root))
    cases = st.one_of(
        st.tuples(trees, st.just(WEIGHTS), st.just(files[WEIGHTS])).map(signed),
        st.tuples(st.just(card), st.just(WEIGHTS), weights_cases(state.weights)).map(signed),
        *(
            st.tuples(st.just(tree), st.just(name), torch_cases(honest[name])).map(signed)
            for name, tree in (("params.pt", before), ("optimizer.pt", card))
        ),
        st.sampled_from(redirected).map(lambda tree: (tree, files)),
        changed_bytes(text).map(lambda data: (data, files)),
    )

    def write(case: tuple[Any, dict[str, bytes]]) -> None:
        tree, content = case
        shutil.rmtree(folder, ignore_errors=True)
        path.mkdir(parents=True)
        for name, data in content.items():
            (path / name).write_bytes(data)
        text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
        (path / "checkpoint.json").write_bytes(text)

    def read(_: object) -> None:
        check_last(folder, identity)
        found = find_checkpoint(folder, "best")
        require_same_model(found, config.model, config.episodes.test.num_ways, SHAPE)
        require_trained_by(config.run_folder, config.learning)
        restored = build_state(config, SHAPE, CPU)
        store.restore(restored, session)
        for value in restored.params.values():
            value.grad = torch.ones_like(value)
        restored.optimizer.step()

    write((card, files))
    read(None)
    write(signed((before, "params.pt", files_before["params.pt"])))
    read(None)
    fuzz(cases, write, read)


def test_what_a_run_was_started_with(fuzz: Fuzz, make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(tmp_path / "honest")
    config = config.model_copy(update={"run_dir": fuzz.place, "name": "run"})
    run = open_run(config, CPU)
    folder = fuzz.place / "run"
    folder.mkdir()
    write_identity(run)
    text = (folder / "run.json").read_bytes()
    trees = changed_tree(json.loads(text), hostile_values(fuzz.root))

    def read(_: object) -> None:
        with claim(run):
            pass

    read(None)
    cases = changed_bytes(text) | trees.map(lambda tree: json.dumps(tree).encode())
    fuzz(cases, (folder / "run.json").write_bytes, read, names=str(folder))


def test_metrics(fuzz: Fuzz) -> None:
    path = fuzz.place / "metrics.jsonl"
    step = {"step": 1, "query_loss": 1.5, "query_accuracy": 0.5, "grad_norm": 0.1}
    val = {"step": 3, "val_accuracy": 0.5, "val_ci95": 0.1, "val_loss": 1.0}
    rows = [{**step, "seconds_left": 3.0}, val] * 2

    def text_of(tree: Any) -> bytes:
        lines = tree if isinstance(tree, list) else [tree]
        return b"\n".join(json.dumps(row).encode() for row in lines)

    trees = changed_tree(rows, hostile_values(fuzz.root)).map(text_of)

    def read(_: object) -> None:
        rows = read_metrics(path)
        json.dumps([row for row in rows if row["step"] <= 2])
        json_ready(rows)

    write = path.write_bytes
    fuzz(changed_bytes(text_of(rows)) | trees, write, read, names="metrics.jsonl")


IDENTITY = {"weights": "abc", "model": "{}"}


@st.composite
def changed_records(draw: st.DrawFn, table: pa.Table) -> bytes:
    """A well-formed Parquet file of records, one value of it replaced."""
    name = draw(st.sampled_from(table.schema.names))
    kind = table.schema.field(name).type
    inner = kind.value_type if pa.types.is_fixed_size_list(kind) else kind
    floats = [float("nan"), float("inf"), float("-inf"), -1.0, 1.1, 1e308, -1e308, 5e-324, None]
    whole = [-1, -(2**63), 2**63 - 1, 2**31, 10**6, 0, 1, None]
    value = draw(st.sampled_from(floats if pa.types.is_floating(inner) else whole))
    values, at = table.column(name).to_pylist(), draw(st.integers(0, len(table) - 1))
    if pa.types.is_fixed_size_list(kind) and draw(st.booleans()):
        values[at] = None
    elif pa.types.is_fixed_size_list(kind):
        values[at][draw(st.integers(0, 2)) % len(values[at])] = value
    else:
        values[at] = value
    place = table.schema.get_field_index(name)
    changed = table.set_column(place, table.schema.field(name), pa.array(values, kind))
    return parquet(changed, compression=draw(st.sampled_from(["snappy", "none", "zstd"])))


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def odd_tables(table: pa.Table) -> list[bytes]:
    """Well-formed Parquet files that are no records."""
    ones = pa.array([0.5] * 200_000_0)
    many = pa.table(dict.fromkeys(["accuracy", "loss"], ones))
    about = table.schema.metadata
    other = [{**about, b"circumstances": text} for text in (b"[", b"3", b'{"a": 1}', b"\xff", b"")]
    return [
        parquet(table.slice(0, 0)),
        parquet(table.drop_columns(["accuracy"])),
        parquet(table.rename_columns([f"{name}x" for name in table.schema.names])),
        parquet(pa.concat_tables([table, table])),
        parquet(table.replace_schema_metadata(None)),
        parquet(many, compression="zstd"),
        parquet(
            table.cast(pa.schema([(f.name, f.type) for f in table.schema])), store_schema=False
        ),
        *(parquet(table.replace_schema_metadata(each)) for each in other),
        parquet(table.replace_schema_metadata({b"ARROW:schema": b"x"})),
        parquet(table.replace_schema_metadata({b"\xff": b"\xff\xfe"})),
    ]


@pytest.fixture
def chunk(tmp_path: Path) -> bytes:
    path = tmp_path / "honest.parquet"
    write_chunk(path, [record(number) for number in range(5)], IDENTITY, {"hardware": "x"})
    return path.read_bytes()


def test_records(fuzz: Fuzz, chunk: bytes) -> None:
    table = pq.read_table(io.BytesIO(chunk))
    path = fuzz.place / "episodes-00000000-00000004.parquet"
    cases = st.one_of(
        changed_bytes(chunk),
        changed_records(table),
        changed_records(table),
        st.sampled_from(odd_tables(table)),
    )

    def read(_: object) -> None:
        missing_chunks(fuzz.place, 20, 5, IDENTITY)
        leading_accuracies(fuzz.place, IDENTITY)
        read_circumstances(fuzz.place)
        found = read_records(fuzz.place, 5, IDENTITY)
        arrays = record_arrays(found)
        arrays.are_of_bank(5, 20)
        protocol = Protocol(
            spec=EpisodesConfig(num_episodes=1),
            model=ModelConfig(),
            num_steps=1,
            examination=None,
        )
        summarize_arm(
            ArmResult(name="m", description="", protocol=protocol, records=found, identity={}),
            arrays,
        )
        worst_episodes(arrays, 3)

    path.write_bytes(chunk)
    read(None)
    fuzz(cases, path.write_bytes, read)


def test_audits(fuzz: Fuzz) -> None:
    audit = {
        **{"name": "labels", "title": "Labels", "outcome": "passed", "sentence": "It did."},
        "rows": [{"a": 1, "b": 0.5}, {"a": 2, "b": None}],
    }
    content = {"identity": IDENTITY, "audits": [audit] * 2}
    campaign = cast(
        "Campaign",
        SimpleNamespace(folder=fuzz.place, arms=[SimpleNamespace(identity=IDENTITY)]),
    )
    path = fuzz.place / "audits.json"
    text = json.dumps(content).encode()
    trees = changed_tree(content, hostile_values(fuzz.root)).map(lambda t: json.dumps(t).encode())

    def read(_: object) -> None:
        list(audits([asdict(each) for each in read_audits(campaign)]))

    path.write_bytes(text)
    read(None)
    fuzz(changed_bytes(text) | trees, path.write_bytes, read)
