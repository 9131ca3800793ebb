"""The command line, run in process on a tiny random model saved to disk."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import powerkernels
from powerkernels import compare
from powerkernels.cli import main
from python_tests.tiny_model import CHAT_TEMPLATE, save_tiny_model

# Two blocks of three tokens, two transitions each: milliseconds.
FAST = ["--max-new-tokens", "6", "--block-size", "3", "--num-mcmc-steps", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("chat") / "model", template=CHAT_TEMPLATE))


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("plain") / "model", template=None))


@pytest.fixture(autouse=True)
def keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(*argv: str) -> int:
    """The exit status, whether argparse or the command decides it."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)


# ---- powerkernels sample: what it prints


def test_three_methods_side_by_side(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run("sample", "one two", "--model", model, *FAST) == 0
    lines = capsys.readouterr().out.splitlines()
    titles = next(line for line in lines if line.startswith("plain"))
    assert [cell.strip() for cell in titles.split("|")] == ["plain", "low-temperature", "power"]
    acceptance = next(line for line in lines if line.startswith("acceptance"))
    plain, low, power = (cell.split()[-1] for cell in acceptance.split("|"))
    assert (plain, low) == ("-", "-")
    assert 0 <= float(power) <= 1
    for name in ("log-likelihood", "confidence", "cost", "time"):
        assert any(line.startswith(name) for line in lines), name
    assert max(map(len, lines)) <= 120


def test_stacked_on_a_narrow_terminal(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert run("sample", "one two", "--model", model, *FAST) == 0
    out = capsys.readouterr().out
    assert "|" not in out
    assert max(map(len, out.splitlines())) <= 60


def test_json_lines(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sample", "one", "two", "-n", "2", "--json", "--model", model, *FAST) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {(r["method"], r["prompt_index"], r["sample_index"]) for r in records}
    assert len(records) == len(found) == 12
    assert found == {(m, p, s) for m in compare.METHODS for p in (0, 1) for s in (0, 1)}
    for record in records:
        assert record["prompt"] == ["one", "two"][record["prompt_index"]]
        assert 1 <= len(record["tokens"]) == len(record["log_prob"]) <= 6
        assert record["log_likelihood"] == pytest.approx(math.fsum(record["log_prob"]), abs=1e-4)
        assert record["finish_reason"] == ("stop" if record["tokens"][-1] == 1 else "length")
        assert record["seconds"] > 0
    settings = {r["method"]: r["settings"] for r in records}
    assert (settings["plain"]["alpha"], settings["plain"]["num_mcmc_steps"]) == (1.0, 0)
    assert (settings["low-temperature"]["alpha"], settings["power"]["alpha"]) == (4.0, 4.0)
    assert settings["low-temperature"]["num_mcmc_steps"] == 0
    assert settings["power"]["num_mcmc_steps"] == 2
    transitions = {r["method"]: {len(r["trace"]["accepted"]) for r in records} for r in records}
    assert transitions["power"] != {0}


def test_power_records_have_every_transition(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("sample", "one", "--methods", "power", "--json", "--model", model, *FAST) == 0
    (record,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    trace = record["trace"]
    assert {"block", "cut", "length", "accepted", "log_accept_ratio", "log_likelihood"} <= set(
        trace
    )
    assert len(set(map(len, trace.values()))) == 1
    assert trace["log_likelihood"][-1] == pytest.approx(record["log_likelihood"], abs=1e-4)
    assert record["acceptance_rate"] == pytest.approx(
        sum(trace["accepted"]) / len(trace["accepted"])
    )


def test_plain_records_say_null_and_not_nan(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("sample", "one", "--methods", "plain", "--json", "--model", model, *FAST) == 0
    out = capsys.readouterr().out
    assert "NaN" not in out
    assert json.loads(out)["acceptance_rate"] is None


def test_output_file_comes_with_the_table(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "samples.jsonl"
    assert run("sample", "one", "-o", str(target), "--model", model, *FAST) == 0
    assert len(target.read_text().splitlines()) == 3
    assert "log-likelihood" in capsys.readouterr().out


def test_same_seed_same_samples(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*extra: str) -> list[list[int]]:
        prompts = ("one", "two", "three", "four")
        assert run("sample", *prompts, "--json", "--model", model, *FAST, *extra) == 0
        return [json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines()]

    first = tokens("--seed", "7")
    assert tokens("--seed", "7") == first
    assert tokens("--seed", "8") != first


def test_settings_reach_the_sampler(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    extra = "--alpha 2.5 --proposal-temperature 0.5 --seed 3 --num-lanes 2 --eos-token-id 1,2"
    extra += " --no-early-rejection --no-shared-prefix-skip --no-prefetch --compat reference"
    extra += " --no-device-loop --methods power --dtype float32"
    assert run("sample", "one", "--json", "--model", model, *FAST, *extra.split()) == 0
    settings = json.loads(capsys.readouterr().out)["settings"]
    expected = {
        "alpha": 2.5,
        "max_new_tokens": 6,
        "block_size": 3,
        "num_mcmc_steps": 2,
        "proposal_temperature": 0.5,
        "seed": 3,
        "early_rejection": False,
        "shared_prefix_skip": False,
        "prefetch": False,
        "compat": "reference",
        "device_loop": False,
        "num_lanes": 2,
        "eos_token_id": [1, 2],
        "dtype": "float32",
        "device": "cpu",
        "model": model,
    }
    assert {key: settings[key] for key in expected} == expected


# ---- where prompts come from


class Recorder:
    """A sampler that only remembers what it was given, and yields what it was told to."""

    prompts: Any = None
    outcome: Callable[[], Iterator[Any]] = staticmethod(lambda: iter(()))

    def __init__(self, model: Any, tokenizer: Any, *, config: Any) -> None:
        self.stats = SimpleNamespace(interrupted=False)

    def iter_samples(self, prompts: Any, num_samples: int, *, progress: Any) -> Iterator[Any]:
        type(self).prompts = prompts
        yield from type(self).outcome()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    class Fresh(Recorder):
        pass

    monkeypatch.setattr(powerkernels, "PowerSampler", Fresh, raising=False)
    return Fresh


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_chat_template_is_the_default_where_there_is_one(
    model: str, plain_model: str, recorder: type[Recorder]
) -> None:
    assert run("sample", "one", "--model", model) == 0
    assert recorder.prompts == [user("one")]
    assert run("sample", "one", "--model", model, "--no-chat") == 0
    assert recorder.prompts == ["one"]
    assert run("sample", "one", "--model", plain_model) == 0
    assert recorder.prompts == ["one"]


def test_prompts_from_a_text_file(model: str, recorder: type[Recorder], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n  two ünï  \n", encoding="utf-8")
    assert run("sample", "-f", str(tmp_path / "prompts.txt"), "--model", model, "--no-chat") == 0
    assert recorder.prompts == ["one", "  two ünï  "]


def test_prompts_from_jsonl(model: str, recorder: type[Recorder], tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "five"}, *user("two")]
    lines = [json.dumps({"prompt": "one\nmore"}), "", json.dumps({"messages": chat})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    assert run("sample", "-f", str(tmp_path / "prompts.jsonl"), "--model", model) == 0
    assert recorder.prompts == [user("one\nmore"), chat]


@pytest.mark.parametrize("argv", [[], ["-"], ["-f", "-"]])
def test_prompts_from_standard_input(
    model: str, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch, argv: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    assert run("sample", *argv, "--model", model, "--no-chat") == 0
    assert recorder.prompts == ["one", "two"]


# ---- interrupts and pipes


def finished(prompt_index: int) -> SimpleNamespace:
    return SimpleNamespace(
        prompt_index=prompt_index,
        sample_index=0,
        tokens=[4, 1],
        text="finished text",
        log_prob=torch.tensor([-1.0, -0.5]),
        log_likelihood=-1.5,
        confidence=-0.7,
        acceptance_rate=0.5,
        decoded_tokens=6,
        finish_reason="stop",
        trace=None,
    )


def test_interrupt_keeps_what_is_finished(
    model: str, recorder: type[Recorder], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted() -> Iterator[Any]:
        yield finished(1)
        raise KeyboardInterrupt

    recorder.outcome = staticmethod(interrupted)
    target = tmp_path / "out.jsonl"
    assert run("sample", "one", "two", "--model", model, "-o", str(target)) == 130
    captured = capsys.readouterr()
    assert "finished text" in captured.out
    assert "low-temperature" not in captured.out  # the methods after the interrupt are not begun
    assert "Traceback" not in captured.err
    (record,) = map(json.loads, target.read_text().splitlines())
    assert record["prompt"] == "two"


def test_samples_are_written_as_they_finish(
    model: str, recorder: type[Recorder], tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    seen = []

    def watch() -> Iterator[Any]:
        yield finished(0)
        seen.append(len(target.read_text().splitlines()))
        yield finished(1)

    recorder.outcome = staticmethod(watch)
    argv = ["sample", "one", "two", "--methods", "power", "--model", model, "-o", str(target)]
    assert run(*argv) == 0
    assert seen == [1]


def test_reader_that_goes_away_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from powerkernels.cli import main; sys.exit(main(['doctor']))"
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.stderr == ""
    assert done.returncode == 141


# ---- bad input: one line that names the argument, exit status 2


def write(folder: Path, name: str, text: str | bytes) -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


BAD_SETTINGS = {
    "negative alpha": (["--alpha", "-1"], "alpha"),
    "infinite alpha": (["--alpha", "inf"], "alpha"),
    "alpha that is no number": (["--alpha", "four"], "--alpha"),
    "no tokens": (["--max-new-tokens", "0"], "max_new_tokens"),
    "negative tokens": (["--max-new-tokens", "-5"], "max_new_tokens"),
    "no block": (["--block-size", "0"], "block_size"),
    "negative steps": (["--num-mcmc-steps", "-1"], "num_mcmc_steps"),
    "no temperature": (["--proposal-temperature", "0"], "proposal_temperature"),
    "no lanes": (["--num-lanes", "0"], "num_lanes"),
    "no samples": (["--num-samples", "0"], "--num-samples"),
    "no threads": (["--threads", "0"], "--threads"),
    "negative seed": (["--seed", "-1"], "seed"),
    "token ids": (["--eos-token-id", "two"], "--eos-token-id"),
    "method": (["--methods", "power,beam"], "--methods"),
    "no method": (["--methods", ","], "--methods"),
    "dtype": (["--dtype", "int8"], "--dtype"),
    "device": (["--device", "abacus"], "--device"),
    "option": (["--temprature", "1"], "--temprature"),
    "output folder": (["-o", "/no/such/folder/out.jsonl"], "--output"),
    "empty prompt": ([""], "prompt 1 is empty"),
    "prompt and file": (["-f", "prompts.txt"], "--file"),
}


@pytest.mark.parametrize(("argv", "names"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings(
    model: str, capsys: pytest.CaptureFixture[str], argv: list[str], names: str
) -> None:
    assert_refused(["sample", "one", *argv, "--model", model], names, capsys)


BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("p.txt", "", "holds no prompt"),
    "blank lines": ("p.txt", "\n \n", "holds no prompt"),
    "not UTF-8": ("p.txt", b"\xff\xfe\xfa", "UTF-8"),
    "not JSON": ("p.jsonl", '{"prompt": "one"}\n{"prompt"', "line 2: not JSON"),
    "JSON of another shape": ("p.jsonl", '{"text": "one"}', "line 1"),
    "JSON that is no object": ("p.jsonl", "[1, 2]", "line 1"),
    "messages without role": ("p.jsonl", '{"messages": [{"content": "one"}]}', "role"),
    "no messages": ("p.jsonl", '{"messages": []}', "messages"),
    "empty prompt in JSON": ("p.jsonl", '{"prompt": ""}', "prompt 0 is empty"),
}


@pytest.mark.parametrize(("name", "content", "names"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(
    model: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    name: str,
    content: str | bytes,
    names: str,
) -> None:
    path = write(tmp_path, name, content)
    assert_refused(["sample", "-f", path, "--model", model], names, capsys)


def test_missing_file(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "none.txt")
    assert_refused(["sample", "-f", path, "--model", model], "none.txt", capsys)


def test_empty_standard_input(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert_refused(["sample", "--model", model], "standard input holds no prompt", capsys)


def test_missing_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["sample", "one", "--model", "./no-such-model"], "no-such-model", capsys)


def test_pickled_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    write(tmp_path, "config.json", '{"model_type": "llama"}')
    write(tmp_path, "pytorch_model.bin", b"\x80\x04.")
    assert_refused(["sample", "one", "--model", str(tmp_path)], "pytorch_model.bin", capsys)


def test_prompt_longer_than_the_context(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["sample", "one " * 80, "--model", model, *FAST]
    assert_refused(argv, "prompts[0]", capsys)


def test_chat_without_a_template(plain_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["sample", "one", "--chat", "--model", plain_model], "--chat", capsys)


def test_messages_without_a_template(
    plain_model: str, model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = write(tmp_path, "p.jsonl", json.dumps({"messages": user("one")}))
    assert_refused(["sample", "-f", path, "--model", plain_model], "messages", capsys)
    assert_refused(["sample", "-f", path, "--no-chat", "--model", model], "--no-chat", capsys)


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused([], "COMMAND", capsys)


def test_debug_keeps_the_traceback(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POWERKERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="alpha"):
        main(["sample", "one", "--alpha", "-1", "--model", model])


def test_unexpected_error_says_its_type(
    model: str, recorder: type[Recorder], capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Iterator[Any]:
        raise RuntimeError("out of\nmemory")
        yield

    recorder.outcome = staticmethod(fail)
    assert run("sample", "one", "--model", model) == 1
    error = capsys.readouterr().err
    assert error.startswith("powerkernels: error: RuntimeError: out of memory")
    assert error.count("\n") == 1


def assert_refused(argv: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("powerkernels: error: ")
    assert names in lines[0]


# ---- help and version


@pytest.mark.parametrize("argv", [["--help"], ["sample", "--help"], ["doctor", "--help"]])
def test_help_does_not_import_torch(argv: list[str]) -> None:
    code = (
        "import sys\nfrom powerkernels.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as exit_:\n    assert exit_.code == 0\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: powerkernels")


def test_every_setting_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    import dataclasses

    assert run("sample", "--help") == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(powerkernels.PowerSamplingConfig):
        assert f"--{field.name.replace('_', '-')}" in text, field.name


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"powerkernels {powerkernels.__version__}\n"


def test_version_of_a_checkout_that_is_not_installed() -> None:
    code = """
import importlib.metadata, sys
def version(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
from powerkernels import cli
sys.exit(cli.main(["--version"]))
"""
    root = Path(powerkernels.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"powerkernels {powerkernels.__version__}\n"


# ---- layout


# Characters of one or two cells each; combining marks and controls have tests of their own.
TEXT = st.text(alphabet="ab cde 文字\n", max_size=200)


@given(TEXT, st.integers(2, 40))
def test_wrapped_text_fits_and_loses_nothing(text: str, width: int) -> None:
    lines = compare.wrap(text, width)
    assert max(map(compare.display_width, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(text.split())


@given(TEXT, TEXT, st.integers(100, 160))
def test_columns_line_up(left: str, right: str, width: int) -> None:
    facts = [("log-likelihood", "-1.0 nats")]
    text = compare.layout([("left", left, facts), ("right", right, facts)], width)
    cells = [line.split("|") for line in text.split("\n")]
    assert all(len(row) == 2 for row in cells)
    assert len({compare.display_width(row[0]) for row in cells}) == 1
    assert max(map(compare.display_width, text.split("\n"))) <= width


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert compare.printable("a\x1b[31mb\u202ec\td\n") == "a\\x1b[31mb\\u202ec\td\n"


def test_method_config() -> None:
    config = powerkernels.PowerSamplingConfig(alpha=3.0, proposal_temperature=0.5)
    assert compare.method_config("power", config) is config
    low = compare.method_config("low-temperature", config)
    assert (low.alpha, low.num_mcmc_steps, low.proposal_temperature) == (3.0, 0, None)
    assert compare.method_config("plain", config).alpha == 1.0
    with pytest.raises(ValueError, match="method"):
        compare.method_config("beam", config)
