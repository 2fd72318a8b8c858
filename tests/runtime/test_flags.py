"""Flags of one command: values, positional value, config arguments, help, and one line for every mistake."""

import pytest

from jaxcl.errors import UserError
from jaxcl.runtime.flags import Flags


def make(**options):
    flags = Flags("Do it.\n\n    jaxcl do --out=x\n\nThat is all.", **options)
    flags.text("out", "", "A file.")
    flags.texts("set", "KEY=VALUE.")
    flags.number("jobs", 1, "Jobs.", at_least=1)
    flags.number("step", None, "Step.")
    flags.choice("kind", "a", ("a", "b"), "Kind.")
    flags.switch("smoke", "Quick.")
    return flags


def test_values_and_defaults():
    flags = make()
    given = flags.parse(["do", "--out=x", "--set=a=1", "--set", "b=2", "--jobs=3", "--kind=b", "--smoke"])
    assert vars(given) == dict(out="x", set=["a=1", "b=2"], jobs=3, step=None, kind="b", smoke=True)
    again = flags.parse(["do"])  # nothing is left of the first call
    assert vars(again) == dict(out="", set=[], jobs=1, step=None, kind="a", smoke=False)
    assert flags.default("jobs") == 1


def test_two_commands_may_have_flags_of_one_name():
    first, second = Flags("a"), Flags("b")
    first.text("out", "1", "")
    second.number("out", 2, "")
    assert (first.parse(["a"]).out, second.parse(["b"]).out) == ("1", 2)


def test_a_positional_value():
    flags = make(positional="name")
    assert flags.parse(["do", "cifar10", "--jobs=2"]).name == "cifar10"
    assert flags.parse(["do", "--jobs=2", "cifar10"]).name == "cifar10"
    assert flags.parse(["do"]).name == ""
    with pytest.raises(UserError, match="'more'"):
        flags.parse(["do", "cifar10", "more"])


@pytest.mark.parametrize(
    "argument, config, overrides",
    [
        ([], None, []),
        (["--config=a.py:x=1"], "a.py:x=1", []),
        (["-config", "a.py"], "a.py", []),
        (["--config=a.py", "--config=b.py"], "b.py", []),
        (["--config.a.b=1=2", "--config=a.py"], "a.py", ["--config.a.b=1=2"]),
        (["--config.lr", "-1.0", "--config.a[0].b", "3"], None, ["--config.lr=-1.0", "--config.a[0].b=3"]),
        (["--config.report", "--noconfig.wandb", "--out=x"], None, ["--config.report", "--noconfig.wandb"]),
    ],
)  # fmt: skip
def test_what_concerns_the_config(argument, config, overrides):
    given = make(config=True).parse(["do", *argument])
    assert (given.config, given.overrides) == (config, overrides)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--ou=x"], ["--ou", "'out'"]),
        (["--config=a.py"], ["--config"]),  # this command has none
        (["--jobs=0"], ["jobs", "0"]),
        (["--jobs=many"], ["jobs", "many"]),
        (["--kind=c"], ["kind", "c"]),
        (["--out"], ["out"]),
        (["x"], ["'x'", "--name=value"]),
    ],
)
def test_mistakes(arguments, words):
    with pytest.raises(UserError) as error:
        make().parse(["do", *arguments])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_help(capsys):
    for argument in ("--help", "-h", "-help"):
        with pytest.raises(SystemExit) as end:
            make(more=lambda: "Evaluators: knn.").parse(["do", "--nothing", argument])
        assert end.value.code == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "Do it." and lines[-1] == "Evaluators: knn."
        assert "  --jobs: Jobs. (default: 1)" in lines and "  --step: Step." in lines and "  --set: KEY=VALUE." in lines
