"""What YAML makes of plain text: each surprise is named with its place and its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymaml.common.errors import UserError
from raymaml.config.load import Changes, load_config, load_study

TREE = {
    "name": "a",
    "seed": "1",
    "data.bank": "bank",
    "model.norm": "context",
    "inner.frozen": "[]",
    "outer.num_steps": "5",
    "outer.lr": "0.1",
    "evaluation.target_half_width": "null",
}
TEXT = """\
name: {name}
seed: {seed}
data: {{source: {{kind: glyphs}}, shards: shards, bank: {data.bank}}}
episodes: {{train: {{num_episodes: 1}}, val: {{num_episodes: 1}}, test: {{num_episodes: 1}}}}
model:
  norm: {model.norm}
inner:
  frozen: {inner.frozen}
outer:
  num_steps: {outer.num_steps}
  lr: {outer.lr}
evaluation:
  target_half_width: {evaluation.target_half_width}
"""
LINES = {
    key: number
    for key in TREE
    for number, line in enumerate(TEXT.splitlines(), 1)
    if f"{{{key}}}" in line
}


def write(tmp_path: Path, key: str = "name", text: str = "a") -> Path:
    content = TEXT
    for name, value in (TREE | {key: text}).items():
        content = content.replace(f"{{{name}}}", value)
    path = tmp_path / "c.yaml"
    path.write_text(content.replace("{{", "{").replace("}}", "}"), encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str | Changes) -> tuple[str, ...]:
    layers = [[each] if isinstance(each, str) else each for each in overrides]
    with pytest.raises(UserError) as caught:
        load_config(path, *layers)
    return caught.value.problems


READ_AS = {
    **{"no": "false", "Off": "false", "on": "true", "YES": "true", "~": "no value"},
    **{"1_000": "1000", "0x10": "16", "1e5": "100000.0", "1.10": "1.1", ".inf": "inf"},
}


@pytest.mark.parametrize("key", ["name", "data.bank", "model.encoder"])
def test_text_that_yaml_takes_for_something_else_is_to_be_quoted(tmp_path: Path, key: str) -> None:
    for text, read in READ_AS.items():
        says = f"{key} is {text}, which YAML reads as {read}; "
        (problem,) = problems_of(write(tmp_path), f"{key}={text}")
        assert problem.startswith(f"command line: {says}")
        assert f"""if it is text, quote it: {key}='"{text}"'""" in problem  # for a shell
        if key in LINES:
            path = write(tmp_path, key, text)
            (problem,) = problems_of(path)
            assert problem.startswith(f"{path}:{LINES[key]}: {says}")
            assert f'if it is text, quote it: "{text}"' in problem
        # and that is a remedy
        quoted = load_config(write(tmp_path, "data.bank", f'"{text}"'))
        assert quoted.data.bank == Path(text).expanduser()


def test_numbers_are_read_as_they_look(tmp_path: Path) -> None:
    """YAML 1.1 reads ``seed: 010`` as 8, ``num_steps: 12:30`` as 750, and 1e-3 as text."""
    for text in ("0", "1_000", "0x10", "+7"):
        assert load_config(write(tmp_path), [f"seed={text}"]).seed == int(text, 0)
    for text in ("1e-3", "1E-3", ".001", "1.0e-3", "0.001"):
        assert load_config(write(tmp_path), [f"outer.lr={text}"]).outer.lr == 0.001
        assert load_config(write(tmp_path, "outer.lr", text)).outer.lr == 0.001
    for text in ("007", "12:30:00", "2024-01-01", "2024-01-01 10:00:00"):
        assert load_config(write(tmp_path, "data.bank", text)).data.bank == Path(text)


NO_NUMBERS = ["0,001", "1'000", "10%", "1 000", "1e", "12:30", "190:20:30"]


@pytest.mark.parametrize("key", ["seed", "outer.num_steps", "outer.lr"])
def test_a_number_in_another_form_gets_the_right_one(tmp_path: Path, key: str) -> None:
    for text in [*NO_NUMBERS, *([] if key == "outer.lr" else ["010", "-010"])]:
        path = write(tmp_path, key, text)
        (problem,) = problems_of(path)
        assert problem.startswith(f"{path}:{LINES[key]}: {key} is {text!r}; it should be a valid ")
        assert ": write numbers as 1000, 0.001 or 1e-3, without quotes, leading zeros, " in problem


def test_a_number_with_a_comma_in_braces_gets_the_right_form(tmp_path: Path) -> None:
    path = write(tmp_path)
    comma = "  {num_steps: 5,\n   lr: 0,001}"
    text = path.read_text("utf-8").replace("  num_steps: 5\n  lr: 0.1", comma)
    path.write_text(text, "utf-8")
    problems = "\n".join(problems_of(path))
    assert ": outer.001 is no key, since keys are text; " in problems
    assert "write the number with a point: 0.001" in problems
    *_, problem = problems_of(write(tmp_path), "outer.milestones=[0,001]")
    assert problem.startswith("command line: outer.milestones.1 is '001'; it should be a valid int")
    assert "write numbers as 1000, 0.001 or 1e-3" in problem


OTHER_TYPES = [
    ("name", "true", 'is true; it should be a valid string; if it is text, quote it: "true"'),
    ("name", "", "is empty, which YAML reads as no value; it should be a valid string"),
    ("outer.num_steps", "5.0", ": write whole numbers as 1000, without a point and an exponent"),
    ("outer.num_steps", "1e3", ": write whole numbers as 1000, without a point and an exponent"),
    ("outer.lr", "yes", "is yes, which YAML reads as true; it should be a number"),
    ("evaluation.target_half_width", "None", ": write null for no value"),
    ("inner.frozen", "head", "is 'head'; it should be a list: write [head]"),
]


@pytest.mark.parametrize(("key", "text", "says"), OTHER_TYPES)
def test_a_value_of_another_type_gets_its_remedy(
    tmp_path: Path, key: str, text: str, says: str
) -> None:
    path = write(tmp_path, key, text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:{LINES[key]}: {key} is ")
    assert problem.endswith(says)


def test_values_in_a_list_are_to_be_quoted_too(tmp_path: Path) -> None:
    first, second = problems_of(write(tmp_path, "inner.frozen", "[no, head, ~]"))
    assert "inner.frozen.0 is no, which YAML reads as false; " in first
    assert first.endswith('if it is text, quote it: "no"')
    assert second.endswith('if it is text, quote it: "~"')
    # the key of an override is the list's; ``a.b.1='"no"'`` is none
    (problem,) = problems_of(write(tmp_path), "inner.frozen=[head,no]")
    assert problem.endswith("""; if it is text, quote it: '"no"'""")


@pytest.mark.parametrize(
    ("key", "text", "remedy"),
    [
        ("name", "a\n\tseed: 2", "indent with spaces, not with tabs"),
        ("inner.frozen", "[*.norm]", 'begins with one of * & ! % @ ` | > into quotes: "*.norm"'),
        ("name", "@home", "into quotes"),
        ("name", "%a", "into quotes"),
        ("name", "a: b", "quote a text that holds ': '"),
        ("name", '"a', "while scanning a quoted scalar from line 1 on, found unexpected end"),
    ],
)
def test_a_text_that_is_no_yaml_gets_line_and_remedy(
    tmp_path: Path, key: str, text: str, remedy: str
) -> None:
    path = write(tmp_path, key, text)
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}: is not YAML: line ")
    assert remedy in problem


def test_an_override_is_read_as_a_file_is(tmp_path: Path) -> None:
    for override, message in {
        "inner.frozen=[*.norm]": "inner.frozen=[*.norm]: the value is not YAML: line 1, column 3: ",
        "inner={lr: 1, lr: 2}": "command line: inner.lr is given twice (first at command line); ",
    }.items():
        (problem,) = problems_of(write(tmp_path), override)
        assert problem.startswith(message)


def test_values_of_a_study_are_to_be_quoted_as_well(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path), Changes("s.yaml: set", {"name": False}))
    assert problem == (
        "s.yaml: set: name is False; it should be a valid string; if it is text, quote it"
    )
    path = tmp_path / "s.yaml"
    path.write_text("name: no\ntitle: 1.10\nconfig: c.yaml\narms: [{name: on}]\n")
    assert [problem.split(";")[0] for problem in load_study(path)[1]] == [
        f"{path}:1: name is no, which YAML reads as false",
        f"{path}:2: title is 1.10, which YAML reads as 1.1",
        f"{path}:4: arms.0.name is on, which YAML reads as true",
    ]
